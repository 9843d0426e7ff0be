// The causal depthwise convolution on the CPU, compiled once per instruction-set level.
//
// Roofline: forward reads and writes 4 bytes (2 for the half types) an element, backward reads x and dout and
// writes dx; 2 * width FLOPs an element, and with silu about 25 more instructions a vector for an exponential
// and a division. So a core that moves less than ~10 GB/s waits for memory, a faster one for the exponential.
//
// Two layouts, one arithmetic. Where steps lie side by side ("rows") a vector holds kLanes steps of a channel
// and a lag is an unaligned load one element back. Where channels do ("columns") it holds one step of kLanes
// channels and a lag is a load one step back. Both read float32 "lines", which are the tensor itself where
// that is possible, and else a copy in the L1 cache that brings the steps before and after along; there half
// types, other strides, states and ends are all alike.
#include "core/threads.h"
#include "scan/causal_conv1d_simd.h"

namespace tilewright::TW_ISA {
namespace {

using namespace conv;

constexpr int64_t kColumnTile = 64;  // channels of a unit of columns
constexpr int64_t kRowTileElements = 32768;
constexpr int64_t kSerialElements = 8192;  // below this, waking a second thread costs more than it saves
constexpr int64_t kStreamBytes = 8 << 20;  // results larger than the caches are written around them
constexpr int64_t kLineFloats = kConvRowChunk + 3 * kHalo * kLanes;  // of either kind, with both halos

static_assert(kConvColumnChunk % kColumnBlock == 0 && kConvRowChunk >= kConvColumnChunk);
static_assert(kConvRowChunk % kLanes == 0 && kColumnTile % kLanes == 0);

// ---- Units of work: a tile of channels, a chunk of steps ------------------------------------------

struct Unit {
  int64_t b, chunk, c_begin, c_end, begin, end;
};

struct Grid {
  int64_t tile, tiles, chunk, chunks;
  bool columns;

  explicit Grid(const CausalConv1dParams& p) {
    // A row shorter than a vector would leave lanes idle.
    columns = (p.x.channel == 1 && p.x.step != 1) || p.length < kLanes;
    chunk = columns ? kConvColumnChunk : kConvRowChunk;
    tile = columns ? kColumnTile : kRowTileElements / smaller(p.length, chunk);
    tiles = (p.dim + tile - 1) / tile;
    chunks = (p.length + chunk - 1) / chunk;
  }
  Unit unit(const CausalConv1dParams& p, int64_t index) const {
    const int64_t c = index % tiles * tile, number = index / tiles % chunks, t = number * chunk;
    return {index / tiles / chunks, number, c, smaller(p.dim, c + tile), t, smaller(p.length, t + chunk)};
  }
  int64_t units(const CausalConv1dParams& p) const { return p.batch * chunks * tiles; }
};

int useful_threads(const CausalConv1dParams& p, int threads) {
  return p.batch * p.dim * p.length < kSerialElements ? 1 : threads;
}

// Where a line's results go: where they belong if they are whole vectors of float32, else to a buffer.
struct Target {
  float* data;
  int64_t vector;  // floats from one vector to the next
  bool direct, around_caches;
};

template <class T, bool kColumns>
Target target_of(const CausalConv1dParams& p, const ConvTensor& out, int64_t b, int64_t c, int64_t lanes,
                 int64_t begin, int64_t steps, float* buffer) {
  const bool whole = kColumns ? out.channel == 1 && lanes == kLanes : out.step == 1 && steps % kLanes == 0;
  if (sizeof(T) != sizeof(float) || !whole) return {buffer, kLanes, false, false};
  float* data = address<float>(out, b, c, begin);
  const bool aligned =
      reinterpret_cast<uintptr_t>(data) % sizeof(Float) == 0 && (!kColumns || out.step % kLanes == 0);
  const bool large = p.batch * p.dim * p.length * int64_t{sizeof(T)} >= kStreamBytes;
  return {data, kColumns ? out.step : kLanes, true, aligned && large};
}

template <class T>
void store_final(const CausalConv1dParams& p, const Unit& u) {
  for (int64_t c = u.c_begin; c < u.c_end; ++c) {
    for (int64_t slot = 0; slot < p.width - 1; ++slot) {
      const int64_t t = p.length - (p.width - 1) + slot;
      T value{};
      if (t >= 0) {
        value = *address<const T>(p.x, u.b, c, t);
      } else if (p.initial.data != nullptr) {
        value = *address<const T>(p.initial, u.b, c, t + p.width - 1);
      }
      *address<T>(p.final, u.b, c, slot) = sees(p, u.b, p.length - 1, p.length - 1 - t) ? value : T{};
    }
  }
}

template <class T, bool kColumns>
void forward_piece(const CausalConv1dParams& p, const Unit& u, int64_t begin, int64_t end, int64_t c,
                   Taps& taps) {
  alignas(64) float x_buffer[kLineFloats], out_buffer[kLineFloats];
  const int64_t lanes = kColumns ? smaller(kLanes, u.c_end - c) : 1, steps = end - begin;
  const Line x = line_of<T, kColumns>(p, p.x, p.initial, u.b, c, lanes, begin, end, p.width - 1, 0, x_buffer);
  const Target out = target_of<T, kColumns>(p, p.out, u.b, c, lanes, begin, steps, out_buffer);
  taps.first = begin - u.begin;
  taps.around_caches = out.around_caches;
  with_width(p, [&]<int kWidth, bool kSeq>() {
    forward_line<kWidth, kSeq, kColumns>(taps, x, out.data, out.vector, steps);
  });
  if (!out.direct) unstage<T, kColumns>(p.out, u.b, c, lanes, begin, steps, out_buffer);
}

template <class T>
void forward_columns(const CausalConv1dParams& p, const Unit& u, const Masks& masks) {
  Taps tile[kColumnTile / kLanes];
  for (int64_t c = u.c_begin; c < u.c_end; c += kLanes) {
    Taps& taps = tile[(c - u.c_begin) / kLanes];
    load_taps<true>(p, c, smaller(kLanes, u.c_end - c), taps);
    taps.masks = &masks;
  }
  for (int64_t begin = u.begin; begin < u.end; begin += kColumnBlock) {
    const int64_t end = smaller(u.end, begin + kColumnBlock);
    for (int64_t c = u.c_begin; c < u.c_end; c += kLanes)
      forward_piece<T, true>(p, u, begin, end, c, tile[(c - u.c_begin) / kLanes]);
  }
}

// Where a piece of a row ends: the first vector has no steps before it where its own are, and the last may be
// a part of one. Both stand alone, so that all others are read and written in place.
template <class T>
int64_t piece_end(const Unit& u, int64_t begin) {
  if (sizeof(T) != sizeof(float)) return u.end;  // all of it passes through the buffers
  const int64_t end = begin == 0 ? smaller(u.end, kLanes) : u.end;
  return end - begin < kLanes ? end : end - (end - begin) % kLanes;
}

template <class T>
void forward_rows(const CausalConv1dParams& p, const Unit& u, const Masks& masks) {
  Taps taps;
  taps.masks = &masks;
  for (int64_t c = u.c_begin; c < u.c_end; ++c) {
    load_taps<false>(p, c, 1, taps);
    for (int64_t begin = u.begin; begin < u.end;) {
      const int64_t end = piece_end<T>(u, begin);
      forward_piece<T, false>(p, u, begin, end, c, taps);
      begin = end;
    }
  }
}

template <class T>
void forward_unit(const CausalConv1dParams& p, const Unit& u, bool columns) {
  Masks masks;
  if (p.seq_idx != nullptr) masks.fill(p, u.b, u.begin, u.end);
  if (columns) {
    forward_columns<T>(p, u, masks);
  } else {
    forward_rows<T>(p, u, masks);
  }
  if (p.final.data != nullptr && u.end == p.length) store_final<T>(p, u);
}

// dinitial out of the first steps' g, which are in a buffer.
template <class T, bool kColumns>
void store_dinitial(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t lanes, const float* g) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t slot = 0; slot < p.width - 1; ++slot) {
      const int64_t t = slot - (p.width - 1);
      float sum = 0.0f;
      for (int64_t lag = -t; lag < p.width && t + lag < p.length; ++lag) {
        if (!sees(p, b, t + lag, lag)) continue;
        sum += float(weight_at(p, c + lane, int(lag))) * g[(t + lag) * kStep<kColumns> + lane];
      }
      if (p.dfinal.data != nullptr && final_slot(p, t) >= 0 && sees(p, b, p.length - 1, p.length - 1 - t))
        sum += widen(*address<const T>(p.dfinal, b, c + lane, final_slot(p, t)));
      narrow_to(address<T>(p.dinitial, b, c + lane, slot), sum);
    }
  }
}

// Adds what reaches the last steps through the final state, to dx that is still float32.
template <class T, bool kColumns>
void add_dfinal(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t lanes, int64_t begin, int64_t end,
                float* dx, int64_t dx_step) {
  for (int64_t t = larger(begin, p.length - (p.width - 1)); t < end; ++t) {
    if (!sees(p, b, p.length - 1, p.length - 1 - t)) continue;
    for (int64_t lane = 0; lane < lanes; ++lane)
      dx[(t - begin) * dx_step + lane] += widen(*address<const T>(p.dfinal, b, c + lane, final_slot(p, t)));
  }
}

// sums as backward_line leaves them, of a group of channels, to the workspace.
template <bool kColumns>
void store_sums(const CausalConv1dParams& p, int64_t part, int64_t c, int64_t lanes, const Float* sums) {
  float* to = static_cast<float*>(p.workspace) + part * (p.width + 1) * p.dim + c;
  for (int k = 0; k <= p.width; ++k, to += p.dim) {
    const Float value = sums[k == p.width ? kMaxConvWidth : p.width - 1 - k];
    if (!kColumns) {
      *to = float(sum(value));
    } else {
      store_some(to, value, lanes);
    }
  }
}

template <class T, bool kColumns>
void backward_unit(const CausalConv1dParams& p, const Unit& u, int64_t part) {
  Masks masks;
  if (p.seq_idx != nullptr) masks.fill(p, u.b, u.begin, u.end);
  alignas(64) float x_buffer[kLineFloats], dout_buffer[kLineFloats], g[kLineFloats], dx_buffer[kLineFloats];
  constexpr int kGroups = kColumns ? kColumnTile / kLanes : 1;
  Taps tile[kGroups];
  Float sums[kGroups][kMaxConvWidth + 1];
  const int64_t group = kColumns ? kLanes : 1, block = kColumns ? kColumnBlock : kConvRowChunk;
  const int64_t halo = p.width - 1;
  for (int64_t begin = u.begin; begin < u.end; begin += block) {
    const int64_t end = smaller(u.end, begin + block), steps = end - begin;
    for (int64_t c = u.c_begin; c < u.c_end; c += group) {
      const int64_t number = kColumns ? (c - u.c_begin) / kLanes : 0, lanes = smaller(group, u.c_end - c);
      Taps& taps = tile[number];
      if (begin == u.begin) {
        load_taps<kColumns>(p, c, lanes, taps);
        for (Float& value : sums[number]) value = splat(0.0f);
      }
      taps.masks = &masks;
      taps.first = begin - u.begin;
      const Line x = line_of<T, kColumns>(p, p.x, p.initial, u.b, c, lanes, begin, end, halo, halo, x_buffer);
      const Line dout =
          line_of<T, kColumns>(p, p.dout, ConvTensor{}, u.b, c, lanes, begin, end, 0, halo, dout_buffer);
      const Target dx = target_of<T, kColumns>(p, p.dx, u.b, c, lanes, begin, steps, dx_buffer);
      taps.around_caches = dx.around_caches;
      with_width(p, [&]<int kWidth, bool kSeq>() {
        gradient_line<kWidth, kSeq, kColumns>(taps, x, dout, g, steps + halo);
        // Behind the end there is no output, whatever silu made of an infinity before it.
        constexpr int64_t step = kStep<kColumns>;
        for (int64_t i = (p.length - begin) * step; i < (steps + halo) * step + kLanes; ++i) g[i] = 0.0f;
        backward_line<kWidth, kSeq, kColumns>(taps, x, g, dx.data, dx.vector, steps, sums[number]);
      });
      if (p.dfinal.data != nullptr)
        add_dfinal<T, kColumns>(p, u.b, c, lanes, begin, end, dx.data, kColumns ? dx.vector : 1);
      if (!dx.direct) unstage<T, kColumns>(p.dx, u.b, c, lanes, begin, steps, dx_buffer);
      if (p.dinitial.data != nullptr && begin == 0) store_dinitial<T, kColumns>(p, u.b, c, lanes, g);
      if (end == u.end) store_sums<kColumns>(p, part, c, lanes, sums[number]);
    }
  }
}

// dweight and dbias of a tile of channels, out of the parts in their order.
void reduce_tile(const CausalConv1dParams& p, int64_t parts, int64_t begin, int64_t end) {
  double total[kMaxConvWidth + 1][kColumnTile] = {};
  const float* from = static_cast<const float*>(p.workspace);
  for (int64_t part = 0; part < parts; ++part) {
    for (int k = 0; k <= p.width; ++k, from += p.dim) {
      for (int64_t c = begin; c < end; ++c) total[k][c - begin] += from[c];
    }
  }
  for (int64_t c = begin; c < end; ++c) {
    for (int k = 0; k < p.width; ++k) write(p.dweight, p.weight_dtype, c * p.width + k, total[k][c - begin]);
    if (p.dbias != nullptr) write(p.dbias, p.weight_dtype, c, total[p.width][c - begin]);
  }
}

template <class T>
void forward(const CausalConv1dParams& p, int threads) {
  const Grid grid(p);
  parallel_chunks(grid.units(p), useful_threads(p, threads),
                  [&](int64_t index) { forward_unit<T>(p, grid.unit(p, index), grid.columns); });
}

template <class T>
void backward(const CausalConv1dParams& p, int threads) {
  const Grid grid(p);
  threads = useful_threads(p, threads);
  parallel_chunks(grid.units(p), threads, [&](int64_t index) {
    const Unit unit = grid.unit(p, index);
    const int64_t part = unit.b * grid.chunks + unit.chunk;
    if (grid.columns) {
      backward_unit<T, true>(p, unit, part);
    } else {
      backward_unit<T, false>(p, unit, part);
    }
  });
  parallel_chunks((p.dim + kColumnTile - 1) / kColumnTile, threads, [&](int64_t tile) {
    const int64_t begin = tile * kColumnTile;
    reduce_tile(p, p.batch * grid.chunks, begin, smaller(p.dim, begin + kColumnTile));
  });
}

// ---- float64: the formula, channel by channel ----------------------------------------------------

// x at a step that may lie before the first.
double value_at(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  if (t >= 0) return *address<const double>(p.x, b, c, t);
  return p.initial.data == nullptr ? 0.0 : *address<const double>(p.initial, b, c, t + p.width - 1);
}

double pre_at(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  double pre = bias_at(p, c);
  for (int lag = 0; lag < p.width; ++lag) {
    if (sees(p, b, t, lag)) pre += weight_at(p, c, lag) * value_at(p, b, c, t - lag);
  }
  return pre;
}

void forward_channel(const CausalConv1dParams& p, int64_t b, int64_t c) {
  for (int64_t t = 0; t < p.length; ++t) {
    const double pre = pre_at(p, b, c, t);
    const double y = p.silu ? pre / (1 + std::exp(-pre)) : pre;
    *address<double>(p.out, b, c, t) = sees(p, b, t, 0) ? y : 0.0;
  }
}

// dx at a step that may lie before the first; null if nobody wants it.
double* gradient_of(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  if (t >= 0) return address<double>(p.dx, b, c, t);
  return p.dinitial.data == nullptr ? nullptr : address<double>(p.dinitial, b, c, t + p.width - 1);
}

void backward_channel(const CausalConv1dParams& p, int64_t b, int64_t c, double* dweight, double& dbias) {
  for (int64_t t = 1 - p.width; t < p.length; ++t) {
    const bool kept = p.dfinal.data != nullptr && final_slot(p, t) >= 0;
    const bool reaches = kept && sees(p, b, p.length - 1, p.length - 1 - t);
    double* to = gradient_of(p, b, c, t);
    if (to != nullptr) *to = reaches ? *address<const double>(p.dfinal, b, c, final_slot(p, t)) : 0.0;
  }
  for (int64_t t = 0; t < p.length; ++t) {
    if (!sees(p, b, t, 0)) continue;
    const double pre = pre_at(p, b, c, t), s = 1 / (1 + std::exp(-pre));
    const double g = *address<const double>(p.dout, b, c, t) * (p.silu ? s * (1 + pre * (1 - s)) : 1.0);
    dbias += g;
    for (int lag = 0; lag < p.width; ++lag) {
      if (!sees(p, b, t, lag)) continue;
      dweight[p.width - 1 - lag] += g * value_at(p, b, c, t - lag);
      double* to = gradient_of(p, b, c, t - lag);
      if (to != nullptr) *to += weight_at(p, c, lag) * g;
    }
  }
}

void forward_double(const CausalConv1dParams& p, int threads) {
  parallel_chunks(p.dim, threads, [&](int64_t c) {
    for (int64_t b = 0; b < p.batch; ++b) {
      forward_channel(p, b, c);
      if (p.final.data != nullptr) store_final<double>(p, {b, 0, c, c + 1, 0, p.length});
    }
  });
}

void backward_double(const CausalConv1dParams& p, int threads) {
  parallel_chunks(p.dim, threads, [&](int64_t c) {
    double dweight[kMaxConvWidth] = {}, dbias = 0;
    for (int64_t b = 0; b < p.batch; ++b) backward_channel(p, b, c, dweight, dbias);
    for (int k = 0; k < p.width; ++k) static_cast<double*>(p.dweight)[c * p.width + k] = dweight[k];
    if (p.dbias != nullptr) static_cast<double*>(p.dbias)[c] = dbias;
  });
}

}  // namespace

void causal_conv1d_fwd_cpu(const CausalConv1dParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return forward_double(p, threads);
    case DType::kFloat32:
      return forward<float>(p, threads);
    case DType::kBFloat16:
      return forward<bf16>(p, threads);
    default:
      return forward<fp16>(p, threads);
  }
}

void causal_conv1d_bwd_cpu(const CausalConv1dParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return backward_double(p, threads);
    case DType::kFloat32:
      return backward<float>(p, threads);
    case DType::kBFloat16:
      return backward<bf16>(p, threads);
    default:
      return backward<fp16>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
