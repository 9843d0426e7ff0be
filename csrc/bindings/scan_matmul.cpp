// Dense float32 products on the CPU.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/check.h"
#include "scan/matmul.h"

namespace tilewright {

#if TILEWRIGHT_EMULATED
void bind_matmul(py::module_&) {}  // no CUDA kernel: nothing to emulate
#else
namespace {

TensorView matrix(Arguments& arguments, py::handle object, const char* name, Access access = Access::kRead) {
  const TensorView v = arguments.tensor(object, name, access);
  check_dtype(v, DType::kFloat32, name);
  check_value(!v.device.is_cuda, name, " must be on the CPU, got ", v.device);
  check_value(v.ndim == 2, name, " must have two axes, got shape ", v.sizes());
  return v;
}

void matmul(py::handle a, py::handle b, py::handle bias, py::handle out, int threads) {
  Arguments arguments;
  const TensorView left = matrix(arguments, a, "a"), right = matrix(arguments, b, "b");
  const TensorView result = matrix(arguments, out, "out", Access::kOverwrite);
  scan::MatmulParams p{};
  p.m = left.shape[0], p.k = left.shape[1], p.n = right.shape[1];
  check_value(right.shape[0] == p.k, "b must have ", p.k, " rows, as a has columns, got shape ",
              right.sizes());
  check_value(result.shape[0] == p.m && result.shape[1] == p.n && (p.n <= 1 || result.stride(1) == 1),
              "out must have shape (", p.m, ", ", p.n, ") and columns side by side, got shape ",
              result.sizes());
  p.a = static_cast<const float*>(left.data);
  p.b = static_cast<const float*>(right.data);
  p.c = static_cast<float*>(result.data);
  p.bias = static_cast<const float*>(arguments.flat(bias, "bias", p.n, DType::kFloat32, left.device));
  p.a_row = left.stride(0), p.a_k = left.stride(1);
  p.b_k = right.stride(0), p.b_column = right.stride(1);
  p.c_row = result.stride(0);
  py::gil_scoped_release released;
  scan::matmul(p, threads);
}

}  // namespace

void bind_matmul(py::module_& m) {
  m.def("matmul", &matmul, "Writes a @ b + bias (or None) of float32 matrices on the CPU, of any strides.");
}
#endif

}  // namespace tilewright
