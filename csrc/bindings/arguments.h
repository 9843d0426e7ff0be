// From Python objects to TensorViews. Two ways in: the DLPack C exchange table that a tensor type publishes
// (torch >= 2.10: no allocation, no copy of metadata), and the `__dlpack__` protocol for everything else
// (older torch, NumPy). Both borrow: a view is valid while the caller holds the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <vector>

#include "core/dlpack.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright {

namespace py = pybind11;

// An argument's name in messages: "A", or "param 3: grad". Text is made only when something is wrong.
struct Label {
  Label(const char* text) : prefix(""), what(text) {}  // NOLINT: a plain name is a label
  Label(const char* owner, int64_t number, const char* text) : prefix(owner), index(number), what(text) {}
  const char* prefix;
  int64_t index = -1;
  const char* what;
};

inline std::ostream& operator<<(std::ostream& out, const Label& label) {
  if (label.index >= 0) out << label.prefix << ' ' << label.index << ": ";
  return out << label.what;
}

// What a kernel does with an argument. Memory that is overwritten from end to end may be new: huge pages then
// cost a fraction of the page faults, which for large outputs take longer than the kernels.
enum class Access { kRead, kOverwrite };

// Reads tensors for the length of one call and owns whatever the protocol handed over meanwhile.
class Arguments {
 public:
  Arguments() = default;
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;
  ~Arguments();

  // The tensor's memory as it is; `name` appears in messages.
  TensorView tensor(py::handle object, Label name, Access access = Access::kRead);
  std::optional<TensorView> optional_tensor(py::handle object, Label name, Access access = Access::kRead);
  // The memory of a contiguous tensor of so many elements; null for None.
  void* flat(py::handle object, Label name, int64_t numel, DType dtype, Device device);

  // Scratch memory of at least so many bytes; null for None if that is none.
  void* workspace(py::handle object, int64_t bytes, Device device);

  // The caller's current stream on the device of the tensors read so far.
  Stream current_stream(Device device) const;

 private:
  TensorView from_exchange_table(const TwDLExchangeApi& api, py::handle object, Label name);
  TensorView from_protocol(py::handle object, Label name);

  // Shapes and strides of protocol tensors live in the owner's struct until it is released.
  std::vector<TwDLManagedTensor*> owned_;
  const TwDLExchangeApi* api_ = nullptr;
};

// Emulated builds treat CPU memory as device memory; in all others a view's own device decides.
bool runs_on_gpu(const TensorView& view);

bool is_real(DType dtype);

// From one row of (..., width) to the next, if all lie at one distance; 0 where there are fewer than two.
std::optional<int64_t> row_stride(const TensorView& view);

void check_dtype(const TensorView& view, DType expected, Label name);
// For several dtypes, whose names `allowed` lists.
void check_dtypes(bool ok, const TensorView& view, const char* allowed, Label name);
// float64 if that is what `owner` has, else another real dtype.
void check_real_like(const TensorView& view, DType owned, const char* owner, Label name);
// float32, float16, bfloat16, and float64 where CPU kernels run.
void check_real(const TensorView& view, Label name);
void check_indices(const TensorView& view, Label name);
void check_contiguous(const TensorView& view, Label name);
void check_numel(const TensorView& view, int64_t expected, Label name);
void check_device(const TensorView& view, Device expected, Label name);

}  // namespace tilewright
