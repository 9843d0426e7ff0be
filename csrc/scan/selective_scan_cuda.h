// What the kernels of the selective scan share: numbers, tiles, where a block works, tiles of tensors in
// shared memory, sums over lanes.
//
// A thread block takes a tile of channels through a run of steps. A thread owns kChannels of them and
// kStates of their states, in registers; `lanes` neighbouring threads together own all states of those
// channels. B and C of a stage of kStage steps are fp32 in shared memory, read by every channel of the tile;
// u, delta, z, dout come there by cp.async, a stage ahead, whichever way they lie.
#pragma once

#include "device/async_copy.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "scan/selective_scan.h"

namespace tilewright::scan {

// ---- Numbers: states are real or complex -------------------------------------------------------

struct alignas(8) Complex {
  float re, im;
};

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kInversePi = 0.318309886183790672f;
constexpr float kPiLog2E = 4.53236014182719381f;

// A as the kernels hold it: its decay is 2^(dt re), turned by pi dt im.
__device__ __forceinline__ float scaled_rate(float A) { return A * kLog2E; }
__device__ __forceinline__ Complex scaled_rate(Complex A) { return {A.re * kLog2E, A.im * kInversePi}; }

__device__ __forceinline__ float decay(float dt, float rate) { return device::exp2_approx(dt * rate); }
__device__ __forceinline__ float decay_by_polynomial(float dt, float rate) {
  return device::exp2_polynomial(dt * rate);
}
__device__ __forceinline__ Complex decay(float dt, Complex rate) {
  const float magnitude = device::exp2_approx(dt * rate.re);
  const device::SineCosine turn = device::sincospi(dt * rate.im);
  return {magnitude * turn.cosine, magnitude * turn.sine};
}

// s a + b
__device__ __forceinline__ float scale_add(float s, float a, float b) { return device::fma_rn(s, a, b); }
__device__ __forceinline__ Complex scale_add(float s, Complex a, Complex b) {
  return {device::fma_rn(s, a.re, b.re), device::fma_rn(s, a.im, b.im)};
}

// a b + s c
__device__ __forceinline__ float mul_add(float a, float b, float s, float c) {
  return device::fma_rn(a, b, s * c);
}
__device__ __forceinline__ Complex mul_add(Complex a, Complex b, float s, Complex c) {
  return {device::fma_rn(a.re, b.re, device::fma_rn(-a.im, b.im, s * c.re)),
          device::fma_rn(a.re, b.im, device::fma_rn(a.im, b.re, s * c.im))};
}

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ Complex add(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }

__device__ __forceinline__ float mul(float a, float b) { return a * b; }
__device__ __forceinline__ Complex mul(Complex a, Complex b) {
  return {device::fma_rn(a.re, b.re, -a.im * b.im), device::fma_rn(a.re, b.im, a.im * b.re)};
}

__device__ __forceinline__ float conj_mul(float a, float b) { return a * b; }
__device__ __forceinline__ Complex conj_mul(Complex a, Complex b) {
  return {device::fma_rn(a.re, b.re, a.im * b.im), device::fma_rn(a.re, b.im, -a.im * b.re)};
}

// sum + Re(conj(a) b)
__device__ __forceinline__ float dot_add(float a, float b, float sum) { return device::fma_rn(a, b, sum); }
__device__ __forceinline__ float dot_add(Complex a, Complex b, float sum) {
  return device::fma_rn(a.re, b.re, device::fma_rn(a.im, b.im, sum));
}

// sum + Re(conj(A) b) / ln 2 for the A of which `rate` is the scaled form
__device__ __forceinline__ float rate_dot_add(float rate, float b, float sum) {
  return device::fma_rn(rate, b, sum);
}
__device__ __forceinline__ float rate_dot_add(Complex rate, Complex b, float sum) {
  return device::fma_rn(rate.re, b.re, device::fma_rn(rate.im * kPiLog2E, b.im, sum));
}

// What a state adds to y, and (`from_output`) the gradient of y with respect to the one of C and h from the
// other one: c h and c, or twice the real part of c h and 2 conj(c).
__device__ __forceinline__ float output_add(float c, float h, float y) { return device::fma_rn(c, h, y); }
__device__ __forceinline__ float output_add(Complex c, Complex h, float y) {
  return device::fma_rn(c.re + c.re, h.re, device::fma_rn(c.im * -2.0f, h.im, y));
}
__device__ __forceinline__ float from_output_add(float g, float c, float sum) {
  return device::fma_rn(g, c, sum);
}
__device__ __forceinline__ Complex from_output_add(float g, Complex c, Complex sum) {
  return {device::fma_rn(g + g, c.re, sum.re), device::fma_rn(g * -2.0f, c.im, sum.im)};
}

__device__ __forceinline__ float sigmoid(float x) { return device::rcp_approx(1.0f + device::exp(-x)); }

__device__ __forceinline__ float step_size(float delta, bool softplus) {
  return softplus ? device::softplus(delta) : delta;
}

// Calls body(T{}) with the type that dtype names.
template <class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(float{});
  } else if (dtype == DType::kBFloat16) {
    body(bf16{});
  } else {
    body(fp16{});
  }
}

// ---- Tiles -------------------------------------------------------------------------------------

constexpr int kMaxTileChannels = 128;

// State_: float or Complex. kLanes_: threads that share channels; 0: known at run time. kMaxStates_: of a
// channel. kStage_: steps in shared memory at a time. kItem_: of these, steps that one thread prepares.
// kBlocks_: that a multiprocessor should hold at once, which limits their registers. kConstant_: B and C may
// be constant; each thread then has one channel and keeps them in registers.
template <class State_, int kChannels_, int kStates_, int kLanes_, int kMaxStates_, int kStage_, int kItem_,
          int kMaxThreads_, int kBlocks_, bool kConstant_>
struct Tile {
  using State = State_;
  static constexpr int kChannels = kChannels_, kStates = kStates_, kLanes = kLanes_;
  static constexpr int kMaxStates = kMaxStates_, kStage = kStage_, kItem = kItem_;
  static constexpr int kMaxThreads = kMaxThreads_, kBlocks = kBlocks_;
  static constexpr bool kFull = false;    // whether channels always have all states of the tile
  static constexpr int kPolynomials = 0;  // of a thread's states of a channel: see SixteenTile
  static constexpr bool kConstant = kConstant_;

  static constexpr int channels_for(int lanes) {
    const int channels = kMaxThreads * kChannels / lanes;
    return channels < kMaxTileChannels ? channels : kMaxTileChannels;
  }
  static constexpr int kMaxChannels = channels_for(kLanes == 0 ? 1 : kLanes);
  static constexpr int kMaxWarps = kMaxThreads / device::kWarpSize;
  static constexpr int kItems = kMaxChannels * kStage / kItem;

  static constexpr int kVector = 16 / int(sizeof(State));  // states moved by one instruction
  using StateVector = device::Vector<State, kVector>;
  // Of a stage of one tensor in shared memory: rows of 64 bytes and more are kept apart.
  __host__ __device__ static constexpr int tile_bytes(int channels, int bytes) {
    return channels * (kStage * bytes < 64 ? kStage * bytes : kStage * bytes + 16);
  }
  static constexpr int kMaxTileBytes = tile_bytes(kMaxChannels, 4);
  static_assert(kStates % kVector == 0 && kStage % kItem == 0 && kScanChunk % kStage == 0);
  static_assert(kMaxThreads % device::kWarpSize == 0 && kMaxThreads * kBlocks <= 2048);
  static_assert(!kConstant || kChannels == 1);
};

// The tile of 9 to 16 states, by constants that a build may change; that of exactly 16, as models have, does
// without the selections that keep absent states zero, a fifth of a step's instructions. kPolynomials of a
// thread's states take their powers of two on the FMA units, which is for kernels that wait for the special
// functions.
template <class Tuning, bool kFull_>
struct SixteenTile : Tile<float, Tuning::kChannels, Tuning::kStates, 16 / Tuning::kStates, 16, Tuning::kStage,
                          Tuning::kItem, Tuning::kThreads, Tuning::kBlocks, false> {
  static constexpr bool kFull = kFull_;
  static constexpr int kPolynomials = Tuning::kPolynomials;
  static_assert(16 % Tuning::kStates == 0 && kPolynomials <= Tuning::kStates);
};

// The decay of state number i of a thread.
template <class TileOf>
__device__ __forceinline__ typename TileOf::State decay_of(int i, float dt, typename TileOf::State rate) {
  if constexpr (TileOf::kPolynomials > 0) {
    if (i < TileOf::kPolynomials) return decay_by_polynomial(dt, rate);
  }
  return decay(dt, rate);
}

__host__ __device__ inline int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// ---- The work and its division -----------------------------------------------------------------

// Parts are runs of whole chunks of a sequence; without `part_chunks` every sequence is one part.
struct ScanLaunch {
  SelectiveScanParams p;
  int64_t parts;
  int64_t part_chunks;  // chunks in a part; 0: all of the sequence
  int64_t splits;       // parts of a sequence, unless packed
  int64_t group_channels;
  int64_t tiles;            // of a group
  int64_t slots;            // thread blocks that share a group's tiles: slot, slot + slots, ...
  int32_t lanes;            // that share a channel
  int32_t tile_bytes;       // of a stage of one tensor in shared memory
  int32_t channels;         // of a tile
  bool adjoint;             // carry kernels: the gradient's recurrence, from the last step to the first
  void* carry;              // [part][state][dim]: the state before a part, adjoint: its gradient behind it
  float* elapsed;           // [part][dim]: the sum of dt over a part
  void *dA, *dB, *dC;       // [part][state][dim] of weight_dtype; dB, dC: where they are constant
  float *dD, *ddelta_bias;  // [part][dim]
  void *dB_rows, *dC_rows;  // [slot][group][batch * length][state]
};

template <class TileOf>
struct Geometry {
  int lanes, channels, states;  // states: padded

  __device__ __forceinline__ explicit Geometry(const ScanLaunch& l)
      : lanes(TileOf::kLanes != 0 ? TileOf::kLanes : l.lanes),
        channels(TileOf::kLanes != 0 ? TileOf::channels_for(TileOf::kLanes) : l.channels),
        states(lanes * TileOf::kStates) {}
  __device__ __forceinline__ int lane() const { return int(threadIdx.x) % lanes; }
  __device__ __forceinline__ int first_channel() const {
    return int(threadIdx.x) / lanes * TileOf::kChannels;
  }
  // The channel's state that is number i of this thread: the lanes' vectors lie side by side.
  __device__ __forceinline__ int state(int i) const {
    constexpr int kVector = TileOf::kVector;
    return (i / kVector * lanes + lane()) * kVector + i % kVector;
  }
  __device__ __forceinline__ int items() const { return channels * (TileOf::kStage / TileOf::kItem); }
};

// The tokens of a sequence in the order of its steps.
struct Walk {
  const int64_t* order;  // null: identity
  int64_t start, steps, length;
  bool reverse;

  __device__ __forceinline__ int64_t position(int64_t step) const {
    return reverse ? start + steps - 1 - step : start + step;
  }
  __device__ __forceinline__ int64_t token(int64_t step) const {
    const int64_t at = position(step);
    if (order == nullptr) return at;
    return device::max(int64_t{0}, device::min(order[at], length - 1));
  }
};

struct Part {
  int64_t number, sequence, batch;
  int64_t begin, end;   // steps
  int64_t first_chunk;  // number of the chunk at `begin`
  Walk walk;
  bool used;  // packed sequences: not all numbers are

  __device__ __forceinline__ bool begins_sequence() const { return used && begin == 0; }
  __device__ __forceinline__ bool ends_sequence() const { return used && end == walk.steps; }
};

__device__ __forceinline__ int64_t packed_start(const SelectiveScanParams& p, int64_t sequence) {
  return device::max(int64_t{0}, device::min(p.cu_seqlens[sequence], p.length));
}

// A packed sequence's first part, counted as chunk_base counts chunks. (Divisions are of 32 bits: those of 64
// are calls.)
__device__ __forceinline__ int64_t packed_part(const ScanLaunch& l, int64_t sequence) {
  return uint32_t(packed_start(l.p, sequence) / kScanChunk) / uint32_t(l.part_chunks) + sequence;
}

__device__ __forceinline__ Part locate(const ScanLaunch& l, int64_t number) {
  const SelectiveScanParams& p = l.p;
  const bool packed = p.cu_seqlens != nullptr;
  int64_t split = 0;
  Part part;
  part.number = part.sequence = number;
  if (l.part_chunks != 0) {
    if (packed) {
      int64_t low = 0, high = p.sequences - 1;
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (packed_part(l, middle) <= number) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      part.sequence = low;
      split = number - packed_part(l, low);
    } else {
      part.sequence = uint32_t(number) / uint32_t(l.splits);
      split = number - part.sequence * l.splits;
    }
  }
  part.batch = packed ? 0 : part.sequence;
  Walk& walk = part.walk;
  walk.order = p.order == nullptr ? nullptr : p.order + part.batch * p.order_stride;
  walk.start = packed ? packed_start(p, part.sequence) : 0;
  walk.steps = packed ? device::max(packed_start(p, part.sequence + 1) - walk.start, int64_t{0}) : p.length;
  walk.length = p.length;
  walk.reverse = p.reverse;
  part.begin = split * l.part_chunks * kScanChunk;
  part.end = walk.steps;
  part.used = part.begin < walk.steps || split == 0;
  if (!part.used) part.begin = walk.steps;
  if (l.part_chunks != 0) part.end = device::min(walk.steps, part.begin + l.part_chunks * kScanChunk);
  part.first_chunk = chunk_base(part.sequence, walk.start, packed, p.length) + part.begin / kScanChunk;
  return part;
}

// The channels a block works on.
struct Channels {
  int64_t group, first;
  int count;
};

__device__ __forceinline__ Channels channels_of(const ScanLaunch& l, int64_t group, int64_t tile,
                                                int channels) {
  const int64_t begin = tile * channels;
  return {group, group * l.group_channels + begin,
          int(device::min(int64_t{channels}, l.group_channels - begin))};
}

// Where a block works, in its shared memory: read at need, it takes no registers from the states.
struct Site {
  Part part;
  Channels channels;
  int64_t slot;
  bool first_tile;  // of those that the block takes
};

// What blockIdx stands for.
struct Place {
  uint32_t part, group, slot;
};

__device__ __forceinline__ Place place_of(const ScanLaunch& l) {
  const uint32_t slots = uint32_t(l.slots), groups = uint32_t(l.p.groups), rest = blockIdx.x / slots;
  return {rest / groups, rest % groups, blockIdx.x % slots};
}

// By the whole block, where nobody reads `site` any more.
__device__ __forceinline__ void enter_site(Site& site, const ScanLaunch& l, int64_t tile, int channels) {
  if (threadIdx.x == 0) {
    const Place place = place_of(l);
    site.part = locate(l, place.part);
    site.channels = channels_of(l, place.group, tile, channels);
    site.slot = place.slot;
    site.first_tile = tile == place.slot;
  }
  device::sync_block();
}

// kStage steps, or fewer at the end of a part.
struct Stage {
  int64_t first;
  int steps;
};

// ---- States ------------------------------------------------------------------------------------

// Calls body(k, i, channel, state) for every state this thread owns that exists.
template <class TileOf, class Body>
__device__ __forceinline__ void for_states(const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                           const Channels& channels, const Body& body) {
#pragma unroll
  for (int k = 0; k < TileOf::kChannels; ++k) {
    const int channel = geometry.first_channel() + k;
#pragma unroll
    for (int i = 0; i < TileOf::kStates; ++i) {
      const int state = geometry.state(i);
      if (channel < channels.count && state < l.p.states) body(k, i, channels.first + channel, state);
    }
  }
}

template <class TileOf>
using States = typename TileOf::State[TileOf::kChannels][TileOf::kStates];

template <class TileOf>
__device__ __forceinline__ void clear(States<TileOf>& x) {
#pragma unroll
  for (int k = 0; k < TileOf::kChannels; ++k) {
#pragma unroll
    for (int i = 0; i < TileOf::kStates; ++i) x[k][i] = {};
  }
}

// [state][dim], as chunk states and workspaces are; a null matrix reads as zero.
template <class TileOf>
__device__ __forceinline__ void load_states(States<TileOf>& x, const void* matrix, int64_t index,
                                            const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                            const Channels& channels) {
  clear<TileOf>(x);
  if (matrix == nullptr) return;
  const auto* from = static_cast<const typename TileOf::State*>(matrix) + index * l.p.states * l.p.dim;
  for_states(l, geometry, channels, [&](int k, int i, int64_t channel, int state) {
    x[k][i] = from[int64_t{state} * l.p.dim + channel];
  });
}

template <class TileOf>
__device__ __forceinline__ void store_states(const States<TileOf>& x, void* matrix, int64_t index,
                                             const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                             const Channels& channels) {
  if (matrix == nullptr) return;
  auto* to = static_cast<typename TileOf::State*>(matrix) + index * l.p.states * l.p.dim;
  for_states(l, geometry, channels, [&](int k, int i, int64_t channel, int state) {
    to[int64_t{state} * l.p.dim + channel] = x[k][i];
  });
}

// [sequence][dim][state], as a user's states are.
template <class TileOf>
__device__ __forceinline__ void load_sequence_states(States<TileOf>& x, const void* matrix, int64_t sequence,
                                                     const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                                     const Channels& channels) {
  clear<TileOf>(x);
  if (matrix == nullptr) return;
  const auto* from = static_cast<const typename TileOf::State*>(matrix) + sequence * l.p.dim * l.p.states;
  for_states(l, geometry, channels,
             [&](int k, int i, int64_t channel, int state) { x[k][i] = from[channel * l.p.states + state]; });
}

template <class TileOf>
__device__ __forceinline__ void store_sequence_states(const States<TileOf>& x, void* matrix, int64_t sequence,
                                                      const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                                      const Channels& channels) {
  if (matrix == nullptr) return;
  auto* to = static_cast<typename TileOf::State*>(matrix) + sequence * l.p.dim * l.p.states;
  for_states(l, geometry, channels,
             [&](int k, int i, int64_t channel, int state) { to[channel * l.p.states + state] = x[k][i]; });
}

// A matrix (dim, state) of weights with strides: A, or constant B and C.
template <class TileOf>
__device__ __forceinline__ void load_weights(States<TileOf>& x, const Strided& weights, const ScanLaunch& l,
                                             const Geometry<TileOf>& geometry, const Channels& channels) {
  clear<TileOf>(x);
  const auto* from = static_cast<const typename TileOf::State*>(weights.data);
  for_states(l, geometry, channels, [&](int k, int i, int64_t channel, int state) {
    x[k][i] = from[channel * weights.channel + state * weights.state];
  });
}

template <class TileOf>
__device__ __forceinline__ void load_rates(States<TileOf>& A, const ScanLaunch& l,
                                           const Geometry<TileOf>& geometry, const Channels& channels) {
  load_weights<TileOf>(A, l.p.A, l, geometry, channels);
#pragma unroll
  for (int k = 0; k < TileOf::kChannels; ++k) {
#pragma unroll
    for (int i = 0; i < TileOf::kStates; ++i) A[k][i] = scaled_rate(A[k][i]);
  }
}

// States that the tile has and the channels have not stay zero even where dt or u is not finite.
template <class TileOf>
__device__ __forceinline__ void clear_absent(States<TileOf>& x, const ScanLaunch& l,
                                             const Geometry<TileOf>& geometry) {
  if (TileOf::kFull || geometry.states == l.p.states) return;
#pragma unroll
  for (int i = 0; i < TileOf::kStates; ++i) {
    if (geometry.state(i) < l.p.states) continue;
#pragma unroll
    for (int k = 0; k < TileOf::kChannels; ++k) x[k][i] = {};
  }
}

// This thread's states of a row of B or C in shared memory.
template <class TileOf>
__device__ __forceinline__ void load_row(typename TileOf::State (&x)[TileOf::kStates],
                                         const typename TileOf::State* row,
                                         const Geometry<TileOf>& geometry) {
  using Vector = typename TileOf::StateVector;
#pragma unroll
  for (int i = 0; i < TileOf::kStates; i += TileOf::kVector) {
    const Vector part = device::load(reinterpret_cast<const Vector*>(row + geometry.state(i)));
#pragma unroll
    for (int j = 0; j < TileOf::kVector; ++j) x[i + j] = part[j];
  }
}

// The thread's channels of a row [channel].
template <class TileOf>
__device__ __forceinline__ void load_channels(float (&x)[TileOf::kChannels], const float* row) {
  using Vector = device::Vector<float, TileOf::kChannels>;
  const Vector all = device::load(reinterpret_cast<const Vector*>(row));
#pragma unroll
  for (int k = 0; k < TileOf::kChannels; ++k) x[k] = all[k];
}

}  // namespace tilewright::scan
