// The operators' schemas, all in one place, and the CPU functions behind them. Fakes, autograd and the functions for
// other devices are registered in python/bitcore/operators/native.py.
//
// Exceptions do not cross the stable ABI: an engine exception arrives in Python as a RuntimeError whose message begins
// with the exception's name.
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "bitcore/exceptions.h"
#include "ops.h"

namespace bitcore::torch_ops {
namespace {

template <auto function>
struct Op;

template <class Result, class... Args, Result (*function)(Args...)>
struct Op<function> {
  static Result call(Args... args) {
    try {
      return function(args...);
    } catch (const QuantizationError& error) {
      throw std::runtime_error(std::string("QuantizationError: ") + error.what());
    } catch (const KernelNotFoundError& error) {
      throw std::runtime_error(std::string("KernelNotFoundError: ") + error.what());
    }
  }
};

// torch_bitlinear and torch_bitlinear_train are the same in plain torch operations on every device: TorchKernel.
// (An argument called `kernel` would clash with one of inductor's.) straight_through returns a copy of value and hands
// its gradient to source. bitlinear_backward takes x as the training forward kept it, int8 codes or floating, and the
// weight packed, as int8 codes, or floating as it was quantized with qweight_scale; a gradient whose dtype is None is
// not computed, and has no elements. dx needs the weight and its scale, dweight x and its scale. group_size 0: no
// scales per group; otherwise those of the weight are (the per_channel flag is false), and those of x with x_per_group.
// Arguments are added at the end, with defaults: programs that were exported before still load.
STABLE_TORCH_LIBRARY(bitcore, m) {
  m.def("compute_weight_scale(Tensor weight, bool per_channel, int group_size=0) -> Tensor");
  m.def("quantize_weight(Tensor weight, Tensor scale, bool per_channel, int group_size=0) -> Tensor");
  m.def("dequantize_weight(Tensor qweight, Tensor scale, bool per_channel, int group_size=0) -> Tensor");
  m.def("compute_x_scale(Tensor x, bool int8_activations, bool per_channel, int group_size=0) -> Tensor");
  m.def("quantize_x(Tensor x, Tensor scale, bool per_channel, int group_size=0) -> Tensor");
  m.def("dequantize_x(Tensor qx, Tensor scale, bool per_channel, int group_size=0) -> Tensor");
  m.def("pack_weights(Tensor qweight, str layout=\"auto\") -> Tensor");
  m.def("unpack_weights(Tensor qweight, int in_features, bool check=True) -> Tensor");
  m.def("check_qweight(Tensor qweight, int in_features) -> ()");
  m.def(
      "prepare_weights(Tensor weight, bool per_channel, str layout=\"auto\", int group_size=0) -> (Tensor "
      "qweight_scale, Tensor qweight)");
  for (const std::string prefix : {"", "torch_"}) {
    m.def((prefix + "bitlinear(Tensor x, Tensor qweight_scale, Tensor qweight, Tensor? bias, bool weight_per_channel, "
                    "bool int8_activations, bool x_per_channel, ScalarType? out_dtype=None, str? kernel_name=None, "
                    "int group_size=0, bool x_per_group=False) -> Tensor")
              .c_str());
    m.def((prefix +
           "bitlinear_train(Tensor x, Tensor weight, Tensor? bias, bool weight_per_channel, bool int8_activations, "
           "bool x_per_channel, ScalarType? out_dtype=None, str? kernel_name=None, int group_size=0, "
           "bool x_per_group=False) -> "
           "(Tensor y, Tensor qx, Tensor x_scale, Tensor qweight, Tensor qweight_scale)")
              .c_str());
  }
  m.def(
      "bitlinear_backward(Tensor dy, Tensor? x, Tensor? x_scale, Tensor? qweight, Tensor? qweight_scale, "
      "int in_features, bool weight_per_channel, ScalarType? dx_dtype, ScalarType? dweight_dtype, "
      "ScalarType? dbias_dtype, int group_size=0, bool x_per_group=False) -> (Tensor dx, Tensor dweight, Tensor "
      "dbias)");
  m.def("straight_through(Tensor value, Tensor source) -> Tensor");
  m.def("list_kernels() -> str");
  m.def("kernel_tile_calls(str kernel) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(bitcore, CPU, m) {
  m.impl("compute_weight_scale", TORCH_BOX(&Op<compute_weight_scale>::call));
  m.impl("quantize_weight", TORCH_BOX(&Op<quantize_weight>::call));
  m.impl("dequantize_weight", TORCH_BOX(&Op<dequantize_weight>::call));
  m.impl("compute_x_scale", TORCH_BOX(&Op<compute_x_scale>::call));
  m.impl("quantize_x", TORCH_BOX(&Op<quantize_x>::call));
  m.impl("dequantize_x", TORCH_BOX(&Op<dequantize_x>::call));
  m.impl("pack_weights", TORCH_BOX(&Op<pack_weights>::call));
  m.impl("unpack_weights", TORCH_BOX(&Op<unpack_weights>::call));
  m.impl("check_qweight", TORCH_BOX(&Op<check_qweight>::call));
  m.impl("prepare_weights", TORCH_BOX(&Op<prepare_weights>::call));
  m.impl("bitlinear", TORCH_BOX(&Op<bitlinear>::call));
  m.impl("bitlinear_train", TORCH_BOX(&Op<bitlinear_train>::call));
  m.impl("bitlinear_backward", TORCH_BOX(&Op<bitlinear_backward>::call));
}

STABLE_TORCH_LIBRARY_IMPL(bitcore, CompositeExplicitAutograd, m) {
  m.impl("list_kernels", TORCH_BOX(&Op<list_kernels>::call));
  m.impl("kernel_tile_calls", TORCH_BOX(&Op<kernel_tile_calls>::call));
}

}  // namespace
}  // namespace bitcore::torch_ops
