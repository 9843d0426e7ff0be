// Which parts of a weight are kept: of groups of m neighbours n, of many tensors or of each row the best.
//
// "Best" is by magnitude, and of equals the first: by position in a row, in a tensor read row by row, and in
// the list of tensors. That says which are kept to the last bit, whatever the threads. Masks are bytes, 1
// where kept. A value that is not finite sets *invalid to 1; what is kept then says nothing.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "prune/linear.h"

namespace tilewright::prune {

constexpr int kLargestGroup = 32;

// Of each m neighbours in a row the n with the largest |w| f are kept.
struct SelectGroupsParams {
  Matrix weight;          // of dtype
  const void* factors;    // [columns] float32 (float64 for float64); null: ones
  uint8_t* mask;          // [rows][columns], written
  int32_t* invalid;       // 0 before the call
  int64_t rows, columns;  // columns: a multiple of m
  int32_t n, m;           // 1 <= n < m <= kLargestGroup
  DType dtype;            // float32, float16, bfloat16; float64 on the CPU
};

// Of each row the `kept` with the largest |w| f are kept.
struct SelectRowsParams {
  const void* factors;  // [columns] float32 (float64 for float64); null: ones
  Matrix scores;        // of dtype
  uint8_t* mask;        // [rows][columns], written
  int32_t* invalid;     // 0 before the call
  void* workspace;      // select_rows_workspace bytes
  int64_t rows, columns, kept;
  DType dtype;
};

// On a CPU the keys of a row, a thread; none on a GPU.
constexpr int64_t select_rows_workspace(int64_t columns, int threads) {
  return int64_t{threads < 1 ? 1 : threads} * columns * 8;
}

// One of the tensors of a selection.
struct SelectSource {
  Matrix scores;  // of dtype
  uint8_t* mask;  // [rows][columns], written
  int64_t rows, columns;
  DType dtype;
};

constexpr int64_t kMostSelected = 0xffffffff;  // elements of all sources

// Of all elements of all sources the `kept` with the largest magnitude are kept.
struct SelectParams {
  const SelectSource* sources;  // in host memory; dtypes are all float64, or none is
  int64_t count;
  int64_t kept;
  int32_t* invalid;  // 0 before the call
  void* workspace;   // select_workspace_* bytes, 64-byte aligned
  int32_t threads;   // on a CPU, at least 1
};

// Groups of group_rows x group_columns neighbours share what `units` says of them.
struct ExpandParams {
  const uint8_t* units;  // [ceil(rows / group_rows)][ceil(columns / group_columns)]
  uint8_t* mask;         // [rows][columns], written
  int64_t rows, columns, group_rows, group_columns;
};

void select_groups_cuda(const SelectGroupsParams&, int device, Stream);
void select_rows_cuda(const SelectRowsParams&, int device, Stream);
int64_t select_workspace_cuda(const SelectParams&);
void select_cuda(const SelectParams&, int device, Stream);
void expand_cuda(const ExpandParams&, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(void, select_groups_cpu, (const prune::SelectGroupsParams&, int threads))
TW_DECLARE_CPU(void, select_rows_cpu, (const prune::SelectRowsParams&, int threads))
TW_DECLARE_CPU(int64_t, select_workspace_cpu, (const prune::SelectParams&))
TW_DECLARE_CPU(void, select_cpu, (const prune::SelectParams&))
TW_DECLARE_CPU(void, expand_cpu, (const prune::ExpandParams&, int threads))
}  // namespace tilewright
