// The DLPack 1.x C ABI, declared from its specification (https://dmlc.github.io/dlpack): only the
// structs this extension reads, with their published layout. Nothing is included or vendored.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

enum TwDLDeviceType : int32_t { kTwDLCPU = 1, kTwDLCUDA = 2, kTwDLCUDAHost = 3, kTwDLCUDAManaged = 13 };

enum TwDLTypeCode : uint8_t {
  kTwDLInt = 0,
  kTwDLUInt = 1,
  kTwDLFloat = 2,
  kTwDLBfloat = 4,
  kTwDLComplex = 5,
  kTwDLBool = 6
};

struct TwDLDevice {
  int32_t type;
  int32_t id;
};

struct TwDLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct TwDLTensor {
  void* data;
  TwDLDevice device;
  int32_t ndim;
  TwDLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major
  uint64_t byte_offset;
};

struct TwDLManagedTensor {
  TwDLTensor tensor;
  void* context;
  void (*deleter)(TwDLManagedTensor*);
};

struct TwDLVersion {
  uint32_t major;
  uint32_t minor;
};

struct TwDLExchangeHeader {
  TwDLVersion version;
  TwDLExchangeHeader* previous;
};

// type(tensor).__dlpack_c_exchange_api__ is a capsule of this table; only the last two entries are called.
struct TwDLExchangeApi {
  TwDLExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, TwDLTensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // extern "C"
