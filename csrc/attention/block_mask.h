// Block masks: which blocks of keys a block of queries attends to, and the reverse.
//
// Attention kernels read a mask as lists (BlockMaskView). A list is built from a map of codes, one a pair of
// blocks:
//
//   0 the block is absent, 1 it is full, 2 + t it is partial, its elements are those of bit table t
//
// so that what a list holds beside the block's number, -1 for full and t for partial, is its code - 2.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"

namespace tilewright::attention {

// Row r of (batch b, head h) is row number b * batch_stride + (h / heads_per_mask_head) * head_stride + r.
// Its counts[row] entries are indices[row * capacity + i], ascending and distinct.
struct BlockLists {
  const int32_t* counts;
  const int32_t* indices;
  const int32_t* bits;  // as indices: -1 for a full block, else the number of its table; null: all are full
  int64_t rows, capacity;
  int64_t batch_stride, head_stride;  // in rows; 0: shared
  int64_t heads_per_mask_head;
};

// Queries and keys beyond q_len and kv_len do not exist: the last block of an axis is full as far as it goes.
struct BlockMaskView {
  BlockLists q2k, k2q;        // rows are blocks of queries, blocks of keys
  const uint32_t* tables;     // [number][block_q][ceil(block_kv / 32)]: bit j of word w of row i is set where
                              // query i of the block may see key 32 w + j of the other
  int32_t block_q, block_kv;  // elements; multiples of 16 from 16 to 256
  int64_t q_len, kv_len;      // elements
};

// ---- lists from a map of codes ----

// Lists to be written, contiguous: counts [batch][heads][rows], the others with [capacity] behind. What does
// not fit into the capacity is left out and not counted.
struct NewLists {
  int32_t* counts;
  int32_t* indices;  // null: only the counts are asked for
  int32_t* bits;     // null: not asked for
  int64_t capacity;
};

struct BlockListsParams {
  const void* codes;                                       // uint8, or int32 if wide
  int64_t batch_stride, head_stride, q_stride, kv_stride;  // in elements, of codes
  int64_t batch, heads, q_blocks, kv_blocks;
  NewLists q2k, k2q;
  bool wide;
};

void block_lists_cuda(const BlockListsParams&, int device, Stream);

// ---- a map of codes from lists that somebody else made ----

// What is wrong with a list. A bad entry is dropped, and of a repeated one the first stays.
enum BadList : int32_t {
  kBadCount = 1,  // below 0 or above the capacity
  kBadIndex = 2,  // no such block
  kRepeated = 4,  // a block more than once
  kBadTable = 8,  // neither -1 nor the number of a table
};

struct BlockCodesParams {
  const int32_t* counts;   // [rows]
  const int32_t* indices;  // [rows][capacity], in any order
  const int32_t* bits;     // [rows][capacity]; null: all blocks are full
  void* codes;             // [rows][blocks] uint8, or int32 if wide; overwritten
  int32_t* flags;          // [rows], of BadList; overwritten
  int64_t rows, capacity, blocks;
  int32_t tables;
  bool wide;
};

void block_codes_cuda(const BlockCodesParams&, int device, Stream);

}  // namespace tilewright::attention

namespace tilewright {
TW_DECLARE_CPU(void, block_lists_cpu, (const attention::BlockListsParams&, int threads))
TW_DECLARE_CPU(void, block_codes_cpu, (const attention::BlockCodesParams&, int threads))
}  // namespace tilewright
