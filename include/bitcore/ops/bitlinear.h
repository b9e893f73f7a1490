/// @file bitlinear.h
/// The ternary linear layer: prepare_weights, forward, and the straight-through backward. Mirrors
/// `bitcore.ops.bitlinear`.
///
/// Shapes: x (M, in_features), weight (out_features, in_features), bias (out_features,), y (M, out_features).
/// y = float(sum_k q_x q_w) * (s_x * s_w) + bias, rounded once to y's dtype; where weights have a scale per group
/// y = sum over the groups g of float(sum over g of q_x q_w) * (s_x * s_w[g]), in order in float32, + bias. With int8
/// activations the bits of y are the same for every kernel and thread count. All functions are re-entrant.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "bitcore/config.h"
#include "bitcore/executor.h"
#include "bitcore/ops/packing.h"
#include "bitcore/tensor.h"

/// The layer: weights are prepared once, then forward runs any number of times; training has its own forward, and
/// backward.
namespace bitcore::bitlinear {

/// Weights ready for inference, in the standard packed form.
struct PreparedWeights {
  FloatVector scale;                  ///< weight_scale_size() elements of weight_scale_dtype().
  std::vector<std::uint8_t> qweight;  ///< (out_features, shape.row_bytes()), contiguous.
  PackedShape shape;                  ///< Sizes of qweight.

  /// qweight as the matrix that forward takes.
  ConstMatrixView view() const { return {qweight.data(), shape.out_features, shape.row_bytes()}; }
};

/// How a call runs, never what it returns.
struct Options {
  Executor* executor = nullptr;         ///< Null: default_executor().
  std::string_view kernel = {};         ///< A kernel's name; empty: the registry's choice.
  std::span<std::byte> workspace = {};  ///< Scratch memory of workspace_size() bytes; empty: forward allocates it.
};

/// Scale, ternary codes and packing in one go.
/// @throws QuantizationError for a NaN or an infinity in the weight, a wrong shape or dtype.
PreparedWeights prepare_weights(ConstMatrixView weight, const BitQuantConfig& config, Layout layout = Layout::automatic,
                                Executor& executor = default_executor());

/// What prepare_weights does with a weight that is not finite.
enum class NonFinite {
  reject,  ///< Throw.
  keep,    ///< Its scale becomes NaN and its codes 0: outputs are NaN. Training forward does this.
};

/// prepare_weights into the caller's memory: `scale` of weight_scale_size() elements of weight_scale_dtype(), `qweight`
/// uint8 (out_features, packed_shape().row_bytes()), contiguous.
void prepare_weights_into(ConstMatrixView weight, const BitQuantConfig& config, Layout layout, NonFinite non_finite,
                          VectorView scale, MatrixView qweight, Executor& executor);

/// Bytes of scratch memory with which forward() on packed weights allocates nothing, for up to `rows` rows of x of any
/// dtype and with the same options. Any alignment will do; concurrent calls need one each. 0 where the kernel (the
/// reference, one that a user registered) takes no workspace and may allocate.
/// @param shape Of the packed weight: PreparedWeights::shape, or what check_trailer() returns.
/// @throws KernelNotFoundError
std::size_t workspace_size(std::int64_t rows, const PackedShape& shape, const BitQuantConfig& config,
                           const Options& options = {});

/// Inference.
/// @param qweight_scale weight_scale_size() elements of weight_scale_dtype(), finite and positive.
/// @param qweight Packed uint8, or plain int8 codes (out_features, in_features), which are packed on every call (slow).
///                Any alignment will do; from memory, weights that begin on a cache line (64 bytes) are 5 % faster.
/// @param bias Floating, out_features elements, or none.
/// @param y Floating; its dtype decides the rounding.
/// @throws QuantizationError, KernelNotFoundError
void forward(ConstMatrixView x, ConstVectorView qweight_scale, ConstMatrixView qweight, ConstVectorView bias,
             const BitQuantConfig& config, MatrixView y, const Options& options = {});

/// The same with prepared weights.
void forward(ConstMatrixView x, const PreparedWeights& weights, ConstVectorView bias, const BitQuantConfig& config,
             MatrixView y, const Options& options = {});

/// What a training forward keeps for backward; a few bits a weight and a byte an activation.
struct SavedTensors {
  std::vector<std::int8_t> qx;  ///< (M, in_features); empty with float32 activations.
  std::vector<float> x_scale;   ///< x_scale_size(); empty with float32 activations.
  ConstMatrixView x;            ///< float32 activations only: the caller keeps x alive until backward.
  PreparedWeights weights;      ///< The quantized weight.
};

/// Training forward: quantizes x and weight, computes y with the bits that inference on the prepared weights returns.
/// A non-finite weight gives NaN, never an error.
SavedTensors forward_training(ConstMatrixView x, ConstMatrixView weight, ConstVectorView bias,
                              const BitQuantConfig& config, MatrixView y, const Options& options = {});

/// The part of forward_training that follows quantization: y from int8 codes and their scales. Values of the scales are
/// not checked: NaN gives NaN.
/// @param qx int8 (M, in_features); float32 activations: x itself.
/// @param x_scale x_scale_size() floats; float32 activations: empty.
void forward_quantized(ConstMatrixView qx, std::span<const float> x_scale, ConstVectorView qweight_scale,
                       ConstMatrixView qweight, ConstVectorView bias, const BitQuantConfig& config, MatrixView y,
                       const Options& options = {});

/// What backward reads, wherever it lies.
struct BackwardInputs {
  ConstMatrixView qx;              ///< int8 (M, in_features); float32 activations: x itself. Only dweight needs it.
  std::span<const float> x_scale;  ///< x_scale_size() floats; float32 activations: empty.
  /// Packed, int8 codes, or the floating weight whose codes qweight_scale gives. Only dx needs it, and its scale.
  ConstMatrixView qweight;
  ConstVectorView qweight_scale;  ///< weight_scale_size() elements of weight_scale_dtype().
};

/// Gradients, each skipped where its data is null. Matrices of any floating dtype.
struct Gradients {
  MatrixView dx;           ///< (M, in_features)
  MatrixView dweight;      ///< (out_features, in_features)
  float* dbias = nullptr;  ///< (out_features,)
};

/// A matrix product: out = left @ right, or left^T @ right if `transpose_left`. All three have one dtype, float32 or
/// bfloat16; sums are float32, rounded once to bfloat16. Called on the thread that calls backward().
using Matmul = std::function<void(ConstMatrixView left, bool transpose_left, ConstMatrixView right, MatrixView out)>;

/// Straight-through backward: dX = dY @ dq(W), dW = dY^T @ dq(x), db = sum over rows of dY. The scales are folded into
/// dY, or where weights have them per group, into the codes; all is computed in float32 (db in float64) and rounded
/// once.
/// @param dy Floating (M, out_features).
/// @param matmul What multiplies in layers of more than 131,072 multiply-adds or 256 rows of x; null: the engine's own
///     loops, which are slow there. If dy is bfloat16 it gets dY and the codes in bfloat16, which holds the codes
///     exactly (those times scales per group it does not; dW with float32 activations: in float32).
/// @throws QuantizationError, and what matmul throws
void backward(ConstMatrixView dy, const BackwardInputs& inputs, const BitQuantConfig& config,
              const Gradients& gradients, Executor& executor = default_executor(), const Matmul& matmul = nullptr);

/// The same with what forward_training kept.
void backward(ConstMatrixView dy, const SavedTensors& saved, const BitQuantConfig& config, const Gradients& gradients,
              Executor& executor = default_executor(), const Matmul& matmul = nullptr);

}  // namespace bitcore::bitlinear
