// The choice of a row's best blocks on the GPU, and bit tables by position.
//
// A warp takes a row and finds the threshold bit by bit: 32 passes over the row, which stay in the L1 cache.
// Roofline: the scores are read once from memory, 4 bytes a block; a row of 1024 blocks is 32 x 32 loads and
// adds a lane.
#include "attention/select_blocks.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/warp.h"

namespace tilewright::attention {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;

template <class Code>
struct Row {
  const SelectBlocksParams& p;
  const float* scores;
  const Code* candidates;

  __device__ __forceinline__ Code candidate(int64_t block) const {
    return block < p.blocks ? candidates[block * p.candidates_block] : Code{0};
  }
  __device__ __forceinline__ float score(int64_t block) const { return scores[block * p.scores_block]; }
  __device__ __forceinline__ float weight(float score) const { return p.count > 0 ? 1.0f : score; }

  // The weights of the candidates whose keys are at least `lowest`, in an order that does not depend on it: a
  // sum of more of them is never smaller.
  __device__ __forceinline__ float mass_from(uint32_t lowest, int lane) const {
    float mass = 0.0f;
    for (int64_t block = lane; block < p.blocks; block += device::kWarpSize) {
      if (candidate(block) == 0) continue;
      const float value = score(block);
      if (key_of(value) >= lowest) mass += weight(value);
    }
    return device::add_lanes(mass);
  }
};

// With the registers of 6 blocks ptxas need not spill for the sake of more.
template <class Code>
__global__ void __launch_bounds__(kThreads, 6) select_kernel(const __grid_constant__ SelectBlocksParams p) {
  const int64_t number = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (number >= p.batch * p.heads * p.rows) return;
  const int lane = device::lane_id();
  const int64_t r = number % p.rows, head = number / p.rows % p.heads, batch = number / p.rows / p.heads;
  const Row<Code> row{p, p.scores + batch * p.scores_batch + head * p.scores_head + r * p.scores_row,
                      static_cast<const Code*>(p.candidates) + batch * p.candidates_batch +
                          head * p.candidates_head + r * p.candidates_row};
  Code* codes = static_cast<Code*>(p.codes) + number * p.blocks;
  const float total = row.mass_from(0, lane);
  const float needed = p.count > 0 ? float(p.count) : p.mass >= 1.0f ? total * 2.0f + 1.0f : p.mass * total;
  uint32_t threshold = 0;  // the highest key from which on the mass is enough
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    if (row.mass_from(threshold | bit, lane) >= needed) threshold |= bit;
  }
  const float above = threshold == 0xffffffffu ? 0.0f : row.mass_from(threshold + 1, lane);
  int64_t before = 0, equal = 0;
  for (int64_t base = 0; base < p.blocks; base += device::kWarpSize) {
    const int64_t block = base + lane;
    const bool ties = row.candidate(block) != 0 && key_of(row.score(block)) == threshold;
    equal += device::count_bits(device::ballot(ties));
  }
  for (int64_t base = 0; base < p.blocks; base += device::kWarpSize) {
    const int64_t block = base + lane;
    const Code candidate = row.candidate(block);
    const float score = candidate != 0 ? row.score(block) : 0.0f;
    const uint32_t key = key_of(score);
    const bool ties = candidate != 0 && key == threshold;
    const uint32_t lanes = device::ballot(ties);
    const int64_t place = before + device::count_bits(lanes & ((1u << lane) - 1u));
    const bool kept =
        candidate != 0 &&
        (key > threshold || (ties && place < as_many_as_fill(needed - above, row.weight(score), equal)));
    if (block < p.blocks) codes[block] = kept ? candidate : Code{0};
    before += device::count_bits(lanes);
  }
}

// A block takes a table, a thread a word at a time.
__global__ void __launch_bounds__(kThreads) tables_kernel(const __grid_constant__ PositionTablesParams p) {
  const int64_t table = blockIdx.x, pair = table % p.pair_count, head = table / p.pair_count;
  const int words = (p.block_kv + 31) / 32;
  const int64_t first_query = p.pairs[2 * pair] * int64_t{p.block_q} + p.kv_len - p.q_len;
  const int64_t first_key = p.pairs[2 * pair + 1] * int64_t{p.block_kv};
  const int keys = int(device::min(int64_t{p.block_kv}, p.kv_len - first_key));
  const int32_t* positions = p.positions + head * p.kv_len + first_key;
  for (int at = int(threadIdx.x); at < p.block_q * words; at += kThreads) {
    const int i = at / words, word = at % words, count = device::min(keys - 32 * word, 32);
    uint32_t bits = 0;
    for (int j = 0; j < count; ++j) bits |= uint32_t{positions[32 * word + j] <= first_query + i} << j;
    p.tables[table * p.block_q * words + at] = bits;
  }
}

template <class Code>
void select(const SelectBlocksParams& p, Stream stream) {
  const int64_t rows = p.batch * p.heads * p.rows;
  device::launch(select_kernel<Code>, dim3(unsigned((rows + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream,
                 p);
}

}  // namespace

void select_blocks_cuda(const SelectBlocksParams& p, int device, Stream stream) {
  if (p.batch * p.heads * p.rows * p.blocks == 0) return;
  const device::DeviceGuard guard(device);
  p.wide ? select<int32_t>(p, stream) : select<uint8_t>(p, stream);
}

void position_tables_cuda(const PositionTablesParams& p, int device, Stream stream) {
  if (p.all_heads * p.pair_count == 0) return;
  const device::DeviceGuard guard(device);
  device::launch(tables_kernel, dim3(unsigned(p.all_heads * p.pair_count)), dim3(kThreads), 0, stream, p);
}

}  // namespace tilewright::attention
