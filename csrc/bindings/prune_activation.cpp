// The activation-sparse linear layer.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "prune/activation_sparse_linear.h"

namespace tilewright {
namespace {

using prune::ActivationSparseLinearParams;
using prune::KeepInputsParams;

TensorView read_x(Arguments& arguments, py::handle object) {
  const TensorView x = arguments.tensor(object, "x");
  check_value(x.ndim == 2, "x: must have shape (tokens, in), got ", x.sizes());
  check_real(x, "x");
  return x;
}

uint8_t* read_keep(Arguments& arguments, py::handle object, const TensorView& x, Access access) {
  const TensorView keep = arguments.tensor(object, "keep", access);
  check_device(keep, x.device, "keep");
  check_dtype(keep, DType::kBool, "keep");
  check_value(keep.same_shape(x), "keep: must have shape (tokens, in) = ", x.sizes(), ", got ", keep.sizes());
  if (keep.numel() > 0) check_contiguous(keep, "keep");
  return static_cast<uint8_t*>(keep.data);
}

void keep_inputs(py::handle x_object, py::handle scale, py::handle threshold, int64_t count, py::handle keep,
                 py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView x = read_x(arguments, x_object);
  const DType wide = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  KeepInputsParams p{};
  p.x = {x.data, x.stride(0), x.stride(1)};
  p.tokens = x.shape[0], p.in = x.shape[1], p.count = count;
  check_value(p.in < int64_t{1} << 31, "x: at most 2^31 - 1 inputs, got ", p.in);
  p.dtype = x.dtype;
  p.scale = arguments.flat(scale, "scale", p.in, wide, x.device);
  p.threshold = arguments.flat(threshold, "threshold", 1, wide, x.device);
  check_value(scale.is_none() != threshold.is_none(), "scale, threshold: one of them must be given");
  p.keep = read_keep(arguments, keep, x, Access::kOverwrite);
  if (!runs_on_gpu(x) && !scale.is_none()) {
    const TensorView room = arguments.tensor(workspace, "workspace");
    check_dtype(room, DType::kUInt8, "workspace");
    check_numel(room, prune::keep_inputs_workspace(p.in, itemsize(x.dtype), threads), "workspace");
    p.workspace = room.data;
  }
  if (p.tokens * p.in == 0) return;
  const Stream stream = arguments.current_stream(x.device);
  py::gil_scoped_release released;
  (void)stream, (void)threads;
  TW_RUN(x.device.is_cuda, TW_CALL_CPU(keep_inputs_cpu, p, threads),
         prune::keep_inputs_cuda(p, x.device.index, stream));
}

int64_t keep_inputs_workspace(int64_t in, int64_t item, int threads) {
  return prune::keep_inputs_workspace(in, item, threads);
}

int64_t workspace_of(bool on_gpu, int64_t tokens, int64_t in, int64_t out, int64_t item, int device) {
  (void)device, (void)item;
  int64_t bytes = 0;
  TW_RUN(on_gpu, (void)(bytes = prune::activation_sparse_linear_workspace(tokens, in, out, item)),
         (void)(bytes = prune::activation_sparse_linear_workspace_cuda(tokens, in, out, device)));
  return bytes;
}

int64_t linear_workspace(py::handle weight_object, int64_t tokens) {
  Arguments arguments;
  const TensorView weight = arguments.tensor(weight_object, "weight_t");
  check_value(weight.ndim == 2, "weight_t: must have shape (in, out), got ", weight.sizes());
  return workspace_of(weight.device.is_cuda, tokens, weight.shape[0], weight.shape[1], itemsize(weight.dtype),
                      weight.device.index);
}

void linear(py::handle x_object, py::handle keep, py::handle weight_object, py::handle bias, py::handle y,
            py::handle workspace, int threads) {
  Arguments arguments;
  const TensorView x = read_x(arguments, x_object);
  ActivationSparseLinearParams p{};
  p.x = {x.data, x.stride(0), x.stride(1)};
  p.tokens = x.shape[0], p.in = x.shape[1];
  p.dtype = x.dtype;
  check_value(p.tokens <= prune::kMaxActiveTokens, "x: at most ", prune::kMaxActiveTokens, " tokens, got ",
              p.tokens);
  p.keep = read_keep(arguments, keep, x, Access::kRead);
  const TensorView weight = arguments.tensor(weight_object, "weight_t");
  check_device(weight, x.device, "weight_t");
  check_dtype(weight, x.dtype, "weight_t");
  check_value(weight.ndim == 2 && weight.shape[0] == p.in,
              "weight_t: must have shape (in, out) with in = ", p.in, ", got ", weight.sizes());
  check_value(weight.shape[1] <= 1 || weight.stride(1) == 1,
              "weight_t: the weights of an input must lie side by side, got a stride of ", weight.stride(1));
  p.weight = weight.data;
  p.weight_row = weight.stride(0);
  p.out = weight.shape[1];
  p.bias = arguments.flat(bias, "bias", p.out, x.dtype, x.device);
  p.y = arguments.flat(y, "y", p.tokens * p.out, x.dtype, x.device);
  if (p.tokens * p.out == 0) return;
  const int64_t bytes =
      workspace_of(x.device.is_cuda, p.tokens, p.in, p.out, itemsize(x.dtype), x.device.index);
  const TensorView room = arguments.tensor(workspace, "workspace");
  check_dtype(room, DType::kUInt8, "workspace");
  check_numel(room, bytes, "workspace");
  p.workspace = room.data;
  const Stream stream = arguments.current_stream(x.device);
  py::gil_scoped_release released;
  (void)stream, (void)threads;
  TW_RUN(x.device.is_cuda, TW_CALL_CPU(activation_sparse_linear_cpu, p, threads),
         prune::activation_sparse_linear_cuda(p, x.device.index, stream));
}

}  // namespace

void bind_activation_sparse(py::module_& m) {
  m.def("keep_inputs_workspace", &keep_inputs_workspace, "Bytes that keep_inputs needs on a CPU.");
  m.def("keep_inputs", &keep_inputs, "Writes which inputs each token keeps.");
  m.def("activation_sparse_linear_workspace", &linear_workspace,
        "Bytes that activation_sparse_linear needs.");
  m.def("activation_sparse_linear", &linear, "Writes y of the inputs that are kept.");
}

}  // namespace tilewright
