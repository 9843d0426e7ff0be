// What the CUDA passes of the SSD scan share: 64 x 64 tiles in shared memory and their products, the steps of
// one head, launches over chunks.
//
// A block has 256 threads; of a 64 x 64 result a thread owns rows 4 ty to 4 ty + 3 and columns 4 tx to
// 4 tx + 3. Both operands of a product lie in shared memory with the summed index first: at[k][row],
// at[k][column].
#pragma once

#include "device/half.h"
#include "device/launch.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "scan/ssd_chunk_scan.h"

namespace tilewright::scan {
namespace {

constexpr int kThreads = 256, kTile = kSsdChunk, kOwn = 4;
constexpr int kPitch = kTile + 4;  // rows stay multiples of 16 bytes, and columns spread over the banks
static_assert(kTile == 64 && kThreads * kOwn * kOwn == kTile * kTile);

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

__device__ __forceinline__ float sum_warp(float value) {
  return sum_columns(value + device::shfl_xor(value, 16));
}

// ---- elements of tensors ----

template <class T>
__device__ __forceinline__ T* row_of(const SsdTensor& t, int64_t batch, int64_t step, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch + step * t.step + head * t.head;
}

// Steps of a chunk as rows: zero outside of [from, to) and beyond `width` columns.
template <class T>
struct RowsOf {
  const T* data;
  int64_t step, inner;
  int from, to, width;

  __device__ __forceinline__ RowsOf(const SsdTensor& t, const SsdChunk& chunk, int64_t head, int columns)
      : data(row_of<T>(t, chunk.batch, chunk.start, head)),
        step(t.step),
        inner(t.inner),
        from(0),
        to(chunk.length),
        width(columns) {}

  __device__ __forceinline__ bool has(int row, int column) const {
    return row >= from && row < to && column < width;
  }
  __device__ __forceinline__ float operator()(int row, int column) const {
    return has(row, column) ? device::to_float(data[row * step + column * inner]) : 0.0f;
  }
};

// A state [states][head_dim] from n0, d0 on.
struct StateTile {
  const float* data;
  int states, dims, n0, d0;
  __device__ __forceinline__ float operator()(int n, int d) const {
    return n0 + n < states && d0 + d < dims ? data[int64_t{n0 + n} * dims + d0 + d] : 0.0f;
  }
};

__device__ __forceinline__ int64_t state_offset(const SsdChunkScanParams& p, int64_t chunk, int64_t head) {
  return (chunk * p.heads + head) * p.states * p.head_dim;
}

__device__ __forceinline__ int tiles(int extent) { return (extent + kTile - 1) / kTile; }
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + device::exp(-x)); }

// ---- the steps of one head in a chunk; cum restarts with every piece ----

struct Pieces {
  int begin[kTile];  // of each step: where its piece starts, in steps of the chunk
  int head_end;      // steps before it continue the state before the chunk
  int tail;          // steps from it on make the state after the chunk
};

struct Steps {
  float raw[kTile], dt[kTile], high[kTile], low[kTile];  // cum in two parts
  float from_start[kTile];                               // exp(cum[i])
  float to_end[kTile];                                   // exp(cum[last] - cum[i])
  __device__ __forceinline__ float decay(int i, int j) const {
    return device::exp((high[i] - high[j]) + (low[i] - low[j]));
  }
};

// By warp 0, as the next one; a barrier has to follow each.
__device__ __forceinline__ void find_pieces(const SsdChunkScanParams& p, const SsdChunk& chunk,
                                            Pieces& pieces) {
  const int lane = device::lane_id();
  const bool first_chunk = chunk.start == ssd_sequence_start(p, chunk.sequence);
  int carry = 0, head_end = chunk.length;
  for (int half = 0; half < kTile; half += device::kWarpSize) {
    const int i = half + lane;
    const bool resets =
        i < chunk.length && !(i == 0 && first_chunk) && ssd_resets(p, chunk.batch, chunk.start + i);
    const uint32_t votes = device::ballot(resets);
    const uint32_t until = votes & (0xffffffffu >> (31 - lane));
    int last = carry;
    for (int bit = 31; bit >= 0; --bit) {
      if (until >> bit & 1u) {
        last = half + bit;
        break;
      }
    }
    pieces.begin[i] = last;
    for (int bit = 31; bit >= 0; --bit) {
      if (votes >> bit & 1u && half + bit < head_end) head_end = half + bit;
    }
    carry = device::shfl(last, 31);
  }
  if (lane == 0) {
    pieces.head_end = head_end;
    pieces.tail = carry;
  }
}

__device__ __forceinline__ float activated(const SsdChunkScanParams& p, float raw) {
  const float dt = p.softplus ? device::softplus(raw) : raw;
  const float lowest = float(p.dt_min), highest = float(p.dt_max);
  return dt < lowest ? lowest : dt > highest ? highest : dt;  // a NaN stays
}

__device__ __forceinline__ void prepare_steps(const SsdChunkScanParams& p, const SsdChunk& chunk,
                                              int64_t head, const Pieces& pieces, Steps& s) {
  const int lane = device::lane_id();
  const float bias = p.dt_bias == nullptr ? 0.0f : static_cast<const float*>(p.dt_bias)[head];
  const float* source = row_of<float>(p.dt, chunk.batch, chunk.start, head);
  const double rate = static_cast<const float*>(p.A)[head];
  double carry = 0;
  for (int half = 0; half < kTile; half += device::kWarpSize) {
    const int i = half + lane, begin = pieces.begin[i];
    const bool inside = i < chunk.length;
    const float raw = inside ? source[i * p.dt.step] + bias : 0.0f;
    const float dt = inside ? activated(p, raw) : 0.0f;
    double cum = inside ? ssd_log_decay(dt, rate) : 0.0;
    for (int distance = 1; distance < device::kWarpSize; distance *= 2) {
      const double below = device::shfl_up(cum, distance);
      if (lane >= distance && i - distance >= begin) cum += below;
    }
    if (begin < half) cum += carry;
    carry = device::shfl(cum, 31);
    s.raw[i] = raw;
    s.dt[i] = dt;
    s.high[i] = float(cum);
    const float rest = float(cum - double(s.high[i]));
    s.low[i] = rest == rest ? rest : 0.0f;
    s.from_start[i] = device::exp(s.high[i]) * (1.0f + s.low[i]);
  }
  device::sync_warp();
  for (int i = lane; i < kTile; i += device::kWarpSize) s.to_end[i] = s.decay(chunk.length - 1, i);
}

// The chunk as one piece, from the state before it to the state after it.
__device__ __forceinline__ bool runs_through(const SsdChunk& chunk, const Pieces& pieces) {
  return pieces.head_end == chunk.length;
}

// Column `tile` of the chunk's B or C, transposed: at[state][step].
template <class T>
__device__ __forceinline__ void fill_states(Matrix& m, const SsdChunkScanParams& p, const SsdTensor& t,
                                            const SsdChunk& chunk, int64_t group, int n0) {
  const RowsOf<T> rows(t, chunk, group, p.states);
  fill<true>(m, [&](int step, int n) { return rows(step, n0 + n); });
}

template <class Params>
void launch_over(device::Kernel<Params> kernel, int64_t blocks, size_t shared_bytes, Stream stream,
                 const Params& params) {
  constexpr int64_t kLargest = 0x7fffffff;
  check_value(blocks <= kLargest, "x: too large, ", blocks, " blocks of threads would be needed, at most ",
              kLargest, " can be started at once");
  if (blocks > 0)
    device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), shared_bytes, stream, params);
}

// The kernel of a dtype.
template <class Params>
device::Kernel<Params> by_dtype(DType dtype, device::Kernel<Params> float32, device::Kernel<Params> half,
                                device::Kernel<Params> brain) {
  return dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? half : brain;
}

}  // namespace
}  // namespace tilewright::scan
