#include "bitmodels/saved_config.h"

#include <charconv>
#include <cmath>
#include <optional>
#include <utility>

#include "bitcore/base/checks.h"
#include "bitcore/io/json.h"
#include "bitmodels/json_file.h"

namespace bitmodels {
namespace {

using bitcore::fail_file;
using bitcore::Json;

constexpr std::string_view kModelType = "model_type";
constexpr std::string_view kQuantConfig = "quant_config";
constexpr std::string_view kModuleConfigs = "module_configs";
constexpr std::string_view kTiedTensors = "tied_tensors";
constexpr std::string_view kTie = "tied.";
constexpr std::string_view kGroupSize = "group_size";  // only where it is not the default
constexpr std::string_view kLayerConfig = ".quant_config.";

bool is_quant_field(std::string_view name) {
  return name == "weight_granularity" || name == "activation_dtype" || name == "activation_granularity" ||
         name == kGroupSize;
}

bool is_count(std::string_view name) {
  return name == "n_layers" || name == "in_channels" || name == "hidden_dim" || name == "out_channels";
}

template <class Number>
std::optional<Number> parse(const std::string& text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<double> number_of(const std::string& text) {
  const auto number = parse<double>(text);
  return number && std::isfinite(*number) ? number : std::nullopt;
}

// Writers differ: 0 is 0.0, and models had other names.
bool same_value(std::string_view name, const std::string& left, const std::string& right) {
  const auto current = [](const std::string& type) { return type == "BitMLPModel" ? "bit_mlp" : type; };
  if (left == right) return true;
  if (name == kModelType) return current(left) == current(right);
  const auto left_number = number_of(left), right_number = number_of(right);
  return left_number && right_number && *left_number == *right_number;
}

// Brings the entries of a config.json into the form of metadata.
class Flattener {
 public:
  Flattener(const Json& json, std::string path) : json_(json), path_(std::move(path)), fields_(default_fields()) {}

  Fields flatten() {
    if (!json_.contains(kModelType)) fail_file(path_, "has no \"model_type\"");
    for (const auto& [name, value] : json_.items()) add(name, value);
    return std::move(fields_);
  }

 private:
  void add(const std::string& name, const Json& value) {
    if (name == kQuantConfig) return add_quant_config("quant_config.", object(name, value));
    if (name == kModuleConfigs) return add_module_configs(object(name, value));
    if (name == kTiedTensors) return add_ties(object(name, value));
    if (name == kModelType) return set(name, text(name, value));
    if (is_count(name)) return set(name, integer(name, value));
    if (name == "dropout" && value.is_number()) return set(name, value.dump());
    if (name == "bias" && value.is_boolean()) return set(name, value.dump());
    fail_file(path_, name, " is ", value.dump(), ", which a BitMLPConfig cannot have");
  }

  void add_quant_config(const std::string& prefix, const Json& values) {
    for (const auto& [field, value] : values.items()) {
      if (!is_quant_field(field)) fail_file(path_, prefix, field, " is no field of a BitQuantConfig");
      set(prefix + field, field == kGroupSize ? integer(prefix + field, value) : text(prefix + field, value));
    }
  }

  void add_module_configs(const Json& configs) {
    for (const auto& [layer, values] : configs.items()) {
      add_quant_config(layer + std::string(kLayerConfig), object("module_configs of " + layer, values));
    }
  }

  void add_ties(const Json& ties) {
    for (const auto& [name, stored] : ties.items())
      set(std::string(kTie) + name, text("tied_tensors of " + name, stored));
  }

  void set(const std::string& name, std::string value) { fields_[name] = std::move(value); }

  const Json& object(const std::string& name, const Json& value) const {
    if (!value.is_object()) fail_file(path_, name, " is ", value.dump(), ", expected an object");
    return value;
  }
  std::string text(const std::string& name, const Json& value) const {
    if (!value.is_string()) fail_file(path_, name, " is ", value.dump(), ", expected a string");
    return value.get<std::string>();
  }
  std::string integer(const std::string& name, const Json& value) const {
    const auto number = bitcore::unsigned_integer(value);
    if (!number) fail_file(path_, name, " is ", value.dump(), ", expected an integer of at least 1");
    return std::to_string(*number);
  }

  const Json& json_;
  const std::string path_;
  Fields fields_;
};

}  // namespace

Fields default_fields() {
  const BitMLPConfig config;
  return {{"n_layers", std::to_string(config.n_layers)},
          {"in_channels", std::to_string(config.in_channels)},
          {"hidden_dim", std::to_string(config.hidden_dim)},
          {"out_channels", std::to_string(config.out_channels)},
          {"dropout", "0.0"},
          {"bias", config.bias ? "true" : "false"},
          {"quant_config.weight_granularity", std::string(to_string(config.quant_config.weight_granularity))},
          {"quant_config.activation_dtype", std::string(to_string(config.quant_config.activation_dtype))},
          {"quant_config.activation_granularity", std::string(to_string(config.quant_config.activation_granularity))}};
}

Fields read_config_json(const std::string& path) {
  constexpr int kMostDepth = 3;  // the config, module_configs, a layer's fields
  return Flattener(read_json_file(path, kMostDepth), path).flatten();
}

void check_metadata(const Fields& metadata, const std::string& metadata_path, const Fields& config,
                    const std::string& config_path) {
  for (const auto& [name, value] : config) {
    const auto found = metadata.find(name);
    if (found != metadata.end() && !same_value(name, found->second, value)) {
      fail_file(metadata_path, "saved with ", name, "=", found->second, ", ", config_path, " says ", value);
    }
  }
  for (const auto& [name, value] : metadata) {
    const bool is_of_layers = name.starts_with(kTie) || name.find(kLayerConfig) != std::string::npos;
    if (is_of_layers && !config.contains(name)) {
      fail_file(metadata_path, "saved with ", name, "=", value, ", ", config_path, " does not have it");
    }
  }
}

SavedConfig::SavedConfig(Fields fields, std::string path) : fields_(std::move(fields)), path_(std::move(path)) {
  if (!same_value(kModelType, text(std::string(kModelType)), "bit_mlp")) {
    fail_file(path_, "model_type is \"", text(std::string(kModelType)), "\", expected \"bit_mlp\"");
  }
  config_ = {count("n_layers"), count("in_channels"), count("hidden_dim"), count("out_channels"),
             dropout(),         flag("bias"),         quant_config("")};
  check_layer_names();
}

bitcore::BitQuantConfig SavedConfig::layer_config(std::int64_t index) const {
  return quant_config("layers." + std::to_string(index) + ".");
}

const std::string& SavedConfig::stored_name(const std::string& tensor) const {
  const auto tie = fields_.find(std::string(kTie) + tensor);
  return tie == fields_.end() ? tensor : tie->second;
}

std::vector<std::string> SavedConfig::tied_names() const {
  std::vector<std::string> names;
  for (const auto& [name, stored] : fields_) {
    if (name.starts_with(kTie)) names.push_back(name.substr(kTie.size()));
  }
  return names;
}

const std::string& SavedConfig::text(const std::string& name) const {
  const auto found = fields_.find(name);
  if (found == fields_.end()) fail_file(path_, "its metadata lack \"", name, "\": no saved BitMLPModel");
  return found->second;
}

std::int64_t SavedConfig::count(const std::string& name) const {
  constexpr double kFirstInexact = 9007199254740992.0;  // 2^53
  auto value = parse<std::int64_t>(text(name));
  const auto number = number_of(text(name));
  if (!value && number && *number < kFirstInexact && *number == std::floor(*number)) value = std::llround(*number);
  if (!value || *value < 1) fail_file(path_, name, " is \"", text(name), "\", expected an integer of at least 1");
  return *value;
}

double SavedConfig::dropout() const {
  const auto found = fields_.find("dropout");
  if (found == fields_.end()) return 0.0;
  const auto number = number_of(found->second);
  if (!number || *number < 0 || *number >= 1) {
    fail_file(path_, "dropout is \"", found->second, "\", expected a number of at least 0 and below 1");
  }
  return *number;
}

bool SavedConfig::flag(const std::string& name) const {
  if (text(name) != "true" && text(name) != "false") {
    fail_file(path_, name, " is \"", text(name), "\", expected \"true\" or \"false\"");
  }
  return text(name) == "true";
}

bitcore::BitQuantConfig SavedConfig::quant_config(const std::string& prefix) const {
  const auto name_of = [&](const std::string& field) {
    const std::string own = prefix + "quant_config." + field;
    return fields_.contains(own) ? own : "quant_config." + field;
  };
  const auto granularity = [&](const std::string& field) {
    return bitcore::parse_granularity(text(name_of(field)), name_of(field));
  };
  try {
    const std::string dtype = name_of("activation_dtype");
    // A granularity of the layer's own comes with its own group_size, or with the default.
    const std::string own = prefix + "quant_config.";
    const bool is_own = fields_.contains(own + "weight_granularity") || fields_.contains(own + "group_size");
    const std::string group_size = (is_own ? own : "quant_config.") + "group_size";
    const bitcore::BitQuantConfig config = {
        granularity("weight_granularity"), bitcore::parse_activation_dtype(text(dtype), dtype),
        granularity("activation_granularity"),
        fields_.contains(group_size) ? count(group_size) : bitcore::kDefaultGroupSize};
    bitcore::check_config(config);
    return config;
  } catch (const bitcore::FileError&) {
    throw;
  } catch (const bitcore::QuantizationError& error) {
    fail_file(path_, error.what());
  }
}

void SavedConfig::check_layer_names() const {
  constexpr std::string_view kLayers = "layers.";
  for (const auto& [name, value] : fields_) {
    const std::size_t end = name.find(kLayerConfig);
    if (end == std::string::npos || name.starts_with(kTie)) continue;
    const std::string layer = name.substr(0, end);
    const auto index = layer.starts_with(kLayers) ? parse<std::int64_t>(layer.substr(kLayers.size())) : std::nullopt;
    const bool is_layer =
        index && *index >= 0 && *index < config_.n_layers && layer == "layers." + std::to_string(*index);
    if (!is_layer || !is_quant_field(std::string_view(name).substr(end + kLayerConfig.size()))) {
      fail_file(path_, "names ", name, ", which no layer of the model has");
    }
  }
}

}  // namespace bitmodels
