// The gated RMS norm.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "scan/gated_rms_norm.h"

namespace tilewright {
namespace {

using scan::GatedRmsNormParams;
using scan::NormGate;
using scan::NormRows;

// Reads tensors that share a device and reports what does not fit.
class Reader {
 public:
  // x, and what follows from it.
  Reader(py::handle x, int64_t group_size) {
    const TensorView v = arguments.tensor(x, "x");
    check_value(v.ndim >= 1 && v.shape[v.ndim - 1] >= 1, "x must have shape (..., dim), got ", v.sizes());
    check_real(v, "x");
    device = v.device;
    p.dtype = v.dtype;
    p.dim = v.shape[v.ndim - 1];
    p.rows = v.numel() / p.dim;
    check_value(group_size >= 1 && p.dim % group_size == 0, "group_size must divide the ", p.dim,
                " channels of x, got ", group_size);
    p.group = group_size;
    p.x = rows_of(v, "x");
  }

  NormRows rows(py::handle object, const char* name, Access access = Access::kRead) {
    const TensorView v = arguments.tensor(object, name, access);
    check_device(v, device, name);
    check_dtype(v, p.dtype, name);
    check_value(v.ndim >= 1 && v.shape[v.ndim - 1] == p.dim && v.numel() == p.rows * p.dim, name,
                " must have the shape of x: ", p.rows, " rows of ", p.dim, ", got ", v.sizes());
    return rows_of(v, name);
  }

  void read_weight(py::handle weight) {
    const TensorView v = arguments.tensor(weight, "weight");
    check_dtypes(v.dtype == p.dtype || (v.dtype == DType::kFloat32 && p.dtype != DType::kFloat64), v,
                 "float32 or x's", "weight");
    p.weight_dtype = v.dtype;
    p.weight = arguments.flat(weight, "weight", p.dim, v.dtype, device);
  }

  // x's gate, and where it comes.
  void read_gate(py::handle z, bool norm_before_gate) {
    if (z.is_none()) return;
    p.z = rows(z, "z");
    p.gate = norm_before_gate ? NormGate::kAfter : NormGate::kBefore;
  }

  void read_rstd(py::handle rstd) {
    const DType wide = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    p.rstd = arguments.flat(rstd, "rstd", p.rows * (p.dim / p.group), wide, device);
  }

  Arguments arguments;
  Device device;
  GatedRmsNormParams p{};

 private:
  // One stride for all rows, or a refusal.
  NormRows rows_of(const TensorView& v, const char* name) const {
    const std::optional<int64_t> stride = row_stride(v);
    const bool whole = v.numel() == 0 || p.dim == 1 || v.stride(v.ndim - 1) == 1;
    check_value(stride.has_value() && whole, name,
                " must have rows at one distance, whose elements lie side by side, got shape ", v.sizes(),
                " with other strides; call .contiguous()");
    return {v.data, p.rows > 1 ? *stride : p.dim};
  }
};

int64_t bytes_of_workspace(const Reader& reader) {
  int64_t bytes = 0;
  TW_RUN(reader.device.is_cuda, void(bytes = scan::gated_rms_norm_workspace(reader.p, false)),
         void(bytes = scan::gated_rms_norm_workspace(reader.p, true)));
  return bytes;
}

void forward(py::handle x, py::handle weight, py::handle z, double eps, int64_t group_size,
             bool norm_before_gate, py::handle out, py::handle rstd, int threads) {
  Reader reader(x, group_size);
  GatedRmsNormParams& p = reader.p;
  reader.read_weight(weight);
  reader.read_gate(z, norm_before_gate);
  reader.read_rstd(rstd);
  p.eps = eps;
  p.out = reader.rows(out, "out", Access::kOverwrite);
  if (p.rows == 0) return;
  const Stream stream = reader.arguments.current_stream(reader.device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(reader.device.is_cuda, TW_CALL_CPU(gated_rms_norm_fwd_cpu, p, threads),
         scan::gated_rms_norm_fwd_cuda(p, reader.device.index, stream));
}

void backward(py::handle dout, py::handle x, py::handle weight, py::handle z, py::handle rstd,
              int64_t group_size, bool norm_before_gate, py::handle dx, py::handle dweight, py::handle dz,
              py::handle workspace, int threads) {
  Reader reader(x, group_size);
  GatedRmsNormParams& p = reader.p;
  reader.read_weight(weight);
  reader.read_gate(z, norm_before_gate);
  reader.read_rstd(rstd);
  p.dout = reader.rows(dout, "dout");
  p.dx = reader.rows(dx, "dx", Access::kOverwrite);
  if (p.gate != NormGate::kNone) p.dz = reader.rows(dz, "dz", Access::kOverwrite);
  p.dweight = reader.arguments.flat(dweight, "dweight", p.dim, p.weight_dtype, reader.device);
  if (p.rows == 0) return;
  p.workspace = reader.arguments.workspace(workspace, bytes_of_workspace(reader), reader.device);
  const Stream stream = reader.arguments.current_stream(reader.device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(reader.device.is_cuda, TW_CALL_CPU(gated_rms_norm_bwd_cpu, p, threads),
         scan::gated_rms_norm_bwd_cuda(p, reader.device.index, stream));
}

int64_t workspace_bytes(py::handle x, int64_t group_size) {
  return bytes_of_workspace(Reader(x, group_size));
}

}  // namespace

void bind_gated_rms_norm(py::module_& m) {
  m.def("gated_rms_norm_fwd", &forward, "Writes out and rstd.");
  m.def("gated_rms_norm_bwd", &backward, "Writes dx, dweight and, with z, dz.");
  m.def("gated_rms_norm_workspace", &workspace_bytes, "Bytes of scratch of a backward pass.");
}

}  // namespace tilewright
