// The decode step of the causal convolution on the CPU, compiled once per instruction-set level.
//
// Roofline: a step reads and writes state_length elements a channel, and reads the weights: some 50 bytes a
// channel, all of it in a cache. kLanes channels make a vector; their few steps are copied side by side.
#include "core/threads.h"
#include "scan/causal_conv1d_simd.h"
#include "scan/causal_conv1d_update.h"

namespace tilewright::TW_ISA {
namespace {

using namespace conv;

constexpr int64_t kSteps = 32;             // computed in one go
constexpr int64_t kTileChannels = 512;     // of a unit of work
constexpr int64_t kSerialChannels = 4096;  // below this, waking a second thread costs more than it saves

int64_t integer_at(const void* data, int64_t index, bool is_64) {
  return is_64 ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
}

// A sequence's state: its slot, negative for padding, and where the ring begins.
struct Place {
  int64_t slot, turn;
};

Place place_of(const CausalConv1dUpdateParams& p, int64_t b) {
  Place place{b, 0};
  if (p.indices != nullptr) place.slot = integer_at(p.indices, b * p.indices_stride, p.indices_are_64);
  if (p.cache_seqlens != nullptr && p.state_length > 0) {
    place.turn = integer_at(p.cache_seqlens, b * p.cache_stride, p.cache_is_64) % p.state_length;
    if (place.turn < 0) place.turn += p.state_length;
  }
  return place;
}

// Where the state has the step that lies `back` >= 1 steps before the first new one.
int64_t position(const CausalConv1dUpdateParams& p, const Place& place, int64_t back) {
  const int64_t at = place.turn - back;
  return at < 0 ? at + p.state_length : at;
}

// Of one channel: x moves in.
template <class T>
void advance_state(const CausalConv1dUpdateParams& p, const Place& place, int64_t b, int64_t c) {
  T* state = address<T>(p.state, place.slot, c, 0);
  const T* x = address<const T>(p.conv.x, b, c, 0);
  const int64_t steps = p.conv.length, length = p.state_length;
  const int64_t taken = smaller(steps, length);
  if (p.cache_seqlens != nullptr) {
    int64_t at = (place.turn + steps - taken) % larger(length, 1);
    for (int64_t s = steps - taken; s < steps; ++s) {
      state[at * p.state.step] = x[s * p.conv.x.step];
      at = at + 1 == length ? 0 : at + 1;
    }
    return;
  }
  for (int64_t i = 0; i + taken < length; ++i) state[i * p.state.step] = state[(i + taken) * p.state.step];
  for (int64_t i = 0; i < taken; ++i)
    state[(length - taken + i) * p.state.step] = x[(steps - taken + i) * p.conv.x.step];
}

template <class T>
void update_group(const CausalConv1dUpdateParams& p, const Place& place, int64_t b, int64_t c,
                  int64_t lanes) {
  const CausalConv1dParams& conv = p.conv;
  alignas(64) float line[(kHalo + kSteps) * kLanes], out[kSteps * kLanes];
  Taps taps;
  load_taps<true>(conv, c, lanes, taps);
  taps.around_caches = false;
  const int64_t halo = conv.width - 1;
  for (int64_t slot = 0; slot < halo; ++slot) {
    const T* state = address<const T>(p.state, place.slot, c, position(p, place, halo - slot));
    for (int64_t lane = 0; lane < kLanes; ++lane)
      line[slot * kLanes + lane] = lane < lanes ? widen(state[lane * p.state.channel]) : 0.0f;
  }
  for (int64_t begin = 0; begin < conv.length; begin += kSteps) {
    const int64_t steps = smaller(kSteps, conv.length - begin);
    float* own = line + halo * kLanes;
    stage<T, true>(conv, conv.x, ConvTensor{}, b, c, lanes, begin, begin + steps, own);
    with_width(conv, [&]<int kWidth, bool kSeq>() {
      forward_line<kWidth, kSeq, true>(taps, Line{own, kLanes}, out, kLanes, steps);
    });
    unstage<T, true>(conv.out, b, c, lanes, begin, steps, out);
    std::memmove(line, line + steps * kLanes, size_t(halo * kLanes) * sizeof(float));
  }
  for (int64_t lane = 0; lane < lanes; ++lane) advance_state<T>(p, place, b, c + lane);
}

void update_channel_double(const CausalConv1dUpdateParams& p, const Place& place, int64_t b, int64_t c) {
  const CausalConv1dParams& conv = p.conv;
  for (int64_t t = 0; t < conv.length; ++t) {
    double pre = bias_at(conv, c);
    for (int lag = 0; lag < conv.width; ++lag) {
      const double value = lag <= t
                               ? *address<const double>(conv.x, b, c, t - lag)
                               : *address<const double>(p.state, place.slot, c, position(p, place, lag - t));
      pre += weight_at(conv, c, lag) * value;
    }
    *address<double>(conv.out, b, c, t) = conv.silu ? pre / (1 + std::exp(-pre)) : pre;
  }
  advance_state<double>(p, place, b, c);
}

template <class T>
void update_tile(const CausalConv1dUpdateParams& p, int64_t b, int64_t begin, int64_t end) {
  const Place place = place_of(p, b);
  if (place.slot < 0) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = 0; t < p.conv.length; ++t) *address<T>(p.conv.out, b, c, t) = T{};
    }
    return;
  }
  if constexpr (sizeof(T) == sizeof(double)) {
    for (int64_t c = begin; c < end; ++c) update_channel_double(p, place, b, c);
  } else {
    for (int64_t c = begin; c < end; c += kLanes) update_group<T>(p, place, b, c, smaller(kLanes, end - c));
  }
}

template <class T>
void update(const CausalConv1dUpdateParams& p, int threads) {
  const int64_t tiles = (p.conv.dim + kTileChannels - 1) / kTileChannels;
  const bool small = p.conv.batch * p.conv.dim * p.conv.length < kSerialChannels;
  parallel_chunks(p.conv.batch * tiles, small ? 1 : threads, [&](int64_t unit) {
    const int64_t begin = unit % tiles * kTileChannels;
    update_tile<T>(p, unit / tiles, begin, smaller(p.conv.dim, begin + kTileChannels));
  });
}

}  // namespace

void causal_conv1d_update_cpu(const CausalConv1dUpdateParams& p, int threads) {
  switch (p.conv.dtype) {
    case DType::kFloat64:
      return update<double>(p, threads);
    case DType::kFloat32:
      return update<float>(p, threads);
    case DType::kBFloat16:
      return update<bf16>(p, threads);
    default:
      return update<fp16>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
