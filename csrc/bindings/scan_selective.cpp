// The selective scan: tensors become SelectiveScanParams, everything is checked, one kernel call follows.
#include "scan/selective_scan.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <initializer_list>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"

namespace tilewright {
namespace {

using scan::SelectiveScanParams;
using scan::Strided;

bool is_complex(DType dtype) { return dtype == DType::kComplex64 || dtype == DType::kComplex128; }

void check_shape(const TensorView& view, std::initializer_list<int64_t> expected, const char* meaning,
                 Label name) {
  const Shape wanted{expected.begin(), int32_t(expected.size())};
  const bool same = view.ndim == wanted.ndim && std::equal(view.shape, view.shape + view.ndim, wanted.sizes);
  check_value(same, name, ": got shape ", view.sizes(), ", expected ", meaning, " = ", wanted);
}

// Reads the arguments of one call into `p`, and checks them.
class Reader {
 public:
  SelectiveScanParams p{};
  Device device;
  bool on_gpu = false;

  // What forward and backward have in common. Sizes and dtypes come from u and A.
  void read_inputs(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D,
                   py::handle z, py::handle delta_bias, py::handle initial_state, py::handle cu_seqlens,
                   py::handle order, bool softplus, bool reverse) {
    read_sizes(arguments_.tensor(u, "u"), arguments_.tensor(A, "A"));
    read_cu_seqlens(cu_seqlens);
    p.u = steps(u, "u");
    p.delta = steps(delta, "delta");
    p.z = steps(z, "z");
    p.A = weight(arguments_.tensor(A, "A"), "A");
    read_groups(arguments_.tensor(B, "B"), arguments_.tensor(C, "C"));
    p.B = projection(B, p.variable_B, "B");
    p.C = projection(C, p.variable_C, "C");
    p.D = channels(D, "D");
    p.delta_bias = channels(delta_bias, "delta_bias");
    p.initial_state = states(initial_state, "initial_state");
    read_order(order);
    p.softplus = softplus;
    p.reverse = reverse;
  }

  Strided steps(py::handle object, Label name, Access access = Access::kRead) {
    const auto view = arguments_.optional_tensor(object, name, access);
    if (!view) return {};
    check(*view, p.dtype, name);
    check_shape(*view, {p.batch, p.dim, p.length}, "(batch, dim, length)", name);
    return {view->data, view->stride(0), view->stride(1), 0, view->stride(2)};
  }

  // B, C or the gradient of one.
  Strided projection(py::handle object, bool variable, Label name) {
    const auto view = arguments_.optional_tensor(object, name);
    if (!view) return {};
    if (!variable) return weight(*view, name);
    check(*view, p.dtype, name);
    const int64_t numbers = is_complex(p.weight_dtype) ? 2 * p.length : p.length;
    if (view->ndim == 3) {
      check_shape(*view, {p.batch, p.states, numbers}, "(batch, states, length)", name);
      return {view->data, view->stride(0), 0, view->stride(1), view->stride(2)};
    }
    check_shape(*view, {p.batch, p.groups, p.states, numbers}, "(batch, groups, states, length)", name);
    return {view->data, view->stride(0), view->stride(1), view->stride(2), view->stride(3)};
  }

  // D, delta_bias or the gradient of one.
  void* channels(py::handle object, Label name) {
    const auto view = arguments_.optional_tensor(object, name);
    if (!view) return nullptr;
    const bool wide = p.dtype == DType::kFloat64;
    check(*view, wide ? DType::kFloat64 : DType::kFloat32, name);
    check_shape(*view, {p.dim}, "(dim,)", name);
    check_contiguous(*view, name);
    return view->data;
  }

  // The gradient of A.
  void* weights(py::handle object, Label name) {
    const auto view = arguments_.optional_tensor(object, name);
    if (!view) return nullptr;
    check_contiguous(*view, name);
    return weight(*view, name).data;
  }

  // States at the ends of sequences.
  void* states(py::handle object, Label name) {
    const auto view = arguments_.optional_tensor(object, name);
    if (!view) return nullptr;
    check(*view, p.weight_dtype, name);
    check_shape(*view, {p.sequences, p.dim, p.states}, "(sequences, dim, states)", name);
    check_contiguous(*view, name);
    return view->data;
  }

  void* chunk_states(py::handle object, Access access) {
    const Label name("chunk_states");
    const auto view = arguments_.optional_tensor(object, name, access);
    if (!view) return nullptr;
    check(*view, p.weight_dtype, name);
    const int64_t chunks = scan::chunk_count(p.batch, p.length, p.sequences, p.cu_seqlens != nullptr);
    check_shape(*view, {chunks, p.states, p.dim}, "(chunks, states, dim)", name);
    check_contiguous(*view, name);
    return view->data;
  }

  // Runs the kernel and returns 0; if it needs more scratch memory than it is given, returns how many bytes
  // that are and does nothing else.
  int64_t run(bool backward, py::handle workspace, int threads) {
    int64_t needed = 0;
    TW_RUN(on_gpu, (void)(needed = TW_CALL_CPU(selective_scan_workspace_cpu, p, backward, threads)),
           (void)(needed = scan::selective_scan_workspace_cuda(p, backward, device.index)));
    if (needed > 0) {
      const auto view = arguments_.optional_tensor(workspace, "workspace", Access::kOverwrite);
      if (!view || view->numel() < needed) return needed;
      check(*view, DType::kUInt8, "workspace");
      check_contiguous(*view, "workspace");
      p.workspace = view->data;
    }
    const Stream stream = arguments_.current_stream(device);
    py::gil_scoped_release released;
    (void)threads;
    (void)stream;
    if (backward) {
      TW_RUN(on_gpu, TW_CALL_CPU(selective_scan_bwd_cpu, p, threads),
             scan::selective_scan_bwd_cuda(p, device.index, stream));
    } else {
      TW_RUN(on_gpu, TW_CALL_CPU(selective_scan_fwd_cpu, p, threads),
             scan::selective_scan_fwd_cuda(p, device.index, stream));
    }
    return 0;
  }

 private:
  void check(const TensorView& view, DType dtype, Label name) const {
    check_dtype(view, dtype, name);
    check_device(view, device, name);
  }

  void read_sizes(const TensorView& u, const TensorView& A) {
    check_value(u.ndim == 3, "u: got shape ", u.sizes(), ", expected (batch, dim, length)");
    check_value(A.ndim == 2, "A: got shape ", A.sizes(), ", expected (dim, states)");
    check_value(u.shape[1] >= 1, "u: got shape ", u.sizes(), ", expected at least one channel");
    check_value(A.shape[1] >= 1 && A.shape[1] <= scan::kMaxStates, "A: got ", A.shape[1],
                " states a channel, allowed: 1 to ", scan::kMaxStates);
    device = u.device;
    on_gpu = runs_on_gpu(u);
    p.batch = p.sequences = u.shape[0];
    p.dim = u.shape[1];
    p.length = u.shape[2];
    p.states = int32_t(A.shape[1]);
    p.dtype = u.dtype;
    p.weight_dtype = A.dtype;
    const bool wide = u.dtype == DType::kFloat64;
    check_type(
        wide || u.dtype == DType::kFloat32 || u.dtype == DType::kFloat16 || u.dtype == DType::kBFloat16,
        "u: got dtype ", u.dtype, ", allowed: float32, float16, bfloat16, float64");
    check_type(!wide || !on_gpu, "u: got dtype float64, which has CPU kernels only");
    check_type(A.dtype == (wide ? DType::kFloat64 : DType::kFloat32) ||
                   A.dtype == (wide ? DType::kComplex128 : DType::kComplex64),
               "A: got dtype ", A.dtype, ", allowed: ", wide ? "float64, complex128" : "float32, complex64");
  }

  void read_cu_seqlens(py::handle object) {
    const auto view = arguments_.optional_tensor(object, "cu_seqlens");
    if (!view) return;
    check(*view, DType::kInt64, "cu_seqlens");
    check_contiguous(*view, "cu_seqlens");
    check_value(view->ndim == 1 && view->shape[0] >= 1, "cu_seqlens: got shape ", view->sizes(),
                ", expected (sequences + 1,)");
    check_value(p.batch == 1, "cu_seqlens: packed sequences need a batch of 1, got ", p.batch);
    p.cu_seqlens = static_cast<const int64_t*>(view->data);
    p.sequences = view->shape[0] - 1;
  }

  void read_order(py::handle object) {
    const auto view = arguments_.optional_tensor(object, "order");
    if (!view) return;
    check(*view, DType::kInt64, "order");
    check_contiguous(*view, "order");
    if (view->ndim == 1) {
      check_shape(*view, {p.length}, "(length,)", "order");
    } else {
      check_shape(*view, {p.batch, p.length}, "(batch, length)", "order");
      p.order_stride = p.length;
    }
    p.order = static_cast<const int64_t*>(view->data);
  }

  // A tensor of rank 2 is constant, one of rank 3 has one group.
  void read_groups(const TensorView& B, const TensorView& C) {
    p.variable_B = B.ndim != 2;
    p.variable_C = C.ndim != 2;
    p.groups = 1;
    if (B.ndim == 4) p.groups = B.shape[1];
    if (C.ndim == 4) p.groups = std::max(p.groups, C.shape[1]);
    check_value(p.groups >= 1 && p.dim % p.groups == 0, "B, C: got ", p.groups, " groups for ", p.dim,
                " channels, expected a number that divides them");
    const bool agree = p.groups == 1 || ((B.ndim == 4 || B.ndim == 2) && (C.ndim == 4 || C.ndim == 2));
    check_value(agree, "B, C: got shapes ", B.sizes(), " and ", C.sizes(), ", whose groups differ");
  }

  Strided weight(const TensorView& view, Label name) {
    check(view, p.weight_dtype, name);
    check_shape(view, {p.dim, p.states}, "(dim, states)", name);
    return {view.data, 0, view.stride(0), view.stride(1), 0};
  }

  Arguments arguments_;
};

int64_t forward(py::handle u, py::handle delta, py::handle A, py::handle B, py::handle C, py::handle D,
                py::handle z, py::handle delta_bias, py::handle initial_state, py::handle cu_seqlens,
                py::handle order, bool softplus, bool reverse, py::handle out, py::handle last_state,
                py::handle chunk_states, py::handle workspace, int threads) {
  Reader reader;
  reader.read_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, order, softplus,
                     reverse);
  reader.p.out = reader.steps(out, "out", Access::kOverwrite);
  reader.p.last_state = reader.states(last_state, "last_state");
  reader.p.chunk_states = reader.chunk_states(chunk_states, Access::kOverwrite);
  return reader.run(false, workspace, threads);
}

// `gradients` are those of u, delta, A, B, C, D, z, delta_bias and initial_state; None: not wanted.
int64_t backward(py::handle dout, py::handle dlast_state, py::handle u, py::handle delta, py::handle A,
                 py::handle B, py::handle C, py::handle D, py::handle z, py::handle delta_bias,
                 py::handle initial_state, py::handle cu_seqlens, py::handle order, py::handle chunk_states,
                 bool softplus, bool reverse, const py::list& gradients, py::handle workspace, int threads) {
  check_value(gradients.size() == 9, "gradients: got ", gradients.size(), " entries, expected 9");
  const auto gradient = [&](int i) { return py::handle(PyList_GET_ITEM(gradients.ptr(), i)); };
  Reader reader;
  SelectiveScanParams& p = reader.p;
  reader.read_inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, cu_seqlens, order, softplus,
                     reverse);
  p.dout = reader.steps(dout, "dout");
  p.dlast_state = reader.states(dlast_state, "dlast_state");
  p.chunk_states = reader.chunk_states(chunk_states, Access::kRead);
  p.du = reader.steps(gradient(0), "du", Access::kOverwrite);
  p.ddelta = reader.steps(gradient(1), "ddelta", Access::kOverwrite);
  p.dA = reader.weights(gradient(2), "dA");
  p.dB = reader.projection(gradient(3), p.variable_B, "dB");
  p.dC = reader.projection(gradient(4), p.variable_C, "dC");
  p.dD = reader.channels(gradient(5), "dD");
  p.dz = reader.steps(gradient(6), "dz", Access::kOverwrite);
  p.ddelta_bias = reader.channels(gradient(7), "ddelta_bias");
  p.dinitial_state = reader.states(gradient(8), "dinitial_state");
  return reader.run(true, workspace, threads);
}

}  // namespace

void bind_selective_scan(py::module_& m) {
  m.def("selective_scan_fwd", &forward, py::arg("u"), py::arg("delta"), py::arg("A"), py::arg("B"),
        py::arg("C"), py::arg("D").none(true), py::arg("z").none(true), py::arg("delta_bias").none(true),
        py::arg("initial_state").none(true), py::arg("cu_seqlens").none(true), py::arg("order").none(true),
        py::arg("softplus"), py::arg("reverse"), py::arg("out"), py::arg("last_state").none(true),
        py::arg("chunk_states").none(true), py::arg("workspace").none(true), py::arg("threads"),
        "Runs and returns 0, or returns the bytes of workspace that are missing and does nothing.");
  m.def("selective_scan_bwd", &backward, py::arg("dout"), py::arg("dlast_state").none(true), py::arg("u"),
        py::arg("delta"), py::arg("A"), py::arg("B"), py::arg("C"), py::arg("D").none(true),
        py::arg("z").none(true), py::arg("delta_bias").none(true), py::arg("initial_state").none(true),
        py::arg("cu_seqlens").none(true), py::arg("order").none(true), py::arg("chunk_states"),
        py::arg("softplus"), py::arg("reverse"), py::arg("gradients"), py::arg("workspace").none(true),
        py::arg("threads"), "As selective_scan_fwd; gradients of None are not computed.");
  m.attr("SELECTIVE_SCAN_CHUNK") = scan::kScanChunk;
  m.attr("SELECTIVE_SCAN_MAX_STATES") = scan::kMaxStates;
}

}  // namespace tilewright
