// A linear layer whose weight (out, in) keeps n of every m neighbours along a row (2:4 and other n:m), its
// gradients, and the weight's two forms:
//
//   z = x W^T + bias,  y = activation(z);   dx = dz W,   dW = dz^T x at the kept elements.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "prune/linear.h"

namespace tilewright::prune {

// The weight's compressed form. A row is in / m groups (m divides in) of exactly n kept elements each; where
// they are takes in bits a row, rounded up to bytes:
//   2:4    four bits a group: the first kept position in the lower two, the second, larger one above; groups
//          from the low bits of a byte on
//   other  one bit a column, set if it is kept, from the low bits of a byte on
struct SemiStructuredWeight {
  void* values;        // [out][in / m * n] of dtype: a row's kept elements in order
  uint8_t* positions;  // [out][position_bytes(in)]
  int64_t out, in;
  int32_t n, m;  // 1 <= n < m <= 32

  constexpr bool two_of_four() const { return n == 2 && m == 4; }
  constexpr int64_t kept() const { return in / m * n; }  // in a row
};

constexpr int64_t position_bytes(int64_t in) { return divide_up(in, 8); }

// Columns that begin and end at a byte of the positions and at a group.
constexpr int64_t columns_together(int32_t m) {
  int64_t columns = m;
  while (columns % 8 != 0) columns += m;
  return columns;
}

struct SemiStructuredLinearParams {
  SemiStructuredWeight weight;
  const void* bias;  // [out] of dtype; null: none
  Matrix x;          // (tokens, in) of dtype; read by forward and weight
  Matrix y;          // (tokens, out), written by forward; input and weight read dz here
  Matrix z;          // (tokens, out), written by forward: before the activation; may be absent
  Matrix dx;         // (tokens, in), written by input
  void* dvalues;     // as weight.values, written by weight
  int64_t tokens;
  Activation activation;
  DType dtype;      // float32, float16, bfloat16; float64 on the CPU
  void* workspace;  // semi_structured_workspace_cpu bytes, 64-byte aligned; none on a GPU
};

enum class SemiStructuredCall : int32_t { kForward, kInput, kWeight };  // y; dx; dW

// Between dense and compressed. To compress, element (r, c) is kept if the mask says so, or, without one, if
// it is not zero; no group keeps more than n. The first others of a group fill it up. Bits are copied.
struct SemiStructuredFormatParams {
  SemiStructuredWeight weight;
  Matrix dense;  // (out, in), of dtype
  Matrix mask;   // (out, in) of bool; may be absent
  DType dtype;
};

void semi_structured_linear_cuda(const SemiStructuredLinearParams&, SemiStructuredCall, int device, Stream);
void semi_structured_compress_cuda(const SemiStructuredFormatParams&, int device, Stream);
void semi_structured_decompress_cuda(const SemiStructuredFormatParams&, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(int64_t, semi_structured_workspace_cpu,
               (const prune::SemiStructuredLinearParams&, prune::SemiStructuredCall, int threads))
TW_DECLARE_CPU(void, semi_structured_linear_cpu,
               (const prune::SemiStructuredLinearParams&, prune::SemiStructuredCall, int threads))
TW_DECLARE_CPU(int64_t, semi_structured_backward_workspace_cpu,
               (const prune::SemiStructuredLinearParams&, prune::SemiStructuredCall, int threads))
TW_DECLARE_CPU(void, semi_structured_backward_cpu,
               (const prune::SemiStructuredLinearParams&, prune::SemiStructuredCall, int threads))
TW_DECLARE_CPU(void, semi_structured_compress_cpu, (const prune::SemiStructuredFormatParams&, int threads))
TW_DECLARE_CPU(void, semi_structured_decompress_cpu, (const prune::SemiStructuredFormatParams&, int threads))
}  // namespace tilewright
