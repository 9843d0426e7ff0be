// The causal convolution and its decode step.
#include "bindings/arguments.h"
#include "bindings/families.h"
#include "bindings/scan_slots.h"
#include "core/dispatch.h"
#include "scan/causal_conv1d.h"
#include "scan/causal_conv1d_update.h"

namespace tilewright {
namespace {

using scan::CausalConv1dParams;
using scan::ConvTensor;

// Reads tensors that share a device and reports what does not fit.
class Reader {
 public:
  explicit Reader(Device device) : device_(device) {}

  TensorView view(py::handle object, const char* name, int32_t ndim, const char* axes,
                  Access access = Access::kRead) {
    const TensorView v = arguments.tensor(object, name, access);
    check_value(v.ndim == ndim, name, " must have shape ", axes, ", got ", v.sizes());
    check_device(v, device_, name);
    return v;
  }

  // (batch, channel, step), absent if None.
  ConvTensor steps(py::handle object, const char* name, const CausalConv1dParams& p, int64_t steps,
                   const char* axes, Access access = Access::kRead) {
    if (object.is_none()) return {};
    const TensorView v = view(object, name, 3, axes, access);
    check_dtype(v, p.dtype, name);
    check_value(v.shape[0] == p.batch && v.shape[1] == p.dim && v.shape[2] == steps, name,
                " must have shape ", axes, " = (", p.batch, ", ", p.dim, ", ", steps, "), got ", v.sizes());
    return {v.data, v.stride(0), v.stride(1), v.stride(2)};
  }

  Arguments arguments;

 private:
  Device device_;
};

void read_weights(Reader& reader, CausalConv1dParams& p, py::handle weight, py::handle bias) {
  const TensorView w = reader.view(weight, "weight", 2, "(dim, width)");
  check_value(w.shape[0] == p.dim, "weight must have shape (dim, width) with dim = ", p.dim, ", got ",
              w.sizes());
  check_value(w.shape[1] >= 1 && w.shape[1] <= scan::kMaxConvWidth, "weight must have a width of 1 to ",
              scan::kMaxConvWidth, ", got ", w.shape[1]);
  check_real_like(w, p.dtype, "x", "weight");
  p.weight = w.data;
  p.weight_channel = w.stride(0);
  p.weight_tap = w.stride(1);
  p.weight_dtype = w.dtype;
  p.width = int32_t(w.shape[1]);
  if (bias.is_none()) return;
  const TensorView v = reader.view(bias, "bias", 1, "(dim,)");
  check_dtype(v, p.weight_dtype, "bias");
  check_numel(v, p.dim, "bias");
  p.bias = v.data;
  p.bias_channel = v.stride(0);
}

void read_seq_idx(Reader& reader, CausalConv1dParams& p, py::handle seq_idx) {
  if (seq_idx.is_none()) return;
  const TensorView v = reader.view(seq_idx, "seq_idx", 2, "(batch, length)");
  check_indices(v, "seq_idx");
  check_value(v.shape[0] == p.batch && v.shape[1] == p.length, "seq_idx must have shape (batch, length) = (",
              p.batch, ", ", p.length, "), got ", v.sizes());
  p.seq_idx = v.data;
  p.seq_batch = v.stride(0);
  p.seq_step = v.stride(1);
  p.seq_is_64 = v.dtype == DType::kInt64;
}

// What forward and backward have in common; `x` has been read.
CausalConv1dParams conv_params(Reader& reader, const TensorView& x, py::handle weight, py::handle bias,
                               py::handle seq_idx, py::handle initial, bool silu) {
  check_value(x.ndim == 3, "x must have shape (batch, dim, length), got ", x.sizes());
  check_real(x, "x");
  CausalConv1dParams p{};
  p.x = {x.data, x.stride(0), x.stride(1), x.stride(2)};
  p.batch = x.shape[0];
  p.dim = x.shape[1];
  p.length = x.shape[2];
  p.dtype = x.dtype;
  p.silu = silu;
  read_weights(reader, p, weight, bias);
  read_seq_idx(reader, p, seq_idx);
  p.initial = reader.steps(initial, "initial_states", p, p.width - 1, "(batch, dim, width - 1)");
  return p;
}

int64_t bytes_of_workspace(const CausalConv1dParams& p, bool backward, Device device) {
  int64_t bytes = 0;
  TW_RUN(device.is_cuda, void(bytes = scan::causal_conv1d_workspace_cpu(p, backward)),
         void(bytes = scan::causal_conv1d_workspace_cuda(p, backward, device.index)));
  return bytes;
}

bool is_empty(const CausalConv1dParams& p) { return p.batch == 0 || p.dim == 0 || p.length == 0; }

void forward(py::handle x, py::handle weight, py::handle bias, py::handle seq_idx, py::handle initial,
             bool silu, py::handle out, py::handle final, py::handle workspace, int threads) {
  Arguments first;
  const TensorView v = first.tensor(x, "x");
  Reader reader(v.device);
  CausalConv1dParams p = conv_params(reader, v, weight, bias, seq_idx, initial, silu);
  p.out = reader.steps(out, "out", p, p.length, "(batch, dim, length)", Access::kOverwrite);
  p.final = reader.steps(final, "final_states", p, p.width - 1, "(batch, dim, width - 1)");
  if (is_empty(p)) return;
  p.workspace = reader.arguments.workspace(workspace, bytes_of_workspace(p, false, v.device), v.device);
  const Stream stream = reader.arguments.current_stream(v.device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(v.device.is_cuda, TW_CALL_CPU(causal_conv1d_fwd_cpu, p, threads),
         scan::causal_conv1d_fwd_cuda(p, v.device.index, stream));
}

void backward(py::handle dout, py::handle dfinal, py::handle x, py::handle weight, py::handle bias,
              py::handle seq_idx, py::handle initial, bool silu, py::handle dx, py::handle dweight,
              py::handle dbias, py::handle dinitial, py::handle workspace, int threads) {
  Arguments first;
  const TensorView v = first.tensor(x, "x");
  Reader reader(v.device);
  CausalConv1dParams p = conv_params(reader, v, weight, bias, seq_idx, initial, silu);
  p.dout = reader.steps(dout, "dout", p, p.length, "(batch, dim, length)");
  p.dfinal = reader.steps(dfinal, "dfinal_states", p, p.width - 1, "(batch, dim, width - 1)");
  p.dx = reader.steps(dx, "dx", p, p.length, "(batch, dim, length)", Access::kOverwrite);
  p.dinitial = reader.steps(dinitial, "dinitial_states", p, p.width - 1, "(batch, dim, width - 1)");
  const TensorView dw = reader.view(dweight, "dweight", 2, "(dim, width)");
  check_dtype(dw, p.weight_dtype, "dweight");
  check_contiguous(dw, "dweight");
  check_numel(dw, p.dim * p.width, "dweight");
  p.dweight = dw.data;
  if (!dbias.is_none()) {
    const TensorView db = reader.view(dbias, "dbias", 1, "(dim,)");
    check_dtype(db, p.weight_dtype, "dbias");
    check_contiguous(db, "dbias");
    check_numel(db, p.dim, "dbias");
    p.dbias = db.data;
  }
  if (is_empty(p)) return;
  p.workspace = reader.arguments.workspace(workspace, bytes_of_workspace(p, true, v.device), v.device);
  const Stream stream = reader.arguments.current_stream(v.device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(v.device.is_cuda, TW_CALL_CPU(causal_conv1d_bwd_cpu, p, threads),
         scan::causal_conv1d_bwd_cuda(p, v.device.index, stream));
}

int64_t workspace_bytes(py::handle x, int width, bool has_seq_idx, bool backward) {
  Arguments arguments;
  const TensorView v = arguments.tensor(x, "x");
  CausalConv1dParams p{};
  p.x = {v.data, v.stride(0), v.stride(1), v.stride(2)};
  p.batch = v.shape[0];
  p.dim = v.shape[1];
  p.length = v.shape[2];
  p.width = width;
  p.dtype = v.dtype;
  if (has_seq_idx) p.seq_idx = &p;  // only whether there is one matters
  return bytes_of_workspace(p, backward, v.device);
}

// Integers [batch]; nothing is read of them here.
const void* read_integers(Reader& reader, py::handle object, const char* name, int64_t batch, int64_t& stride,
                          bool& is_64) {
  if (object.is_none()) return nullptr;
  const TensorView v = reader.view(object, name, 1, "(batch,)");
  check_indices(v, name);
  check_numel(v, batch, name);
  stride = v.stride(0);
  is_64 = v.dtype == DType::kInt64;
  return v.data;
}

void update(py::handle x, py::handle conv_state, py::handle weight, py::handle bias, bool silu,
            py::handle cache_seqlens, py::handle indices, py::handle out, int threads) {
  Arguments first;
  const TensorView v = first.tensor(x, "x");
  check_value(v.ndim == 2 || v.ndim == 3, "x must have shape (batch, dim) or (batch, dim, steps), got ",
              v.sizes());
  check_real(v, "x");
  Reader reader(v.device);
  scan::CausalConv1dUpdateParams p{};
  p.conv.batch = v.shape[0];
  p.conv.dim = v.shape[1];
  p.conv.length = v.ndim == 3 ? v.shape[2] : 1;
  p.conv.dtype = v.dtype;
  p.conv.silu = silu;
  p.conv.x = {v.data, v.stride(0), v.stride(1), v.ndim == 3 ? v.stride(2) : 0};
  const TensorView o = reader.arguments.tensor(out, "out");
  check_value(o.same_shape(v) && o.dtype == v.dtype, "out must be like x");
  p.conv.out = {o.data, o.stride(0), o.stride(1), o.ndim == 3 ? o.stride(2) : 0};
  read_weights(reader, p.conv, weight, bias);
  const TensorView s = reader.view(conv_state, "conv_state", 3, "(batch, dim, state_length)");
  check_dtype(s, v.dtype, "conv_state");
  check_value(s.shape[1] == p.conv.dim && s.shape[2] >= p.conv.width - 1,
              "conv_state must have shape (batch or slots, dim, at least width - 1) with dim = ", p.conv.dim,
              " and width = ", p.conv.width, ", got ", s.sizes());
  check_written(s, "conv_state");
  p.state = {s.data, s.stride(0), s.stride(1), s.stride(2)};
  p.slots = s.shape[0];
  p.state_length = s.shape[2];
  p.cache_seqlens =
      read_integers(reader, cache_seqlens, "cache_seqlens", p.conv.batch, p.cache_stride, p.cache_is_64);
  p.indices =
      read_integers(reader, indices, "conv_state_indices", p.conv.batch, p.indices_stride, p.indices_are_64);
  check_slots(p.indices, p.indices_stride, p.indices_are_64, p.conv.batch, p.slots, runs_on_gpu(v),
              "conv_state_indices", "conv_state");
  if (is_empty(p.conv)) return;
  const Stream stream = reader.arguments.current_stream(v.device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(v.device.is_cuda, TW_CALL_CPU(causal_conv1d_update_cpu, p, threads),
         scan::causal_conv1d_update_cuda(p, v.device.index, stream));
}

}  // namespace

void bind_causal_conv1d(py::module_& m) {
  m.def("causal_conv1d_fwd", &forward, "Writes out and, unless None, final_states.");
  m.def("causal_conv1d_bwd", &backward, "Writes the gradients that are not None.");
  m.def("causal_conv1d_update", &update, "Writes out and moves conv_state on.");
  m.def("causal_conv1d_workspace", &workspace_bytes, "Bytes of scratch.");
}

}  // namespace tilewright
