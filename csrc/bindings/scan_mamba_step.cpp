// The decode step of a whole Mamba layer.
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "bindings/scan_slots.h"
#include "core/dispatch.h"
#include "scan/mamba_step.h"

namespace tilewright {
namespace {

using scan::ConvTensor;
using scan::MambaStepParams;
using scan::StepTensor;
using scan::TokenLinearParams;

// Reads the arguments of one call; sizes come from the first tensor that has them.
class StepReader {
 public:
  explicit StepReader(py::handle hidden) : hidden_(arguments.tensor(hidden, "hidden_states")) {
    check_value(hidden_.ndim == 2, "hidden_states must have shape (batch, d_model), got ", hidden_.sizes());
    check_real(hidden_, "hidden_states");
    check_value(hidden_.stride(1) == 1 || hidden_.shape[1] <= 1,
                "hidden_states must have features side by side, got stride ", hidden_.stride(1));
  }

  const TensorView& hidden() const { return hidden_; }
  DType dtype() const { return hidden_.dtype; }
  int64_t batch() const { return hidden_.shape[0]; }

  // A tensor of this shape; sizes below 0 are not checked.
  TensorView view(py::handle object, const char* name, const char* axes,
                  std::initializer_list<int64_t> sizes) {
    const TensorView v = arguments.tensor(object, name);
    check_device(v, hidden_.device, name);
    bool fits = v.ndim == int32_t(sizes.size());
    int32_t axis = 0;
    for (int64_t size : sizes) {
      fits = fits && (size < 0 || v.shape[axis] == size);
      ++axis;
    }
    if (!fits) {
      int64_t expected[4];
      axis = 0;
      for (int64_t size : sizes) expected[axis++] = size;
      fail(ErrorKind::kValue, name, " must have shape ", axes, " = ", Shape{expected, axis},
           " (-1: any), got ", v.sizes());
    }
    return v;
  }

  TensorView of_dtype(py::handle object, const char* name, const char* axes,
                      std::initializer_list<int64_t> sizes) {
    const TensorView v = view(object, name, axes, sizes);
    check_type(v.dtype == dtype(), name, " must have the dtype of hidden_states, ", dtype(), ", got ",
               v.dtype);
    return v;
  }

  // Of the recurrence: float32, float16 or bfloat16, or float64 with float64.
  TensorView of_recurrence(py::handle object, const char* name, const char* axes,
                           std::initializer_list<int64_t> sizes) {
    const TensorView v = view(object, name, axes, sizes);
    check_real_like(v, dtype(), "hidden_states", name);
    return v;
  }

  Arguments arguments;

 private:
  TensorView hidden_;
};

TokenLinearParams linear(StepReader& reader, const TensorView& weight, py::handle bias,
                         const char* bias_name) {
  TokenLinearParams p{};
  p.weight = weight.data;
  p.weight_row = weight.stride(0);
  p.weight_column = weight.stride(1);
  p.tokens = reader.batch();
  p.rows = weight.shape[0];
  p.columns = weight.shape[1];
  p.dtype = reader.dtype();
  if (!bias.is_none()) {
    const TensorView v = reader.of_dtype(bias, bias_name, "(rows of the weight,)", {p.rows});
    p.bias = v.data;
    p.bias_row = v.stride(0);
  }
  return p;
}

struct Sizes {
  int64_t model, dim, rank, states;
};

Sizes read_weights(StepReader& reader, MambaStepParams& p, py::handle in_weight, py::handle in_bias,
                   py::handle x_weight, py::handle dt_weight, py::handle out_weight, py::handle out_bias) {
  const TensorView in =
      reader.of_dtype(in_weight, "in_proj_weight", "(2 dim, d_model)", {-1, reader.hidden().shape[1]});
  check_value(in.shape[0] > 0 && in.shape[0] % 2 == 0,
              "in_proj_weight must have shape (2 dim, d_model), got ", in.sizes());
  Sizes sizes{in.shape[1], in.shape[0] / 2, 0, 0};
  p.in = linear(reader, in, in_bias, "in_proj_bias");
  const TensorView dt = reader.of_dtype(dt_weight, "dt_proj_weight", "(dim, rank)", {sizes.dim, -1});
  sizes.rank = dt.shape[1];
  p.dt = linear(reader, dt, py::none(), "");
  const TensorView x = reader.of_dtype(x_weight, "x_proj_weight", "(rank + 2 N, dim)", {-1, sizes.dim});
  check_value(x.shape[0] >= sizes.rank && (x.shape[0] - sizes.rank) % 2 == 0,
              "x_proj_weight must have shape (rank + 2 N, dim) with rank = ", sizes.rank, ", got ",
              x.sizes());
  sizes.states = (x.shape[0] - sizes.rank) / 2;
  p.dt_B_C = linear(reader, x, py::none(), "");
  p.out = linear(reader, reader.of_dtype(out_weight, "out_proj_weight", "(features, dim)", {-1, sizes.dim}),
                 out_bias, "out_proj_bias");
  return sizes;
}

void read_convolution(StepReader& reader, MambaStepParams& p, const Sizes& sizes, py::handle conv_state,
                      py::handle weight, py::handle bias) {
  scan::CausalConv1dParams& conv = p.conv.conv;
  const TensorView w = reader.of_dtype(weight, "conv1d_weight", "(dim, width)", {sizes.dim, -1});
  check_value(w.shape[1] >= 1 && w.shape[1] <= scan::kMaxConvWidth,
              "conv1d_weight must have a width of 1 to ", scan::kMaxConvWidth, ", got ", w.shape[1]);
  conv.weight = w.data;
  conv.weight_channel = w.stride(0);
  conv.weight_tap = w.stride(1);
  conv.width = int32_t(w.shape[1]);
  if (!bias.is_none()) {
    const TensorView v = reader.of_dtype(bias, "conv1d_bias", "(dim,)", {sizes.dim});
    conv.bias = v.data;
    conv.bias_channel = v.stride(0);
  }
  const TensorView state = reader.of_dtype(conv_state, "conv_state", "(batch, dim, state_length)",
                                           {reader.batch(), sizes.dim, -1});
  check_value(state.shape[2] >= conv.width - 1,
              "conv_state must have a length of at least width - 1 = ", conv.width - 1, ", got ",
              state.shape[2]);
  check_written(state, "conv_state");
  p.conv.state = {state.data, state.stride(0), state.stride(1), state.stride(2)};
  p.conv.slots = reader.batch();
  p.conv.state_length = state.shape[2];
  conv.batch = reader.batch();
  conv.dim = sizes.dim;
  conv.length = 1;
  conv.dtype = conv.weight_dtype = reader.dtype();
  conv.silu = true;
}

StepTensor of_channels(const TensorView& v) {
  return {v.data, 0, 0, v.stride(0), v.ndim == 2 ? v.stride(1) : 0, v.dtype};
}

void read_recurrence(StepReader& reader, MambaStepParams& p, const Sizes& sizes, py::handle ssm_state,
                     py::handle A_log, py::handle D, py::handle dt_bias) {
  const TensorView state = reader.of_recurrence(ssm_state, "ssm_state", "(batch, dim, N)",
                                                {reader.batch(), sizes.dim, sizes.states});
  check_written(state, "ssm_state");
  p.scan.state = {state.data, state.stride(0), 0, state.stride(1), state.stride(2), state.dtype};
  p.scan.A = of_channels(reader.of_recurrence(A_log, "A_log", "(dim, N)", {sizes.dim, sizes.states}));
  if (!D.is_none()) p.scan.D = of_channels(reader.of_recurrence(D, "D", "(dim,)", {sizes.dim}));
  if (!dt_bias.is_none())
    p.scan.dt_bias = of_channels(reader.of_recurrence(dt_bias, "dt_proj_bias", "(dim,)", {sizes.dim}));
  p.scan.batch = p.scan.slots = reader.batch();
  p.scan.heads = p.scan.groups = 1;
  p.scan.dim = sizes.dim;
  p.scan.states = sizes.states;
  p.scan.softplus = p.scan.A_is_log = true;
}

void read_norms(StepReader& reader, MambaStepParams& p, const Sizes& sizes, py::handle dt, py::handle B,
                py::handle C, double eps) {
  const auto segment = [&](py::handle object, const char* name, const char* axes, int64_t size) {
    scan::SegmentNormParams::Segment result{nullptr, 0, size, reader.dtype()};
    if (!object.is_none()) {
      const TensorView v = reader.of_recurrence(object, name, axes, {size});
      result = {v.data, v.stride(0), size, v.dtype};
    }
    return result;
  };
  p.norms.segments[0] = segment(dt, "dt_rms_weight", "(rank,)", sizes.rank);
  p.norms.segments[1] = segment(B, "b_rms_weight", "(N,)", sizes.states);
  p.norms.segments[2] = segment(C, "c_rms_weight", "(N,)", sizes.states);
  p.norms.tokens = reader.batch();
  p.norms.eps = eps;
  p.norms.dtype = reader.dtype();
}

// What lies between the parts: row-major matrices of a row a token, one behind the other.
class Workspace {
 public:
  Workspace(void* data, int64_t tokens, DType dtype)
      : data_(static_cast<char*>(data)), tokens_(tokens), itemsize_(itemsize(dtype)) {}
  void* take(int64_t row) {
    void* result = data_;
    data_ += tokens_ * row * itemsize_;
    return result;
  }
  void* at(void* matrix, int64_t column) const { return static_cast<char*>(matrix) + column * itemsize_; }

 private:
  char* data_;
  int64_t tokens_, itemsize_;
};

void connect(StepReader& reader, MambaStepParams& p, const Sizes& sizes, void* memory,
             const TensorView& out) {
  Workspace workspace(memory, reader.batch(), reader.dtype());
  const DType dtype = reader.dtype();
  const int64_t dim = sizes.dim, columns = sizes.rank + 2 * sizes.states;
  void* xz = workspace.take(2 * dim);
  void* u = workspace.take(dim);
  void* dt_B_C = workspace.take(columns);
  void* dt = workspace.take(dim);
  void* y = workspace.take(dim);
  const auto product = [](TokenLinearParams& of, const void* x, int64_t x_row, void* result, int64_t row) {
    of.x = x;
    of.x_row = x_row;
    of.out = result;
    of.out_row = row;
  };
  product(p.in, reader.hidden().data, reader.hidden().stride(0), xz, 2 * dim);
  p.conv.conv.x = {xz, 2 * dim, 1, 1};
  p.conv.conv.out = {u, dim, 1, 1};
  product(p.dt_B_C, u, dim, dt_B_C, columns);
  p.norms.x = dt_B_C;
  p.norms.x_row = columns;
  product(p.dt, dt_B_C, columns, dt, dim);
  p.scan.x = {u, dim, 0, 1, 0, dtype};
  p.scan.dt = {dt, dim, 0, 1, 0, dtype};
  p.scan.z = {workspace.at(xz, dim), 2 * dim, 0, 1, 0, dtype};
  p.scan.B = {workspace.at(dt_B_C, sizes.rank), columns, 0, 0, 1, dtype};
  p.scan.C = {workspace.at(dt_B_C, sizes.rank + sizes.states), columns, 0, 0, 1, dtype};
  p.scan.out = {y, dim, 0, 1, 0, dtype};
  product(p.out, y, dim, out.data, out.stride(0));
}

void step(py::handle hidden, py::handle conv_state, py::handle ssm_state, py::handle in_weight,
          py::handle in_bias, py::handle conv_weight, py::handle conv_bias, py::handle x_weight,
          py::handle dt_weight, py::handle dt_bias, py::handle A_log, py::handle D, py::handle out_weight,
          py::handle out_bias, py::handle b_rms, py::handle c_rms, py::handle dt_rms,
          std::optional<double> eps, py::handle workspace, py::handle out, int threads) {
  StepReader reader(hidden);
  MambaStepParams p{};
  const Sizes sizes = read_weights(reader, p, in_weight, in_bias, x_weight, dt_weight, out_weight, out_bias);
  read_convolution(reader, p, sizes, conv_state, conv_weight, conv_bias);
  read_recurrence(reader, p, sizes, ssm_state, A_log, D, dt_bias);
  p.has_norms = eps.has_value();
  if (p.has_norms) read_norms(reader, p, sizes, dt_rms, b_rms, c_rms, *eps);
  const TensorView scratch =
      reader.of_dtype(workspace, "workspace", "(batch, elements)",
                      {reader.batch(), scan::mamba_step_workspace(sizes.dim, sizes.rank, sizes.states)});
  check_contiguous(scratch, "workspace");
  const TensorView result = reader.of_dtype(out, "out", "(batch, features)", {reader.batch(), p.out.rows});
  check_contiguous(result, "out");
  connect(reader, p, sizes, scratch.data, result);
  if (reader.batch() == 0) return;
  const Device device = reader.hidden().device;
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, scan::mamba_step_cpu(p, threads), scan::mamba_step_cuda(p, device.index, stream));
}

}  // namespace

void bind_mamba_step(py::module_& m) { m.def("mamba_step", &step, "Writes out and moves both states on."); }

}  // namespace tilewright
