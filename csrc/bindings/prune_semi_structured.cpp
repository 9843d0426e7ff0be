// The semi-structured linear layer, its gradients, and its weight's two forms.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "prune/semi_structured_linear.h"

namespace tilewright {
namespace {

using namespace prune;

// Sizes come from `values` and `positions` alone; `in` must be said, since positions are whole bytes.
SemiStructuredWeight weight_of(Arguments& arguments, py::handle values, py::handle positions, int64_t in,
                               int n, int m, DType& dtype, Device& device, Access access = Access::kRead) {
  check_value(n >= 1 && n < m && m <= 32, "n, m: need 1 <= n < m <= 32, got ", n, ", ", m);
  check_value(in >= 0 && in % m == 0, "in: must be a multiple of m = ", m, ", got ", in);
  const TensorView v = arguments.tensor(values, "values", access);
  check_dtypes(is_real(v.dtype), v, "float32, float16, bfloat16, float64", "values");
  dtype = v.dtype, device = v.device;
  const TensorView at = arguments.tensor(positions, "positions");
  check_dtype(at, DType::kUInt8, "positions");
  check_device(at, device, "positions");
  SemiStructuredWeight w{v.data, static_cast<uint8_t*>(at.data), v.ndim == 2 ? v.shape[0] : 0, in, n, m};
  check_value(v.ndim == 2 && v.shape[1] == w.kept(), "values: must have shape (out, ", w.kept(), "), got ",
              v.sizes());
  check_value(at.ndim == 2 && at.shape[0] == w.out && at.shape[1] == position_bytes(in),
              "positions: must have shape (", w.out, ", ", position_bytes(in), "), got ", at.sizes());
  if (v.numel() > 0) check_contiguous(v, "values");
  if (at.numel() > 0) check_contiguous(at, "positions");
  return w;
}

Matrix matrix(Arguments& arguments, py::handle object, const char* name, int64_t rows, int64_t columns,
              DType dtype, Device device, Access access = Access::kRead) {
  if (object.is_none()) return {};
  const TensorView v = arguments.tensor(object, name, access);
  check_dtype(v, dtype, name);
  check_device(v, device, name);
  check_value(v.ndim == 2 && v.shape[0] == rows && v.shape[1] == columns, name, ": must have shape (", rows,
              ", ", columns, "), got ", v.sizes());
  return {v.data, v.stride(0), v.stride(1)};
}

int64_t rows_of(Arguments& arguments, py::handle object, const char* name) {
  const TensorView v = arguments.tensor(object, name);
  check_value(v.ndim == 2, name, ": must have two axes, got ", v.sizes());
  return v.shape[0];
}

void check_place(DType dtype, const TensorView& values) {
  if (dtype == DType::kFloat64 && runs_on_gpu(values))
    fail(ErrorKind::kNotImplemented, "values: float64 runs on the CPU only");
}

int64_t workspace_size(int64_t tokens, int64_t out, int64_t in, int n, int m, bool is_float64, int call,
                       int threads) {
  SemiStructuredLinearParams p{};
  p.weight = {nullptr, nullptr, out, in, n, m};
  p.tokens = tokens;
  p.dtype = is_float64 ? DType::kFloat64 : DType::kFloat32;
#if TILEWRIGHT_EMULATED
  (void)call, (void)threads;
  return 0;
#else
  return TW_CALL_CPU(semi_structured_workspace_cpu, p, SemiStructuredCall(call), threads);
#endif
}

void run(const SemiStructuredLinearParams& p, SemiStructuredCall call, Device device, Stream stream,
         int threads) {
  py::gil_scoped_release released;
  (void)stream, (void)threads;
  TW_RUN(device.is_cuda, TW_CALL_CPU(semi_structured_linear_cpu, p, call, threads),
         semi_structured_linear_cuda(p, call, device.index, stream));
}

// What every call reads: the weight, and one of the matrices of tokens.
SemiStructuredLinearParams read_call(Arguments& arguments, Device& device, py::handle values,
                                     py::handle positions, int64_t in, int n, int m, py::handle tokens,
                                     const char* name, py::handle workspace) {
  SemiStructuredLinearParams p{};
  p.weight = weight_of(arguments, values, positions, in, n, m, p.dtype, device);
  check_place(p.dtype, arguments.tensor(values, "values"));
  p.tokens = rows_of(arguments, tokens, name);
  p.workspace = workspace.is_none() ? nullptr : arguments.tensor(workspace, "workspace").data;
  return p;
}

void forward(py::handle x, py::handle values, py::handle positions, py::handle bias, py::handle y,
             py::handle z, int64_t in, int n, int m, int activation, py::handle workspace, int threads) {
  Arguments arguments;
  Device device;
  SemiStructuredLinearParams p = read_call(arguments, device, values, positions, in, n, m, x, "x", workspace);
  p.x = matrix(arguments, x, "x", p.tokens, in, p.dtype, device);
  p.y = matrix(arguments, y, "y", p.tokens, p.weight.out, p.dtype, device, Access::kOverwrite);
  p.z = matrix(arguments, z, "z", p.tokens, p.weight.out, p.dtype, device, Access::kOverwrite);
  p.bias = arguments.flat(bias, "bias", p.weight.out, p.dtype, device);
  check_value(activation >= 0 && activation <= int(Activation::kSilu), "activation: got ", activation);
  p.activation = Activation(activation);
  if (p.tokens * p.weight.out == 0) return;
  run(p, SemiStructuredCall::kForward, device, arguments.current_stream(device), threads);
}

void input_gradient(py::handle dz, py::handle values, py::handle positions, py::handle dx, int64_t in, int n,
                    int m, py::handle workspace, int threads) {
  Arguments arguments;
  Device device;
  SemiStructuredLinearParams p =
      read_call(arguments, device, values, positions, in, n, m, dz, "dz", workspace);
  p.y = matrix(arguments, dz, "dz", p.tokens, p.weight.out, p.dtype, device);
  p.dx = matrix(arguments, dx, "dx", p.tokens, in, p.dtype, device, Access::kOverwrite);
  if (p.tokens * in == 0) return;
  run(p, SemiStructuredCall::kInput, device, arguments.current_stream(device), threads);
}

void weight_gradient(py::handle dz, py::handle x, py::handle values, py::handle positions, py::handle dvalues,
                     int64_t in, int n, int m, py::handle workspace, int threads) {
  Arguments arguments;
  Device device;
  SemiStructuredLinearParams p =
      read_call(arguments, device, values, positions, in, n, m, dz, "dz", workspace);
  p.y = matrix(arguments, dz, "dz", p.tokens, p.weight.out, p.dtype, device);
  p.x = matrix(arguments, x, "x", p.tokens, in, p.dtype, device);
  p.dvalues = arguments.flat(dvalues, "dvalues", p.weight.out * p.weight.kept(), p.dtype, device);
  if (p.weight.out * in == 0) return;
  run(p, SemiStructuredCall::kWeight, device, arguments.current_stream(device), threads);
}

SemiStructuredFormatParams format_of(Arguments& arguments, py::handle dense, py::handle mask,
                                     py::handle values, py::handle positions, int n, int m, Device& device,
                                     Access access) {
  const TensorView d = arguments.tensor(dense, "dense");
  check_value(d.ndim == 2, "dense: must have shape (out, in), got ", d.sizes());
  SemiStructuredFormatParams p{};
  p.weight = weight_of(arguments, values, positions, d.shape[1], n, m, p.dtype, device, access);
  p.dense = matrix(arguments, dense, "dense", p.weight.out, d.shape[1], p.dtype, device);
  p.mask = matrix(arguments, mask, "mask", p.weight.out, d.shape[1], DType::kBool, device);
  return p;
}

void compress(py::handle dense, py::handle mask, py::handle values, py::handle positions, int n, int m,
              int threads) {
  Arguments arguments;
  Device device;
  const SemiStructuredFormatParams p =
      format_of(arguments, dense, mask, values, positions, n, m, device, Access::kOverwrite);
  if (p.weight.out * p.weight.in == 0) return;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)stream, (void)threads;
  TW_RUN(device.is_cuda, TW_CALL_CPU(semi_structured_compress_cpu, p, threads),
         semi_structured_compress_cuda(p, device.index, stream));
}

void decompress(py::handle values, py::handle positions, py::handle dense, int n, int m, int threads) {
  Arguments arguments;
  Device device;
  const SemiStructuredFormatParams p =
      format_of(arguments, dense, py::none(), values, positions, n, m, device, Access::kRead);
  if (p.weight.out * p.weight.in == 0) return;
  const Stream stream = arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)stream, (void)threads;
  TW_RUN(device.is_cuda, TW_CALL_CPU(semi_structured_decompress_cpu, p, threads),
         semi_structured_decompress_cuda(p, device.index, stream));
}

}  // namespace

void bind_semi_structured(py::module_& m) {
  m.def("semi_structured_workspace", &workspace_size, "Bytes of memory that a call on the CPU needs beside.");
  m.def("semi_structured_fwd", &forward, "Writes the layer's result.");
  m.def("semi_structured_dx", &input_gradient, "Writes the gradient of the input.");
  m.def("semi_structured_dw", &weight_gradient, "Writes the gradient of the kept elements.");
  m.def("semi_structured_compress", &compress, "Writes a dense weight's kept elements and their positions.");
  m.def("semi_structured_decompress", &decompress, "Writes the dense weight.");
}

}  // namespace tilewright
