// The decode step of a selective scan on the CPU, compiled once per instruction-set level.
//
// Roofline: the state is read and written once, 8 bytes an element in float32, with 5 FLOPs and, where A
// differs from state to state, one exponential. Everything else is a state's share of a few rows: dt, x, z, D
// and out are prepared for a tile of channels, B and C for the head's group, as float32 in the L1 cache.
//
// A channel's states lie in the lanes. Where they are not side by side in whole vectors, or A is not float32,
// the channel's row goes through a buffer; the arithmetic is the same.
#include "core/integers.h"
#include "core/simd_math.h"
#include "core/threads.h"
#include "scan/selective_state_update.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::scan;

constexpr int64_t kBlockStates = 256;  // of a row, at a time
constexpr int64_t kTileElements = 8192;
constexpr int64_t kMaxTile = 256;           // channels
constexpr int64_t kSerialElements = 32768;  // below this, waking a second thread costs more than it saves

static_assert(kBlockStates % kLanes == 0 && kMaxTile % kLanes == 0);

int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class To, class From>
void copy_strided(To* to, const From* from, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) to[i] = To(widen(from[i * stride]));
}

// `count` elements of any dtype as To.
template <class To>
void gather(To* to, const StepTensor& t, int64_t offset, int64_t count, int64_t stride) {
  switch (t.dtype) {
    case DType::kFloat64:
      return copy_strided(to, static_cast<const double*>(t.data) + offset, count, stride);
    case DType::kFloat32:
      return copy_strided(to, static_cast<const float*>(t.data) + offset, count, stride);
    case DType::kBFloat16:
      return copy_strided(to, static_cast<const bf16*>(t.data) + offset, count, stride);
    default:
      return copy_strided(to, static_cast<const fp16*>(t.data) + offset, count, stride);
  }
}

template <class From>
void scatter(const StepTensor& t, int64_t offset, const From* from, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = offset + i * stride;
    switch (t.dtype) {
      case DType::kFloat64:
        static_cast<double*>(t.data)[at] = double(from[i]);
        break;
      case DType::kFloat32:
        static_cast<float*>(t.data)[at] = float(from[i]);
        break;
      case DType::kBFloat16:
        static_cast<bf16*>(t.data)[at] = narrow_bf16(float(from[i]));
        break;
      default:
        static_cast<fp16*>(t.data)[at] = narrow_fp16(float(from[i]));
    }
  }
}

int64_t slot_of(const SelectiveStateUpdateParams& p, int64_t b) {
  if (p.indices == nullptr) return b;
  const int64_t at = b * p.indices_stride;
  return p.indices_are_64 ? static_cast<const int64_t*>(p.indices)[at]
                          : static_cast<const int32_t*>(p.indices)[at];
}

// The sum of the lanes, by halves.
float add_lanes(Float x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#elif defined(__AVX2__)
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 quarters = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return quarters[0] + quarters[1];
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// What a tile of channels needs besides the states, all of it float32.
struct Tile {
  int64_t b, h, slot, begin, count;
  alignas(64) float dt[kMaxTile], x[kMaxTile], dtx[kMaxTile], decay[kMaxTile], y[kMaxTile], z[kMaxTile],
      skip[kMaxTile];
  alignas(64) float B[kBlockStates], C[kBlockStates];

  void gather_channels(float* to, const StepTensor& t, int64_t batch_index) const {
    const int64_t offset = batch_index * t.batch + h * t.head + begin * t.channel;
    gather(to, t, offset, count, t.channel);
    for (int64_t i = count; i < padded(count); ++i) to[i] = 0.0f;
  }
};

// A of what is in memory for it.
Float rate_of(const SelectiveStateUpdateParams& p, Float x) { return p.A_is_log ? -exp(x) : x; }

void prepare(const SelectiveStateUpdateParams& p, Tile& tile, bool one_decay) {
  tile.gather_channels(tile.dt, p.dt, tile.b);
  tile.gather_channels(tile.x, p.x, tile.b);
  if (p.dt_bias.data != nullptr) {
    tile.gather_channels(tile.y, p.dt_bias, 0);
    for (int64_t i = 0; i < tile.count; ++i) tile.dt[i] += tile.y[i];
  }
  if (one_decay) tile.gather_channels(tile.decay, p.A, 0);
  for (int64_t i = 0; i < padded(tile.count); i += kLanes) {
    const Float raw = load(tile.dt + i), dt = p.softplus ? softplus(raw) : raw;
    store(tile.dt + i, dt);
    store(tile.dtx + i, dt * load(tile.x + i));
    if (one_decay) store(tile.decay + i, exp(dt * rate_of(p, load(tile.decay + i))));
    store(tile.y + i, splat(0.0f));
  }
}

void finish(const SelectiveStateUpdateParams& p, Tile& tile) {
  if (p.D.data != nullptr) tile.gather_channels(tile.skip, p.D, 0);
  if (p.z.data != nullptr) tile.gather_channels(tile.z, p.z, tile.b);
  for (int64_t i = 0; i < padded(tile.count); i += kLanes) {
    Float y = load(tile.y + i);
    if (p.D.data != nullptr) y = fma(load(tile.skip + i), load(tile.x + i), y);
    if (p.z.data != nullptr) {
      const Float z = load(tile.z + i);
      y = y * (z * sigmoid(z));
    }
    store(tile.y + i, y);
  }
  const int64_t offset = tile.b * p.out.batch + tile.h * p.out.head + tile.begin * p.out.channel;
  scatter(p.out, offset, tile.y, tile.count, p.out.channel);
}

// A row of `count` states, a multiple of kLanes: moves them on and returns their share of y. Null A: one
// decay.
template <class T>
float step_row(const SelectiveStateUpdateParams& p, const Tile& tile, int64_t row, T* state, const float* A,
               int64_t count) {
  const Float dt = splat(tile.dt[row]), dtx = splat(tile.dtx[row]);
  const Float shared = splat(tile.decay[row]);
  Float y = splat(0.0f);
  for (int64_t n = 0; n < count; n += kLanes) {
    const Float decay = A == nullptr ? shared : exp(dt * rate_of(p, load(A + n)));
    const Float moved = fma(load(state + n), decay, dtx * load(tile.B + n));
    store(state + n, moved);
    y = fma(moved, load(tile.C + n), y);
  }
  return add_lanes(y);
}

template <class T>
void update_tile(const SelectiveStateUpdateParams& p, Tile& tile) {
  const bool one_decay = p.A.state == 0;
  prepare(p, tile, one_decay);
  const int64_t group = tile.h / (p.heads / p.groups);
  for (int64_t first = 0; first < p.states; first += kBlockStates) {
    const int64_t count = smaller(kBlockStates, p.states - first), whole = padded(count);
    for (int64_t i = count; i < whole; ++i) tile.B[i] = tile.C[i] = 0.0f;
    gather(tile.B, p.B, tile.b * p.B.batch + group * p.B.head + first * p.B.state, count, p.B.state);
    gather(tile.C, p.C, tile.b * p.C.batch + group * p.C.head + first * p.C.state, count, p.C.state);
    const bool vectors = p.state.state == 1 && count == whole;
    const bool vectors_A = p.A.state == 1 && p.A.dtype == DType::kFloat32 && count == whole;
    alignas(64) float state_row[kBlockStates], A_row[kBlockStates];
    for (int64_t i = count; i < whole; ++i) state_row[i] = A_row[i] = 0.0f;
    for (int64_t row = 0; row < tile.count; ++row) {
      const int64_t c = tile.begin + row;
      const int64_t A_offset = tile.h * p.A.head + c * p.A.channel + first * p.A.state;
      const float* A = one_decay   ? nullptr
                       : vectors_A ? static_cast<const float*>(p.A.data) + A_offset
                                   : A_row;
      if (A == A_row) gather(A_row, p.A, A_offset, count, p.A.state);
      const int64_t offset =
          tile.slot * p.state.batch + tile.h * p.state.head + c * p.state.channel + first * p.state.state;
      if (vectors) {
        tile.y[row] += step_row(p, tile, row, static_cast<T*>(p.state.data) + offset, A, whole);
        continue;
      }
      gather(state_row, p.state, offset, count, p.state.state);
      tile.y[row] += step_row(p, tile, row, state_row, A, whole);
      scatter(p.state, offset, state_row, count, p.state.state);
    }
  }
  finish(p, tile);
}

// ---- float64: the formula ------------------------------------------------------------------------

double one(const StepTensor& t, int64_t b, int64_t h, int64_t c, int64_t n) {
  double value;
  gather(&value, t, b * t.batch + h * t.head + c * t.channel + n * t.state, 1, 1);
  return value;
}

void update_channel_double(const SelectiveStateUpdateParams& p, const Tile& tile, int64_t c) {
  const int64_t b = tile.b, h = tile.h, g = h / (p.heads / p.groups);
  double dt = one(p.dt, b, h, c, 0);
  if (p.dt_bias.data != nullptr) dt += one(p.dt_bias, 0, h, c, 0);
  if (p.softplus && dt <= 20) dt = std::log1p(std::exp(dt));
  const double x = one(p.x, b, h, c, 0);
  double y = 0;
  for (int64_t n = 0; n < p.states; ++n) {
    const double A = one(p.A, 0, h, c, n);
    const double moved = one(p.state, tile.slot, h, c, n) * std::exp(dt * (p.A_is_log ? -std::exp(A) : A)) +
                         dt * x * one(p.B, b, g, 0, n);
    const StepTensor& s = p.state;
    scatter(s, tile.slot * s.batch + h * s.head + c * s.channel + n * s.state, &moved, 1, 1);
    y += moved * one(p.C, b, g, 0, n);
  }
  if (p.D.data != nullptr) y += one(p.D, 0, h, c, 0) * x;
  if (p.z.data != nullptr) y *= one(p.z, b, h, c, 0) / (1 + std::exp(-one(p.z, b, h, c, 0)));
  scatter(p.out, b * p.out.batch + h * p.out.head + c * p.out.channel, &y, 1, 1);
}

void run_tile(const SelectiveStateUpdateParams& p, Tile& tile) {
  if (tile.slot < 0) {
    const double zero = 0;
    for (int64_t c = tile.begin; c < tile.begin + tile.count; ++c)
      scatter(p.out, tile.b * p.out.batch + tile.h * p.out.head + c * p.out.channel, &zero, 1, 1);
    return;
  }
  switch (p.state.dtype) {
    case DType::kFloat64:
      for (int64_t c = tile.begin; c < tile.begin + tile.count; ++c) update_channel_double(p, tile, c);
      break;
    case DType::kFloat32:
      return update_tile<float>(p, tile);
    case DType::kBFloat16:
      return update_tile<bf16>(p, tile);
    default:
      return update_tile<fp16>(p, tile);
  }
}

}  // namespace

void selective_state_update_cpu(const SelectiveStateUpdateParams& p, int threads) {
  const int64_t fitting = kTileElements / (p.states > 0 ? p.states : 1) / kLanes * kLanes;
  const int64_t size = smaller(kMaxTile, fitting > kLanes ? fitting : kLanes);
  const int64_t tiles = (p.dim + size - 1) / size;
  const bool small = p.batch * p.heads * p.dim * p.states < kSerialElements;
  parallel_chunks(p.batch * p.heads * tiles, small ? 1 : threads, [&](int64_t unit) {
    Tile tile;
    tile.b = unit / tiles / p.heads;
    tile.h = unit / tiles % p.heads;
    tile.slot = slot_of(p, tile.b);
    tile.begin = unit % tiles * size;
    tile.count = smaller(size, p.dim - tile.begin);
    run_tile(p, tile);
  });
}

}  // namespace tilewright::TW_ISA
