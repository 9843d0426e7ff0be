// How much the parts of a weight matter. The score of a group of R x C weights w with factors f (one for each
// column, or 1) is
//
//   kSum      sum |w| f              kLargest   max |w| f
//   kSquares  sqrt(sum (|w| f)^2)    kPowers    (sum (|w| f)^p)^(1/p)
//   kProducts |sum w g|
//
// Groups at the lower and right edge of a weight whose sizes are no multiples of R and C hold what is there.
// A group of more than kPartRows rows is summed in parts, added up in their order.
#pragma once

#include <cstdint>

#include "core/integers.h"
#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"
#include "prune/linear.h"

namespace tilewright::prune {

enum class Score : int32_t { kSum, kSquares, kLargest, kPowers, kProducts };

constexpr int64_t kPartRows = 128;

struct GroupScoresParams {
  Matrix weight;        // of dtype
  Matrix gradient;      // of dtype; kProducts alone reads it
  const void* factors;  // [columns] float32 (float64 for float64); null: ones
  void* scores;     // [ceil(rows / group_rows)][ceil(columns / group_columns)] float32 (or float64), written
  void* workspace;  // group_scores_workspace bytes
  int64_t rows, columns, group_rows, group_columns;
  double power;  // of kPowers
  Score score;
  DType dtype;  // float32, float16, bfloat16; float64 on the CPU
};

constexpr int64_t group_parts(const GroupScoresParams& p) {
  return divide_up(smaller(p.group_rows, p.rows), kPartRows);
}

// Sums of the parts, where there is more than one.
constexpr int64_t group_scores_workspace(const GroupScoresParams& p) {
  const int64_t groups = divide_up(p.rows, p.group_rows) * divide_up(p.columns, p.group_columns);
  return group_parts(p) > 1 ? group_parts(p) * groups * (p.dtype == DType::kFloat64 ? 8 : 4) : 0;
}

// Numbers from [0, 1), multiples of 2^-24: number i depends on the seed, the stream and i alone.
struct RandomScoresParams {
  float* scores;
  int64_t count;
  uint64_t seed;
  uint32_t stream;
};

void group_scores_cuda(const GroupScoresParams&, int device, Stream);
void random_scores_cuda(const RandomScoresParams&, int device, Stream);

}  // namespace tilewright::prune

namespace tilewright {
TW_DECLARE_CPU(void, group_scores_cpu, (const prune::GroupScoresParams&, int threads))
TW_DECLARE_CPU(void, random_scores_cpu, (const prune::RandomScoresParams&, int threads))
}  // namespace tilewright
