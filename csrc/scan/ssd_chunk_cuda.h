// What the CUDA passes of the SSD scan share, on tensor cores (ssd_chunk_mma_cuda.h) or without
// (ssd_chunk_fma_cuda.h): elements of tensors, the steps of one head, launches over chunks.
#pragma once

#include <iterator>

#include "core/integers.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "scan/ssd_chunk_scan.h"

namespace tilewright::scan {

// What the kernels of a pass are told. For dtypes of 16 bits they run on tensor cores, block by block; a
// block that meets an infinity or NaN says so in its place of `odd_...`, and its work is done again on FMA
// units. Null: no tensor cores.
struct SsdForward {
  SsdChunkScanParams p;
  float* decay;  // [chunk][head]: of the state over the chunk; kSsdDropped where it is dropped
  int32_t *odd_states, *odd_outputs;
  bool running;  // a block takes a tile of the state through all chunks of a sequence
};

struct SsdBackward {
  SsdChunkScanParams p;
  float* G;                   // [chunk][head][states][head_dim]: gradient of the state after the chunk
  float* decay;               // as above
  float *dA, *ddt_bias, *dD;  // partial sums [chunk][head], dD [chunk][head][head_dim]
  float *dB, *dC;             // partial sums [block][batch][step][group][states]
  int blocks;                 // blocks of a group's heads
  // Tensor cores only. Partial sums over a tile of states: [chunk][head][tile][step], and the product of the
  // states before and after the chunk, [chunk][head][tile].
  float *along_C, *along_B, *through;
  int32_t *odd_states, *odd_sums, *odd_heads;
  bool running;  // as above
};

constexpr float kSsdDropped = -1.0f;

// Whether sequences, heads and tiles of states are enough to occupy the device: then what a chunk adds needs
// not be written for another kernel to pass it on. Either way the same sums.
bool ssd_enough_runs(const SsdChunkScanParams&, int device);

// The state before each chunk.
void ssd_states(const SsdForward&, int device, Stream);

// On tensor cores. Forward what chunks add to the states, and what the states give; backward the same, the
// second in two kernels.
void ssd_states_mma(const SsdForward&, Stream);
void ssd_outputs_mma(const SsdForward&, Stream);
void ssd_state_gradients_mma(const SsdBackward&, Stream);
void ssd_sums_mma(const SsdBackward&, Stream);
void ssd_heads_mma(const SsdBackward&, Stream);

// Takes what a pass needs from p.workspace; returns how many bytes that is, also where there is none yet.
int64_t ssd_lay_out(SsdForward&);
int64_t ssd_lay_out(SsdBackward&);

namespace {

constexpr int kTile = kSsdChunk;
static_assert(kTile == 64);

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

__device__ __forceinline__ int64_t state_offset(const SsdChunkScanParams& p, int64_t chunk, int64_t head) {
  return (chunk * p.heads + head) * p.states * p.head_dim;
}

__host__ __device__ __forceinline__ int tiles(int extent) { return int(divide_up(extent, kTile)); }
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

// The gradient of raw from that of dt.
__device__ __forceinline__ float through_activation(const SsdChunkScanParams& p, float gradient, float raw) {
  const float active = p.softplus ? device::softplus(raw) : raw;
  if (active < float(p.dt_min) || active > float(p.dt_max)) return 0.0f;
  return p.softplus && raw <= 20.0f ? gradient * sigmoid(raw) : gradient;
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

// Pieces and steps of a head's chunk, for the whole block.
template <class Smem>
__device__ __forceinline__ void prepare(const SsdChunkScanParams& p, const SsdChunk& chunk, int64_t head,
                                        Smem& smem) {
  if (device::warp_id() == 0) {
    find_pieces(p, chunk, smem.pieces);
    device::sync_warp();
    prepare_steps(p, chunk, head, smem.pieces, smem.steps);
  }
  device::sync_block();
}

// Of the state, over the chunk.
__device__ __forceinline__ float decay_over(const SsdChunk& chunk, const Pieces& pieces, const Steps& steps) {
  return runs_through(chunk, pieces) ? steps.from_start[chunk.length - 1] : kSsdDropped;
}

// ---- blocks ----

struct Place {
  SsdChunk chunk;
  int64_t number, head;
  int group, tile;
};

// Blocks count tiles fastest, then heads, then chunks.
__device__ __forceinline__ Place place_of_block(const SsdChunkScanParams& p, int64_t block, int tiles_each) {
  const int64_t task = block / tiles_each;
  const int64_t number = task / p.heads, head = task % p.heads;
  return {ssd_chunk(p, number), number, head, int(head / (p.heads / p.groups)), int(block % tiles_each)};
}

// A tile's place in a state.
struct TilePlace {
  int n0, d0;
};

__device__ __forceinline__ TilePlace tile_place(const SsdChunkScanParams& p, int tile) {
  const int across = tiles(p.head_dim);
  return {tile / across * kTile, tile % across * kTile};
}

// All chunks of a sequence, for a head and a tile of its state.
struct Run {
  int64_t sequence, head, base, chunks;
  int group, tile;

  __device__ __forceinline__ Place place(const SsdChunkScanParams& p, int64_t index) const {
    return {ssd_chunk_at(p, sequence, index), base + index, head, group, tile};
  }
  // Of states as users hand them over, (sequence, head, head_dim, states).
  __device__ __forceinline__ int64_t outside(const SsdChunkScanParams& p, int n, int d) const {
    return ((sequence * p.heads + head) * p.head_dim + d) * p.states + n;
  }
};

__device__ __forceinline__ int64_t chunks_of(const SsdChunkScanParams& p, int64_t sequence) {
  const int64_t steps = ssd_sequence_end(p, sequence) - ssd_sequence_start(p, sequence);
  return steps > 0 ? (steps + kSsdChunk - 1) / kSsdChunk : 0;
}

__device__ __forceinline__ Run run_of_block(const SsdChunkScanParams& p, int64_t block, int tiles_each) {
  const int64_t task = block / tiles_each, sequence = task / p.heads, head = task % p.heads;
  return {sequence,
          head,
          ssd_chunk_base(p, sequence),
          chunks_of(p, sequence),
          int(head / (p.heads / p.groups)),
          int(block % tiles_each)};
}

// ---- states from chunk to chunk ----

// A state's way through the chunks of a sequence, or its gradient's way back: where it comes from and where
// it goes in the end (of users; null: zeros, not wanted), what is kept before each chunk it comes to, and
// decays.
struct Passage {
  const float* from;
  float *to, *kept, *decay;
  bool back;
};

__device__ __forceinline__ Passage passage_of(const SsdForward& f) {
  const SsdChunkScanParams& p = f.p;
  return {static_cast<const float*>(p.initial_state), static_cast<float*>(p.final_state),
          static_cast<float*>(p.chunk_states), f.decay, false};
}

__device__ __forceinline__ Passage passage_of(const SsdBackward& params) {
  const SsdChunkScanParams& p = params.p;
  return {static_cast<const float*>(p.dfinal_state), static_cast<float*>(p.dinitial_state), params.G,
          params.decay, true};
}

__device__ __forceinline__ float pass_on(float decay, float state, float added) {
  return decay < 0.0f ? added : device::fma_rn(decay, state, added);
}

// The next ones work on a thread's share of a tile, which the products' header knows: each_element(p, at,
// sums, body(n, d, value)) and store_tile(p, state, at, smem, sums).

// What a chunk adds, by add(place, at, sums), written for another kernel to pass it on.
template <class Sums, class Smem, class Add>
__device__ __forceinline__ void write_added(const SsdChunkScanParams& p, const Passage& way, Smem& smem,
                                            const Place& place, const Add& add) {
  if (place.chunk.length == 0) return;
  const TilePlace at = tile_place(p, place.tile);
  Sums added;
  add(place, at, added);
  store_tile(p, way.kept + state_offset(p, place.number, place.head), at, smem, added);
  if (place.tile == 0 && threadIdx.x == 0) {
    way.decay[place.number * p.heads + place.head] = decay_over(place.chunk, smem.pieces, smem.steps);
  }
}

// A tile all the way through a sequence.
template <class Sums, class Smem, class Add>
__device__ __forceinline__ void take_through(const SsdChunkScanParams& p, const Passage& way, Smem& smem,
                                             const Run& run, const Add& add) {
  const TilePlace at = tile_place(p, run.tile);
  Sums state;
  each_element(p, at, state, [&](int n, int d, float& value) {
    value = way.from == nullptr || n >= p.states || d >= p.head_dim ? 0.0f : way.from[run.outside(p, n, d)];
  });
  for (int64_t index = 0; index < run.chunks; ++index) {
    const Place place = run.place(p, way.back ? run.chunks - 1 - index : index);
    store_tile(p, way.kept + state_offset(p, place.number, place.head), at, smem, state);
    Sums added;
    device::sync_block();
    add(place, at, added);
    const float decay = decay_over(place.chunk, smem.pieces, smem.steps);
#pragma unroll
    for (int i = 0; i < int(std::size(state)); ++i) {
#pragma unroll
      for (int j = 0; j < int(std::size(state[0])); ++j)
        state[i][j] = pass_on(decay, state[i][j], added[i][j]);
    }
  }
  if (way.to == nullptr) return;
  each_element(p, at, state, [&](int n, int d, float& value) {
    if (n < p.states && d < p.head_dim) way.to[run.outside(p, n, d)] = value;
  });
}

// Of the backward pass: one chunk, a share of the heads of a group.
struct Heads {
  SsdChunk chunk;
  int64_t number, begin, end, head;  // head goes from begin to end
  int group, block;
};

__device__ __forceinline__ Heads heads_of_block(const SsdBackward& params, int64_t block) {
  const SsdChunkScanParams& p = params.p;
  const int share = int(block % params.blocks), per_group = p.heads / p.groups;
  const int64_t task = block / params.blocks, number = task / p.groups;
  const int group = int(task % p.groups), first = group * per_group;
  const int begin = first + per_group * share / params.blocks;
  const int end = first + per_group * (share + 1) / params.blocks;
  return {ssd_chunk(p, number), number, begin, end, begin, group, share};
}

__host__ __device__ __forceinline__ int64_t tasks_of(const SsdChunkScanParams& p) {
  return ssd_chunk_count(p) * p.heads;
}
__host__ __device__ __forceinline__ int64_t blocks_of_heads(const SsdBackward& params) {
  return ssd_chunk_count(params.p) * params.p.groups * params.blocks;
}
__host__ __device__ __forceinline__ int state_tiles(const SsdChunkScanParams& p) {
  return tiles(p.head_dim) * tiles(p.states);
}
__host__ __device__ __forceinline__ int64_t runs_of(const SsdChunkScanParams& p) {
  return p.sequences * p.heads * state_tiles(p);
}

// Pieces of the workspace, one behind the other; without one, only how long it has to be.
struct Workspace {
  char* base;
  int64_t bytes = 0;

  template <class T>
  void take(T*& piece, int64_t count) {
    piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + bytes);
    bytes += (count * int64_t(sizeof(T)) + 127) / 128 * 128;
  }

  void take_states(SsdChunkScanParams& p) {
    float* states;
    take(states, tasks_of(p) * p.states * p.head_dim);
    p.chunk_states = states;
  }
};

template <class Params>
void launch_over(device::Kernel<Params> kernel, int64_t blocks, int threads, size_t shared_bytes,
                 Stream stream, const Params& params) {
  constexpr int64_t kLargest = 0x7fffffff;
  check_value(blocks <= kLargest, "x: too large, ", blocks, " blocks of threads would be needed, at most ",
              kLargest, " can be started at once");
  if (blocks > 0)
    device::launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, stream, params);
}

// The kernel of a dtype.
template <class Params>
device::Kernel<Params> by_dtype(DType dtype, device::Kernel<Params> float32, device::Kernel<Params> half,
                                device::Kernel<Params> brain) {
  return dtype == DType::kFloat32 ? float32 : dtype == DType::kFloat16 ? half : brain;
}

}  // namespace
}  // namespace tilewright::scan
