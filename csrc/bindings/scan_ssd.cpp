// The SSD scan of Mamba-2.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "scan/ssd_chunk_scan.h"

namespace tilewright {
namespace {

using scan::SsdChunkScanParams;
using scan::SsdTensor;

// Reads the arguments of one call and holds them against the sizes that x and B give.
class Reader {
 public:
  explicit Reader(SsdChunkScanParams& params) : p(params) {}

  void sizes(py::handle x, py::handle B, py::handle cu_seqlens) {
    const TensorView view = arguments.tensor(x, "x"), states = arguments.tensor(B, "B");
    check_value(view.ndim == 4, "x: got shape ", view.sizes(), ", expected four axes");
    check_value(states.ndim == 4, "B: got shape ", states.sizes(), ", expected four axes");
    device = view.device;
    on_gpu = runs_on_gpu(view);
    p.dtype = view.dtype;
    const bool wide = view.dtype == DType::kFloat64 && !on_gpu;
    check_type(view.dtype == DType::kFloat32 || view.dtype == DType::kFloat16 ||
                   view.dtype == DType::kBFloat16 || wide,
               "x: got dtype ", view.dtype, ", allowed: float32, float16, bfloat16, and float64 on a CPU");
    p.weight_dtype = wide ? DType::kFloat64 : DType::kFloat32;
    p.batch = p.sequences = view.shape[0];
    p.length = view.shape[1];
    p.heads = int32_t(view.shape[2]);
    p.head_dim = int32_t(view.shape[3]);
    p.groups = int32_t(states.shape[2]);
    p.states = int32_t(states.shape[3]);
    check_value(p.heads > 0 && p.head_dim > 0, "x: got shape ", view.sizes(),
                ", heads and head_dim must not be 0");
    check_value(p.groups > 0 && p.states > 0 && p.heads % p.groups == 0, "B: got ", p.groups, " groups of ",
                p.states, " states, expected a divisor of ", p.heads, " heads and at least one state");
    if (cu_seqlens.is_none()) return;
    const TensorView positions = arguments.tensor(cu_seqlens, "cu_seqlens");
    check_dtype(positions, DType::kInt64, "cu_seqlens");
    check_contiguous(positions, "cu_seqlens");
    check_device(positions, device, "cu_seqlens");
    check_value(p.batch == 1 && positions.ndim == 1 && positions.shape[0] >= 2, "cu_seqlens: got shape ",
                positions.sizes(), " for batch ", p.batch, ", expected (sequences + 1,) and batch 1");
    p.cu_seqlens = static_cast<const int64_t*>(positions.data);
    p.sequences = positions.shape[0] - 1;
  }

  // (batch, step, heads, inner); an inner of 0 stands for a tensor without that axis.
  SsdTensor tensor(py::handle object, Label name, int64_t heads, int64_t inner, DType dtype,
                   Access access = Access::kRead) {
    if (object.is_none()) return {};
    const TensorView view = arguments.tensor(object, name, access);
    check_dtype(view, dtype, name);
    check_device(view, device, name);
    const bool fits = view.ndim == (inner == 0 ? 3 : 4) && view.shape[0] == p.batch &&
                      view.shape[1] == p.length && view.shape[2] == heads &&
                      (inner == 0 || view.shape[3] == inner);
    check_value(fits, name, ": got shape ", view.sizes(), ", which does not fit x and B");
    return {view.data, view.stride(0), view.stride(1), view.stride(2), inner == 0 ? 0 : view.stride(3)};
  }

  void* flat(py::handle object, Label name, int64_t numel, DType dtype) {
    return arguments.flat(object, name, numel, dtype, device);
  }

  void inputs(py::dict t, bool softplus, double dt_min, double dt_max) {
    sizes(t["x"], t["B"], t["cu_seqlens"]);
    const DType weight = p.weight_dtype;
    p.x = tensor(t["x"], "x", p.heads, p.head_dim, p.dtype);
    p.z = tensor(t["z"], "z", p.heads, p.head_dim, p.dtype);
    p.B = tensor(t["B"], "B", p.groups, p.states, p.dtype);
    p.C = tensor(t["C"], "C", p.groups, p.states, p.dtype);
    p.dt = tensor(t["dt"], "dt", p.heads, 0, weight);
    p.A = flat(t["A"], "A", p.heads, weight);
    p.dt_bias = flat(t["dt_bias"], "dt_bias", p.heads, weight);
    if (!t["D"].is_none()) p.D_wide = arguments.tensor(t["D"], "D").ndim == 2;
    p.D = flat(t["D"], "D", D_numel(), weight);
    p.initial_state = flat(t["initial_states"], "initial_states", state_numel(), weight);
    p.seq_idx = static_cast<const int64_t*>(flat(t["seq_idx"], "seq_idx", p.batch * p.length, DType::kInt64));
    p.softplus = softplus;
    p.dt_min = dt_min;
    p.dt_max = dt_max;
    const int64_t kept = ssd_chunk_count(p) * p.heads * p.states * p.head_dim;
    if (!on_gpu) p.chunk_states = flat(t["chunk_states"], "chunk_states", kept, weight);
    p.y = tensor(t["y"], "y", p.heads, p.head_dim, p.dtype);
  }

  int64_t state_numel() const { return p.sequences * p.heads * p.head_dim * p.states; }
  int64_t D_numel() const { return p.D_wide ? int64_t{p.heads} * p.head_dim : p.heads; }

  SsdChunkScanParams& p;
  Arguments arguments;
  Device device;
  bool on_gpu;
};

int64_t workspace_bytes(const SsdChunkScanParams& p, bool on_gpu, bool backward, int threads) {
  (void)threads;
  int64_t bytes = 0;
  if (backward) {
    TW_RUN(on_gpu, void(bytes = TW_CALL_CPU(ssd_chunk_scan_bwd_workspace_cpu, p, threads)),
           void(bytes = scan::ssd_chunk_scan_workspace_cuda(p, true)));
  } else {
    TW_RUN(on_gpu, void(bytes = TW_CALL_CPU(ssd_chunk_scan_fwd_workspace_cpu, p, threads)),
           void(bytes = scan::ssd_chunk_scan_workspace_cuda(p, false)));
  }
  return bytes;
}

// Bytes of scratch for a call on these tensors.
int64_t workspace(py::handle x, py::handle B, py::handle cu_seqlens, bool backward, int threads) {
  SsdChunkScanParams p{};
  Reader reader(p);
  reader.sizes(x, B, cu_seqlens);
  return workspace_bytes(p, reader.device.is_cuda, backward, threads);
}

void forward(py::dict tensors, bool softplus, double dt_min, double dt_max, int threads) {
  SsdChunkScanParams p{};
  Reader reader(p);
  reader.inputs(tensors, softplus, dt_min, dt_max);
  p.out = reader.tensor(tensors["out"], "out", p.heads, p.head_dim, p.dtype, Access::kOverwrite);
  p.final_state = reader.flat(tensors["final_states"], "final_states", reader.state_numel(), p.weight_dtype);
  const Device device = reader.device;
  p.workspace = reader.arguments.workspace(tensors["workspace"],
                                           workspace_bytes(p, device.is_cuda, false, threads), device);
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(ssd_chunk_scan_fwd_cpu, p, threads),
         scan::ssd_chunk_scan_fwd_cuda(p, device.index, stream));
}

void backward(py::dict tensors, bool softplus, double dt_min, double dt_max, int threads) {
  SsdChunkScanParams p{};
  Reader reader(p);
  reader.inputs(tensors, softplus, dt_min, dt_max);
  const DType weight = p.weight_dtype;
  check_value(p.z.data == nullptr || p.y.data != nullptr, "y: is needed where z is given");
  p.dout = reader.tensor(tensors["dout"], "dout", p.heads, p.head_dim, p.dtype);
  p.dx = reader.tensor(tensors["dx"], "dx", p.heads, p.head_dim, p.dtype, Access::kOverwrite);
  p.dz = reader.tensor(tensors["dz"], "dz", p.heads, p.head_dim, p.dtype, Access::kOverwrite);
  p.dB = reader.tensor(tensors["dB"], "dB", p.groups, p.states, p.dtype);
  p.dC = reader.tensor(tensors["dC"], "dC", p.groups, p.states, p.dtype);
  p.ddt = reader.tensor(tensors["ddt"], "ddt", p.heads, 0, weight);
  p.dA = reader.flat(tensors["dA"], "dA", p.heads, weight);
  p.dD = reader.flat(tensors["dD"], "dD", reader.D_numel(), weight);
  p.ddt_bias = reader.flat(tensors["ddt_bias"], "ddt_bias", p.heads, weight);
  p.dfinal_state = reader.flat(tensors["dfinal_states"], "dfinal_states", reader.state_numel(), weight);
  p.dinitial_state = reader.flat(tensors["dinitial_states"], "dinitial_states", reader.state_numel(), weight);
  const Device device = reader.device;
  p.workspace = reader.arguments.workspace(tensors["workspace"],
                                           workspace_bytes(p, device.is_cuda, true, threads), device);
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(ssd_chunk_scan_bwd_cpu, p, threads),
         scan::ssd_chunk_scan_bwd_cuda(p, device.index, stream));
}

}  // namespace

void bind_ssd_chunk_scan(py::module_& m) {
  m.def("ssd_chunk_scan_workspace", &workspace);
  m.def("ssd_chunk_scan_fwd", &forward);
  m.def("ssd_chunk_scan_bwd", &backward);
  m.attr("SSD_CHUNK") = scan::kSsdChunk;
}

}  // namespace tilewright
