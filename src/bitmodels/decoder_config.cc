#include "bitmodels/decoder_config.h"

#include <cmath>
#include <limits>
#include <set>
#include <string_view>

#include "bitcore/base/checks.h"

namespace bitmodels {
namespace {

using bitcore::fail_file;
using bitcore::Json;
using bitlayers::RotaryScaling;

constexpr std::int64_t kMostSize = std::numeric_limits<std::int32_t>::max();

// Up to which angles of the rotation are exact enough.
constexpr std::int64_t kMostPositions = std::int64_t{1} << 24;

// A class of transformers that computes as the decoder does, and what is fixed in it.
struct Architecture {
  std::string_view model_type;
  std::string_view class_name;
  bool head_norms;
  bool sub_norms;
  bool multipliers;
};
constexpr Architecture kArchitectures[] = {
    {"llama", "LlamaForCausalLM", false, false, false},
    {"qwen3", "Qwen3ForCausalLM", true, false, false},
    {"bitnet", "BitNetForCausalLM", false, true, false},
    {"granite", "GraniteForCausalLM", false, false, true},
};

// The keys of one JSON object, each of a type that is asked for.
class Object {
 public:
  Object(const Json& json, std::string path) : json_(json), path_(std::move(path)) {}

  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }

  std::int64_t size(const char* key) const {
    const auto value = bitcore::unsigned_integer(at(key));
    if (!value || *value < 1 || *value > static_cast<std::uint64_t>(kMostSize)) wrong(key, "a positive integer");
    return static_cast<std::int64_t>(*value);
  }
  double number(const char* key) const {
    const Json& value = at(key);
    if (!value.is_number() || !std::isfinite(value.get<double>())) wrong(key, "a number");
    return value.get<double>();
  }
  // A normal number, as a float32, too.
  double positive(const char* key) const {
    const double value = number(key);
    if (!(value > 0) || !std::isnormal(static_cast<float>(value))) wrong(key, "a positive number");
    return value;
  }
  double positive(const char* key, double otherwise) const { return has(key) ? positive(key) : otherwise; }
  bool flag(const char* key, bool otherwise) const {
    if (!has(key)) return otherwise;
    if (!at(key).is_boolean()) wrong(key, "true or false");
    return at(key).get<bool>();
  }
  std::string text(const char* key) const {
    if (!at(key).is_string()) wrong(key, "a text");
    return at(key).get<std::string>();
  }
  Object object(const char* key) const {
    if (!at(key).is_object()) wrong(key, "an object");
    return {at(key), path_ + ": " + key};
  }
  std::vector<double> numbers(const char* key) const {
    const Json& value = at(key);
    if (!value.is_array()) wrong(key, "an array of numbers");
    std::vector<double> found;
    for (const Json& each : value) {
      if (!each.is_number() || !(each.get<double>() > 0)) wrong(key, "an array of positive numbers");
      found.push_back(each.get<double>());
    }
    return found;
  }
  const Json& at(const char* key) const {
    if (!has(key)) fail_file(path_, "has no \"", key, "\"");
    return json_.at(key);
  }
  const Json& json() const { return json_; }
  const std::string& path() const { return path_; }

  [[noreturn]] void wrong(const char* key, const char* expected) const {
    fail_file(path_, key, " is ", at(key).dump(-1, ' ', true, Json::error_handler_t::replace).substr(0, 80),
              ", expected ", expected);
  }

 private:
  const Json& json_;
  const std::string path_;
};

const Architecture& architecture_of(const Object& config) {
  std::string name = config.has("model_type") ? config.text("model_type") : "";
  for (const Architecture& each : kArchitectures) {
    if (name == each.model_type) return each;
  }
  fail_file(config.path(), "model_type is \"", name, "\", known are llama, qwen3, bitnet and granite");
}

bitlayers::Activation activation_of(const Object& config) {
  using bitlayers::Activation;
  const std::string name = config.has("hidden_act") ? config.text("hidden_act") : "silu";
  if (name == "silu") return Activation::silu;
  if (name == "relu2") return Activation::relu2;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  fail_file(config.path(), "hidden_act is \"", name, "\", known are silu, relu2, gelu and gelu_pytorch_tanh");
}

void require_known_keys(const Object& object, const std::set<std::string_view>& known) {
  for (const auto& [key, value] : object.json().items()) {
    if (!known.contains(key)) fail_file(object.path(), "has \"", key, "\", which is not known");
  }
}

void read_yarn(const Object& rope, RotaryScaling& scaling) {
  scaling.kind = RotaryScaling::Kind::yarn;
  scaling.factor = rope.positive("factor");
  scaling.original_context = rope.size("original_max_position_embeddings");
  scaling.attention_factor = rope.positive("attention_factor", 0);
  scaling.beta_fast = rope.positive("beta_fast", scaling.beta_fast);
  scaling.beta_slow = rope.positive("beta_slow", scaling.beta_slow);
  scaling.mscale = rope.positive("mscale", 0);
  scaling.mscale_all_dim = rope.positive("mscale_all_dim", 0);
  scaling.truncate = rope.flag("truncate", true);
}

void read_longrope(const Object& rope, std::int64_t head_dim, RotaryScaling& scaling) {
  scaling.kind = RotaryScaling::Kind::longrope;
  scaling.original_context = rope.size("original_max_position_embeddings");
  scaling.attention_factor = rope.positive("attention_factor", 0);
  scaling.factor = rope.positive("factor", 0);
  scaling.short_factors = rope.numbers("short_factor");
  scaling.long_factors = rope.numbers("long_factor");
  for (const auto* factors : {&scaling.short_factors, &scaling.long_factors}) {
    if (static_cast<std::int64_t>(factors->size()) != head_dim / 2) {
      fail_file(rope.path(), "has ", factors->size(), " factors, expected ", head_dim / 2);
    }
  }
}

// rope_parameters of transformers 5: every key explicit.
void read_rope(const Object& config, DecoderConfig& decoder) {
  const Object rope = config.object("rope_parameters");
  decoder.rope_theta = rope.positive("rope_theta");
  if (decoder.rope_theta <= 1) rope.wrong("rope_theta", "a number above 1");
  require_known_keys(rope, {"rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
                            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                            "mscale_all_dim", "truncate", "short_factor", "long_factor"});
  const std::string kind = rope.has("rope_type") ? rope.text("rope_type") : "default";
  RotaryScaling& scaling = decoder.rope;
  if (kind == "default") return;
  if (kind == "linear") {
    scaling.kind = RotaryScaling::Kind::linear;
    scaling.factor = rope.positive("factor");
  } else if (kind == "llama3") {
    scaling.kind = RotaryScaling::Kind::llama3;
    scaling.factor = rope.positive("factor");
    scaling.low_freq_factor = rope.positive("low_freq_factor");
    scaling.high_freq_factor = rope.positive("high_freq_factor");
    scaling.original_context = rope.size("original_max_position_embeddings");
  } else if (kind == "yarn") {
    read_yarn(rope, scaling);
  } else if (kind == "longrope") {
    read_longrope(rope, decoder.info.head_dim, scaling);
  } else {
    fail_file(rope.path(), "rope_type is \"", kind, "\", known are default, linear, llama3, yarn and longrope");
  }
}

// ---- quantization_config ------------------------------------------------------------------------------------------

bitcore::BitQuantConfig quant_of(const Object& fields, bitcore::BitQuantConfig quant) {
  try {
    if (fields.has("weight_granularity")) {
      quant.weight_granularity = bitcore::parse_granularity(fields.text("weight_granularity"), "weight_granularity");
      quant.group_size = bitcore::kDefaultGroupSize;
    }
    if (fields.has("group_size")) quant.group_size = fields.size("group_size");
    if (fields.has("activation_dtype")) {
      quant.activation_dtype = bitcore::parse_activation_dtype(fields.text("activation_dtype"), "activation_dtype");
    }
    if (fields.has("activation_granularity")) {
      quant.activation_granularity =
          bitcore::parse_granularity(fields.text("activation_granularity"), "activation_granularity");
    }
    bitcore::check_config(quant);
  } catch (const bitcore::FileError&) {
    throw;
  } catch (const bitcore::QuantizationError& error) {
    fail_file(fields.path(), error.what());
  }
  if (quant.activation_granularity == bitcore::Granularity::per_tensor) {
    fail_file(fields.path(),
              "activation_granularity is per_tensor: a token's logits would depend on the others of a batch");
  }
  return quant;
}

void require_deployed(const Object& fields, const char* otherwise) {
  const std::string state = fields.has("state") ? fields.text("state") : otherwise;
  if (state != "deployed") fail_file(fields.path(), "state is \"", state, "\", expected \"deployed\": pack it first");
}

MatrixConfig module_of(const Object& fields, const MatrixConfig& most) {
  const std::string kind = fields.text("kind");
  if (kind == "float") return {MatrixConfig::Kind::floating, {}};
  if (kind == "int8") return {MatrixConfig::Kind::int8, {}};
  if (kind != "ternary") fail_file(fields.path(), "kind is \"", kind, "\", known are ternary, int8 and float");
  require_deployed(fields, "deployed");
  return {MatrixConfig::Kind::ternary, quant_of(fields, most.quant)};
}

void read_quantization(const Object& config, DecoderConfig& decoder) {
  if (!config.has("quantization_config")) {
    fail_file(config.path(),
              "has no quantization_config: nothing in the model is ternary; `bitlab convert` reads other forms");
  }
  const Object quantization = config.object("quantization_config");
  const std::string method = quantization.text("quant_method");
  if (method != "bitlab") {
    fail_file(quantization.path(), "quant_method is \"", method,
              "\", expected \"bitlab\": `bitlab convert` reads others");
  }
  if (quantization.size("format") != 1) quantization.wrong("format", "1");
  if (quantization.has("modules_to_not_convert") && !quantization.at("modules_to_not_convert").empty()) {
    fail_file(quantization.path(), "has modules_to_not_convert: save the model once more, which lists them by name");
  }
  require_deployed(quantization, "trainable");
  decoder.most = {MatrixConfig::Kind::ternary, quant_of(quantization, {})};
  if (!quantization.has("modules")) return;
  const Object modules = quantization.object("modules");
  for (const auto& [name, fields] : modules.json().items()) {
    decoder.modules[name] = module_of(modules.object(name.c_str()), decoder.most);
  }
}

void read_tokens(const Object& config, LanguageModelInfo& info) {
  if (!config.has("eos_token_id")) return;
  const Json& value = config.at("eos_token_id");
  for (const Json& each : value.is_array() ? value : Json::array({value})) {
    const auto token = bitcore::unsigned_integer(each);
    if (!token || *token > static_cast<std::uint64_t>(kMostSize)) config.wrong("eos_token_id", "a token, or several");
    info.eos_tokens.push_back(static_cast<Token>(*token));
  }
}

void read_sizes(const Object& config, DecoderConfig& decoder) {
  LanguageModelInfo& info = decoder.info;
  info.vocab_size = config.size("vocab_size");
  info.hidden_size = config.size("hidden_size");
  info.num_layers = config.size("num_hidden_layers");
  info.num_heads = config.size("num_attention_heads");
  info.num_key_value_heads = config.has("num_key_value_heads") ? config.size("num_key_value_heads") : info.num_heads;
  info.head_dim = config.has("head_dim") ? config.size("head_dim") : info.hidden_size / info.num_heads;
  info.max_position_embeddings = config.size("max_position_embeddings");
  if (info.max_position_embeddings > kMostPositions) config.wrong("max_position_embeddings", "at most 16777216");
  decoder.intermediate_size = config.size("intermediate_size");
  if (info.head_dim < 2 || info.head_dim % 2 != 0) {
    fail_file(config.path(), "head_dim is ", info.head_dim, ", expected an even number");
  }
  if (info.num_heads % info.num_key_value_heads != 0) {
    fail_file(config.path(), "num_attention_heads is ", info.num_heads, ", expected a multiple of num_key_value_heads ",
              info.num_key_value_heads);
  }
  for (const std::int64_t heads : {info.num_heads, info.num_key_value_heads}) {
    if (heads * info.head_dim > kMostSize) fail_file(config.path(), "has ", heads, " heads of ", info.head_dim);
  }
}

}  // namespace

const MatrixConfig& DecoderConfig::linear(const std::string& name) const {
  const auto found = modules.find(name);
  return found == modules.end() ? most : found->second;
}

MatrixConfig DecoderConfig::table(const std::string& name) const {
  const auto found = modules.find(name);
  return found == modules.end() ? MatrixConfig{MatrixConfig::Kind::floating, {}} : found->second;
}

DecoderConfig read_decoder_config(const Json& json, const std::string& path) {
  const Object config(json, path);
  const Architecture& architecture = architecture_of(config);
  DecoderConfig decoder;
  decoder.info.architecture = architecture.class_name;
  read_sizes(config, decoder);
  read_tokens(config, decoder.info);
  decoder.activation = activation_of(config);
  decoder.rms_norm_eps = static_cast<float>(config.positive("rms_norm_eps"));
  decoder.tied = config.flag("tie_word_embeddings", false);
  decoder.attention_bias = config.flag("attention_bias", false);
  decoder.mlp_bias = config.flag("mlp_bias", false);
  decoder.head_norms = architecture.head_norms;
  decoder.sub_norms = architecture.sub_norms;
  decoder.attention_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(decoder.info.head_dim)));
  if (architecture.multipliers) {
    decoder.embedding_multiplier = static_cast<float>(config.positive("embedding_multiplier", 1));
    decoder.residual_multiplier = static_cast<float>(config.positive("residual_multiplier", 1));
    decoder.logits_multiplier = static_cast<float>(1.0 / config.positive("logits_scaling", 1));
    decoder.attention_scale = static_cast<float>(config.positive("attention_multiplier", 1));
  }
  if (config.flag("use_sliding_window", false)) fail_file(path, "use_sliding_window is true, expected full attention");
  read_rope(config, decoder);
  read_quantization(config, decoder);
  return decoder;
}

}  // namespace bitmodels
