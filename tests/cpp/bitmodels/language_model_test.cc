// bitmodels::LanguageModel: one hash for whatever computes a model's logits, sessions on many threads, a lack of
// memory, and what is refused. tests/python/bitmodels compares the same engine with an independent definition.
#include "bitmodels/language_model.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cfenv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <new>
#include <optional>
#include <thread>

#include "../bitcore/allocations.h"
#include "../bitcore/support.h"
#include "bitcore/io.h"
#include "bitcore/kernels/registry.h"
#include "bitmodels/sampler.h"
#include "tiny_model.h"

namespace bitmodels {
namespace {

namespace fs = std::filesystem;
using bitcore::Executor;
using bitcore::FileError;
using bitcore::Granularity;
using bitcore::KernelNotFoundError;
using bitcore::KernelRegistry;
using bitcore::Layout;
using bitcore::QuantizationError;
using bitcore::serial_executor;
using bitcore::StateError;
using bitcore::ThreadPool;
using bitcore::testing::bits_of;
using bitcore::testing::expect_error;
using bitcore::testing::Floats;
using bitcore::testing::on_threads;
using testing::Table;
using testing::TinyModel;
using Tokens = std::vector<Token>;

constexpr CacheForm kForms[] = {CacheForm::float16, CacheForm::float32, CacheForm::int8};
constexpr auto kInt8 = bitcore::ActivationDtype::int8;
constexpr auto kFloat32 = bitcore::ActivationDtype::float32;

// ---- models -------------------------------------------------------------------------------------------------------

// A model, and the hashes of its logits by the cache's form. They are the same on every CPU.
struct Kind {
  const char* name;
  TinyModel model;
  std::uint64_t hashes[3];
};

// Every switch, both layouts, all granularities, every kind of embedding and head.
const std::vector<Kind>& kinds() {
  using enum Granularity;
  static const std::vector<Kind> kinds = {
      {"Llama", {.mixed = true}, {0x5fa5f12defdad988, 0xb551391a07aa33d4, 0x1683493494ae50a5}},
      {"LlamaBiases",
       {.layout = Layout::base3,
        .quant = {.weight_granularity = per_channel},
        .embedding = Table::float32,
        .head = Table::float32,
        .biases = true,
        .rope = "llama3",
        .activation = "gelu",
        .hidden = 96,
        .head_dim = 24},
       {0x149de81ce45b0fd4, 0xa09884315eb5811, 0x326cc23c46c65af4}},
      {"LlamaFloatActivations",
       {.quant = {.weight_granularity = per_group, .activation_dtype = kFloat32, .group_size = 64},
        .embedding = Table::float16,
        .head = Table::ternary,
        .rope = "linear"},
       {0x5fb6f8d34586dca2, 0x742c208cc1c36d1e, 0x2f4c4ce1e2025b92}},
      {"Qwen3",
       {.architecture = "qwen3",
        .quant = {per_group, kInt8, per_group, 32},
        .embedding = Table::ternary,
        .tied = true,
        .rope = "yarn",
        .inner = 112},
       {0xecf066d1f9884dac, 0x41db3b048d090c64, 0x232ed48e63da8eb3}},
      {"BitNet",
       {.architecture = "bitnet", .layout = Layout::base3, .tied = true, .activation = "relu2", .hidden = 96},
       {0x55da1b4f2fc883be, 0x87f34f8d159d1289, 0x36193c3c8d603fa8}},
      {"BitNetInt8",
       {.architecture = "bitnet", .embedding = Table::int8, .tied = true, .activation = "relu2", .key_value_heads = 1},
       {0xabc29610b3048d63, 0xcdef3f09cd17f045, 0x56dc9d4297ffd50b}},
      {"Granite",
       {.architecture = "granite",
        .layout = Layout::base3,
        .quant = {per_group, kInt8, per_channel, 128},
        .head = Table::ternary,
        .rope = "longrope",
        .activation = "gelu_pytorch_tanh",
        .hidden = 80,
        .inner = 144,
        .vocab = 67},
       {0x257c8e1985077e38, 0xdc6099347a424d11, 0x1aea99177d623dd6}},
  };
  return kinds;
}

const Kind& kind_of(std::string_view name) {
  return *std::find_if(kinds().begin(), kinds().end(), [&](const Kind& kind) { return kind.name == name; });
}

// A folder of this process, removed at its end.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("bitmodels-language-model-" + std::to_string(getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code error;
    fs::remove_all(path_, error);
  }
  fs::path make(const std::string& name) const {
    fs::remove_all(path_ / name);
    fs::create_directories(path_ / name);
    return path_ / name;
  }
  static const Folder& get() {
    static const Folder folder;
    return folder;
  }

 private:
  const fs::path path_;
};

// The model's directory, written at its first use.
const std::string& directory_of(const Kind& kind) {
  static std::map<std::string, std::string> written;
  std::string& directory = written[kind.name];
  if (directory.empty()) {
    directory = Folder::get().make(kind.name).string();
    testing::write_tiny_model(directory, kind.model);
  }
  return directory;
}

LanguageModel open(const Kind& kind, std::string_view kernel = {}) {
  return LanguageModel::open(directory_of(kind), {.kernel = kernel});
}

LanguageModel llama() { return open(kinds()[0]); }

// ---- what they compute --------------------------------------------------------------------------------------------

constexpr std::int64_t kCount = 40;

Tokens tokens_of(std::int64_t count, std::int64_t vocab = 67) {
  Tokens tokens;
  for (std::int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<Token>((i * i + 37 * i + 11) % vocab));
  return tokens;
}

// FNV-1a of the bytes.
std::uint64_t hash_of(const Floats& logits) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const std::byte byte : std::as_bytes(std::span(logits))) {
    hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3u;
  }
  return hash;
}

Floats room_for(const LanguageModel& model, std::size_t rows) {
  return Floats(rows * static_cast<std::size_t>(model.info().vocab_size));
}

// The logits of all tokens.
Floats append(const LanguageModel& model, Session& session, std::span<const Token> tokens,
              Executor& executor = serial_executor()) {
  Floats logits = room_for(model, tokens.size());
  const Input input{&session, tokens, Logits::all, logits};
  EXPECT_TRUE(model.forward({&input, 1}, {.executor = &executor}));
  return logits;
}

// The same in parts of these sizes, the last one repeated.
Floats append_parts(const LanguageModel& model, Session& session, std::span<const Token> tokens,
                    const std::vector<std::size_t>& parts, Executor& executor = serial_executor()) {
  Floats logits;
  for (std::size_t i = 0; !tokens.empty(); ++i) {
    const std::size_t size = std::min(parts[std::min(i, parts.size() - 1)], tokens.size());
    const Floats found = append(model, session, tokens.first(size), executor);
    logits.insert(logits.end(), found.begin(), found.end());
    tokens = tokens.subspan(size);
  }
  return logits;
}

Floats rows_from(const LanguageModel& model, const Floats& logits, std::int64_t first) {
  return Floats(logits.begin() + first * model.info().vocab_size, logits.end());
}

// ---- one hash -----------------------------------------------------------------------------------------------------

class LanguageModelEveryKernel : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto all = KernelRegistry::all_kernels();
    kernel_ = *std::find_if(all.begin(), all.end(), [](const auto& kernel) { return kernel->name() == GetParam(); });
    if (!kernel_->is_supported()) GTEST_SKIP() << "this CPU lacks " << kernel_->requirement();
  }

  KernelRegistry::KernelPtr kernel_;
};

TEST_P(LanguageModelEveryKernel, HasTheHashesOfAllModels) {
  const std::vector<std::size_t> splits[] = {{40}, {1}, {7, 1, 20, 12}, {33, 7}};
  ThreadPool two(2), five(5);
  Executor* const executors[] = {&serial_executor(), &two, &five};
  std::size_t turn = 0;
  for (const Kind& kind : kinds()) {
    if (!kernel_->is_compatible_with(kind.model.quant)) continue;
    const LanguageModel model = open(kind, GetParam());
    for (std::size_t form = 0; form < 3; ++form) {
      for (Executor* executor : executors) {
        Session session = model.new_session({.cache = kForms[form]});
        const Floats logits = append_parts(model, session, tokens_of(kCount), splits[turn++ % 4], *executor);
        EXPECT_EQ(hash_of(logits), kind.hashes[form])
            << kind.name << " " << form << " " << std::hex << "0x" << hash_of(logits);
        EXPECT_EQ(session.position(), kCount);
      }
    }
  }
}

// 520 positions are three blocks of the cache; a single token's blocks are then work for several threads.
TEST_P(LanguageModelEveryKernel, HasTheHashesAcrossBlocks) {
  const bool int8 = kernel_->is_compatible_with({});
  const std::uint64_t hashes[2][3] = {{0x305629f9eca7e22f, 0x12e9b9c4aa9a6065, 0xcc2c140cce2770a5},
                                      {0x42d7b1bac47fc89, 0xaf89f49c25dbc5e4, 0xd5c7bfcda20c45d}};
  const std::vector<std::size_t> splits[] = {{255, 2, 254, 1, 2, 1}, {520}, {300, 210, 2, 8}};
  const LanguageModel model = open(kind_of(int8 ? "Llama" : "LlamaFloatActivations"), GetParam());
  ThreadPool five(5);
  for (std::size_t form = 0; form < 3; ++form) {
    Session session = model.new_session({.cache = kForms[form]});
    const Floats logits = append_parts(model, session, tokens_of(520), splits[form], five);
    EXPECT_EQ(hash_of(logits), hashes[int8][form]) << int8 << " " << form << " " << std::hex << "0x" << hash_of(logits);
  }
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const auto& kernel : KernelRegistry::all_kernels()) names.emplace_back(kernel->name());
  return names;
}
INSTANTIATE_TEST_SUITE_P(All, LanguageModelEveryKernel, ::testing::ValuesIn(kernel_names()),
                         [](const auto& test) { return test.param; });

// ---- sessions -----------------------------------------------------------------------------------------------------

// Seven others in the same call: prompts and single tokens, at other positions.
TEST(LanguageModelSessions, CompanyDoesNotMatter) {
  ThreadPool two(2);
  for (const Kind& kind : kinds()) {
    const LanguageModel model = open(kind);
    for (std::size_t form = 0; form < 3; ++form) {
      const Tokens tokens = tokens_of(kCount);
      std::vector<Session> others;
      for (std::size_t i = 0; i < 7; ++i) {
        others.push_back(model.new_session({.cache = kForms[(form + i) % 3]}));
        append(model, others[i], std::span(tokens).first(3 * i + 1));
      }
      Session session = model.new_session({.cache = kForms[form]});
      Floats logits = room_for(model, kCount), others_logits = room_for(model, 7);
      for (const auto& [first, size] : {std::pair{0u, 15u}, {15u, 1u}, {16u, 24u}}) {
        const auto vocab = static_cast<std::size_t>(model.info().vocab_size);
        std::vector<Input> inputs;
        for (std::size_t i = 0; i < 7; ++i) {
          inputs.push_back({&others[i], std::span(tokens).first(i % 2 == 0 ? 1 : 4), Logits::last,
                            std::span(others_logits).subspan(i * vocab, vocab)});
        }
        inputs.insert(inputs.begin() + 3, {&session, std::span(tokens).subspan(first, size), Logits::all,
                                           std::span(logits).subspan(first * vocab, size * vocab)});
        ASSERT_TRUE(model.forward(inputs, {.executor = &two}));
      }
      EXPECT_EQ(hash_of(logits), kind.hashes[form]) << kind.name << " " << form;
    }
  }
}

// Prompts, single tokens and pairs in one call, some of them with several blocks behind them.
TEST(LanguageModelSessions, LongOnesShareACallWithShortOnes) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(600);
  ThreadPool three(3);
  Session whole = model.new_session();
  const Floats expected = append(model, whole, tokens);
  const std::size_t starts[] = {511, 520, 0, 540, 3, 255}, sizes[] = {2, 1, 30, 2, 1, 40};
  std::vector<Session> sessions;
  std::vector<Floats> logits;
  std::vector<Input> inputs;
  for (const std::size_t start : starts) {
    sessions.push_back(whole.fork());
    sessions.back().truncate(static_cast<std::int64_t>(start));
  }
  for (const std::size_t size : sizes) logits.push_back(room_for(model, size));
  for (std::size_t i = 0; i < std::size(starts); ++i) {
    inputs.push_back({&sessions[i], std::span(tokens).subspan(starts[i], sizes[i]), Logits::all, logits[i]});
  }
  ASSERT_TRUE(model.forward(inputs, {.executor = &three}));
  for (std::size_t i = 0; i < std::size(starts); ++i) {
    Floats rows = rows_from(model, expected, static_cast<std::int64_t>(starts[i]));
    rows.resize(logits[i].size());
    EXPECT_EQ(bits_of(logits[i]), bits_of(rows)) << i;
  }
}

TEST(LanguageModelSessions, ForkedAndTruncated) {
  ThreadPool two(2);
  for (const Kind& kind : kinds()) {
    const LanguageModel model = open(kind);
    const Tokens tokens = tokens_of(kCount), other(15, 5);
    for (const CacheForm form : kForms) {
      Session session = model.new_session({.cache = form});
      const Floats expected = append(model, session, tokens, two);
      session.truncate(30);
      Session fork = session.fork();
      append(model, session, other, two);  // What one writes the other does not see.
      session.truncate(20);
      EXPECT_EQ(fork.cache(), form);
      for (auto* each : {&fork, &session}) {
        const std::int64_t from = each->position();
        const Floats logits = append(model, *each, std::span(tokens).subspan(static_cast<std::size_t>(from)), two);
        EXPECT_EQ(bits_of(logits), bits_of(rows_from(model, expected, from))) << kind.name << " " << from;
      }
    }
  }
}

TEST(LanguageModelSessions, ForksAcrossBlocks) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(530), other(300, 7);
  for (const CacheForm form : kForms) {
    Session session = model.new_session({.cache = form});
    const Floats expected = append(model, session, tokens);
    for (const std::int64_t from : {512, 511, 257, 256, 255}) {
      Session fork = session.fork();
      fork.truncate(from);
      Session second = fork.fork();
      append(model, second, other);
      const Floats logits = append(model, fork, std::span(tokens).subspan(static_cast<std::size_t>(from)));
      EXPECT_EQ(bits_of(logits), bits_of(rows_from(model, expected, from))) << from;
    }
    session.truncate(529);
    EXPECT_EQ(bits_of(append(model, session, std::span(tokens).last(1))), bits_of(rows_from(model, expected, 529)));
  }
}

// The last row, no row, or all of them.
TEST(LanguageModelSessions, LogitsOfTheRowsThatAsk) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(kCount);
  Session session = model.new_session();
  const Floats expected = append(model, session, tokens);
  session.truncate(0);
  const Input silent{&session, std::span(tokens).first(25), Logits::none, {}};
  EXPECT_TRUE(model.forward({&silent, 1}));
  Floats last = room_for(model, 1);
  const Input input{&session, std::span(tokens).subspan(25), Logits::last, last};
  EXPECT_TRUE(model.forward({&input, 1}));
  EXPECT_EQ(bits_of(last), bits_of(rows_from(model, expected, kCount - 1)));
  EXPECT_TRUE(model.forward({}));  // nothing to do
}

// Hidden states do not depend on the split either, and logits may be asked for beside them.
TEST(LanguageModelSessions, HiddenRows) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(kCount);
  const auto width = static_cast<std::size_t>(model.info().hidden_size);
  const auto hidden_of = [&](std::size_t first) {
    Session one = model.new_session(), two = model.new_session();
    Floats hidden(tokens.size() * width), logits = room_for(model, tokens.size());
    const std::span<const Token> all(tokens);
    const std::span<float> out(hidden);
    const Input inputs[] = {{&one, all.first(first), Logits::hidden, out.first(first * width)},
                            {&two, all, Logits::all, logits}};
    EXPECT_TRUE(model.forward(inputs));
    EXPECT_EQ(hash_of(logits), kinds()[0].hashes[0]);
    const Input rest{&one, all.subspan(first), Logits::hidden, out.subspan(first * width)};
    EXPECT_TRUE(model.forward({&rest, 1}));
    return hidden;
  };
  EXPECT_EQ(bits_of(hidden_of(1)), bits_of(hidden_of(33)));
  Session session = model.new_session();
  Floats small(width * tokens.size() - 1);
  const Input input{&session, tokens, Logits::hidden, small};
  expect_error<QuantizationError>([&] { model.forward({&input, 1}); }, {"output has", std::to_string(small.size())});
}

TEST(LanguageModelSessions, OutliveTheirModelAndItsFiles) {
  const Kind& kind = kind_of("Qwen3");
  const fs::path directory = Folder::get().make("gone");
  testing::write_tiny_model(directory.string(), kind.model);
  const Tokens tokens = tokens_of(kCount);
  std::optional<LanguageModel> model = LanguageModel::open(directory.string());
  fs::remove_all(directory);
  LanguageModel copy = *model;
  Session session = model->new_session(), unused = model->new_session();
  model.reset();
  EXPECT_EQ(hash_of(append(copy, session, tokens)), kind.hashes[0]);
  { const LanguageModel last = std::move(copy); }
  EXPECT_EQ(session.position(), kCount);
  Session fork = session.fork();
  fork.truncate(3);
  Session moved = std::move(fork);
  fork = std::move(session);
  EXPECT_EQ(moved.position(), 3);
  EXPECT_EQ(fork.position(), kCount);
  EXPECT_EQ(unused.context_limit(), kind.model.context);
}

// The limit chooses between longrope's factors.
TEST(LanguageModelSessions, ContextLimit) {
  const LanguageModel model = open(kind_of("Granite"));
  const Tokens tokens = tokens_of(kCount);
  Session at = model.new_session({.context_limit = 256}), above = model.new_session({.context_limit = 257});
  EXPECT_EQ(above.context_limit(), 257);
  const Floats of_short = append(model, at, tokens), of_long = append(model, above, tokens);
  EXPECT_NE(bits_of(of_short), bits_of(of_long));
  EXPECT_EQ(hash_of(of_long), kind_of("Granite").hashes[0]);
  Session small = model.new_session({.context_limit = kCount});
  EXPECT_EQ(bits_of(append(model, small, tokens)), bits_of(of_short));  // Full to the last position.
  expect_error<QuantizationError>([&] { append(model, small, std::span(tokens).first(1)); },
                                  {"tokens has 1 after 40", "context limit is 40"});
}

TEST(LanguageModelSessions, ReadShardedAndChecked) {
  const Kind& kind = kind_of("LlamaBiases");
  const fs::path directory = Folder::get().make("sharded");
  testing::write_sharded(directory.string(), kind.model);
  for (const bool map : {false, true}) {
    for (const std::string& from : {directory.string(), directory_of(kind)}) {
      const LanguageModel model = LanguageModel::open(from, {.map = map, .check = true});
      Session session = model.new_session();
      EXPECT_EQ(hash_of(append(model, session, tokens_of(kCount))), kind.hashes[0]);
    }
  }
}

TEST(LanguageModelSessions, Info) {
  const TinyModel& model = kind_of("Granite").model;
  const LanguageModel granite = open(kind_of("Granite"));
  EXPECT_EQ(granite.info().architecture, "GraniteForCausalLM");
  EXPECT_EQ(granite.info().vocab_size, model.vocab);
  EXPECT_EQ(granite.info().hidden_size, model.hidden);
  EXPECT_EQ(granite.info().num_layers, model.layers);
  EXPECT_EQ(granite.info().num_heads, model.heads);
  EXPECT_EQ(granite.info().num_key_value_heads, model.key_value_heads);
  EXPECT_EQ(granite.info().head_dim, model.head_dim);
  EXPECT_EQ(granite.info().max_position_embeddings, model.context);
  EXPECT_EQ(granite.info().eos_tokens, (Tokens{2, 3}));
  EXPECT_GT(granite.info().weight_bytes, 0);
}

// ---- threads ------------------------------------------------------------------------------------------------------

// What a session answers next to tokens of its own: another hash if anything in it has changed.
std::uint64_t next_answer(const LanguageModel& model, const Session& session) {
  Session fork = session.fork();
  return hash_of(append(model, fork, tokens_of(4)));
}

TEST(LanguageModelThreads, OneSessionIsUsedByOneAtATime) {
  const LanguageModel model = llama();
  const Tokens tokens(300, 5);
  Session session = model.new_session();
  const Floats expected = append(model, session, tokens);
  session.truncate(0);
  std::atomic<int> finished{0};
  on_threads(3, [&](int thread) {
    for (int i = 0; i < 60; ++i) {
      try {
        if (thread == 2) {
          const Session fork = session.fork();
          EXPECT_LE(fork.position(), 120);
        } else {
          Floats logits = room_for(model, 1);
          const Input input{&session, std::span(tokens).first(1), Logits::last, logits};
          EXPECT_TRUE(model.forward({&input, 1}, {.executor = &serial_executor()}));
          ++finished;
        }
      } catch (const StateError&) {
      }
    }
  });
  EXPECT_EQ(session.position(), finished.load());
  const Floats rest = append(model, session, std::span(tokens).subspan(static_cast<std::size_t>(finished.load())));
  EXPECT_EQ(bits_of(rest), bits_of(rows_from(model, expected, finished.load())));
}

TEST(LanguageModelThreads, ManySessionsOfOneModel) {
  const Kind& kind = kind_of("Qwen3");
  const LanguageModel model = open(kind);
  ThreadPool shared(3);
  const std::vector<std::size_t> splits[] = {{40}, {1}, {7, 1, 20, 12}, {33, 7}};
  on_threads(6, [&](int thread) {
    for (std::size_t i = 0; i < 6; ++i) {
      Session session = model.new_session({.cache = kForms[i % 3]});
      Executor& executor = thread % 2 == 0 ? static_cast<Executor&>(shared) : serial_executor();
      const auto& parts = splits[(i + static_cast<std::size_t>(thread)) % 4];
      const Floats logits = append_parts(model, session, tokens_of(kCount), parts, executor);
      EXPECT_EQ(hash_of(logits), kind.hashes[i % 3]);
    }
  });
}

// Other libraries change how a thread rounds, and drop subnormal numbers; threads inherit it.
class OtherRounding {
 public:
  OtherRounding() {
    fegetenv(&found_);
    fesetround(FE_UPWARD);
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040u);  // FTZ and DAZ
    state_ = __builtin_ia32_stmxcsr() & 0xFFC0u;
#endif
  }
  ~OtherRounding() { fesetenv(&found_); }
  bool stands() const {
#if defined(__SSE__)
    if ((__builtin_ia32_stmxcsr() & 0xFFC0u) != state_) return false;
#endif
    return fegetround() == FE_UPWARD;
  }

 private:
  fenv_t found_;
  unsigned state_ = 0;
};

TEST(LanguageModelThreads, TheCallersRoundingDoesNotMatter) {
  Floats draws(67);
  for (std::size_t i = 0; i < draws.size(); ++i) draws[i] = static_cast<float>(i % 11) / 3;
  const auto drawn = [&] {
    Sampler sampler({.temperature = 0.7f, .top_p = 0.9f, .seed = 5}, 67);
    Tokens tokens;
    for (int i = 0; i < 20; ++i) {
      Floats logits = draws;
      tokens.push_back(sampler.sample(logits));
    }
    return tokens;
  };
  const Tokens expected = drawn();
  for (const Kind& kind : kinds()) {
    const OtherRounding other;
    const LanguageModel model = open(kind);
    ThreadPool pool(3);
    std::barrier together(3);
    pool.run(3, [&](int) { together.arrive_and_wait(); });  // Now each of its threads runs, and rounds like this one.
    for (std::size_t i = 0; i < 3; ++i) {
      Session session = model.new_session({.cache = kForms[i]});
      EXPECT_EQ(hash_of(append(model, session, tokens_of(kCount), pool)), kind.hashes[i]) << kind.name;
    }
    EXPECT_EQ(drawn(), expected);
    EXPECT_TRUE(other.stands());
  }
}

// A block that the last other owner has left, on another thread, becomes the session's own.
TEST(LanguageModelThreads, ForksComeAndGoOnOtherThreads) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(kCount), other(8, 3);
  Session session = model.new_session();
  const Floats expected = append(model, session, tokens);
  session.truncate(20);
  for (int round = 0; round < 20; ++round) {
    std::vector<Session> forks;
    for (int i = 0; i < 3; ++i) forks.push_back(session.fork());
    on_threads(4, [&](int thread) {
      Session own = thread == 3 ? std::move(session) : std::move(forks[static_cast<std::size_t>(thread)]);
      for (int i = 0; i < 4; ++i) {
        const Floats logits = append(model, own, std::span(tokens).subspan(20));
        EXPECT_EQ(bits_of(logits), bits_of(rows_from(model, expected, 20)));
        own.truncate(20);
      }
      if (thread == 3) session = std::move(own);
    });
  }
}

TEST(LanguageModelThreads, CancelledAtAnyMoment) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(24);
  ThreadPool two(2);
  Session session = model.new_session(), company = model.new_session();
  append(model, session, std::span(tokens).first(10));
  append(model, company, std::span(tokens).first(3));
  const std::uint64_t expected = next_answer(model, session), of_company = next_answer(model, company);
  std::atomic<bool> cancelled{false};
  std::atomic<int> turn{0};
  constexpr int kTurns = 1000;
  std::thread canceller([&] {
    for (int i = 1; i <= kTurns; ++i) {
      while (turn.load() < i) std::this_thread::yield();
      for (int wait = (i * 7919) % 4001; wait > 0; --wait) static_cast<void>(turn.load());
      cancelled = true;
      turn.store(-1);
    }
  });
  for (int i = 1; i <= kTurns; ++i) {
    cancelled = false;
    turn.store(i);
    const Input inputs[] = {{&session, std::span(tokens).subspan(10), Logits::none, {}},
                            {&company, std::span(tokens).first(2), Logits::none, {}}};
    const bool done =
        model.forward(inputs, {.executor = i % 2 == 0 ? &two : &serial_executor(), .cancelled = &cancelled});
    ASSERT_EQ(session.position(), done ? 24 : 10);
    ASSERT_EQ(company.position(), done ? 5 : 3);
    while (turn.load() != -1) std::this_thread::yield();
    session.truncate(10);
    company.truncate(3);
    if (i % 10 != 0) continue;
    ASSERT_EQ(next_answer(model, session), expected);
    ASSERT_EQ(next_answer(model, company), of_company);
  }
  canceller.join();
  EXPECT_EQ(next_answer(model, session), expected);
  cancelled = true;  // before it begins
  const Input input{&session, tokens, Logits::none, {}};
  EXPECT_FALSE(model.forward({&input, 1}, {.cancelled = &cancelled}));
  EXPECT_EQ(session.position(), 10);
}

// ---- memory -------------------------------------------------------------------------------------------------------

// Each allocation fails once, on whichever thread it happens.
template <class Call>
int fail_each_allocation(const Call& call) {
  int failures = 0;
  for (bool failed = true; failed; failures += failed) {
    bitcore::testing::allocations_until_failure = failures;
    try {
      call();
      failed = bitcore::testing::allocations_until_failure.exchange(-1) < 0;
    } catch (const std::bad_alloc&) {
    } catch (...) {
      bitcore::testing::allocations_until_failure = -1;
      throw;
    }
  }
  return failures;
}

TEST(LanguageModelMemory, ALackOfItLeavesSessionsAsTheyWere) {
  const LanguageModel model = llama();
  const Tokens tokens = tokens_of(300);
  ThreadPool two(2);
  for (const std::size_t before : {10u, 250u}) {
    Session session = model.new_session();
    append(model, session, std::span(tokens).first(before), two);
    const std::uint64_t expected = next_answer(model, session);
    const Session other = session.fork();  // The first block is copied.
    Floats logits = room_for(model, 40), expected_logits = room_for(model, 40);
    std::int64_t position = session.position();
    const int failures = fail_each_allocation([&] {
      position = session.position();
      const Input input{&session, std::span(tokens).subspan(before, 40), Logits::all, logits};
      EXPECT_TRUE(model.forward({&input, 1}, {.executor = &two}));
      position = session.position();
    });
    EXPECT_GT(failures, 2);
    EXPECT_EQ(position, static_cast<std::int64_t>(before + 40));
    EXPECT_EQ(session.position(), position);
    Session again = other.fork();
    EXPECT_EQ(bits_of(append(model, again, std::span(tokens).subspan(before, 40))), bits_of(logits));
    session.truncate(static_cast<std::int64_t>(before));
    EXPECT_EQ(next_answer(model, session), expected);
    EXPECT_EQ(next_answer(model, other), expected);
  }
}

TEST(LanguageModelMemory, ALackOfItInTheFirstCall) {
  fail_each_allocation([] {
    const std::int64_t failures = bitcore::testing::allocations_until_failure.exchange(-1);
    const LanguageModel model = llama();
    Session session = model.new_session();
    const Tokens tokens = tokens_of(3);
    const Input input{&session, tokens, Logits::none, {}};
    bitcore::testing::allocations_until_failure = failures;
    EXPECT_TRUE(model.forward({&input, 1}, {.executor = &serial_executor()}));
  });
}

TEST(LanguageModelMemory, ALackOfItInSessions) {
  const LanguageModel model = open(kind_of("Granite"));
  Session session = model.new_session();
  append(model, session, tokens_of(8));
  const std::uint64_t expected = next_answer(model, session);
  fail_each_allocation([&] { model.new_session(); });
  fail_each_allocation([&] { session.fork(); });
  fail_each_allocation([&] { session.truncate(session.position()); });
  EXPECT_EQ(session.position(), 8);
  EXPECT_EQ(next_answer(model, session), expected);
}

// A call takes memory that earlier ones have left, but for a new block of the cache.
TEST(LanguageModelMemory, ATokenAllocatesNothing) {
  for (const Kind& kind : kinds()) {
    const LanguageModel model = open(kind);
    ThreadPool two(2);
    for (Executor* executor : {static_cast<Executor*>(&two), &serial_executor()}) {
      Session session = model.new_session();
      Floats logits = room_for(model, 1);
      const Tokens tokens(1, 5);
      const Input input{&session, tokens, Logits::last, logits};
      const auto steps = [&](int count) {
        const std::int64_t before = bitcore::testing::allocations;
        for (int i = 0; i < count; ++i) EXPECT_TRUE(model.forward({&input, 1}, {.executor = executor}));
        return bitcore::testing::allocations - before;
      };
      steps(4);
      EXPECT_EQ(steps(252), 0) << kind.name;
      EXPECT_GT(steps(1), 0) << kind.name;
    }
  }
}

// ---- refusals -----------------------------------------------------------------------------------------------------

TEST(LanguageModelErrors, Inputs) {
  const LanguageModel model = llama(), other = open(kind_of("Granite"));
  Session session = model.new_session({.context_limit = 50}), stranger = other.new_session();
  append(model, session, tokens_of(8));
  const std::uint64_t expected = next_answer(model, session);
  const Tokens tokens = tokens_of(3), many(43, 1), negative{1, -1}, large{80, 1};
  Floats row = room_for(model, 1), rows = room_for(model, 3);
  const std::span<float> output(row), short_of_one = output.first(79);
  const std::pair<Input, const char*> inputs[] = {
      {{nullptr, tokens, Logits::last, output}, "session is null"},
      {{&stranger, tokens, Logits::last, output}, "session is of another model"},
      {{&session, {}, Logits::last, output}, "tokens are empty, expected at least one"},
      {{&session, negative, Logits::last, output}, "tokens has -1, expected 0 to 79"},
      {{&session, large, Logits::last, output}, "tokens has 80, expected 0 to 79"},
      {{&session, many, Logits::last, output}, "tokens has 43 after 8, and the context limit is 50"},
      {{&session, tokens, Logits::none, output}, "output has 80 floats, expected 0"},
      {{&session, tokens, Logits::last, {}}, "output has 0 floats, expected 80"},
      {{&session, tokens, Logits::last, short_of_one}, "output has 79 floats, expected 80"},
      {{&session, tokens, Logits::all, output}, "output has 80 floats, expected 240"},
  };
  Session beside = model.new_session();
  for (const auto& [input, message] : inputs) {
    const Input both[] = {{&beside, tokens, Logits::all, rows}, input};  // What was right before it is not done either.
    expect_error<QuantizationError>([&] { model.forward(both); }, {message});
    EXPECT_EQ(beside.position(), 0);
  }
  const Input twice[] = {{&session, tokens, Logits::none, {}}, {&session, tokens, Logits::none, {}}};
  expect_error<StateError>([&] { model.forward(twice); }, {"session is in use", "twice in one call"});
  EXPECT_EQ(session.position(), 8);
  EXPECT_EQ(next_answer(model, session), expected);
}

TEST(LanguageModelErrors, Executors) {
  class NoThreads final : public Executor {
    int num_threads() const override { return 0; }
    void run(int, const std::function<void(int)>&) override {}
  };
  const LanguageModel model = llama();
  Session session = model.new_session();
  NoThreads none;
  expect_error<QuantizationError>([&] { append(model, session, tokens_of(3), none); }, {"executor has 0 threads"});
  EXPECT_EQ(session.position(), 0);
  EXPECT_EQ(hash_of(append(model, session, tokens_of(kCount))), kinds()[0].hashes[0]);
}

TEST(LanguageModelErrors, Sessions) {
  const LanguageModel model = llama();
  for (const std::int64_t limit : {std::int64_t{-1}, std::int64_t{1025}, std::numeric_limits<std::int64_t>::min()}) {
    expect_error<QuantizationError>([&] { model.new_session({.context_limit = limit}); },
                                    {"context_limit is " + std::to_string(limit) + ", expected 1 to 1024"});
  }
  expect_error<QuantizationError>([&] { model.new_session({.cache = static_cast<CacheForm>(7)}); },
                                  {"cache is 7, expected float16, float32 or int8"});
  Session session = model.new_session();
  append(model, session, tokens_of(3));
  expect_error<QuantizationError>([&] { session.truncate(-1); }, {"position is -1, expected 0 to 3"});
  expect_error<QuantizationError>([&] { session.truncate(4); }, {"position is 4, expected 0 to 3"});
  EXPECT_EQ(session.position(), 3);
}

TEST(LanguageModelErrors, Directories) {
  const std::string missing = (Folder::get().make("errors") / "missing").string();
  expect_error<FileError>([&] { LanguageModel::open(missing); }, {missing, "is no directory"});
  expect_error<FileError>([&] { LanguageModel::open(""); }, {"is no directory"});
  const std::string file = (fs::path(directory_of(kinds()[0])) / "model.safetensors").string();
  expect_error<FileError>([&] { LanguageModel::open(file); }, {file, "is no directory"});
  const fs::path nested = Folder::get().make("nested");
  fs::create_directory(nested / "config.json");
  expect_error<FileError>([&] { LanguageModel::open(nested.string()); }, {"config.json", "cannot be read"});
  const fs::path folder = Folder::get().make("empty");
  expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {"config.json", "cannot be opened"});
  std::ofstream(folder / "config.json") << testing::config_json({});
  expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {"model.safetensors"});
  expect_error<FileError>([&] { LanguageModel::open(folder.string(), {.map = false}); },
                          {"model.safetensors", "cannot be opened"});
}

TEST(LanguageModelErrors, Kernels) {
  expect_error<KernelNotFoundError>([] { open(kinds()[0], "NoKernel"); }, {"NoKernel"});
  expect_error<KernelNotFoundError>([] { open(kinds()[0], "Float32PortableKernel"); }, {"Float32PortableKernel"});
  expect_error<KernelNotFoundError>([] { open(kind_of("LlamaFloatActivations"), "Int8PortableKernel"); },
                                    {"Int8PortableKernel"});
}

// `text` with one part for another.
std::string replaced(std::string text, const std::string& part, const std::string& other) {
  EXPECT_NE(text.find(part), std::string::npos) << part;
  return text.replace(text.find(part), part.size(), other);
}

TEST(LanguageModelErrors, Configs) {
  const fs::path folder = Folder::get().make("configs");
  testing::write_tiny_model(folder.string(), {});
  const std::string config = testing::config_json({});
  const auto opened_with = [&](const std::string& text) {
    std::ofstream(folder / "config.json", std::ios::binary) << text;
    return LanguageModel::open(folder.string());
  };
  const std::array<const char*, 3> cases[] = {
      {"\"llama\"", "\"gemma3\"", "model_type is \"gemma3\", known are llama, qwen3, bitnet and granite"},
      {"\"llama\"", "\"qwen3\"", "has no tensor model.layers.0.self_attn.q_norm.weight"},
      {"\"llama\"", "\"bitnet\"", "has no tensor model.layers.0.self_attn.attn_sub_norm.weight"},
      {"\"llama\"", "3", "model_type is 3, expected a text"},
      {"\"silu\"", "\"tanh\"", "hidden_act is \"tanh\", known are silu, relu2, gelu and gelu_pytorch_tanh"},
      {"\"vocab_size\": 80", "\"vocab_size\": 0", "vocab_size is 0, expected a positive integer"},
      {"\"vocab_size\": 80", "\"vocab_size\": 81", "has shape (80, 64), expected (81, 64)"},
      {"\"vocab_size\": 80", "\"vocab_size\": 2147483648", "vocab_size is 2147483648, expected a positive integer"},
      {"\"hidden_size\": 64, ", "", "has no \"hidden_size\""},
      {"\"head_dim\": 16", "\"head_dim\": 15", "head_dim is 15, expected an even number"},
      {"\"head_dim\": 16", "\"head_dim\": 2147483646", "heads of 2147483646"},
      {"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "expected a multiple of num_key_value_heads 3"},
      {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "has no tensor model.layers.2.input_layernorm.weight"},
      {"\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "which the model does not have"},
      {"1e-05", "-1", "rms_norm_eps is -1, expected a positive number"},
      {"1e-05", "\"small\"", "rms_norm_eps is \"small\", expected a number"},
      {"[2, 3]", "[2, -1]", "eos_token_id is [2,-1], expected a token, or several"},
      {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": 0", "expected true or false"},
      {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "ties lm_head to an embedding of another"},
      {"\"attention_bias\": false", "\"attention_bias\": true", "has no tensor model.layers.0.self_attn.q_proj.bias"},
      {"\"mlp_bias\": false", "\"mlp_bias\": true", "has no tensor model.layers.0.mlp.gate_proj.bias"},
      {"\"mlp_bias\": false", "\"use_sliding_window\": true", "use_sliding_window is true, expected full attention"},
      {"\"rope_parameters\"", "\"rope_scaling\"", "has no \"rope_parameters\""},
      {"\"default\"", "\"dynamic\"", "rope_type is \"dynamic\", known are default, linear, llama3, yarn and longrope"},
      {"\"default\"", "\"linear\"", "has no \"factor\""},
      {"\"default\"", "\"linear\", \"factor\": -2", "factor is -2, expected a positive number"},
      {"\"default\"", "\"linear\", \"x\": 1", "has \"x\", which is not known"},
      {"\"default\"",
       "\"longrope\", \"original_max_position_embeddings\": 4, \"short_factor\": [1], \"long_factor\": []",
       "has 1 factors, expected 8"},
      {"\"default\"", "\"longrope\", \"original_max_position_embeddings\": 4, \"short_factor\": [0]",
       "short_factor is [0], expected an array of positive numbers"},
      {"\"quantization_config\"", "\"quantization\"", "has no quantization_config"},
      {"\"bitlab\"", "\"gptq\"", "quant_method is \"gptq\", expected \"bitlab\""},
      {"\"format\": 1", "\"format\": 2", "format is 2, expected 1"},
      {"\"deployed\"", "\"trainable\"", "state is \"trainable\", expected \"deployed\""},
      {"\"per_channel\"", "\"per_tensor\"", "a token's logits would depend on the others of a batch"},
      {"\"per_tensor\"", "\"per_moon\"", "weight_granularity"},
      {"\"group_size\": 128", "\"group_size\": 31", "group_size"},
      {"{\"kind\": \"int8\"}", "{\"kind\": \"int4\"}", "kind is \"int4\", known are ternary, int8 and float"},
      {"{\"kind\": \"int8\"}", "{\"kind\": \"float\"}", "is int8, expected a floating dtype"},
      {"{\"kind\": \"float\"}", "{\"kind\": \"int8\"}", "expected int8"},
      {"{\"kind\": \"float\"}", "{\"kind\": \"ternary\"}", "has no tensor model.embed_tokens.qweight"},
      {"{\"kind\": \"float\"}", "3", "expected an object"},
      {"\"modules\"", "\"modules_to_not_convert\": [\"lm_head\"], \"modules\"", "has modules_to_not_convert"},
      {"{", "[", "config.json"},
      {"{", "{\"model_type\": \"llama\", ", "model_type"},
  };
  for (const auto& [part, other, message] : cases) {
    expect_error<FileError>([&, text = replaced(config, part, other)] { opened_with(text); },
                            {folder.string(), message});
  }
  const LanguageModel model = opened_with("\xef\xbb\xbf \n" + config);  // Some editors put a byte order mark first.
  EXPECT_EQ(model.info().architecture, "LlamaForCausalLM");
}

// Where a tensor's bytes begin in a file.
std::size_t offset_of(const fs::path& path, const std::string& tensor) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  const auto view = bitcore::SafetensorsFile::from_bytes(std::as_bytes(std::span(bytes)), "model");
  const std::size_t place = bytes.find(
      std::string(reinterpret_cast<const char*>(view.tensor(tensor).bytes.data()), view.tensor(tensor).bytes.size()));
  return place;
}

void overwrite(const fs::path& path, std::size_t offset, const std::string& bytes) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(offset));
  file << bytes;
}

// Damage of a payload is found at the latest by the call that reads it, and the session stays where it is.
TEST(LanguageModelErrors, DamagedWeights) {
  const TinyModel& model = kind_of("Qwen3").model;
  const fs::path folder = Folder::get().make("damaged");
  const fs::path file = folder / "model.safetensors";
  for (const char* tensor : {"model.embed_tokens.qweight", "model.layers.1.mlp.down_proj.qweight"}) {
    testing::write_tiny_model(folder.string(), model);
    overwrite(file, offset_of(file, tensor), std::string(400, '\xff'));
    expect_error<FileError>([&] { LanguageModel::open(folder.string(), {.check = true}); }, {tensor});
    const LanguageModel damaged = LanguageModel::open(folder.string());
    Session session = damaged.new_session();
    expect_error<QuantizationError>([&] { append(damaged, session, tokens_of(40)); }, {"qweight"});
    EXPECT_EQ(session.position(), 0);
  }
  const std::pair<const char*, const char*> floats[] = {
      {"model.norm.weight", "holds NaN or infinity"},
      {"model.layers.0.self_attn.k_norm.weight", "holds NaN or infinity"},
      {"model.layers.0.self_attn.k_proj.qweight_scale", "qweight_scale"},
  };
  for (const auto& [tensor, message] : floats) {
    testing::write_tiny_model(folder.string(), model);
    overwrite(file, offset_of(file, tensor), "\xff\xff\xff\xff");
    expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {tensor, message});
  }
  testing::write_tiny_model(folder.string(), model);
  fs::resize_file(file, fs::file_size(file) - 1);
  expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {"model.safetensors"});
}

TEST(LanguageModelErrors, Indexes) {
  const fs::path folder = Folder::get().make("indexes");
  testing::write_sharded(folder.string(), {});
  const fs::path index = folder / "model.safetensors.index.json";
  std::ifstream file(index);
  const std::string right(std::istreambuf_iterator<char>(file), {});
  const std::string first = "\"model-00001-of-00002.safetensors\"", second = "\"model-00002-of-00002.safetensors\"";
  const std::array<std::string, 3> cases[] = {
      {"weight_map", "weights", "has no weight_map"},
      {first, "3", "names the file 3, expected a .safetensors file of the directory"},
      {first, "\"../model-00001-of-00002.safetensors\"", "names the file"},
      {first, "\"model.bin\"", "names the file"},
      {first, "\"missing.safetensors\"", "missing.safetensors"},
      {first, second, "promises lm_head.weight in model-00002-of-00002.safetensors, which does not have it"},
      {"{", "", "index.json"},
  };
  for (const auto& [part, other, message] : cases) {
    std::ofstream(index, std::ios::binary) << replaced(right, part, other);
    expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {message});
  }
  fs::copy_file(folder / "model-00001-of-00002.safetensors", folder / "copy.safetensors");
  std::ofstream(index, std::ios::binary) << replaced(right, "{\"lm_head", "{\"x\": \"copy.safetensors\", \"lm_head");
  expect_error<FileError>([&] { LanguageModel::open(folder.string()); }, {"which another file has, too"});
}

// ---- sampler ------------------------------------------------------------------------------------------------------

TEST(LanguageModelSampler, Philox) {
  const Philox zeros(0, 0, 0);  // The known answer of its authors.
  const std::uint32_t expected[] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  EXPECT_TRUE(std::equal(expected, expected + 4, zeros.words));
  const double uniform = static_cast<double>((std::uint64_t{0x6627e8d5 >> 5} << 26) + (0xe169c58d >> 6)) * 0x1p-53;
  EXPECT_EQ(zeros.uniform(), uniform);
  for (std::uint64_t counter : {std::uint64_t{1}, std::uint64_t{1} << 32, ~std::uint64_t{0}}) {
    const Philox other(7, 9, counter);
    EXPECT_NE(other.words[0], Philox(9, 7, counter).words[0]);
    EXPECT_NE(other.words[0], Philox(7, 9, counter - 1).words[0]);
    EXPECT_GE(other.uniform(), 0);
    EXPECT_LT(other.uniform(), 1);
  }
}

// The first choices for a seed are the same everywhere.
TEST(LanguageModelSampler, KnownAnswers) {
  const auto answer = [](SamplingParameters parameters) {
    parameters.seed = 12345;
    Sampler sampler(parameters, 16);
    Tokens tokens;
    for (std::int64_t i = 0; i < 8; ++i) {
      Floats logits;
      for (std::int64_t j = 0; j < 16; ++j) logits.push_back(static_cast<float>((i * 5 + j * 7) % 16) / 4);
      tokens.push_back(sampler.sample(logits));
    }
    return tokens;
  };
  EXPECT_EQ(answer({.temperature = 0}), (Tokens{9, 6, 3, 0, 13, 10, 7, 4}));
  EXPECT_EQ(answer({}), (Tokens{11, 0, 5, 9, 12, 8, 0, 10}));
  EXPECT_EQ(answer({.choice = 1}), (Tokens{2, 12, 0, 0, 13, 7, 11, 8}));
  EXPECT_EQ(answer({.temperature = 2, .top_k = 9, .top_p = 0.8f, .min_p = 0.3f}), (Tokens{13, 1, 5, 9, 10, 7, 0, 10}));
  EXPECT_EQ(answer({.repetition_penalty = 3, .frequency_penalty = 1, .presence_penalty = 1}),
            (Tokens{11, 0, 5, 9, 12, 7, 1, 10}));
}

TEST(LanguageModelSampler, Greedy) {
  const auto greedy = [](Floats logits, std::vector<std::uint32_t> mask = {}) {
    return Sampler({.temperature = 0}, static_cast<std::int64_t>(logits.size())).sample(logits, mask);
  };
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(greedy({1, 3, 3, 2}), 1);
  EXPECT_EQ(greedy({1, 3, 3, 2}, {0b1101}), 2);
  EXPECT_EQ(greedy({-kInfinity, -1e30f}), 1);
  EXPECT_EQ(greedy(Floats(40, 1.0f), {0, 0x80}), 39);
  Floats infinite{0, kInfinity, kInfinity};
  EXPECT_EQ(Sampler({}, 3).sample(infinite), 1);
}

TEST(LanguageModelSampler, Errors) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  const std::pair<SamplingParameters, const char*> cases[] = {
      {{.repetition_penalty = -1}, "repetition_penalty is -1, expected a positive number"},
      {{.repetition_penalty = kInfinity}, "repetition_penalty is inf"},
      {{.frequency_penalty = kNaN}, "frequency_penalty is nan, expected a finite number"},
      {{.presence_penalty = -kInfinity}, "presence_penalty is -inf, expected a finite number"},
      {{.logit_bias = {{0, kNaN}}}, "logit_bias is nan"},
      {{.logit_bias = {{4, 1}}}, "token is 4, expected 0 to 3"},
      {{.logit_bias = {{-1, 1}}}, "token is -1, expected 0 to 3"},
      {{.temperature = -0.5f}, "temperature is -0.5, expected a number from 0 on"},
      {{.temperature = kNaN}, "temperature is nan"},
      {{.top_k = -1}, "top_k is -1, expected a number from 0 on"},
      {{.top_p = 0}, "top_p is 0, expected a number above 0, up to 1"},
      {{.top_p = 1.5f}, "top_p is 1.5"},
      {{.top_p = kNaN}, "top_p is nan"},
      {{.min_p = -0.5f}, "min_p is -0.5, expected a number from 0 to 1"},
      {{.min_p = 2}, "min_p is 2"},
  };
  for (const auto& [parameters, message] : cases) {
    expect_error<QuantizationError>([&, wrong = parameters] { Sampler(wrong, 4); }, {message});
  }
  for (const float temperature : {0.0f, 1.0f}) {
    Sampler sampler({.temperature = temperature}, 4);
    const std::uint32_t nothing[] = {0xfffffff0}, long_mask[] = {1, 1};
    const auto sample = [&](Floats logits, std::span<const std::uint32_t> mask = {}) { sampler.sample(logits, mask); };
    expect_error<QuantizationError>([&] { sample({0, kNaN, 0, 0}); }, {"logits has a NaN"});
    expect_error<QuantizationError>([&] { sample({0, 0, 0}); }, {"logits has 3, expected 4"});
    expect_error<QuantizationError>([&] { sample({0, 0, 0, 0}, long_mask); }, {"mask has 2 words, expected 1"});
    expect_error<QuantizationError>([&] { sample({0, 0, 0, 0}, nothing); }, {"no token is allowed by mask"});
    expect_error<QuantizationError>([&] { sample(Floats(4, -kInfinity)); }, {"no token is allowed by mask"});
    const Token tokens[] = {3, 4};
    expect_error<QuantizationError>([&] { sampler.see(tokens); }, {"token is 4, expected 0 to 3"});
    sample({0, 0, 0, 0});
  }
}

}  // namespace
}  // namespace bitmodels
