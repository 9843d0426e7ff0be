// The choice of a row's best blocks on the CPU, and bit tables by position; compiled once per
// instruction-set level.
//
// Roofline: a row's scores are read once. Nothing is sorted: the threshold is found bit by bit, each bit
// halving, on average, the candidates it may still be, so that the work is a few instructions a candidate.
#include "attention/select_blocks.h"
#include "core/threads.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::attention;

constexpr int64_t kChunkBlocks = 8192;  // scores of a unit of work
constexpr uint32_t kTop = 0x80000000u;

struct Candidates {
  uint32_t* keys;
  float* weights;
  int32_t* numbers;
  int64_t count;
};

template <class Code>
struct Row {
  const float* scores;
  const Code* candidates;
  Code* codes;

  void keep(const SelectBlocksParams& p, int64_t block) const {
    codes[block] = candidates[block * p.candidates_block];
  }
};

template <class Code>
Row<Code> row_of(const SelectBlocksParams& p, int64_t row) {
  const int64_t r = row % p.rows, head = row / p.rows % p.heads, batch = row / p.rows / p.heads;
  return {p.scores + batch * p.scores_batch + head * p.scores_head + r * p.scores_row,
          static_cast<const Code*>(p.candidates) + batch * p.candidates_batch + head * p.candidates_head +
              r * p.candidates_row,
          static_cast<Code*>(p.codes) + row * p.blocks};
}

template <class Code>
void select_row(const SelectBlocksParams& p, int64_t number, void* workspace) {
  const Row<Code> row = row_of<Code>(p, number);
  Candidates left{static_cast<uint32_t*>(workspace), nullptr, nullptr, 0};
  left.weights = reinterpret_cast<float*>(left.keys + p.blocks);
  left.numbers = reinterpret_cast<int32_t*>(left.weights + p.blocks);
  float total = 0;
  for (int64_t block = 0; block < p.blocks; ++block) {
    row.codes[block] = 0;
    if (row.candidates[block * p.candidates_block] == 0) continue;
    const float score = row.scores[block * p.scores_block];
    const float weight = p.count > 0 ? 1.0f : score;
    left.keys[left.count] = key_of(score);
    left.weights[left.count] = weight;
    left.numbers[left.count++] = int32_t(block);
    total += weight;
  }
  const float needed = p.count > 0 ? float(p.count) : p.mass >= 1 ? total * 2 + 1 : p.mass * total;
  float kept = 0;
  for (uint32_t bit = kTop; bit != 0 && left.count > 0; bit >>= 1) {
    float above = 0;
    for (int64_t i = 0; i < left.count; ++i) above += left.keys[i] & bit ? left.weights[i] : 0.0f;
    const bool upper = kept + above >= needed;  // the threshold has this bit: the others are out
    if (!upper) kept += above;
    int64_t count = 0;
    for (int64_t i = 0; i < left.count; ++i) {
      const bool has = (left.keys[i] & bit) != 0;
      if (has && !upper) row.keep(p, left.numbers[i]);
      left.keys[count] = left.keys[i];
      left.weights[count] = left.weights[i];
      left.numbers[count] = left.numbers[i];
      count += has == upper;
    }
    left.count = count;
  }
  if (left.count == 0) return;
  const int64_t ties = as_many_as_fill(needed - kept, left.weights[0], left.count);
  for (int64_t i = 0; i < ties; ++i) row.keep(p, left.numbers[i]);
}

void fill_table(const PositionTablesParams& p, int64_t table) {
  const int64_t pair = table % p.pair_count, head = table / p.pair_count;
  const int32_t words = (p.block_kv + 31) / 32;
  const int64_t first_query = p.pairs[2 * pair] * int64_t{p.block_q} + p.kv_len - p.q_len;
  const int64_t first_key = p.pairs[2 * pair + 1] * int64_t{p.block_kv};
  const int32_t keys = int32_t(smaller(p.block_kv, p.kv_len - first_key));
  const int32_t* positions = p.positions + head * p.kv_len + first_key;
  uint32_t* to = p.tables + table * p.block_q * words;
  for (int32_t i = 0; i < p.block_q; ++i, to += words) {
    for (int32_t word = 0; word < words; ++word) {
      uint32_t bits = 0;
      const int32_t count = keys - 32 * word < 32 ? keys - 32 * word : 32;
      for (int32_t j = 0; j < count; ++j) bits |= uint32_t{positions[32 * word + j] <= first_query + i} << j;
      to[word] = bits;
    }
  }
}

}  // namespace

void select_blocks_cpu(const SelectBlocksParams& p, int threads) {
  const int64_t rows = p.batch * p.heads * p.rows, size = larger(kChunkBlocks / larger(p.blocks, 1), 1);
  parallel_slots(divide_up(rows, size), threads, [&](int64_t chunk, int slot) {
    void* workspace = static_cast<char*>(p.workspace) + slot * select_blocks_workspace(p.blocks, 1);
    for (int64_t row = chunk * size; row < smaller((chunk + 1) * size, rows); ++row)
      p.wide ? select_row<int32_t>(p, row, workspace) : select_row<uint8_t>(p, row, workspace);
  });
}

void position_tables_cpu(const PositionTablesParams& p, int threads) {
  parallel_chunks(p.all_heads * p.pair_count, threads, [&](int64_t table) { fill_table(p, table); });
}

}  // namespace tilewright::TW_ISA
