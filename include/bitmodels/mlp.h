/// @file mlp.h
/// The multi-layer perceptron whose layers are all ternary. Mirrors `bitmodels.mlp`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/tensor.h"
#include "bitlayers/bitlinear.h"

/// Models on bitlayers.
namespace bitmodels {

/// The sizes of a multi-layer perceptron.
struct BitMLPConfig {
  std::int64_t n_layers = 3;             ///< Number of linear layers, at least 1.
  std::int64_t in_channels = 256;        ///< Size of the input.
  std::int64_t hidden_dim = 128;         ///< Size of every hidden layer.
  std::int64_t out_channels = 10;        ///< Size of the output.
  double dropout = 0.0;                  ///< Of training, which Python does.
  bool bias = true;                      ///< Whether the layers have a bias.
  bitcore::BitQuantConfig quant_config;  ///< The schema of every layer that the file gives none of its own.

  /// Equal in all members.
  friend bool operator==(const BitMLPConfig&, const BitMLPConfig&) = default;
};

/// Ternary linear layers with ReLU between them. It cannot change: any number of threads may use one model.
class BitMLPModel {
 public:
  /// Reads what `save_pretrained` wrote, deployed or not, and checks every byte of it. Packed weights stay in the
  /// mapped file, which may be renamed, replaced or deleted meanwhile, but not changed in place.
  /// @param path     The directory; or its model.safetensors alone, whose metadata repeat the config.
  /// @param executor Packs the weights of a model that was not deployed.
  /// @throws FileError for a file that is missing, damaged, foreign, or does not belong to the one beside it.
  static BitMLPModel from_pretrained(const std::string& path,
                                     bitcore::Executor& executor = bitcore::default_executor());

  /// The same of an open model.safetensors, which the model keeps.
  /// @throws FileError as from_pretrained().
  static BitMLPModel from_file(bitcore::SafetensorsFile file,
                               bitcore::Executor& executor = bitcore::default_executor());

  /// Computes y (M, out_channels) of x (M, in_channels), both of one floating dtype, which hidden activations have,
  /// too. Without an executor the process's pool does, whose threads are kept from call to call.
  /// @throws QuantizationError for shapes or dtypes that do not fit, and a workspace that is too small.
  /// @throws KernelNotFoundError
  void forward(bitcore::ConstMatrixView x, bitcore::MatrixView y,
               const bitcore::bitlinear::Options& options = {}) const;

  /// Bytes of scratch memory (Options::workspace) with which forward() allocates nothing, for up to `rows` rows of x of
  /// any dtype and with the same options.
  /// @throws KernelNotFoundError
  std::size_t workspace_size(std::int64_t rows, const bitcore::bitlinear::Options& options = {}) const;

  /// The sizes.
  const BitMLPConfig& config() const { return config_; }
  /// From the input to the output, at least one.
  std::span<const bitlayers::BitLinear> layers() const { return layers_; }

 private:
  BitMLPModel(const BitMLPConfig& config, std::vector<bitlayers::BitLinear> layers);
  std::size_t hidden_bytes(std::int64_t rows) const;

  BitMLPConfig config_;
  std::vector<bitlayers::BitLinear> layers_;
};

}  // namespace bitmodels
