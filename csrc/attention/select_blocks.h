// What estimators of block masks need: the choice of a row's best blocks, and the bit tables of blocks whose
// keys are in another order.
#pragma once

#include <bit>
#include <cstdint>

#include "core/integers.h"
#include "core/isa.h"
#include "core/stream.h"

namespace tilewright::attention {

// Of each row of scores the best candidates keep their codes, all other blocks get 0. "Best" is by score,
// NaN above all numbers, and among equal scores the first. Kept are `count` candidates, or, where count is 0,
// the fewest whose scores sum up to `mass` times the sum of all; scores are >= 0 then. mass >= 1 keeps all.
struct SelectBlocksParams {
  const float* scores;
  int64_t scores_batch, scores_head, scores_row, scores_block;  // strides in elements
  const void* candidates;                                       // codes: uint8, or int32 if wide
  int64_t candidates_batch, candidates_head, candidates_row, candidates_block;
  void* codes;  // as candidates, contiguous [batch][heads][rows][blocks]; overwritten
  int64_t batch, heads, rows, blocks;
  int64_t count;
  float mass;
  bool wide;
  void* workspace;  // on a CPU: select_blocks_workspace bytes
};

// Ascending as the score, NaN last.
static constexpr uint32_t key_of(float score) {
  constexpr uint32_t kSign = 0x80000000u;
  if (score != score) return 0xffffffffu;
  const uint32_t raw = std::bit_cast<uint32_t>(score + 0.0f);  // -0 is 0
  return raw & kSign ? ~raw : raw | kSign;
}

// How many of `limit` equal weights it takes to fill what is missing; all if that is not a number.
static constexpr int64_t as_many_as_fill(float missing, float weight, int64_t limit) {
  if (missing <= 0.0f) return 0;
  if (!(missing < float(limit) * weight)) return limit;
  const float share = missing / weight;
  const int64_t whole = int64_t(share);
  return smaller(whole + (float(whole) < share), limit);
}

// Scores, weights and numbers of one row's candidates, a thread.
constexpr int64_t select_blocks_workspace(int64_t blocks, int threads) {
  return int64_t{threads < 1 ? 1 : threads} * blocks * 12;
}

// Tables [batch * heads][pairs][block_q][ceil(block_kv / 32)]: query i of block pairs[t][0] may see key j of
// block pairs[t][1], whose position is positions[j], if that is not after the query's, i + kv_len - q_len.
struct PositionTablesParams {
  const int32_t* positions;  // [batch * heads][kv_len]
  const int32_t* pairs;      // [pair_count][2]
  uint32_t* tables;          // overwritten
  int64_t all_heads, pair_count, q_len, kv_len;
  int32_t block_q, block_kv;
};

void select_blocks_cuda(const SelectBlocksParams&, int device, Stream);
void position_tables_cuda(const PositionTablesParams&, int device, Stream);

}  // namespace tilewright::attention

namespace tilewright {
TW_DECLARE_CPU(void, select_blocks_cpu, (const attention::SelectBlocksParams&, int threads))
TW_DECLARE_CPU(void, position_tables_cpu, (const attention::PositionTablesParams&, int threads))
}  // namespace tilewright
