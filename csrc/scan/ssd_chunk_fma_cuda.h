// 64 x 64 tiles of fp32 in shared memory, and their products on the FMA units.
//
// A block has 256 threads; of a 64 x 64 result a thread owns rows 4 ty to 4 ty + 3 and columns 4 tx to
// 4 tx + 3. Both operands of a product lie in shared memory with the summed index first: at[k][row],
// at[k][column].
// float32 runs on these alone, to its last bit; of 16-bit dtypes what tensor cores leave.
#pragma once

#include "scan/ssd_chunk_cuda.h"

namespace tilewright::scan {
namespace {

constexpr int kThreads = 256, kOwn = 4;
constexpr int kPitch = kTile + 4;  // rows stay multiples of 16 bytes, and columns spread over the banks
static_assert(kThreads * kOwn * kOwn == kTile * kTile);

using Own = float[kOwn][kOwn];

struct alignas(16) Matrix {
  float at[kTile][kPitch];
};

__device__ __forceinline__ int own_row() { return int(threadIdx.x) / 16 * kOwn; }
__device__ __forceinline__ int own_column() { return int(threadIdx.x) % 16 * kOwn; }

template <class Body>
__device__ __forceinline__ void each_own(const Body& body) {
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
#pragma unroll
    for (int c = 0; c < kOwn; ++c) body(r, c);
  }
}

__device__ __forceinline__ void clear(Own& own) {
  each_own([&](int r, int c) { own[r][c] = 0.0f; });
}

__device__ __forceinline__ void load_four(float (&four)[kOwn], const float* from) {
  const auto loaded = device::load(reinterpret_cast<const device::Vector<float, 4>*>(from));
#pragma unroll
  for (int i = 0; i < kOwn; ++i) four[i] = loaded[i];
}

__device__ __forceinline__ void store_own(Matrix& m, const Own& own) {
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    device::store(reinterpret_cast<device::Vector<float, 4>*>(&m.at[own_row() + r][own_column()]),
                  {own[r][0], own[r][1], own[r][2], own[r][3]});
  }
}

__device__ __forceinline__ void store_own_transposed(Matrix& m, const Own& own) {
  each_own([&](int r, int c) { m.at[own_column() + c][own_row() + r] = own[r][c]; });
}

// own += the product, over k in [0, depth).
__device__ __forceinline__ void multiply(Own& own, const Matrix& left, const Matrix& right, int depth) {
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    float a[kOwn], b[kOwn];
    load_four(a, &left.at[k][own_row()]);
    load_four(b, &right.at[k][own_column()]);
    each_own([&](int r, int c) { own[r][c] = device::fma_rn(a[r], b[c], own[r][c]); });
  }
}

// The same where a row takes only k of its own piece that are not later (kUpper: not earlier) than itself.
// The others are skipped, not multiplied by zero: an infinity or NaN does not reach other steps.
template <bool kUpper>
__device__ __forceinline__ void multiply_triangle(Own& own, const Matrix& left, const Matrix& right,
                                                  const int (&begin)[kTile]) {
  const int first = kUpper ? own_row() : begin[own_row()], last = kUpper ? kTile - 1 : own_row() + kOwn - 1;
  for (int k = first; k <= last; ++k) {
    float a[kOwn], b[kOwn];
    load_four(a, &left.at[k][own_row()]);
    load_four(b, &right.at[k][own_column()]);
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const int row = own_row() + r;
      const bool reached = kUpper ? k >= row && begin[k] <= row : k <= row && begin[row] <= k;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) own[r][c] = reached ? device::fma_rn(a[r], b[c], own[r][c]) : own[r][c];
    }
  }
}

// m.at[row][column] = value(row, column), or m.at[column][row]; neighbouring threads take neighbouring
// columns.
template <bool kTransposed, class Value>
__device__ __forceinline__ void fill(Matrix& m, const Value& value) {
  for (int i = int(threadIdx.x); i < kTile * kTile; i += kThreads) {
    const int row = i / kTile, column = i % kTile;
    (kTransposed ? m.at[column][row] : m.at[row][column]) = value(row, column);
  }
}

// The sum over the 16 threads that share rows, in a fixed order; all of them get it.
__device__ __forceinline__ float sum_columns(float value) {
  for (int distance = 8; distance > 0; distance /= 2) value += device::shfl_xor(value, distance);
  return value;
}

// body(block) for the block that this one is; or, of those named odd, for all that are this block's to redo.
template <class Body>
__device__ __forceinline__ void each_block(const int32_t* odd, int64_t blocks, const Body& body) {
  const int64_t stride = gridDim.x;
  for (int64_t first = blockIdx.x; first < blocks; first += stride * kThreads) {
    if (odd != nullptr) {
      const int64_t mine = first + threadIdx.x * stride;
      if (!device::sync_block_or(mine < blocks && odd[mine] != 0)) continue;
    }
    for (int64_t block = first; block < blocks && block < first + stride * kThreads; block += stride) {
      if (odd != nullptr && odd[block] == 0) continue;
      device::sync_block();
      body(block);
    }
  }
}

// Launches what each_block is in: a block each, or enough to occupy the device should there be much to redo.
template <class Params>
void launch_each(device::Kernel<Params> kernel, const int32_t* odd, int64_t blocks, size_t shared_bytes,
                 int device, Stream stream, const Params& params) {
  const int64_t enough = 2 * device::multiprocessor_count(device);
  launch_over(kernel, odd == nullptr || blocks < enough ? blocks : enough, kThreads, shared_bytes, stream,
              params);
}

// A state [states][head_dim] from n0, d0 on.
struct StateTile {
  const float* data;
  int states, dims, n0, d0;
  __device__ __forceinline__ float operator()(int n, int d) const {
    return n0 + n < states && d0 + d < dims ? data[int64_t{n0 + n} * dims + d0 + d] : 0.0f;
  }
};

// ---- states between chunks ----

template <class Sums, class Body>
__device__ __forceinline__ void each_element(const SsdChunkScanParams&, const TilePlace& at, Sums& own,
                                             const Body& body) {
  each_own([&](int r, int c) { body(at.n0 + own_row() + r, at.d0 + own_column() + c, own[r][c]); });
}

template <class Smem>
__device__ __forceinline__ void store_tile(const SsdChunkScanParams& p, float* state, const TilePlace& at,
                                           Smem&, const Own& own) {
  each_element(p, at, own, [&](int n, int d, float value) {
    if (n < p.states && d < p.head_dim) state[int64_t{n} * p.head_dim + d] = value;
  });
}

// An element of a state, for the thread that takes it through all chunks of its sequence.
struct Passed {
  bool exists;
  int64_t outside, first, stride, decay, chunks;  // first and decay: of the first chunk
};

__device__ __forceinline__ Passed passed_element(const SsdChunkScanParams& p, int64_t element) {
  const int64_t numel = int64_t{p.states} * p.head_dim;
  if (element >= p.sequences * p.heads * numel) return {};
  const int64_t sequence = element / (p.heads * numel), head = element / numel % p.heads;
  const int64_t n = element % numel / p.head_dim, d = element % p.head_dim;
  const int64_t base = ssd_chunk_base(p, sequence);
  return {true,
          (sequence * p.heads + head) * numel + d * p.states + n,
          state_offset(p, base, head) + n * p.head_dim + d,
          p.heads * numel,
          base * p.heads + head,
          chunks_of(p, sequence)};
}

// Leaves in place of what each chunk adds the state before it; loads do not wait for the stores before them.
__device__ __forceinline__ float pass_through(float state, float* kept, int64_t stride, const float* decay,
                                              int64_t decay_stride, int64_t chunks) {
  constexpr int kAhead = 8;
  for (int64_t first = 0; first < chunks; first += kAhead) {
    float added[kAhead], decays[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool exists = first + i < chunks;
      added[i] = exists ? kept[(first + i) * stride] : 0.0f;
      decays[i] = exists ? decay[(first + i) * decay_stride] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= chunks) break;
      kept[(first + i) * stride] = state;
      state = pass_on(decays[i], state, added[i]);
    }
  }
  return state;
}

// The same for a whole kernel of elements.
__device__ __forceinline__ void pass_element(const SsdChunkScanParams& p, const Passage& way) {
  const Passed at = passed_element(p, int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (!at.exists) return;
  const int64_t first = way.back ? at.chunks - 1 : 0, turn = way.back ? -1 : 1;
  float state = way.from == nullptr ? 0.0f : way.from[at.outside];
  state = pass_through(state, way.kept + at.first + first * at.stride, turn * at.stride,
                       way.decay + at.decay + first * p.heads, turn * p.heads, at.chunks);
  if (way.to != nullptr) way.to[at.outside] = state;
}

// Column `tile` of the chunk's B or C, transposed: at[state][step].
template <class T>
__device__ __forceinline__ void fill_states(Matrix& m, const SsdChunkScanParams& p, const SsdTensor& t,
                                            const SsdChunk& chunk, int64_t group, int n0) {
  const RowsOf<T> rows(t, chunk, group, p.states);
  fill<true>(m, [&](int step, int n) { return rows(step, n0 + n); });
}

}  // namespace
}  // namespace tilewright::scan
