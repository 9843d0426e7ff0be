// Optimizer updates on the CPU, compiled once per instruction-set level.
//
// A tile's states are decoded into the L1 cache, updated there together with the parameters, and encoded from
// there. Roofline, AdamW with fp32 parameters: 16.06 bytes per element (parameter and two codes read and
// written, gradient read) against 28 for fp32 states.
#include "core/threads.h"
#include "optim/codec_simd.h"
#include "optim/coefficients.h"
#include "optim/update.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::optim;
namespace codec = ::tilewright::TW_ISA::optim;

constexpr int64_t kSerialTiles = 64;  // fewer than this are done before a second thread wakes up

struct Vectors {
  Float scale, l2, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, eps,
      momentum_weight, grad_weight;
  bool plain;  // the gradient is taken as it is

  explicit Vectors(const Coefficients& c)
      : scale(splat(c.grad_scale)),
        l2(splat(c.l2)),
        decay(splat(c.decay)),
        beta1(splat(c.beta1)),
        one_minus_beta1(splat(c.one_minus_beta1)),
        beta2(splat(c.beta2)),
        one_minus_beta2(splat(c.one_minus_beta2)),
        step_size(splat(c.step_size)),
        inverse_correction2(splat(c.inverse_correction2)),
        eps(splat(c.eps)),
        momentum_weight(splat(c.momentum_weight)),
        grad_weight(splat(c.grad_weight)),
        plain(c.grad_scale == 1.0f && c.l2 == 0.0f) {}
};

template <Algorithm kAlgorithm>
Float updated(const Vectors& c, Float g, Float p, Float& s1, Float& s2) {
  if (!c.plain) g = fma(c.l2, p, g * c.scale);
  if constexpr (kAlgorithm == Algorithm::kAdam) {
    s1 = fma(c.beta1, s1, c.one_minus_beta1 * g);
    s2 = fma(c.beta2, s2, c.one_minus_beta2 * g * g);
    return p * c.decay - c.step_size * s1 / fma(sqrt(s2), c.inverse_correction2, c.eps);
  } else if constexpr (kAlgorithm == Algorithm::kLion) {
    const Float direction = fma(c.beta1, s1, c.one_minus_beta1 * g);
    s1 = fma(c.beta2, s1, c.one_minus_beta2 * g);
    // sign(direction) is 0 at 0 and NaN at NaN.
    const Int nonzero = direction != splat(0.0f);
    const Float one = from_bits((bits(splat(1.0f)) & nonzero) | (bits(direction) & int32_t(0x80000000)));
    const Int nan = direction != direction;
    return p * c.decay - c.step_size * from_bits((bits(one) & ~nan) | (bits(direction) & nan));
  } else {
    s1 = fma(c.beta1, s1, c.one_minus_beta1 * g);
    return p - c.step_size * fma(c.momentum_weight, s1, c.grad_weight * g);
  }
}

// Adds 16 random bits below the kept ones and truncates: rounds up with the probability of the dropped part.
void store_stochastic(bf16* p, Float x, Int random) {
  const Int b = bits(x);
  const Int finite = (b & 0x7f800000) != 0x7f800000;
  const Int nan = (b & 0x7fffffff) > 0x7f800000;
  store_halves(&p->bits, shift_right(b + (random & finite), 16) | (nan & 0x40));
}

// As for bf16 where fp16 is normal; below 2^-14 its steps are 2^-24 wide, so the value is moved to where such
// a step is one. Values at or above the largest finite one round to nearest.
void store_stochastic(fp16* p, Float x, Int random) {
  const Int b = bits(x), magnitude = b & 0x7fffffff;
  const Int normal = magnitude >= 0x38800000, large = magnitude >= 0x477fe000;
  const Int kept = (b + shift_right(random, 3)) & ~0x1fff;
  const Float fraction = (from_bits(random | 0x4b000000) - splat(0x1p23f)) * splat(0x1p-16f);
  Float steps = abs(x) * splat(0x1p24f) + fraction;
  for (int i = 0; i < kLanes; ++i) steps[i] = steps[i] < 0x1p20f ? float(int32_t(steps[i])) : 0.0f;
  const Int small = bits(steps * splat(0x1p-24f)) | (b & int32_t(0x80000000));
  const Int chosen = (large & b) | (~large & ((normal & kept) | (~normal & small)));
  store(p, from_bits(chosen));
}

void store_stochastic(float* p, Float x, Int) { store(p, x); }

// A tile's stretch of memory. States are float here: scratch for 8-bit states, the states themselves
// otherwise.
template <class T>
struct Span {
  const T* grad;
  T* param;
  float* state1;
  float* state2;
  const uint16_t* random;  // null: round to nearest
};

// Largest magnitudes of the new states, as bits (see codec::absmax_of).
struct Largest {
  Int state1 = splat(int32_t{0}), state2 = splat(int32_t{0});
};

template <Algorithm kAlgorithm, bool kStochastic, class T>
void update_whole_vectors(const Vectors& c, const Span<T>& span, int64_t count, Largest& largest) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Float s1 = load(span.state1 + i);
    Float s2 = kAlgorithm == Algorithm::kAdam ? load(span.state2 + i) : splat(0.0f);
    const Float p = updated<kAlgorithm>(c, load(span.grad + i), load(span.param + i), s1, s2);
    if constexpr (kStochastic) {
      store_stochastic(span.param + i, p, load_halves(span.random + i));
    } else {
      store_fast(span.param + i, p);
    }
    store(span.state1 + i, s1);
    largest.state1 = max(largest.state1, bits(s1) & 0x7fffffff);
    if (kAlgorithm == Algorithm::kAdam) {
      store(span.state2 + i, s2);
      largest.state2 = max(largest.state2, bits(s2) & 0x7fffffff);
    }
  }
}

template <Algorithm kAlgorithm, bool kStochastic, class T>
Largest update_span(const Coefficients& coefficients, const Span<T>& span, int64_t count) {
  const Vectors c(coefficients);
  const int64_t whole = count / kLanes * kLanes, rest = count - whole;
  Largest largest;
  update_whole_vectors<kAlgorithm, kStochastic>(c, span, whole, largest);
  if (rest == 0) return largest;
  T grad[kLanes] = {}, param[kLanes] = {};
  float state1[kLanes] = {}, state2[kLanes] = {};
  uint16_t random[kLanes] = {};
  std::memcpy(grad, span.grad + whole, size_t(rest) * sizeof(T));
  std::memcpy(param, span.param + whole, size_t(rest) * sizeof(T));
  std::memcpy(state1, span.state1 + whole, size_t(rest) * sizeof(float));
  if (kAlgorithm == Algorithm::kAdam) std::memcpy(state2, span.state2 + whole, size_t(rest) * sizeof(float));
  if (kStochastic) std::memcpy(random, span.random + whole, size_t(rest) * sizeof(uint16_t));
  update_whole_vectors<kAlgorithm, kStochastic>(c, Span<T>{grad, param, state1, state2, random}, kLanes,
                                                largest);
  std::memcpy(span.param + whole, param, size_t(rest) * sizeof(T));
  std::memcpy(span.state1 + whole, state1, size_t(rest) * sizeof(float));
  if (kAlgorithm == Algorithm::kAdam) std::memcpy(span.state2 + whole, state2, size_t(rest) * sizeof(float));
  return largest;
}

// 8-bit state of a tile: decoded on the way in, encoded on the way out. The padding keeps the values of the
// four states in flight from lying at the same place in their 4 KiB pages, where a load would wait for
// another state's store.
struct CodedState {
  uint8_t* codes;
  float* absmax;     // where the scale is kept
  const float* map;  // null: the built-in one
  float new_absmax;
  alignas(64) float values[kMaxBlock];
  char padding[1024];
};

// What a tile needs between its update and its encoding.
struct Pending {
  CodedState state1, state2;
  int64_t count = 0;  // elements waiting to be encoded
};

template <bool kSigned>
float* decode_state(CodedState& state, void* codes_of_row, float* absmax_of_row, const float* map,
                    const Row& row, int64_t tile, int64_t count) {
  state.codes = static_cast<uint8_t*>(codes_of_row) + tile * row.block_size;
  state.absmax = absmax_of_row + tile;
  state.map = map;
  codec::decode_any<kSigned>(state.codes, *state.absmax, map, state.values, count);
  return state.values;
}

bool is_finite(float x) { return std::fabs(x) <= codec::kLargestFloat; }

// States that a non-finite or an overflowing gradient reached become zero, both of an element: its neighbours
// in the block keep theirs. Its parameter is what torch would make of it.
void drop_nonfinite(float* state1, float* state2, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (is_finite(state1[i]) && is_finite(state2[i])) continue;
    state1[i] = 0.0f;
    state2[i] = 0.0f;
  }
}

template <bool kSigned>
void encode_state(CodedState& state, int64_t count) {
  constexpr SmallValues kSmall = kSigned ? SmallValues::kNearest : SmallValues::kPositive;
  codec::encode_any<kSigned, kSmall>(state.values, state.new_absmax, state.map, state.codes, count);
  *state.absmax = state.new_absmax;
}

template <bool kTwo>
void find_absmax(Pending& tile, const Largest& largest) {
  CodedState &state1 = tile.state1, &state2 = tile.state2;
  state1.new_absmax = codec::absmax_from(largest.state1);
  state2.new_absmax = kTwo ? codec::absmax_from(largest.state2) : 0.0f;
  if (__builtin_expect(is_finite(state1.new_absmax) && is_finite(state2.new_absmax), 1)) return;
  const int64_t padded = codec::padded_to_step(tile.count);
  drop_nonfinite(state1.values, kTwo ? state2.values : state1.values, padded);
  state1.new_absmax = codec::absmax_of(state1.values, padded);
  if (kTwo) state2.new_absmax = codec::absmax_of(state2.values, padded);
}

template <bool kTwo>
void encode_pending(Pending& tile) {
  if (tile.count == 0) return;
  encode_state<true>(tile.state1, tile.count);
  if (kTwo) encode_state<false>(tile.state2, tile.count);
  tile.count = 0;
}

// Asks for the tile after this one. The stretches a tile reads are too short for the hardware to have caught
// up with all four streams before they end.
template <class T>
void prefetch_next(const Row& row, const T* grads, int64_t next) {
  constexpr int64_t kLine = 64;
  if (row.absmax1 == nullptr || next + row.block_size > row.numel) return;
  for (int64_t i = 0; i < row.block_size; i += kLine / int64_t(sizeof(T))) {
    __builtin_prefetch(grads + next + i, 0, 3);
    __builtin_prefetch(static_cast<const T*>(row.param) + next + i, 1, 3);
  }
  for (int64_t i = 0; i < row.block_size; i += kLine) {
    __builtin_prefetch(static_cast<const uint8_t*>(row.state1) + next + i, 1, 3);
    if (row.state2 != nullptr) __builtin_prefetch(static_cast<const uint8_t*>(row.state2) + next + i, 1, 3);
  }
}

// Updates a tile. 8-bit states are left in `pending`, to be encoded after the next tile's update: the
// reductions that find their absmax are over by then.
template <Algorithm kAlgorithm, class T>
void update_tile(const Row& row, const void* grads, const Coefficients& c, int64_t tile, Pending& pending) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  const int64_t begin = tile * row.block_size;
  prefetch_next(row, static_cast<const T*>(grads), begin + row.block_size);
  const int64_t count = row.numel - begin < row.block_size ? row.numel - begin : row.block_size;
  const bool stochastic = c.stochastic && sizeof(T) == 2;
  alignas(64) PhiloxWords random[kMaxBlock / 8];
  if (stochastic) {
    for (int64_t i = 0; i * 8 < count; ++i) random[i] = random_octet(c, row.id, begin / 8 + i);
  }
  Span<T> span{static_cast<const T*>(grads) + begin, static_cast<T*>(row.param) + begin, nullptr, nullptr,
               reinterpret_cast<const uint16_t*>(random)};
  const bool coded = row.absmax1 != nullptr;
  if (coded) {
    pending.count = count;
    span.state1 = decode_state<true>(pending.state1, row.state1, row.absmax1, row.map1, row, tile, count);
    if (kTwo)
      span.state2 = decode_state<false>(pending.state2, row.state2, row.absmax2, row.map2, row, tile, count);
  } else {
    span.state1 = static_cast<float*>(row.state1) + begin;
    if (kTwo) span.state2 = static_cast<float*>(row.state2) + begin;
  }
  const Largest largest = stochastic ? update_span<kAlgorithm, true>(c, span, count)
                                     : update_span<kAlgorithm, false>(c, span, count);
  if (coded) find_absmax<kTwo>(pending, largest);
}

// The last row that starts at or before the tile.
int64_t row_of_tile(const UpdateParams& p, int64_t tile) {
  int64_t low = 0, high = p.num_rows - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (p.rows[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls body(row index, tile within the row) for tiles begin..end of the whole sweep.
template <class Body>
void for_tiles(const UpdateParams& p, int64_t begin, int64_t end, const Body& body) {
  int64_t row = row_of_tile(p, begin);
  for (int64_t tile = begin; tile < end; ++tile) {
    while (row + 1 < p.num_rows && p.rows[row + 1].first_tile <= tile) ++row;
    body(row, tile - p.rows[row].first_tile);
  }
}

template <Algorithm kAlgorithm>
void update_all(const UpdateParams& p, int threads) {
  const int64_t chunks = (p.num_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
  parallel_chunks(chunks, p.num_tiles <= kSerialTiles ? 1 : threads, [&](int64_t chunk) {
    const int64_t begin = chunk * kTilesPerChunk;
    const int64_t end = begin + kTilesPerChunk < p.num_tiles ? begin + kTilesPerChunk : p.num_tiles;
    Pending pending[2];
    int current = 0;
    for_tiles(p, begin, end, [&](int64_t row, int64_t tile) {
      with_float_type(p.rows[row].dtype, [&](auto zero) {
        update_tile<kAlgorithm, decltype(zero)>(p.rows[row], p.grads[row], p.coefficients[row], tile,
                                                pending[current]);
      });
      current ^= 1;
      encode_pending<kAlgorithm == Algorithm::kAdam>(pending[current]);
    });
    encode_pending<kAlgorithm == Algorithm::kAdam>(pending[current ^ 1]);
  });
}

template <class T>
double squared_sum(const T* x, int64_t count) {
  Float total = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) total = fma(load(x + i), load(x + i), total);
  if (i < count) {
    const Float rest = load_some(x + i, count - i);
    total = fma(rest, rest, total);
  }
  return sum(total);
}

}  // namespace

void update_cpu(const UpdateParams& p, int threads) {
  switch (p.algorithm) {
    case Algorithm::kAdam:
      return update_all<Algorithm::kAdam>(p, threads);
    case Algorithm::kLion:
      return update_all<Algorithm::kLion>(p, threads);
    case Algorithm::kSgd:
      return update_all<Algorithm::kSgd>(p, threads);
  }
}

double squared_norm_cpu(const UpdateParams& p, int64_t chunk) {
  const int64_t begin = chunk * kTilesPerChunk;
  const int64_t end = begin + kTilesPerChunk < p.num_tiles ? begin + kTilesPerChunk : p.num_tiles;
  double total = 0;
  for_tiles(p, begin, end, [&](int64_t index, int64_t tile) {
    const Row& row = p.rows[index];
    const int64_t offset = tile * row.block_size;
    const int64_t count = row.numel - offset < row.block_size ? row.numel - offset : row.block_size;
    total += with_float_type(row.dtype, [&](auto zero) {
      return squared_sum(static_cast<const decltype(zero)*>(p.grads[index]) + offset, count);
    });
  });
  return total;
}

}  // namespace tilewright::TW_ISA
