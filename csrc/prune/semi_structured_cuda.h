// What the CUDA kernels of the semi-structured linear layer share; the formulas are in
// semi_structured_linear.h.
#pragma once

#include "core/half.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "prune/activation_cuda.h"
#include "prune/semi_structured_linear.h"

namespace tilewright::prune::semi {

using device::Vector;

// Products on tensor cores by mma.sp, 2:4 in 16 bits.
void forward_sparse_mma(const SemiStructuredLinearParams&, Stream);
// Few tokens, 2:4, of aligned rows; false: not for these.
bool forward_few(const SemiStructuredLinearParams&, Stream);
// All that remains, on tensor cores (16 bits) or without.
void product_dense(const SemiStructuredLinearParams&, SemiStructuredCall, Stream);

template <class T>
__device__ __forceinline__ const T* values_of(const SemiStructuredWeight& w, int64_t row) {
  return static_cast<const T*>(w.values) + row * w.kept();
}

__device__ __forceinline__ const uint8_t* positions_of(const SemiStructuredWeight& w, int64_t row) {
  return w.positions + row * position_bytes(w.in);
}

// Where an element lies in its row's values; -1: it is not kept.
__device__ __forceinline__ int64_t place_of(const SemiStructuredWeight& w, int64_t row, int64_t column) {
  const uint8_t* positions = positions_of(w, row);
  if (w.two_of_four()) {
    const int nibble = positions[column / 8] >> column / 4 % 2 * 4 & 15, at = int(column % 4);
    if (at == (nibble & 3)) return column / 4 * 2;
    return at == nibble >> 2 ? column / 4 * 2 + 1 : -1;
  }
  if ((positions[column / 8] >> column % 8 & 1) == 0) return -1;
  const int64_t group = column / w.m, begin = group * w.m;
  int before = 0;
  for (int64_t byte = begin / 8; byte <= column / 8; ++byte) {
    uint32_t bits = positions[byte];
    if (byte == begin / 8) bits &= ~0u << begin % 8;
    if (byte == column / 8) bits &= (1u << column % 8) - 1u;
    before += device::count_bits(bits);
  }
  return before < w.n ? group * w.n + before : -1;
}

// Element (token, row) of the results from its sum of products.
template <class T>
__device__ __forceinline__ void finish(const SemiStructuredLinearParams& p, int64_t token, int64_t row,
                                       float sum) {
  if (p.bias != nullptr) sum += device::to_float(static_cast<const T*>(p.bias)[row]);
  if (p.z.data != nullptr)
    static_cast<T*>(p.z.data)[token * p.z.row + row * p.z.column] = device::from_float<T>(sum);
  const float result = activate<std::is_same_v<T, float>>(sum, p.activation);
  static_cast<T*>(p.y.data)[token * p.y.row + row * p.y.column] = device::from_float<T>(result);
}

}  // namespace tilewright::prune::semi
