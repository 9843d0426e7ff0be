// What the CPU kernels of the selective scan share. A vector holds kLanes channels of one step; a tile is
// kLanes channels of one group. Tensors are brought, a chunk of steps at a time, into float32 rows of lanes
// in the order in which the steps visit the tokens, whatever their strides, and results go back the same way.
#pragma once

#include <atomic>
#include <utility>

#include "core/integers.h"
#include "core/simd_math.h"
#include "core/threads.h"
#include "scan/selective_scan.h"

namespace tilewright::TW_ISA::selective {

using ::tilewright::scan::chunk_base;
using ::tilewright::scan::chunk_count;
using ::tilewright::scan::kMaxStates;
using ::tilewright::scan::kScanChunk;
using ::tilewright::scan::SelectiveScanParams;
using ::tilewright::scan::Strided;

// ---- sequences, and the tokens their steps visit ----

struct Sequence {
  int64_t index, batch;
  int64_t start, length;  // its steps within the batch row
  int64_t row;            // its first step, counted over all sequences
  int64_t slot;           // its first chunk, likewise

  int64_t chunks() const { return divide_up(length, kScanChunk); }
};

static inline Sequence sequence_at(const SelectiveScanParams& p, int64_t index) {
  if (p.cu_seqlens == nullptr) {
    return {index, index, 0, p.length, index * p.length, chunk_base(index, 0, false, p.length)};
  }
  const int64_t start = p.cu_seqlens[index];
  return {index, 0, start, p.cu_seqlens[index + 1] - start, start, chunk_base(index, start, true, p.length)};
}

static inline int64_t most_chunks(const SelectiveScanParams& p) {
  if (p.cu_seqlens == nullptr) return divide_up(p.length, kScanChunk);
  int64_t most = 0;
  for (int64_t s = 0; s < p.sequences; ++s) most = larger(most, sequence_at(p, s).chunks());
  return most;
}

struct Chunk {
  int64_t count;
  bool ascending, descending;  // the tokens follow one another
  int64_t token[kScanChunk];
};

[[gnu::noinline]] [[maybe_unused]] static Chunk chunk_of(const SelectiveScanParams& p,
                                                         const Sequence& sequence, int64_t index) {
  Chunk chunk;
  const int64_t first = index * kScanChunk;
  chunk.count = smaller(kScanChunk, sequence.length - first);
  chunk.ascending = p.order == nullptr && !p.reverse;
  chunk.descending = p.order == nullptr && p.reverse;
  for (int64_t i = 0; i < chunk.count; ++i) {
    const int64_t step = sequence.start + (p.reverse ? sequence.length - 1 - first - i : first + i);
    chunk.token[i] = p.order == nullptr ? step : p.order[sequence.batch * p.order_stride + step];
  }
  return chunk;
}

// Calls body(sequence, chunk index, part) for every chunk of every sequence and each of `parts`.
template <class Body>
static inline void for_each_chunk(const SelectiveScanParams& p, int64_t parts, int threads,
                                  const Body& body) {
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t slots = chunk_count(p.batch, p.length, p.sequences, packed);
  if (p.sequences == 0) return;
  parallel_chunks(slots * parts, threads, [&](int64_t task) {
    const int64_t slot = task / parts;
    int64_t low = 0, high = p.sequences - 1;  // the last sequence that starts at or before the slot
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (sequence_at(p, middle).slot <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    const Sequence sequence = sequence_at(p, low);
    if (slot - sequence.slot < sequence.chunks()) body(sequence, slot - sequence.slot, task % parts);
  });
}

// ---- tiles of channels ----

struct Tile {
  int64_t index, group, channel;  // the first channel
  int64_t lanes;                  // channels; the lanes behind them hold zeros and are never written
};

static inline int64_t tiles_per_group(const SelectiveScanParams& p) {
  return divide_up(p.dim / p.groups, kLanes);
}

static inline Tile tile_at(const SelectiveScanParams& p, int64_t index) {
  const int64_t per_group = tiles_per_group(p), channels = p.dim / p.groups;
  const int64_t group = index / per_group, offset = index % per_group * kLanes;
  return {index, group, group * channels + offset, smaller(kLanes, channels - offset)};
}

// ---- vectors ----

template <int kDistance, int... kLane>
static inline Float interleave_low(Float a, Float b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + kLane - kDistance : kLane)...);
}

template <int kDistance, int... kLane>
static inline Float interleave_high(Float a, Float b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLanes + kLane : kLane + kDistance)...);
}

using AllLanes = std::make_integer_sequence<int, kLanes>;

// Lane l of vector v becomes lane v of vector l, by exchanging ever larger off-diagonal squares.
template <int kDistance = 1>
static inline void transpose(Float (&v)[kLanes]) {
  if constexpr (kDistance < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kDistance) continue;
      const Float low = interleave_low<kDistance>(v[i], v[i + kDistance], AllLanes{});
      v[i + kDistance] = interleave_high<kDistance>(v[i], v[i + kDistance], AllLanes{});
      v[i] = low;
    }
    transpose<2 * kDistance>(v);
  }
}

// Adjacent sums: where lanes hold partial sums of a or of b, each lane of the result holds one of two.
template <int kDistance>
static inline Float fold(Float a, Float b) {
  return interleave_low<kDistance>(a, b, AllLanes{}) + interleave_high<kDistance>(a, b, AllLanes{});
}

// Lane i (modulo 4) of the result sums the lanes of x[i] that lie in its quarter.
static inline Float fold_four(const Float (&x)[4]) {
  return fold<2>(fold<1>(x[0], x[1]), fold<1>(x[2], x[3]));
}

// out[i] += sum of the lanes of x[i], out[4 + i] += those of y[i].
static inline void add_sums(float* out, const Float (&x)[4], const Float (&y)[4]) {
  const Float quarters_x = fold_four(x), quarters_y = fold_four(y);
#if defined(__AVX512F__)
  const Float halves = fold<4>(quarters_x, quarters_y);
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(halves), _mm512_extractf32x8_ps(halves, 1));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), eight));
#elif defined(__AVX2__)
  store(out, load(out) + fold<4>(quarters_x, quarters_y));
#else
  store(out, load(out) + quarters_x);
  store(out + 4, load(out + 4) + quarters_y);
#endif
}

// A product that is zero in the lanes behind a tile's channels, where an infinite operand would make it NaN.
#if defined(__AVX512F__)
using LaneMask = __mmask16;
static inline LaneMask lane_mask(int64_t lanes) { return LaneMask((1u << lanes) - 1); }
static inline Float kept_product(LaneMask mask, Float a, Float b) { return _mm512_maskz_mul_ps(mask, a, b); }
#else
using LaneMask = Int;
static inline LaneMask lane_mask(int64_t lanes) {
  LaneMask mask = {};
  for (int64_t i = 0; i < lanes; ++i) mask[i] = -1;
  return mask;
}
static inline Float kept_product(LaneMask mask, Float a, Float b) { return from_bits(bits(a * b) & mask); }
#endif

// 2^x, reduced to [-1/2, 1/2]: unlike exp2, whose error is the same everywhere, this becomes exact as x goes
// to 0. A state that decays slowly needs that, for it adds up the error of its factor for as long as it
// lasts. Relative error 1.1e-7 at the ends, below 1e-8 for |x| < 0.05, and rounding.
static inline Float decay(Float x) {
#if defined(__AVX512F__)
  const Float f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 at infinities
  const Float whole = x - f;
#else
  x = max(splat(-127.0f), min(splat(128.0f), x));       // in this order a NaN stays
  const Float shifted = x + splat(0x1.8p23f + 127.0f);  // its low bits: the nearest integer and the bias
  const Float f = x - (shifted - splat(0x1.8p23f + 127.0f));
#endif
  Float p = fma(splat(0.0013300531f), f, splat(0.009669661f));
  p = fma(p, f, splat(0.055505585f));
  p = fma(p, f, splat(0.24022283f));
  p = fma(p, f, splat(0.6931472f));
  p = fma(p, f, splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  return p * from_bits(bits(shifted) << 23);  // 2^-127 is 0, 2^128 infinity
#endif
}

// softplus and its derivative, of one exponential.
struct Softplus {
  Float value, slope;
};

static inline Softplus softplus_with_slope(Float x) {
  const Float one = splat(1.0f), e = exp(-abs(x)), small = log1p_unit(e);
  const Float value = select_above(x, splat(0.0f), x + small, small);
  const Float slope = select_above(x, splat(0.0f), one, e) / (one + e);
  return {select_above(x, splat(20.0f), x, value), select_above(x, splat(20.0f), one, slope)};
}

// ---- staging ----

// The tokens and up to kLanes lanes (channels, or states of B and C) of a tensor.
template <class T>
struct Plane {
  T* data;
  int64_t lane, step;  // strides
};

template <class T>
static inline Plane<T> channels_of(const Strided& x, int64_t batch, const Tile& tile) {
  return {static_cast<T*>(x.data) + batch * x.batch + tile.channel * x.channel, x.channel, x.step};
}

template <class T>
static inline Plane<T> states_of(const Strided& x, int64_t batch, int64_t group, int64_t state) {
  return {static_cast<T*>(x.data) + batch * x.batch + group * x.channel + state * x.state, x.state, x.step};
}

static inline void narrow_to(float* p, float x) { *p = x; }
static inline void narrow_to(bf16* p, float x) { *p = narrow_bf16(x); }
static inline void narrow_to(fp16* p, float x) { *p = narrow_fp16(x); }

// Steps first to first + kLanes of a plane whose tokens lie one behind the other.
template <class T>
static inline void stage_block(const Plane<T>& x, int64_t lanes, const Chunk& chunk, int64_t first,
                               float* rows, int64_t pitch) {
  const int64_t low = chunk.token[chunk.ascending ? first : first + kLanes - 1];
  Float v[kLanes];
  if (lanes == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = load(x.data + i * x.lane + low);
  } else {
    for (int i = 0; i < kLanes; ++i) v[i] = i < lanes ? load(x.data + i * x.lane + low) : splat(0.0f);
  }
  transpose(v);
  const int64_t sign = chunk.ascending ? 1 : -1;
  float* row = rows + (chunk.ascending ? first : first + kLanes - 1) * pitch;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(row + sign * i * pitch, v[i]);
}

template <class T>
static inline void unstage_block(const Plane<T>& x, int64_t lanes, const Chunk& chunk, int64_t first,
                                 const float* rows, int64_t pitch) {
  const int64_t low = chunk.token[chunk.ascending ? first : first + kLanes - 1];
  const int64_t sign = chunk.ascending ? 1 : -1;
  const float* row = rows + (chunk.ascending ? first : first + kLanes - 1) * pitch;
  Float v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = load(row + sign * i * pitch);
  transpose(v);
  if (lanes == kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(x.data + i * x.lane + low, v[i]);
  } else {
    for (int i = 0; i < lanes; ++i) store(x.data + i * x.lane + low, v[i]);
  }
}

// rows[step * pitch + lane] = the plane's values; zeros in the lanes behind `lanes`.
template <class T>
[[gnu::noinline]] static void stage(const Plane<T>& x, int64_t lanes, const Chunk& chunk, float* rows,
                                    int64_t pitch = kLanes) {
  int64_t i = 0;
  if (x.lane == 1 && lanes == kLanes) {
    for (; i < chunk.count; ++i) store(rows + i * pitch, load(x.data + chunk.token[i] * x.step));
    return;
  }
  if (x.step == 1 && (chunk.ascending || chunk.descending)) {
    for (; i + kLanes <= chunk.count; i += kLanes) stage_block(x, lanes, chunk, i, rows, pitch);
  }
  for (; i < chunk.count; ++i) {
    const T* token = x.data + chunk.token[i] * x.step;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[i * pitch + lane] = lane < lanes ? widen(token[lane * x.lane]) : 0.0f;
    }
  }
}

template <class T>
[[gnu::noinline]] static void unstage(const Plane<T>& x, int64_t lanes, const Chunk& chunk, const float* rows,
                                      int64_t pitch = kLanes) {
  int64_t i = 0;
  if (x.lane == 1 && lanes == kLanes) {
    for (; i < chunk.count; ++i) store(x.data + chunk.token[i] * x.step, load(rows + i * pitch));
    return;
  }
  if (x.step == 1 && (chunk.ascending || chunk.descending)) {
    for (; i + kLanes <= chunk.count; i += kLanes) unstage_block(x, lanes, chunk, i, rows, pitch);
  }
  for (; i < chunk.count; ++i) {
    T* token = x.data + chunk.token[i] * x.step;
    for (int64_t lane = 0; lane < lanes; ++lane) narrow_to(token + lane * x.lane, rows[i * pitch + lane]);
  }
}

// Asks for the lines of a chunk that is worked on later. Where tokens or channels lie far apart the hardware
// does not foresee them, and several lines of a page at a time take hardly longer than one.
template <class T>
[[gnu::noinline]] static void prefetch(const Plane<T>& x, int64_t lanes, const Chunk& chunk) {
  // GCC takes a function that only prefetches for one without effect, and drops its calls.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  if (x.lane == 1) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const T* token = x.data + chunk.token[i] * x.step;
      for (int64_t lane = 0; lane < lanes; lane += kLine) __builtin_prefetch(token + lane, 0, 2);
    }
  } else if (x.step == 1 && chunk.count > 0) {
    const int64_t low = smaller(chunk.token[0], chunk.token[chunk.count - 1]);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T* tokens = x.data + lane * x.lane + low;
      for (int64_t i = 0; i < chunk.count; i += kLine) __builtin_prefetch(tokens + i, 0, 2);
    }
  }
}

// ---- weights and states: [state][lane] here, (dim, state) outside ----

[[gnu::noinline]] [[maybe_unused]] static void load_weights(const Strided& x, const Tile& tile,
                                                            int64_t states, float* out) {
  const float* data = static_cast<const float*>(x.data) + tile.channel * x.channel;
  for (int64_t n = 0; n < states; ++n) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[n * kLanes + lane] = lane < tile.lanes ? data[lane * x.channel + n * x.state] : 0.0f;
    }
  }
}

[[gnu::noinline]] [[maybe_unused]] static void store_weights(const Strided& x, const Tile& tile,
                                                             int64_t states, const float* values) {
  float* data = static_cast<float*>(x.data) + tile.channel * x.channel;
  for (int64_t n = 0; n < states; ++n) {
    for (int64_t lane = 0; lane < tile.lanes; ++lane) {
      data[lane * x.channel + n * x.state] = values[n * kLanes + lane];
    }
  }
}

// A contiguous (sequence, dim, state), or with sequence 0 (dim, state), as load_weights takes it.
static inline Strided contiguous(const SelectiveScanParams& p, const void* data, int64_t sequence) {
  float* start = static_cast<float*>(const_cast<void*>(data));
  return {start == nullptr ? start : start + sequence * p.dim * p.states, 0, p.states, 1, 0};
}

static inline Float load_channels(const void* data, const Tile& tile) {
  if (data == nullptr) return splat(0.0f);
  return load_some(static_cast<const float*>(data) + tile.channel, tile.lanes);
}

// A[n] times log2(e), so that the factor of a step is a power of two.
static inline void load_rates(const SelectiveScanParams& p, const Tile& tile, float* out) {
  load_weights(p.A, tile, p.states, out);
  for (int64_t n = 0; n < p.states; ++n) store(out + n * kLanes, load(out + n * kLanes) * kLog2E);
}

// ---- B and C ----

// Either rows of scalars [step][state], shared by the channels of a group, or vectors [state][lane].
struct Operand {
  const float* data;
  int64_t step;  // distance of two steps; 0: vectors
};

template <bool kVariable>
static inline Float operand(const float* x, int64_t state) {
  return kVariable ? splat(x[state]) : load(x + state * kLanes);
}

template <bool kVariable>
static inline const float* operand_at(const Operand& x, int64_t state) {
  return x.data + (kVariable ? state : state * kLanes);
}

static inline int64_t row_pitch(const SelectiveScanParams& p) { return divide_up(p.states, kLanes) * kLanes; }

static inline int64_t staged_floats(const SelectiveScanParams& p, bool variable) {
  return variable ? p.groups * (p.cu_seqlens ? p.length : p.batch * p.length) * row_pitch(p) : 0;
}

static inline int64_t staged_row(const SelectiveScanParams& p, int64_t group, int64_t row) {
  const int64_t rows = p.cu_seqlens ? p.length : p.batch * p.length;
  return (group * rows + row) * row_pitch(p);
}

// Brings variable B or C into float32 rows [group][row of the sequence's step][state].
template <class T>
static inline void stage_rows(const SelectiveScanParams& p, const Strided& x, float* rows, int threads) {
  const int64_t pitch = row_pitch(p);
  for_each_chunk(p, p.groups, threads, [&](const Sequence& sequence, int64_t index, int64_t group) {
    const Chunk chunk = chunk_of(p, sequence, index);
    float* out = rows + staged_row(p, group, sequence.row + index * kScanChunk);
    for (int64_t n = 0; n < p.states; n += kLanes) {
      stage(states_of<T>(x, sequence.batch, group, n), smaller(kLanes, p.states - n), chunk, out + n, pitch);
    }
  });
}

// What one (sequence, tile) needs of B or C; `vectors` holds a constant one.
static inline Operand operand_of(const SelectiveScanParams& p, const Strided& x, bool variable,
                                 const float* rows, const Sequence& sequence, const Tile& tile,
                                 float* vectors) {
  if (variable) return {rows + staged_row(p, tile.group, sequence.row), row_pitch(p)};
  load_weights(x, tile, p.states, vectors);
  return {vectors, 0};
}

// Calls body(variable_B, variable_C) with them as compile-time constants.
template <class Body>
static inline void with_variability(const SelectiveScanParams& p, const Body& body) {
  using std::bool_constant;
  if (p.variable_B) {
    p.variable_C ? body(bool_constant<true>{}, bool_constant<true>{})
                 : body(bool_constant<true>{}, bool_constant<false>{});
  } else {
    p.variable_C ? body(bool_constant<false>{}, bool_constant<true>{})
                 : body(bool_constant<false>{}, bool_constant<false>{});
  }
}

// Calls body(T{}) with the storage type.
template <class Body>
static inline void with_storage(DType dtype, const Body& body) {
  if (dtype == DType::kFloat32) {
    body(float{});
  } else if (dtype == DType::kBFloat16) {
    body(bf16{});
  } else {
    body(fp16{});
  }
}

// float64 and complex A (selective_scan_general_cpu.cpp), gradients of float32 and halves
// (selective_scan_backward_cpu.cpp).
static inline bool is_general(const SelectiveScanParams& p) { return p.weight_dtype != DType::kFloat32; }

int64_t general_workspace(const SelectiveScanParams&, bool backward);
void general_forward(const SelectiveScanParams&, int threads);
void general_backward(const SelectiveScanParams&, int threads);
int64_t backward_workspace(const SelectiveScanParams&);
void backward(const SelectiveScanParams&, int threads);

}  // namespace tilewright::TW_ISA::selective
