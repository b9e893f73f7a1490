/// @file bitlinear.h
/// A ternary linear layer for inference: config, packed weight, scales and bias in one object. Mirrors a deployed
/// `bitlayers.bitlinear.BitLinear`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/io.h"
#include "bitcore/ops/bitlinear.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

/// Layers on bitcore.
namespace bitlayers {

/// The tensors of one layer in a file; null stands for one that is not there.
struct LayerTensors {
  const bitcore::TensorEntry* weight = nullptr;   ///< Floating (out_features, in_features): not deployed.
  const bitcore::TensorEntry* qweight = nullptr;  ///< Packed: deployed. It comes before `weight`.
  const bitcore::TensorEntry* qweight_scale =
      nullptr;                                 ///< Floating: a scalar, (out_features,), or float16 of the groups.
  const bitcore::TensorEntry* bias = nullptr;  ///< Floating (out_features,).

  /// Those named `<prefix>weight`, `<prefix>qweight`, `<prefix>qweight_scale` and `<prefix>bias`.
  static LayerTensors find(const bitcore::SafetensorsFile& file, std::string_view prefix);
};

/// y = float(sum_k q_x q_w) * (s_x * s_w) + bias (with scales per group the sum of such terms), on weights that are
/// packed once. It cannot change: any number of threads may use one layer. Copies are cheap and share their memory.
class BitLinear {
 public:
  /// A layer that owns its memory; the bias is copied.
  /// @param weights What prepare_weights() with the same config returned.
  /// @param bias    Floating (out_features,), or none.
  /// @throws QuantizationError for weights of another config or damaged ones, a scale that is not finite and positive,
  ///     and a bias of another size or dtype or with NaN or infinity in it.
  BitLinear(bitcore::bitlinear::PreparedWeights weights, bitcore::ConstVectorView bias,
            const bitcore::BitQuantConfig& config);

  /// Quantizes and packs a floating weight (out_features, in_features). The layer owns its memory.
  /// @throws QuantizationError as the constructor, and for a weight that prepare_weights() refuses.
  static BitLinear deploy(bitcore::ConstMatrixView weight, bitcore::ConstVectorView bias = {},
                          const bitcore::BitQuantConfig& config = {},
                          bitcore::Layout layout = bitcore::Layout::automatic,
                          bitcore::Executor& executor = bitcore::default_executor());

  /// A layer on packed bytes, scales per group and a bias that lie elsewhere, as in a mapped file; other scales are
  /// copied.
  /// @param qweight Packed uint8 (out_features, row bytes); from memory 5 % faster if it begins on a cache line.
  /// @param scale   weight_scale_size() elements of weight_scale_dtype().
  /// @param bias    Floating (out_features,), or none.
  /// @param owner   Kept as long as the layer and its copies; null: the caller keeps the memory alive and unchanged.
  /// @param verify  Whether every byte of `qweight` is checked now, or only its trailer.
  /// @throws QuantizationError as the constructor.
  static BitLinear view(bitcore::ConstMatrixView qweight, std::int64_t in_features, bitcore::ConstVectorView scale,
                        bitcore::ConstVectorView bias, const bitcore::BitQuantConfig& config,
                        std::shared_ptr<const void> owner = nullptr,
                        bitcore::Verify verify = bitcore::Verify::every_byte);

  /// A layer of a file. Deployed, it is a view of the file, and otherwise packed now.
  /// @param file Kept as long as the layer and its copies.
  /// @throws FileError that names the file and the tensor which is missing, has another shape or dtype, or is damaged.
  static BitLinear load(std::shared_ptr<const bitcore::SafetensorsFile> file, const LayerTensors& tensors,
                        std::int64_t out_features, std::int64_t in_features, const bitcore::BitQuantConfig& config,
                        bitcore::Verify verify = bitcore::Verify::every_byte,
                        bitcore::Executor& executor = bitcore::default_executor());

  /// Computes y (M, out_features) of x (M, in_features), both floating; y is rounded once to its dtype.
  /// @throws QuantizationError for shapes or dtypes that do not fit, and a workspace that is too small.
  /// @throws KernelNotFoundError
  void forward(bitcore::ConstMatrixView x, bitcore::MatrixView y,
               const bitcore::bitlinear::Options& options = {}) const;

  /// Bytes of scratch memory (Options::workspace) with which forward() allocates nothing, for up to `rows` rows of x.
  /// @throws KernelNotFoundError
  std::size_t workspace_size(std::int64_t rows, const bitcore::bitlinear::Options& options = {}) const;

  /// Adds `<prefix>qweight`, `<prefix>qweight_scale` and, if there is one, `<prefix>bias`, as Python names and shapes
  /// them. The layer outlives the writing.
  /// @throws QuantizationError where a name is taken.
  void add_to(bitcore::SafetensorsWriter& writer, const std::string& prefix) const;

  /// Columns of x.
  std::int64_t in_features() const { return shape_.in_features; }
  /// Columns of y.
  std::int64_t out_features() const { return shape_.out_features; }
  /// The quantization schema.
  const bitcore::BitQuantConfig& config() const { return config_; }
  /// Sizes and layout of the packed weight.
  const bitcore::PackedShape& packed_shape() const { return shape_; }
  /// The packed weight, uint8 (out_features, packed_shape().row_bytes()).
  bitcore::ConstMatrixView qweight() const;
  /// The weight's scales, row-major: 1 per tensor, out_features per channel, float16 ones per group.
  bitcore::ConstVectorView qweight_scale() const;
  /// The bias, or none.
  bitcore::ConstVectorView bias() const;

 private:
  struct Memory;
  BitLinear(std::shared_ptr<const Memory> memory, std::int64_t in_features, const bitcore::BitQuantConfig& config,
            bitcore::Verify verify);
  static std::shared_ptr<const Memory> own(bitcore::bitlinear::PreparedWeights& weights, bitcore::ConstVectorView bias);

  bitcore::BitQuantConfig config_;
  bitcore::PackedShape shape_;
  std::shared_ptr<const Memory> memory_;
};

}  // namespace bitlayers
