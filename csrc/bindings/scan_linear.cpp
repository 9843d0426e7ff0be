// Linear scans: from tensors of any shape and strides to (outer axes, step, inner).
#include <pybind11/pybind11.h>

#include <algorithm>

#include "bindings/arguments.h"
#include "bindings/families.h"
#include "core/dispatch.h"
#include "scan/linear_scan.h"

namespace tilewright {
namespace {

using scan::kMaxOuterAxes;
using scan::LinearScanParams;
using scan::ScanTensor;

constexpr int kTensors = 7;
constexpr int kFirstState = 5;  // the tensors before it have steps
constexpr const char* kNames[kTensors] = {"a", "b or grad", "h or db", "h", "da", "h0", "dh0"};

struct Axis {
  int64_t size;
  int64_t strides[kTensors];
};

DType accumulator_of(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? DType::kFloat32 : dtype;
}

bool is_scannable(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat64 || dtype == DType::kComplex64 || dtype == DType::kComplex128;
}

class LinearScanCall {
 public:
  LinearScanCall(py::sequence tensors, py::handle seqlens, int dim, bool backward, bool descending)
      : dim_(dim) {
    p_.backward = backward;
    p_.descending = descending;
    for (int i = 0; i < kTensors; ++i) {
      const Access access = i == 2 || i == 4 ? Access::kOverwrite : Access::kRead;
      views_[i] = arguments_.optional_tensor(tensors[i], kNames[i], access);
    }
    check_value(views_[0] && views_[1] && views_[2], "linear_scan: a, b and the output are needed");
    const TensorView& y = *views_[2];
    check_value(dim >= 0 && dim < y.ndim, "dim: got ", dim, " for ", y.ndim, " axes");
    check_type(is_scannable(y.dtype), "a: got dtype ", y.dtype,
               ", allowed: float32, float64, bfloat16, float16, complex64, complex128");
    p_.dtype = y.dtype;
    p_.length = y.shape[dim];
    p_.sequences = 1;
    read_sequences(seqlens);
    for (int i = 0; i < kTensors; ++i) check_view(i);
    if (is_gpu() && (y.dtype == DType::kFloat64 || y.dtype == DType::kComplex128)) {
      fail(ErrorKind::kNotImplemented, "linear_scan: ", y.dtype,
           " is computed on the CPU only; allowed on CUDA: float32, bfloat16, float16, complex64");
    }
    lay_out();
  }

  const LinearScanParams& params() const { return p_; }
  Device device() const { return views_[2]->device; }
  bool is_gpu() const { return runs_on_gpu(*views_[2]); }
  Stream stream() const { return arguments_.current_stream(device()); }

  void set_workspace(py::handle workspace) {
    if (workspace.is_none()) return;
    const TensorView view = arguments_.tensor(workspace, "workspace");
    check_device(view, device(), "workspace");
    p_.workspace = view.data;
  }

 private:
  void read_sequences(py::handle seqlens) {
    const auto view = arguments_.optional_tensor(seqlens, "cu_seqlens");
    if (!view) return;
    check_dtype(*view, DType::kInt64, "cu_seqlens");
    check_contiguous(*view, "cu_seqlens");
    check_device(*view, device(), "cu_seqlens");
    p_.seqlens = static_cast<const int64_t*>(view->data);
    p_.sequences = view->numel() - 1;
    check_value(p_.sequences >= 0, "cu_seqlens: must not be empty");
  }

  // The axis of a state that belongs to an axis of the tensors with steps; -1: none, it has one element.
  int state_axis(int axis) const {
    if (p_.seqlens != nullptr) return axis < dim_ ? -1 : axis - dim_;
    return axis < dim_ ? axis : axis - 1;
  }

  void check_view(int i) {
    if (!views_[i]) return;
    const TensorView &view = *views_[i], &y = *views_[2];
    check_device(view, y.device, kNames[i]);
    if (i < kFirstState) {
      check_dtype(view, y.dtype, kNames[i]);
      check_value(view.same_shape(y), kNames[i], ": has shape ", view.sizes(), ", expected ", y.sizes());
      return;
    }
    check_dtype(view, accumulator_of(y.dtype), kNames[i]);
    const bool packed = p_.seqlens != nullptr;
    bool fits = view.ndim == (packed ? y.ndim - dim_ : y.ndim - 1);
    if (fits && packed) fits = view.shape[0] == p_.sequences;
    for (int axis = 0; axis < y.ndim && fits; ++axis) {
      if (axis == dim_) continue;
      const int own = state_axis(axis);
      fits = y.shape[axis] == (own < 0 ? 1 : view.shape[own]);
    }
    check_value(fits, kNames[i], ": has shape ", view.sizes(), ", which does not fit b's shape ", y.sizes());
  }

  int64_t stride_of(int i, int axis) const {
    if (!views_[i]) return 0;
    if (i < kFirstState) return views_[i]->stride(axis);
    return axis == dim_ || state_axis(axis) < 0 ? 0 : views_[i]->stride(state_axis(axis));
  }

  // Whether two axes are one to every tensor.
  static bool mergeable(const Axis& outer, const Axis& inner) {
    for (int i = 0; i < kTensors; ++i) {
      if (outer.strides[i] != inner.strides[i] * inner.size) return false;
    }
    return true;
  }

  void lay_out() {
    const TensorView& y = *views_[2];
    std::vector<Axis> axes;
    for (int axis = 0; axis < y.ndim; ++axis) {
      if (axis == dim_ || y.shape[axis] == 1) continue;
      Axis found{y.shape[axis], {}};
      for (int i = 0; i < kTensors; ++i) found.strides[i] = stride_of(i, axis);
      axes.push_back(found);
    }
    // As they lie in the output, which is dense: from far apart to near.
    std::stable_sort(axes.begin(), axes.end(),
                     [](const Axis& a, const Axis& b) { return a.strides[2] > b.strides[2]; });
    std::vector<Axis> merged;
    for (const Axis& axis : axes) {
      if (!merged.empty() && mergeable(merged.back(), axis)) {
        const int64_t size = merged.back().size * axis.size;
        merged.back() = axis;
        merged.back().size = size;
      } else {
        merged.push_back(axis);
      }
    }
    Axis inner{1, {}};
    if (!merged.empty() && merged.back().strides[2] == 1) {
      inner = merged.back();
      merged.pop_back();
    }
    check_axes(merged.size());
    fill(merged, inner);
  }

  static void check_axes(size_t axes) {
    if (axes <= size_t{kMaxOuterAxes}) return;
    fail(ErrorKind::kNotImplemented, "linear_scan: the strides of a and b leave ", axes,
         " axes that cannot be merged, allowed: ", kMaxOuterAxes, "; make the inputs contiguous");
  }

  void fill(const std::vector<Axis>& outer, const Axis& inner) {
    ScanTensor* const targets[kTensors] = {&p_.a, &p_.x, &p_.y, &p_.h, &p_.da, &p_.h0, &p_.dh0};
    p_.inner = inner.size;
    p_.outer = 1;
    p_.outer_axes = int32_t(outer.size());
    for (size_t axis = 0; axis < outer.size(); ++axis) {
      p_.sizes[axis] = outer[axis].size;
      p_.outer *= outer[axis].size;
    }
    for (int i = 0; i < kTensors; ++i) {
      if (!views_[i]) continue;
      ScanTensor& target = *targets[i];
      target.data = views_[i]->data;
      target.step = stride_of(i, dim_);
      target.inner = inner.strides[i];
      for (size_t axis = 0; axis < outer.size(); ++axis) target.outer[axis] = outer[axis].strides[i];
      if (i >= kFirstState && p_.seqlens != nullptr) target.sequence = views_[i]->stride(0);
    }
  }

  Arguments arguments_;
  int dim_;
  std::optional<TensorView> views_[kTensors];
  LinearScanParams p_{};
};

// Bytes of workspace that the call of the same arguments needs.
int64_t linear_scan_workspace(py::sequence tensors, py::handle seqlens, int dim, bool backward,
                              bool descending) {
  const LinearScanCall call(tensors, seqlens, dim, backward, descending);
  int64_t bytes = 0;
  TW_RUN(call.device().is_cuda, (void)0, (void)(bytes = scan::linear_scan_workspace_cuda(call.params())));
  return bytes;
}

void linear_scan(py::sequence tensors, py::handle seqlens, int dim, bool backward, bool descending,
                 py::handle workspace, int threads) {
  LinearScanCall call(tensors, seqlens, dim, backward, descending);
  call.set_workspace(workspace);
  const LinearScanParams& p = call.params();
  const Device device = call.device();
  const Stream stream = call.stream();
  py::gil_scoped_release released;
  (void)threads;
  (void)stream;
  (void)device;
  TW_RUN(device.is_cuda, TW_CALL_CPU(linear_scan_cpu, p, threads),
         scan::linear_scan_cuda(p, device.index, stream));
}

}  // namespace

void bind_linear_scan(py::module_& m) {
  m.def("linear_scan_workspace", &linear_scan_workspace, py::arg("tensors"), py::arg("cu_seqlens").none(true),
        py::arg("dim"), py::arg("backward"), py::arg("descending"));
  m.def("linear_scan", &linear_scan, py::arg("tensors"), py::arg("cu_seqlens").none(true), py::arg("dim"),
        py::arg("backward"), py::arg("descending"), py::arg("workspace").none(true), py::arg("threads"),
        "One sweep over (a, b or grad, h or db, h, da, h0, dh0); the last four may be None.");
}

}  // namespace tilewright
