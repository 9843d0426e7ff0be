// The decode step of a selective scan.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "bindings/scan_slots.h"
#include "core/dispatch.h"
#include "scan/selective_state_update.h"

namespace tilewright {
namespace {

using scan::SelectiveStateUpdateParams;
using scan::StepTensor;

// Which axes a tensor has, in this order.
enum Axes : int { kBatch = 1, kHead = 2, kChannel = 4, kState = 8 };

// Reads the arguments of one call, all of which have to fit to the state.
class StepReader {
 public:
  explicit StepReader(py::handle state_object) {
    const TensorView state = arguments.tensor(state_object, "state");
    check_value(state.ndim == 3 || state.ndim == 4,
                "state must have shape (batch, dim, N) or (batch, heads, dim, N), got ", state.sizes());
    has_heads_ = state.ndim == 4;
    device_ = state.device;
    dtype_ = state.dtype;
    on_gpu_ = runs_on_gpu(state);
    check_real(state, "state");
    check_written(state, "state");
    p.slots = state.shape[0];
    p.heads = has_heads_ ? state.shape[1] : 1;
    p.dim = state.shape[state.ndim - 2];
    p.states = state.shape[state.ndim - 1];
    p.state = spread(state, kBatch | kChannel | kState | (has_heads_ ? kHead : 0));
  }

  void read_x(py::handle object) {
    const TensorView v = arguments.tensor(object, "x");
    check_value(v.ndim == (has_heads_ ? 3 : 2), "x must have shape ",
                has_heads_ ? "(batch, heads, dim)" : "(batch, dim)", " to go with a state of ",
                has_heads_ ? 4 : 3, " axes, got ", v.sizes());
    p.batch = v.shape[0];
    p.x = read(object, "x", kBatch | kChannel);
  }

  // A tensor with these axes and, where the state has heads, that of heads.
  StepTensor read(py::handle object, const char* name, int axes) {
    if (object.is_none()) return {};
    if (has_heads_) axes |= kHead;
    const TensorView v = checked(object, name);
    int64_t expected[4];
    int32_t count = 0;
    if (axes & kBatch) expected[count++] = p.batch;
    if (axes & kHead) expected[count++] = p.heads;
    if (axes & kChannel) expected[count++] = p.dim;
    if (axes & kState) expected[count++] = p.states;
    bool fits = v.ndim == count;
    for (int32_t i = 0; fits && i < count; ++i) fits = v.shape[i] == expected[i];
    check_value(fits, name, " must have shape ", Shape{expected, count}, " to go with state and x, got ",
                v.sizes());
    return spread(v, axes);
  }

  // B or C: (batch, N), or (batch, groups, N).
  StepTensor read_projection(py::handle object, const char* name, int64_t& groups) {
    const TensorView v = checked(object, name);
    check_value((v.ndim == 2 || v.ndim == 3) && v.shape[0] == p.batch && v.shape[v.ndim - 1] == p.states,
                name, " must have shape (batch, N) or (batch, groups, N) with batch = ", p.batch,
                " and N = ", p.states, ", got ", v.sizes());
    groups = v.ndim == 3 ? v.shape[1] : 1;
    check_value(groups > 0 && p.heads % groups == 0, name, " must have groups that divide the heads, got ",
                groups, " groups for ", p.heads, " heads");
    return spread(v, kBatch | kState | (v.ndim == 3 ? kHead : 0));
  }

  void read_indices(py::handle object) {
    if (!object.is_none()) {
      const TensorView v = arguments.tensor(object, "state_batch_indices");
      check_device(v, device_, "state_batch_indices");
      check_indices(v, "state_batch_indices");
      check_value(v.ndim == 1 && v.shape[0] == p.batch, "state_batch_indices must have shape (batch,) = (",
                  p.batch, ",), got ", v.sizes());
      p.indices = v.data;
      p.indices_stride = v.stride(0);
      p.indices_are_64 = v.dtype == DType::kInt64;
    }
    check_slots(p.indices, p.indices_stride, p.indices_are_64, p.batch, p.slots, on_gpu_,
                "state_batch_indices", "state");
  }

  Arguments arguments;
  SelectiveStateUpdateParams p{};
  Device device() const { return device_; }

 private:
  TensorView checked(py::handle object, const char* name) {
    const TensorView v = arguments.tensor(object, name);
    check_device(v, device_, name);
    check_real_like(v, dtype_, "state", name);
    return v;
  }

  static StepTensor spread(const TensorView& v, int axes) {
    StepTensor t{v.data, 0, 0, 0, 0, v.dtype};
    int32_t axis = 0;
    if (axes & kBatch) t.batch = v.stride(axis++);
    if (axes & kHead) t.head = v.stride(axis++);
    if (axes & kChannel) t.channel = v.stride(axis++);
    if (axes & kState) t.state = v.stride(axis++);
    return t;
  }

  Device device_;
  DType dtype_;
  bool has_heads_, on_gpu_;
};

void update(py::handle state, py::handle x, py::handle dt, py::handle A, py::handle B, py::handle C,
            py::handle D, py::handle z, py::handle dt_bias, bool dt_softplus, py::handle indices,
            py::handle out, int threads) {
  StepReader reader(state);
  SelectiveStateUpdateParams& p = reader.p;
  reader.read_x(x);
  p.dt = reader.read(dt, "dt", kBatch | kChannel);
  p.A = reader.read(A, "A", kChannel | kState);
  int64_t groups_of_C = 1;
  p.B = reader.read_projection(B, "B", p.groups);
  p.C = reader.read_projection(C, "C", groups_of_C);
  check_value(groups_of_C == p.groups, "C must have as many groups as B, ", p.groups, ", got ", groups_of_C);
  p.D = reader.read(D, "D", kChannel);
  p.z = reader.read(z, "z", kBatch | kChannel);
  p.dt_bias = reader.read(dt_bias, "dt_bias", kChannel);
  p.out = reader.read(out, "out", kBatch | kChannel);
  p.softplus = dt_softplus;
  reader.read_indices(indices);
  if (p.batch == 0 || p.heads == 0 || p.dim == 0) return;
  const Device device = reader.device();
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, TW_CALL_CPU(selective_state_update_cpu, p, threads),
         scan::selective_state_update_cuda(p, device.index, stream));
}

}  // namespace

void bind_selective_state_update(py::module_& m) {
  m.def("selective_state_update", &update, "Writes out and moves state on.");
}

}  // namespace tilewright
