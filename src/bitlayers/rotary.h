// Cosines and sines of rotary position embeddings, with the scalings that models are stretched by.
//
// Frequencies follow Hugging Face transformers' modeling_rope_utils.py, in float64 instead of float32; docs/contract.md
// states each operation.
#pragma once

#include <cstdint>
#include <vector>

namespace bitlayers {

/// How a model's frequencies differ from theta^(-2i / head_dim): "rope_parameters" of its config.json. Members that a
/// kind does not name are ignored.
struct RotaryScaling {
  enum class Kind {
    none,
    linear,    ///< All divided by `factor`.
    llama3,    ///< Low ones divided by `factor`, high ones kept, between them a mixture.
    yarn,      ///< The same by another rule, and a factor on cosine and sine.
    longrope,  ///< Each divided by a factor of its own, and a factor on cosine and sine.
  };
  Kind kind = Kind::none;
  double factor = 0;  ///< linear, llama3; yarn, longrope: 0 stands for max_position_embeddings / original_context.
  double low_freq_factor = 1;           ///< llama3
  double high_freq_factor = 4;          ///< llama3
  std::int64_t original_context = 0;    ///< llama3, yarn, longrope: positions that the model was trained with first.
  double attention_factor = 0;          ///< yarn, longrope: on cosine and sine. 0: by the kind's rule.
  double beta_fast = 32;                ///< yarn: rotations within original_context above which nothing changes, ...
  double beta_slow = 1;                 ///< ... and below which all is divided.
  bool truncate = true;                 ///< yarn: whether those bounds are rounded to whole pairs.
  double mscale = 0;                    ///< yarn: of attention_factor's rule. 0: absent.
  double mscale_all_dim = 0;            ///< yarn: the same.
  std::vector<double> short_factors{};  ///< longrope: head_dim / 2, for contexts up to original_context.
  std::vector<double> long_factors{};   ///< longrope: head_dim / 2, for longer ones.
};

class Rotary {
 public:
  /// @param head_dim Even, from 2 on.
  /// @param theta The base, above 1.
  /// @param context_limit Positions that the session may use: chooses between longrope's factors.
  /// @param max_position_embeddings Of the model.
  Rotary(std::int64_t head_dim, double theta, const RotaryScaling& scaling, std::int64_t context_limit,
         std::int64_t max_position_embeddings);

  /// head_dim / 2 of each, times attention_factor(), rounded once.
  /// @param position From 0 up to 2^24.
  void cosines_and_sines(std::int64_t position, float* cosines, float* sines) const;

  /// Radians per position of each pair.
  const std::vector<double>& frequencies() const { return frequencies_; }
  double attention_factor() const { return attention_factor_; }

 private:
  std::vector<double> frequencies_;
  double attention_factor_;
};

}  // namespace bitlayers
