// A Mamba-2 block, with its projections or without.
#include <vector>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "scan/mamba2_inner.h"

namespace tilewright {
namespace {

using scan::Mamba2InnerParams;
using scan::MatmulParams;
using scan::SsdTensor;

// Rows of one width at one distance, whose elements lie side by side.
struct RowsView {
  char* data = nullptr;
  int64_t width = 0, stride = 0, itemsize = 0;

  void* column(int64_t index) const { return data == nullptr ? nullptr : data + index * itemsize; }
};

// The options of a call, in the order of Python's.
struct Options {
  int64_t groups;
  bool silu;
  double dt_min, dt_max;
  int64_t norm_group;
  bool norm_before_gate;
};

// Reads a call's tensors by name, and holds the memory that it needs meanwhile.
class Reader {
 public:
  Reader(const py::dict& tensors, const py::function& allocate, const Options& options)
      : t_(tensors), options_(options), allocate_(allocate) {
    const TensorView v = arguments.tensor(t_["zxbcdt"], "zxbcdt");
    check_value(v.ndim == 3, "zxbcdt must have shape (batch, length, columns), got ", v.sizes());
    check_real(v, "zxbcdt");
    device = v.device;
    on_gpu_ = runs_on_gpu(v);
    dtype_ = v.dtype;
    wide_ = v.dtype == DType::kFloat64 ? v.dtype : DType::kFloat32;
    batch_ = v.shape[0], length_ = v.shape[1];
    check_value(batch_ > 0 && length_ > 0, "zxbcdt must have elements, got shape ", v.sizes());
    read_sizes(v.shape[2]);
  }

  bool has(const char* name) const { return !t_[name].is_none(); }

  RowsView optional_rows(const char* name, int64_t width, Access access = Access::kRead) {
    return has(name) ? rows(name, width, access) : RowsView{};
  }

  RowsView rows(const char* name, int64_t width, Access access = Access::kRead) {
    const TensorView v = arguments.tensor(t_[name], name, access);
    check_dtype(v, dtype_, name);
    check_device(v, device, name);
    check_value(v.ndim == 3 && v.shape[0] == batch_ && v.shape[1] == length_ && v.shape[2] == width, name,
                " must have shape (", batch_, ", ", length_, ", ", width, "), got ", v.sizes());
    const std::optional<int64_t> stride = row_stride(v);
    check_value(stride.has_value() && (width == 1 || v.stride(2) == 1), name,
                " must have rows at one distance, whose elements lie side by side; call .contiguous()");
    return {static_cast<char*>(v.data), width, *stride, itemsize(dtype_)};
  }

  void* optional_flat(const char* name, int64_t numel, DType dtype) {
    return arguments.flat(t_[name], name, numel, dtype, device);
  }

  void* flat(const char* name, int64_t numel, DType dtype) {
    check_type(has(name), name, " must be a tensor, got None");
    return optional_flat(name, numel, dtype);
  }

  // What forward and backward read alike.
  void inputs(const RowsView& zxbcdt, const RowsView& xBC) {
    read_convolution(zxbcdt, xBC);
    read_scan(zxbcdt, xBC);
    if (!has("norm_weight")) return;
    scan::GatedRmsNormParams& norm = p.norm;
    const TensorView w = arguments.tensor(t_["norm_weight"], "norm_weight");
    check_dtypes(w.dtype == dtype_ || (w.dtype == DType::kFloat32 && dtype_ != DType::kFloat64), w,
                 "float32 or the input's", "norm_weight");
    check_value(options_.norm_group >= 1 && dim % options_.norm_group == 0, "norm_group must divide the ",
                dim, " channels, got ", options_.norm_group);
    norm.weight_dtype = w.dtype;
    norm.weight = flat("norm_weight", dim, w.dtype);
    norm.rows = tokens(), norm.dim = dim, norm.group = options_.norm_group;
    norm.dtype = dtype_;
    norm.gate = options_.norm_before_gate ? scan::NormGate::kAfter : scan::NormGate::kBefore;
    norm.z = {zxbcdt.data, zxbcdt.stride};
    norm.rstd = flat("rstd", norm.rows * (dim / norm.group), wide_);
  }

  // (tokens, k) times a weight (n, k) transposed, or as it lies; left out without its result.
  MatmulParams times_weight(const RowsView& rows, const char* name, bool transposed, const RowsView& result) {
    if (result.data == nullptr || !has(name)) return {};
    const TensorView w = weight(name);
    const int64_t inputs = transposed ? 1 : 0;
    check_value(w.shape[inputs] == rows.width && w.shape[1 - inputs] == result.width, name, " of shape ",
                w.sizes(), " does not fit ", rows.width, " columns and ", result.width, " of the result");
    MatmulParams product = product_of(tokens(), result.width, rows.width, result);
    product.a = floats(rows), product.a_row = rows.stride, product.a_k = 1;
    product.b = static_cast<const float*>(w.data);
    product.b_k = w.stride(int32_t(inputs)), product.b_column = w.stride(int32_t(1 - inputs));
    return product;
  }

  // The gradient (n, k) of a weight, from rows of n and of k columns.
  MatmulParams weight_gradient(const char* name, const RowsView& gradient, const RowsView& rows) {
    const TensorView v = arguments.tensor(t_[name], name, Access::kOverwrite);
    check_dtype(v, DType::kFloat32, name);
    check_device(v, device, name);
    check_contiguous(v, name);
    check_value(v.ndim == 2 && v.shape[0] == gradient.width && v.shape[1] == rows.width, name,
                " must have shape (", gradient.width, ", ", rows.width, "), got ", v.sizes());
    const RowsView result{static_cast<char*>(v.data), rows.width, rows.width, itemsize(dtype_)};
    MatmulParams product = product_of(gradient.width, rows.width, tokens(), result);
    product.a = floats(gradient), product.a_row = 1, product.a_k = gradient.stride;
    product.b = floats(rows), product.b_k = rows.stride, product.b_column = 1;
    return product;
  }

  // Columns of a weight's output, and of its input.
  int64_t outputs(const char* name) { return weight(name).shape[0]; }
  int64_t features(const char* name) { return weight(name).shape[1]; }

  // A tensor (batch, step, head or group, inner) that begins at a column.
  SsdTensor heads_at(const RowsView& rows, int64_t column, int64_t width) const {
    if (rows.data == nullptr) return {};
    return {rows.column(column), length_ * rows.stride, rows.stride, width, 1};
  }

  // dt or its gradient, which lies in zxbcdt unless it is wider.
  SsdTensor step_size(const char* name, const RowsView& zxbcdt) {
    if (!has(name)) {
      check_type(dtype_ == wide_, name, " must be given where zxbcdt is narrower than float32");
      return {zxbcdt.column(dim + channels), length_ * zxbcdt.stride, zxbcdt.stride, 1, 0};
    }
    const TensorView v = arguments.tensor(t_[name], name);
    check_dtype(v, wide_, name);
    check_device(v, device, name);
    check_value(v.ndim == 3 && v.shape[0] == batch_ && v.shape[1] == length_ && v.shape[2] == heads, name,
                " must have shape (batch, length, heads), got ", v.sizes());
    return {v.data, v.stride(0), v.stride(1), v.stride(2), 0};
  }

  scan::ConvTensor conv_at(const RowsView& rows, int64_t column) const {
    return {rows.column(column), length_ * rows.stride, 1, rows.stride};
  }

  // Memory for the length of the call, piece by piece: small enough for the allocator to have it at hand.
  char* take(int64_t bytes) {
    if (bytes == 0) return nullptr;
    taken_.push_back(allocate_(bytes));
    return static_cast<char*>(arguments.workspace(taken_.back(), bytes, device));
  }

  RowsView between(int64_t width) {
    return {take(tokens() * width * itemsize(dtype_)), width, width, itemsize(dtype_)};
  }

  // The kernels', which use it one after the other.
  void take_workspace(int64_t bytes) { p.conv.workspace = p.scan.workspace = p.norm.workspace = take(bytes); }

  int64_t state_numel() const { return batch_ * heads * head_dim * states; }
  int64_t tokens() const { return batch_ * length_; }
  DType wide() const { return wide_; }

  Mamba2InnerParams p{};
  Arguments arguments;
  Device device;
  int64_t columns, dim, channels, heads, head_dim, states;

 private:
  void read_sizes(int64_t columns_of_zxbcdt) {
    columns = columns_of_zxbcdt;
    const TensorView A = arguments.tensor(t_["A"], "A"),
                     taps = arguments.tensor(t_["conv_weight"], "conv_weight");
    check_value(A.ndim == 1, "A must have shape (heads,), got ", A.sizes());
    check_value(taps.ndim == 2 || (taps.ndim == 3 && taps.shape[1] == 1),
                "conv_weight must have shape (channels, width) or (channels, 1, width), got ", taps.sizes());
    heads = A.shape[0], channels = taps.shape[0], dim = columns - channels - heads;
    const int64_t groups = options_.groups, shared = channels - dim;
    check_value(heads > 0 && dim > 0 && dim % heads == 0 && groups > 0 && heads % groups == 0 && shared > 0 &&
                    shared % (2 * groups) == 0,
                "zxbcdt of ", columns, " columns, conv_weight of ", channels, " rows, ", heads, " heads and ",
                groups, " groups do not fit together");
    head_dim = dim / heads, states = shared / (2 * groups);
  }

  TensorView weight(const char* name) {
    const TensorView v = arguments.tensor(t_[name], name);
    check_value(!runs_on_gpu(v), name, " is for the products of the CPU alone");
    check_dtype(v, DType::kFloat32, name);
    check_device(v, device, name);
    check_type(dtype_ == DType::kFloat32, "input must have dtype float32 with ", name, ", got ", dtype_);
    check_value(v.ndim == 2, name, " must have shape (outputs, inputs), got ", v.sizes());
    return v;
  }

  static float* floats(const RowsView& rows) { return reinterpret_cast<float*>(rows.data); }

  static MatmulParams product_of(int64_t m, int64_t n, int64_t k, const RowsView& result) {
    MatmulParams product{};
    product.m = m, product.n = n, product.k = k;
    product.c = floats(result), product.c_row = result.stride;
    return product;
  }

  void read_convolution(const RowsView& zxbcdt, const RowsView& xBC) {
    scan::CausalConv1dParams& conv = p.conv;
    const TensorView w = arguments.tensor(t_["conv_weight"], "conv_weight");
    check_device(w, device, "conv_weight");
    check_real_like(w, dtype_, "the input", "conv_weight");
    const int32_t last = w.ndim - 1;
    check_value(w.shape[last] >= 1 && w.shape[last] <= scan::kMaxConvWidth,
                "conv_weight must have a width of 1 to ", scan::kMaxConvWidth, ", got ", w.sizes());
    conv.weight = w.data;
    conv.weight_channel = w.stride(0), conv.weight_tap = w.stride(last);
    conv.weight_dtype = w.dtype;
    conv.width = int32_t(w.shape[last]);
    conv.bias = optional_flat("conv_bias", channels, w.dtype);
    conv.bias_channel = 1;
    conv.seq_idx = optional_flat("seq_idx", tokens(), DType::kInt64);
    conv.seq_batch = length_, conv.seq_step = 1, conv.seq_is_64 = true;
    conv.batch = batch_, conv.dim = channels, conv.length = length_;
    conv.dtype = dtype_;
    conv.silu = options_.silu;
    conv.x = conv_at(zxbcdt, dim);
    conv.out = conv_at(xBC, 0);
  }

  void read_scan(const RowsView& zxbcdt, const RowsView& xBC) {
    scan::SsdChunkScanParams& s = p.scan;
    s.batch = s.sequences = batch_, s.length = length_;
    s.heads = int32_t(heads), s.head_dim = int32_t(head_dim);
    s.groups = int32_t(options_.groups), s.states = int32_t(states);
    s.dtype = dtype_, s.weight_dtype = wide_;
    s.x = heads_at(xBC, 0, head_dim);
    s.B = heads_at(xBC, dim, states);
    s.C = heads_at(xBC, dim + options_.groups * states, states);
    if (!has("norm_weight")) s.z = heads_at(zxbcdt, 0, head_dim);
    s.dt = step_size("dt", zxbcdt);
    s.A = flat("A", heads, wide_);
    s.dt_bias = optional_flat("dt_bias", heads, wide_);
    if (has("D")) s.D_wide = arguments.tensor(t_["D"], "D").ndim == 2;
    s.D = optional_flat("D", s.D_wide ? dim : heads, wide_);
    s.initial_state = optional_flat("initial_states", state_numel(), wide_);
    s.seq_idx = static_cast<const int64_t*>(p.conv.seq_idx);
    s.softplus = true;
    s.dt_min = options_.dt_min, s.dt_max = options_.dt_max;
    if (!on_gpu_) {
      s.chunk_states = flat("chunk_states", ssd_chunk_count(s) * heads * states * head_dim, wide_);
    }
  }

  const py::dict& t_;
  const Options& options_;
  DType dtype_, wide_;
  bool on_gpu_;
  int64_t batch_, length_;
  const py::function& allocate_;
  std::vector<py::object> taken_;
};

int64_t workspace_bytes(const Reader& reader, bool backward, int threads) {
  (void)threads;
  int64_t bytes = 0;
  TW_RUN(reader.device.is_cuda, void(bytes = scan::mamba2_inner_workspace_cpu(reader.p, backward, threads)),
         void(bytes = scan::mamba2_inner_workspace_cuda(reader.p, backward, reader.device.index)));
  return bytes;
}

void forward(const py::dict& tensors, const py::function& allocate, int threads, double eps, int64_t groups,
             bool silu, double dt_min, double dt_max, int64_t norm_group, bool norm_before_gate) {
  const Options options{groups, silu, dt_min, dt_max, norm_group, norm_before_gate};
  Reader reader(tensors, allocate, options);
  Mamba2InnerParams& p = reader.p;
  const bool projects = reader.has("in_weight");
  const RowsView zxbcdt =
      reader.rows("zxbcdt", reader.columns, projects ? Access::kOverwrite : Access::kRead);
  const RowsView xBC = reader.rows("xBC", reader.channels, Access::kOverwrite);
  const RowsView inner = reader.rows("inner", reader.dim, Access::kOverwrite);
  reader.inputs(zxbcdt, xBC);
  const bool norms = p.norm.weight != nullptr;
  const RowsView y = norms ? reader.rows("y", reader.dim, Access::kOverwrite)
                           : reader.optional_rows("y", reader.dim, Access::kOverwrite);
  p.scan.out = reader.heads_at(norms ? y : inner, 0, reader.head_dim);
  if (!norms) p.scan.y = reader.heads_at(y, 0, reader.head_dim);
  p.scan.final_state = reader.optional_flat("final_states", reader.state_numel(), reader.wide());
  p.norm.x = {y.data, y.stride}, p.norm.out = {inner.data, inner.stride};
  p.norm.eps = eps;
  if (projects) {
    p.in = reader.times_weight(reader.rows("input", reader.features("in_weight")), "in_weight", true, zxbcdt);
    p.in.bias = static_cast<const float*>(reader.optional_flat("in_bias", p.in.n, DType::kFloat32));
  }
  if (reader.has("out_weight")) {
    p.out = reader.times_weight(inner, "out_weight", true,
                                reader.rows("out", reader.outputs("out_weight"), Access::kOverwrite));
    p.out.bias = static_cast<const float*>(reader.optional_flat("out_bias", p.out.n, DType::kFloat32));
  }
  reader.take_workspace(workspace_bytes(reader, false, threads));
  const Device device = reader.device;
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, scan::mamba2_inner_fwd_cpu(p, threads),
         scan::mamba2_inner_fwd_cuda(p, device.index, stream));
}

// Gives every kernel of the backward pass its gradients, and what lies between the kernels a place.
void connect(Reader& reader) {
  Mamba2InnerParams& p = reader.p;
  const bool norms = p.norm.weight != nullptr, projects = reader.has("in_weight");
  const int64_t dim = reader.dim, channels = reader.channels;
  const bool is_projected = reader.has("out_weight");
  RowsView dinner = reader.rows("dout", is_projected ? reader.outputs("out_weight") : dim);
  if (is_projected) {
    const RowsView dout = dinner;
    dinner = reader.between(dim);
    p.dinner = reader.times_weight(dout, "out_weight", false, dinner);
    if (reader.has("dout_weight")) {
      p.dout_weight = reader.weight_gradient("dout_weight", dout, reader.rows("inner", dim));
    }
  }
  const RowsView dzxbcdt =
      projects ? reader.between(reader.columns) : reader.rows("dzxbcdt", reader.columns, Access::kOverwrite);
  const RowsView dy = norms ? reader.between(dim) : dinner;
  if (norms) {
    p.norm.dout = {dinner.data, dinner.stride}, p.norm.dx = {dy.data, dy.stride};
    p.norm.dz = {dzxbcdt.data, dzxbcdt.stride};
  }
  const RowsView dxBC = reader.between(channels);
  p.scan.dout = reader.heads_at(dy, 0, reader.head_dim);
  p.scan.dx = reader.heads_at(dxBC, 0, reader.head_dim);
  p.scan.dB = reader.heads_at(dxBC, dim, reader.states);
  p.scan.dC = reader.heads_at(dxBC, dim + (channels - dim) / 2, reader.states);
  if (!norms) p.scan.dz = reader.heads_at(dzxbcdt, 0, reader.head_dim);
  p.scan.ddt = reader.step_size("ddt", dzxbcdt);
  p.conv.dout = reader.conv_at(dxBC, 0), p.conv.dx = reader.conv_at(dzxbcdt, dim);
  if (!projects) return;
  const int64_t features = reader.features("in_weight");
  p.dinput = reader.times_weight(dzxbcdt, "in_weight", false,
                                 reader.optional_rows("dinput", features, Access::kOverwrite));
  if (reader.has("din_weight")) {
    p.din_weight = reader.weight_gradient("din_weight", dzxbcdt, reader.rows("input", features));
  }
}

void backward(const py::dict& tensors, const py::function& allocate, int threads, int64_t groups, bool silu,
              double dt_min, double dt_max, int64_t norm_group, bool norm_before_gate) {
  const Options options{groups, silu, dt_min, dt_max, norm_group, norm_before_gate};
  Reader reader(tensors, allocate, options);
  Mamba2InnerParams& p = reader.p;
  const RowsView y = reader.rows("y", reader.dim);
  reader.inputs(reader.rows("zxbcdt", reader.columns), reader.rows("xBC", reader.channels));
  const DType wide = reader.wide();
  if (p.norm.weight != nullptr) {
    p.norm.x = {y.data, y.stride};
    p.norm.dweight = reader.flat("dnorm_weight", reader.dim, p.norm.weight_dtype);
  } else {
    p.scan.y = reader.heads_at(y, 0, reader.head_dim);
  }
  p.differentiates_scan = reader.has("dA");
  p.scan.dA = reader.optional_flat("dA", reader.heads, wide);
  p.scan.dD = reader.optional_flat("dD", p.scan.D_wide ? reader.dim : reader.heads, wide);
  p.scan.ddt_bias = reader.optional_flat("ddt_bias", reader.heads, wide);
  p.scan.dfinal_state = reader.optional_flat("dfinal_states", reader.state_numel(), wide);
  p.scan.dinitial_state = reader.optional_flat("dinitial_states", reader.state_numel(), wide);
  p.differentiates_conv = p.differentiates_scan && reader.has("dconv_weight");
  const int64_t taps = reader.channels * p.conv.width;
  p.conv.dweight = reader.optional_flat("dconv_weight", taps, p.conv.weight_dtype);
  p.conv.dbias = reader.optional_flat("dconv_bias", reader.channels, p.conv.weight_dtype);
  connect(reader);
  reader.take_workspace(workspace_bytes(reader, true, threads));
  const Device device = reader.device;
  const Stream stream = reader.arguments.current_stream(device);
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  TW_RUN(device.is_cuda, scan::mamba2_inner_bwd_cpu(p, threads),
         scan::mamba2_inner_bwd_cuda(p, device.index, stream));
}

}  // namespace

void bind_mamba2_inner(py::module_& m) {
  m.def("mamba2_inner_fwd", &forward, "Writes the results among the tensors; allocate(bytes) gives scratch.");
  m.def("mamba2_inner_bwd", &backward, "Writes the gradients that are not None.");
}

}  // namespace tilewright
