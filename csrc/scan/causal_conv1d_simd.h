// Lines of the causal convolution: how a CPU kernel reads a few steps of one channel ("a row", kLanes steps a
// vector) or of kLanes channels ("columns", one step a vector) as float32, whatever the dtype, strides,
// states and ends of the sequence, and what it computes along them.
#pragma once

#include "core/integers.h"
#include "core/simd_math.h"
#include "scan/causal_conv1d.h"

namespace tilewright::TW_ISA::conv {

using namespace ::tilewright::scan;

constexpr int64_t kHalo = kMaxConvWidth - 1;
constexpr int64_t kMaskSteps = kConvRowChunk + kHalo + kLanes;

// ---- Elements ----------------------------------------------------------------------------------

static inline void narrow_to(float* to, float value) { *to = value; }
static inline void narrow_to(bf16* to, float value) { *to = narrow_bf16(value); }
static inline void narrow_to(fp16* to, float value) { *to = narrow_fp16(value); }

template <class T>
static inline T* address(const ConvTensor& x, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + c * x.channel + t * x.step;
}

static inline double read(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(data)[index];
    case DType::kFloat32:
      return static_cast<const float*>(data)[index];
    case DType::kBFloat16:
      return widen(static_cast<const bf16*>(data)[index]);
    default:
      return widen(static_cast<const fp16*>(data)[index]);
  }
}

static inline void write(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(data)[index] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(data)[index] = float(value);
      break;
    case DType::kBFloat16:
      static_cast<bf16*>(data)[index] = narrow_bf16(float(value));
      break;
    default:
      static_cast<fp16*>(data)[index] = narrow_fp16(float(value));
  }
}

static inline double weight_at(const CausalConv1dParams& p, int64_t c, int lag) {
  return read(p.weight, p.weight_dtype, c * p.weight_channel + (p.width - 1 - lag) * p.weight_tap);
}

static inline double bias_at(const CausalConv1dParams& p, int64_t c) {
  return p.bias == nullptr ? 0.0 : read(p.bias, p.weight_dtype, c * p.bias_channel);
}

static inline int64_t sequence_at(const CausalConv1dParams& p, int64_t b, int64_t t) {
  const int64_t index = b * p.seq_batch + (t < 0 ? 0 : t) * p.seq_step;
  return p.seq_is_64 ? static_cast<const int64_t*>(p.seq_idx)[index]
                     : static_cast<const int32_t*>(p.seq_idx)[index];
}

// Whether step t sees the one `lag` before it.
static inline bool sees(const CausalConv1dParams& p, int64_t b, int64_t t, int64_t lag) {
  if (p.seq_idx == nullptr) return true;
  const int64_t own = sequence_at(p, b, t);
  return own >= 0 && own == sequence_at(p, b, t - lag);
}

// The final state's slot of step t, which may be negative: not in it.
static inline int64_t final_slot(const CausalConv1dParams& p, int64_t t) {
  return t - (p.length - (p.width - 1));
}

// ---- Lines -------------------------------------------------------------------------------------

// Floats from one step of a line in a buffer to the next.
template <bool kColumns>
constexpr int64_t kStep = kColumns ? kLanes : 1;

constexpr int64_t kColumnBlock = 32;  // steps of a line of columns

// Columns of one step are far from those of the next, where no prefetcher of the hardware looks for them.
template <bool kColumns, bool kWrite = false, class T>
static inline void fetch_next_line(const T* at, int64_t step) {
  if constexpr (kColumns) __builtin_prefetch(at + kColumnBlock * step, kWrite);
}

// Float32 copies of the steps [begin, end), which may begin before the sequence, where `before` is, and end
// behind it, where zeros are. A line of columns has `lanes` channels, and zeros in the others.
template <class T, bool kColumns>
static inline void stage(const CausalConv1dParams& p, const ConvTensor& x, const ConvTensor& before,
                         int64_t b, int64_t c, int64_t lanes, int64_t begin, int64_t end, float* to) {
  constexpr int64_t step = kStep<kColumns>;
  int64_t t = begin;
  for (; t < smaller(0, end); ++t, to += step) {
    const int64_t slot = t + p.width - 1;
    for (int64_t lane = 0; lane < step; ++lane) {
      const bool present = before.data != nullptr && slot >= 0 && lane < lanes;
      to[lane] = present ? widen(*address<const T>(before, b, c + lane, slot)) : 0.0f;
    }
  }
  const int64_t last = smaller(end, p.length);
  const T* from = address<const T>(x, b, c, t);
  if (kColumns && lanes == kLanes && x.channel == 1) {
    for (; t < last; ++t, to += step, from += x.step) {
      fetch_next_line<kColumns>(from, x.step);
      store(to, load(from));
    }
  } else if (!kColumns && x.step == 1) {
    for (; t + kLanes <= last; t += kLanes, to += kLanes, from += kLanes) store(to, load(from));
    for (; t < last; ++t) *to++ = widen(*from++);
  } else {
    for (; t < last; ++t, to += step, from += x.step) {
      for (int64_t lane = 0; lane < step; ++lane)
        to[lane] = lane < lanes ? widen(from[lane * x.channel]) : 0.0f;
    }
  }
  for (; t < end; ++t, to += step) {
    for (int64_t lane = 0; lane < step; ++lane) to[lane] = 0.0f;
  }
}

// The way back: `count` steps of a line, rounded.
template <class T, bool kColumns>
static inline void unstage(const ConvTensor& x, int64_t b, int64_t c, int64_t lanes, int64_t begin,
                           int64_t count, const float* from) {
  constexpr int64_t step = kStep<kColumns>;
  T* to = address<T>(x, b, c, begin);
  int64_t i = 0;
  if (kColumns && lanes == kLanes && x.channel == 1) {
    for (; i < count; ++i) {
      fetch_next_line<kColumns, true>(to + i * x.step, x.step);
      store(to + i * x.step, load(from + i * step));
    }
  } else if (!kColumns && x.step == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  }
  for (; i < count; ++i) {
    for (int64_t lane = 0; lane < lanes; ++lane)
      narrow_to(to + i * x.step + lane * x.channel, from[i * step + lane]);
  }
}

// A line in a tensor or in a buffer: where its first step is, and how far the next one.
struct Line {
  const float* data;
  int64_t step;
};

// The steps [begin, end) with `left` and `right` steps around them; in `buffer`, unless all of it can be read
// where it is.
template <class T, bool kColumns>
static inline Line line_of(const CausalConv1dParams& p, const ConvTensor& x, const ConvTensor& before,
                           int64_t b, int64_t c, int64_t lanes, int64_t begin, int64_t end, int64_t left,
                           int64_t right, float* buffer) {
  constexpr int64_t step = kStep<kColumns>;
  if constexpr (sizeof(T) == sizeof(float)) {
    const int64_t slack = kColumns ? right : right + kLanes - 1;
    const bool inside = begin >= left && end + slack <= p.length;
    const bool whole = !kColumns && right == 0 && (end - begin) % kLanes == 0 && begin >= left;
    const bool side_by_side = kColumns ? x.channel == 1 && lanes == kLanes : x.step == 1;
    if (side_by_side && (inside || whole)) return {address<const float>(x, b, c, begin), x.step};
  }
  stage<T, kColumns>(p, x, before, b, c, lanes, begin - left, end + right, buffer);
  for (int64_t i = 0; !kColumns && i < kLanes; ++i) buffer[end + right - begin + left + i] = 0.0f;
  return {buffer + left * step, step};
}

// Where seq_idx lets taps through: all bits set or none, for each lag and step from a chunk's first.
struct Masks {
  alignas(64) int32_t value[kMaxConvWidth][kMaskSteps];

  void fill(const CausalConv1dParams& p, int64_t b, int64_t begin, int64_t end) {
    int64_t numbers[kHalo + kMaskSteps];
    const int64_t count = end - begin + kHalo + kLanes;
    for (int64_t i = -kHalo; i < count; ++i)
      numbers[kHalo + i] = begin + i < p.length ? sequence_at(p, b, begin + i) : -1;
    for (int lag = 0; lag < p.width; ++lag) {
      const int64_t* own = numbers + kHalo;
      for (int64_t i = 0; i < count; ++i) value[lag][i] = -int32_t(own[i] >= 0 && own[i] == own[i - lag]);
    }
  }
};

// What all steps of a line share. Of a row, weights are splats and steps follow in the lanes.
struct Taps {
  Float weight[kMaxConvWidth];  // by lag
  Float bias;
  const Masks* masks;
  int64_t first;  // of the line, in the masks
  int width;
  bool silu;
  bool around_caches;  // results are written around the caches
};

template <bool kSeq, bool kColumns>
static inline Float through(Float x, const Taps& taps, int lag, int64_t step) {
  if constexpr (!kSeq) {
    return x;
  } else {
    const int32_t* mask = taps.masks->value[lag] + taps.first + step;
    Int wanted = splat(*mask);
    if constexpr (!kColumns) std::memcpy(&wanted, mask, sizeof wanted);
    return from_bits(bits(x) & wanted);
  }
}

template <class T>
static inline void gather_taps(const CausalConv1dParams& p, int64_t c, int64_t lanes,
                               float (&values)[kMaxConvWidth + 1][kLanes]) {
  const T* weight = static_cast<const T*>(p.weight) + c * p.weight_channel;
  if (p.width == 4 && p.weight_channel == 4 && p.weight_tap == 1 && lanes == kLanes) {
    for (int lag = 0; lag < 4; ++lag) {  // as models store them: constant strides, which become permutes
      for (int lane = 0; lane < kLanes; ++lane) values[lag][lane] = float(widen(weight[lane * 4 + 3 - lag]));
    }
  } else {
    for (int64_t lane = 0; lane < lanes; ++lane, weight += p.weight_channel) {
      for (int lag = 0; lag < p.width; ++lag)
        values[lag][lane] = float(widen(weight[(p.width - 1 - lag) * p.weight_tap]));
    }
  }
  if (p.bias == nullptr) return;
  const T* bias = static_cast<const T*>(p.bias) + c * p.bias_channel;
  for (int64_t lane = 0; lane < lanes; ++lane)
    values[kMaxConvWidth][lane] = float(widen(bias[lane * p.bias_channel]));
}

// The weights of the channels from c on: a splat for a row, a lane a channel for columns.
template <bool kColumns>
static inline void load_taps(const CausalConv1dParams& p, int64_t c, int64_t lanes, Taps& taps) {
  alignas(64) float values[kMaxConvWidth + 1][kLanes] = {};
  if (p.weight_dtype == DType::kFloat32) {
    gather_taps<float>(p, c, lanes, values);
  } else if (p.weight_dtype == DType::kBFloat16) {
    gather_taps<bf16>(p, c, lanes, values);
  } else {
    gather_taps<fp16>(p, c, lanes, values);
  }
  for (int lag = 0; lag < p.width; ++lag)
    taps.weight[lag] = kColumns ? load(values[lag]) : splat(values[lag][0]);
  taps.bias = kColumns ? load(values[kMaxConvWidth]) : splat(values[kMaxConvWidth][0]);
  taps.width = p.width;
  taps.silu = p.silu;
}

// kWidth: 0 takes the width from the taps.
template <int kWidth, bool kSeq, bool kColumns>
static inline Float pre_activation(const Taps& taps, const float* x, int64_t back, int64_t step) {
  Float sum = taps.bias;
  const int width = kWidth ? kWidth : taps.width;
#pragma GCC unroll 4
  for (int lag = 0; lag < width; ++lag) {
    const Float value = through<kSeq, kColumns>(load(x - lag * back), taps, lag, step);
    sum = fma(taps.weight[lag], value, sum);
  }
  return sum;
}

template <bool kColumns>
static inline void put(float* to, int64_t step, Float x, bool around_caches) {
  if (around_caches) {
    stream(to, x);
  } else {
    fetch_next_line<kColumns, true>(to, step);
    store(to, x);
  }
}

template <int kWidth, bool kSeq, bool kColumns>
static inline void forward_line(const Taps& given, Line x, float* out, int64_t out_vector, int64_t steps) {
  const Taps taps = given;
  const int64_t vector = kColumns ? x.step : kLanes, per_vector = kColumns ? 1 : kLanes;
  for (int64_t step = 0; step < steps; step += per_vector) {
    fetch_next_line<kColumns>(x.data, x.step);
    Float y = pre_activation<kWidth, kSeq, kColumns>(taps, x.data, x.step, step);
    if (taps.silu) y = y / (splat(1.0f) + exp(-y));
    put<kColumns>(out, out_vector, through<kSeq, kColumns>(y, taps, 0, step), taps.around_caches);
    x.data += vector;
    out += out_vector;
  }
}

// The gradient of pre: `count` vectors of it, side by side. kColumns or not, as the lines are.
template <int kWidth, bool kSeq, bool kColumns>
static inline void gradient_line(const Taps& given, Line x, Line dout, float* g, int64_t steps) {
  const Taps taps = given;
  const int64_t per_vector = kColumns ? 1 : kLanes;
  for (int64_t step = 0; step < steps; step += per_vector) {
    fetch_next_line<kColumns>(x.data, x.step);
    fetch_next_line<kColumns>(dout.data, dout.step);
    Float gradient = load(dout.data);
    if (taps.silu) {
      const Float pre = pre_activation<kWidth, kSeq, kColumns>(taps, x.data, x.step, step);
      const Float s = sigmoid(pre);
      gradient = gradient * (s * fma(pre, splat(1.0f) - s, splat(1.0f)));
    }
    store(g, through<kSeq, kColumns>(gradient, taps, 0, step));
    x.data += kColumns ? x.step : kLanes;
    dout.data += kColumns ? dout.step : kLanes;
    g += kLanes;
  }
}

// dx out of g, and the sums over the steps: sums[lag] of dweight, sums[kMaxConvWidth] of dbias.
template <int kWidth, bool kSeq, bool kColumns>
static inline void backward_line(const Taps& given, Line x, const float* g, float* dx, int64_t dx_vector,
                                 int64_t steps, Float* sums) {
  const Taps taps = given;
  const int64_t per_vector = kColumns ? 1 : kLanes;
  const int width = kWidth ? kWidth : taps.width;
  Float by_lag[kMaxConvWidth], plain = sums[kMaxConvWidth];
  for (int lag = 0; lag < width; ++lag) by_lag[lag] = sums[lag];
  for (int64_t step = 0; step < steps; step += per_vector) {
    const Float own = load(g);
    Float gradient = splat(0.0f);
#pragma GCC unroll 4
    for (int lag = 0; lag < width; ++lag) {
      const Float later = load(g + lag * kStep<kColumns>);
      gradient = fma(taps.weight[lag], through<kSeq, kColumns>(later, taps, lag, step + lag), gradient);
      const Float value = through<kSeq, kColumns>(load(x.data - lag * x.step), taps, lag, step);
      by_lag[lag] = fma(own, value, by_lag[lag]);
    }
    plain = plain + own;
    put<kColumns>(dx, dx_vector, gradient, taps.around_caches);
    x.data += kColumns ? x.step : kLanes;
    g += kLanes;
    dx += dx_vector;
  }
  for (int lag = 0; lag < width; ++lag) sums[lag] = by_lag[lag];
  sums[kMaxConvWidth] = plain;
}

// Calls body.operator()<width or 0, masked>().
template <class Body>
static inline void with_width(const CausalConv1dParams& p, const Body& body) {
  const bool masked = p.seq_idx != nullptr;
  switch (p.width) {
    case 2:
      return masked ? body.template operator()<2, true>() : body.template operator()<2, false>();
    case 3:
      return masked ? body.template operator()<3, true>() : body.template operator()<3, false>();
    case 4:
      return masked ? body.template operator()<4, true>() : body.template operator()<4, false>();
    default:
      return masked ? body.template operator()<0, true>() : body.template operator()<0, false>();
  }
}

}  // namespace tilewright::TW_ISA::conv
