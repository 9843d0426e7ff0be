// Attention over the blocks of a mask, and its gradient. For every query i of a head
//
//   s[j]   = scale * (q[i] . k[j]), and with softcap s[j] = softcap * tanh(s[j] / softcap)
//   lse[i] = log sum_j exp(s[j]),  out[i] = sum_j exp(s[j] - lse[i]) v[j]
//
// over the keys j that the block mask shows to i and, if asked for, j <= i + kv_len - q_len (causal) or
// key_from[i] <= j < key_to[i]. A query that sees no key has out 0, lse -inf and no gradient.
#pragma once

#include <cstdint>

#include "attention/block_mask.h"
#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::attention {

// A tensor (batch, head, row, inner); strides in elements, any.
struct HeadsTensor {
  void* data;  // null: absent
  int64_t batch, head, row, inner;
};

struct BlockSparseParams {
  HeadsTensor q;    // (batch, heads, q_len, head_dim) of dtype, as all of these
  HeadsTensor k;    // (batch, kv_heads, kv_len, head_dim); query head h reads head h / (heads / kv_heads)
  HeadsTensor v;    // (batch, kv_heads, kv_len, value_dim)
  HeadsTensor out;  // (batch, heads, q_len, value_dim); written forward, read backward
  void* lse;        // [batch][heads][q_len], natural logarithm, float32 (float64 where dtype is); as out

  // Backward only. None of the results needs to be zeroed before.
  HeadsTensor dout, dq, dk, dv;  // as out, q, k, v
  const void* dlse;              // as lse; null: zero

  BlockMaskView mask;
  int32_t tables;  // how many the mask has
  // [q_len] each, both ascending: the range of keys that a query may see (packed sequences); null: all.
  const int32_t *key_from, *key_to;
  void* workspace;  // block_sparse_{fwd,bwd}_workspace_{cpu,cuda} bytes of scratch, 64-byte aligned

  int64_t batch, q_len, kv_len;
  int32_t heads, kv_heads, head_dim, value_dim;  // dims: 1..kMaxHeadDim
  double scale, softcap;                         // softcap 0: none
  bool causal;                                   // without key_from and key_to
  DType dtype;                                   // float32, float16, bfloat16; float64 on the CPU
};

constexpr int32_t kMaxHeadDim = 256;

// The range of keys that query i may see by its position.
struct KeyRange {
  int64_t from, to;
};

static constexpr KeyRange key_range(const BlockSparseParams& p, int64_t i) {
  int64_t from = 0, to = p.kv_len;
  if (p.key_to != nullptr) {
    from = p.key_from[i] > 0 ? p.key_from[i] : 0;
    to = p.key_to[i] < to ? p.key_to[i] : to;
  } else if (p.causal) {
    const int64_t last = i + p.kv_len - p.q_len;
    to = last + 1 < to ? last + 1 : to;
  }
  return {from, to > from ? to : from};
}

// On a GPU. Scratch is written before it is read.
int64_t block_sparse_fwd_workspace_cuda(const BlockSparseParams&, int device);
int64_t block_sparse_bwd_workspace_cuda(const BlockSparseParams&);
void block_sparse_fwd_cuda(const BlockSparseParams&, int device, Stream);
void block_sparse_bwd_cuda(const BlockSparseParams&, int device, Stream);

// float32: the multiply-add units
void block_sparse_fwd_float32(const BlockSparseParams&, int device, Stream);
void block_sparse_bwd_float32(const BlockSparseParams&, int device, Stream);

static constexpr int64_t row_of(const BlockLists& lists, int64_t batch, int64_t head, int64_t row) {
  return batch * lists.batch_stride + head / lists.heads_per_mask_head * lists.head_stride + row;
}

// Bits [column, column + count) of a query's row of a table, count <= 64.
static constexpr uint64_t table_bits(const BlockMaskView& mask, int64_t table, int64_t row, int32_t column,
                                     int32_t count) {
  const int32_t words = (mask.block_kv + 31) / 32;
  const uint32_t* line = mask.tables + (table * mask.block_q + row) * words;
  uint64_t result = 0;
  for (int32_t word = column / 32; word <= (column + count - 1) / 32; ++word) {
    const int32_t at = word * 32 - column;
    const uint64_t value = line[word];
    result |= at < 0 ? value >> -at : value << at;
  }
  return count < 64 ? result & ((uint64_t{1} << count) - 1) : result;
}

}  // namespace tilewright::attention

namespace tilewright {
TW_DECLARE_CPU(int64_t, block_sparse_fwd_workspace_cpu, (const attention::BlockSparseParams&, int threads))
TW_DECLARE_CPU(int64_t, block_sparse_bwd_workspace_cpu, (const attention::BlockSparseParams&, int threads))
TW_DECLARE_CPU(void, block_sparse_fwd_cpu, (const attention::BlockSparseParams&, int threads))
TW_DECLARE_CPU(void, block_sparse_bwd_cpu, (const attention::BlockSparseParams&, int threads))
// float64, without workspace
TW_DECLARE_CPU(void, block_sparse_fwd_float64_cpu, (const attention::BlockSparseParams&, int threads))
TW_DECLARE_CPU(void, block_sparse_bwd_float64_cpu, (const attention::BlockSparseParams&, int threads))
}  // namespace tilewright
