// TensorView: what a kernel needs to know of somebody else's memory. It owns nothing.
#pragma once

#include <cstdint>

#include "core/check.h"

namespace tilewright {

enum class DType : int32_t {
  kFloat64,
  kFloat32,
  kFloat16,
  kBFloat16,
  kUInt8,
  kInt8,
  kInt32,
  kInt64,
  kBool,
  kComplex64,
  kComplex128,
  kOther
};

static constexpr int64_t itemsize(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
    case DType::kComplex64:
      return 8;
    case DType::kComplex128:
      return 16;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kBool:
      return "bool";
    case DType::kComplex64:
      return "complex64";
    case DType::kComplex128:
      return "complex128";
    case DType::kOther:
      break;
  }
  return "an unsupported dtype";
}

struct Device {
  bool is_cuda = false;
  int32_t index = 0;
  bool operator==(const Device&) const = default;
};

// Devices, dtypes and shapes are written by streaming, so that passing one to a check costs nothing when it
// holds.
inline std::ostream& operator<<(std::ostream& out, Device device) {
  return device.is_cuda ? out << "cuda:" << device.index : out << "cpu";
}

inline std::ostream& operator<<(std::ostream& out, DType dtype) { return out << name_of(dtype); }

struct Shape {
  const int64_t* sizes;
  int32_t ndim;
};

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
  out << '(';
  for (int32_t i = 0; i < shape.ndim; ++i) out << (i ? ", " : "") << shape.sizes[i];
  return out << (shape.ndim == 1 ? ",)" : ")");
}

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kOther;
  Device device;
  int32_t ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;  // in elements; null means row-major

  int64_t numel() const {
    int64_t count = 1;
    for (int32_t i = 0; i < ndim; ++i) count *= shape[i];
    return count;
  }

  // An axis of size 1 gets the one it would have around the axes behind it: any number is right, but kernels
  // look at whether strides are multiples of their vectors, and torch before 2.10 exports 1.
  int64_t stride(int32_t axis) const {
    if (strides != nullptr && shape[axis] != 1) return strides[axis];
    return axis + 1 == ndim ? 1 : stride(axis + 1) * shape[axis + 1];
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int32_t i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride(i) != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  // The elements fill one gapless range of memory, in any order of the axes.
  bool is_dense() const {
    if (numel() <= 1) return true;
    int64_t expected = 1;
    for (int32_t placed = 0; placed < ndim; ++placed) {
      int32_t axis = -1;
      for (int32_t i = 0; i < ndim; ++i) {
        if (shape[i] != 1 && stride(i) == expected) axis = i;
      }
      if (axis < 0) return expected == numel();
      expected *= shape[axis];
    }
    return expected == numel();
  }

  bool same_shape(const TensorView& other) const {
    if (ndim != other.ndim) return false;
    for (int32_t i = 0; i < ndim; ++i) {
      if (shape[i] != other.shape[i]) return false;
    }
    return true;
  }

  // Element i of the one lies where element i of the other lies, counted in elements.
  bool same_layout(const TensorView& other) const {
    if (!same_shape(other)) return false;
    for (int32_t i = 0; i < ndim; ++i) {
      if (shape[i] != 1 && stride(i) != other.stride(i)) return false;
    }
    return true;
  }

  Shape sizes() const { return {shape, ndim}; }
};

}  // namespace tilewright
