#include "bindings/arguments.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tilewright {
namespace {

DType dtype_from(TwDLDataType type) {
  if (type.lanes != 1) return DType::kOther;
  const int key = type.code * 256 + type.bits;
  switch (key) {
    case kTwDLFloat * 256 + 64:
      return DType::kFloat64;
    case kTwDLFloat * 256 + 32:
      return DType::kFloat32;
    case kTwDLFloat * 256 + 16:
      return DType::kFloat16;
    case kTwDLBfloat * 256 + 16:
      return DType::kBFloat16;
    case kTwDLUInt * 256 + 8:
      return DType::kUInt8;
    case kTwDLInt * 256 + 8:
      return DType::kInt8;
    case kTwDLInt * 256 + 32:
      return DType::kInt32;
    case kTwDLInt * 256 + 64:
      return DType::kInt64;
    case kTwDLBool * 256 + 8:
      return DType::kBool;
    case kTwDLComplex * 256 + 64:
      return DType::kComplex64;
    case kTwDLComplex * 256 + 128:
      return DType::kComplex128;
    default:
      return DType::kOther;
  }
}

TensorView view_of(const TwDLTensor& tensor, Label name) {
  TensorView view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (tensor.data == nullptr) view.data = nullptr;
  view.dtype = dtype_from(tensor.dtype);
  view.ndim = tensor.ndim;
  view.shape = tensor.shape;
  view.strides = tensor.strides;
  const int32_t device = tensor.device.type;
  view.device.is_cuda = device == kTwDLCUDA || device == kTwDLCUDAManaged;
  view.device.index = view.device.is_cuda ? tensor.device.id : 0;
  check_value(view.device.is_cuda || device == kTwDLCPU || device == kTwDLCUDAHost, name,
              " must be on a CPU or CUDA device, got DLPack device type ", device);
  return view;
}

// The table that the object's type publishes, or null. Types are few, so the last ones asked for are
// remembered; a type that publishes a table lives as long as the process.
const TwDLExchangeApi* exchange_api_of(PyTypeObject* type) {
  static std::array<std::pair<PyTypeObject*, const TwDLExchangeApi*>, 4> known{};
  static size_t next = 0;
  for (const auto& [seen, api] : known) {
    if (seen == type) return api;
  }
  py::object capsule =
      py::getattr(py::handle(reinterpret_cast<PyObject*>(type)), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none() || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* api =
      static_cast<const TwDLExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api->header.version.major != 1 || api->tensor_from_object == nullptr) return nullptr;
  known[next++ % known.size()] = {type, api};
  return api;
}

// Only memory whose pages lie wholly within the tensor; that of other tensors keeps its policy.
void prefer_huge_pages(const TensorView& view) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const int64_t bytes = view.numel() * itemsize(view.dtype);
  if (view.device.is_cuda || bytes < int64_t{2} * int64_t{kPage}) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(view.data), end = begin + uintptr_t(bytes);
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first,
          MADV_HUGEPAGE);  // where it is refused nothing changes
#else
  (void)view;
#endif
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

}  // namespace

Arguments::~Arguments() {
  for (TwDLManagedTensor* tensor : owned_) {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
}

TensorView Arguments::tensor(py::handle object, Label name, Access access) {
  const TwDLExchangeApi* api = exchange_api_of(Py_TYPE(object.ptr()));
  const TensorView view =
      api == nullptr ? from_protocol(object, name) : from_exchange_table(*api, object, name);
  if (access == Access::kOverwrite) prefer_huge_pages(view);
  return view;
}

std::optional<TensorView> Arguments::optional_tensor(py::handle object, Label name, Access access) {
  if (object.is_none()) return std::nullopt;
  return tensor(object, name, access);
}

TensorView Arguments::from_exchange_table(const TwDLExchangeApi& api, py::handle object, Label name) {
  TwDLTensor tensor;
  if (api.tensor_from_object(object.ptr(), &tensor) != 0) {
    py::error_already_set cause;
    fail(ErrorKind::kType, name, " must be a strided tensor, got one that cannot be read (", cause.what(),
         ")");
  }
  api_ = &api;
  return view_of(tensor, name);
}

TensorView Arguments::from_protocol(py::handle object, Label name) {
  check_type(py::hasattr(object, "__dlpack__"), name, " must be a tensor, got ", type_name(object));
  py::object source = py::reinterpret_borrow<py::object>(object);
  // torch refuses to export a tensor that requires grad; its detached alias is the same memory.
  if (py::hasattr(object, "detach")) source = object.attr("detach")();
  py::object capsule = source.attr("__dlpack__")();
  auto* managed = static_cast<TwDLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  owned_.push_back(managed);
  return view_of(managed->tensor, name);
}

Stream Arguments::current_stream(Device device) const {
  if (!device.is_cuda) return nullptr;
  if (api_ != nullptr && api_->current_stream != nullptr) {
    void* stream = nullptr;
    if (api_->current_stream(kTwDLCUDA, device.index, &stream) != 0) throw py::error_already_set();
    return stream;
  }
  py::object stream = py::module_::import("torch").attr("cuda").attr("current_stream")(device.index);
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
}

bool runs_on_gpu(const TensorView& view) {
#if TILEWRIGHT_EMULATED
  (void)view;
  return true;
#else
  return view.device.is_cuda;
#endif
}

std::optional<int64_t> row_stride(const TensorView& view) {
  if (view.numel() == 0) return 0;
  int64_t rows = 1, stride = 0;
  for (int32_t axis = view.ndim - 2; axis >= 0; --axis) {
    if (view.shape[axis] == 1) continue;
    if (rows == 1) stride = view.stride(axis);
    if (view.stride(axis) != stride * rows) return std::nullopt;
    rows *= view.shape[axis];
  }
  return stride;
}

bool is_real(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16 ||
         dtype == DType::kFloat64;
}

void* Arguments::flat(py::handle object, Label name, int64_t numel, DType dtype, Device device) {
  if (object.is_none()) return nullptr;
  const TensorView view = tensor(object, name);
  check_dtype(view, dtype, name);
  check_device(view, device, name);
  check_numel(view, numel, name);
  if (numel != 0) check_contiguous(view, name);
  return view.data;
}

void* Arguments::workspace(py::handle object, int64_t bytes, Device device) {
  if (object.is_none() && bytes == 0) return nullptr;
  const TensorView view = tensor(object, "workspace", Access::kOverwrite);
  check_dtype(view, DType::kUInt8, "workspace");
  check_device(view, device, "workspace");
  check_contiguous(view, "workspace");
  check_value(view.numel() >= bytes, "workspace: got ", view.numel(), " bytes, expected ", bytes);
  return view.data;
}

void check_dtype(const TensorView& view, DType expected, Label name) {
  check_type(view.dtype == expected, name, " must have dtype ", expected, ", got ", view.dtype);
}

void check_dtypes(bool ok, const TensorView& view, const char* allowed, Label name) {
  check_type(ok, name, " must have dtype ", allowed, ", got ", view.dtype);
}

void check_real_like(const TensorView& view, DType owned, const char* owner, Label name) {
  const bool wide = owned == DType::kFloat64;
  check_type(is_real(view.dtype) && (view.dtype == DType::kFloat64) == wide, name, " must have dtype ",
             wide ? "float64, as " : "float32, float16, bfloat16", wide ? owner : "", wide ? " has" : "",
             ", got ", view.dtype);
}

void check_real(const TensorView& view, Label name) {
  check_dtypes(is_real(view.dtype), view, "float32, float16, bfloat16, float64", name);
  check_dtypes(!runs_on_gpu(view) || view.dtype != DType::kFloat64, view,
               "float32, float16, bfloat16 on a CUDA device", name);
}

void check_indices(const TensorView& view, Label name) {
  check_dtypes(view.dtype == DType::kInt32 || view.dtype == DType::kInt64, view, "int32, int64", name);
}

void check_contiguous(const TensorView& view, Label name) {
  // Of a tensor without elements, torch 2.6 exports strides of any kind.
  check_value(view.numel() == 0 || view.is_contiguous(), name, " must be contiguous, got shape ",
              view.sizes(), " with other strides; call .contiguous()");
}

void check_numel(const TensorView& view, int64_t expected, Label name) {
  check_value(view.numel() == expected, name, " must have ", expected, " elements, got ", view.numel(),
              " in shape ", view.sizes());
}

void check_device(const TensorView& view, Device expected, Label name) {
  check_value(view.device == expected, name, " must be on ", expected, ", got ", view.device);
}

}  // namespace tilewright
