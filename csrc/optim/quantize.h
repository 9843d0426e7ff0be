// Blockwise 8-bit quantization: each run of block_size elements is stored as 8-bit codes of x / absmax,
// absmax being the block's largest magnitude.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::optim {

struct QuantizeParams {
  void* values;      // [numel] of dtype, contiguous; read by quantize, written by dequantize
  uint8_t* codes;    // [numel]
  float* absmax;     // [ceil(numel / block_size)]
  const float* map;  // [256] ascending; null: the built-in dynamic map
  int64_t numel;
  int32_t block_size;  // elements; 64 to 4096, a power of two
  DType dtype;         // float32, float16 or bfloat16
  bool is_signed;      // which built-in map
};

void quantize_cuda(const QuantizeParams&, int device, Stream);
void dequantize_cuda(const QuantizeParams&, int device, Stream);

}  // namespace tilewright::optim

namespace tilewright {
TW_DECLARE_CPU(void, quantize_cpu, (const optim::QuantizeParams&, int threads))
TW_DECLARE_CPU(void, dequantize_cpu, (const optim::QuantizeParams&, int threads))
}  // namespace tilewright
