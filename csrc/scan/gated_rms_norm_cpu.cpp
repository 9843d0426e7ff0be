// The gated RMS norm on the CPU, compiled once per instruction-set level.
//
// Roofline: forward reads x and z and writes out, 12 bytes an element in float32; backward reads x, z and
// dout and writes dx and dz, 20. An element costs an exponential and a division, half of all instructions:
// with AVX-512 a core that gets more than ~40 bytes a nanosecond waits for these, others for memory.
//
// A group is gone through twice, as the norm needs its sum first. What the gate made of its channels is kept
// in the L1 cache meanwhile, so that x, z and dout come from memory once and each exponential is taken once.
#include "core/simd_math.h"
#include "core/simd_units.h"
#include "core/threads.h"
#include "scan/gated_rms_norm.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::scan;

constexpr int64_t kKept = 4096;             // channels of a group; beyond them the gate is computed again
constexpr int64_t kUnitChannels = 1024;     // smaller groups are taken together, up to these
constexpr int64_t kSerialElements = 16384;  // below this, waking a second thread costs more than it saves
constexpr int64_t kReduceChannels = 64;

static_assert(kKept % kLanes == 0);

template <class T>
T* row_of(const NormRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// ---- Units of work: a few rows of a few groups -----------------------------------------------------

struct Unit {
  int64_t part, row_begin, row_end, group_begin, group_end;
};

struct Grid {
  int64_t groups, together, spans, parts;

  explicit Grid(const GatedRmsNormParams& p) {
    groups = p.dim / p.group;
    together = larger(1, kUnitChannels / p.group);
    spans = divide_up(groups, together);
    parts = norm_parts_cpu(p);
  }
  int64_t units() const { return parts * spans; }
  Unit unit(const GatedRmsNormParams& p, int64_t index) const {
    const int64_t part = index / spans, row = part * kNormPartRows, group = index % spans * together;
    return {part, row, smaller(p.rows, row + kNormPartRows), group, smaller(groups, group + together)};
  }
};

int useful_threads(const GatedRmsNormParams& p, int threads) {
  return p.rows * p.dim < kSerialElements ? 1 : threads;
}

// ---- float32 and the half types, by vectors --------------------------------------------------------

struct Whole {
  template <class T>
  Float load(const T* from) const {
    return TW_ISA::load(from);
  }
  template <class T>
  void store(T* to, Float value) const {
    store_fast(to, value);
  }
};

struct Part {
  int64_t count;
  template <class T>
  Float load(const T* from) const {
    return load_some(from, count);
  }
  template <class T>
  void store(T* to, Float value) const {
    store_some(to, value, count);
  }
};

template <class Body>
void each_vector(int64_t begin, int64_t end, const Body& body) {
  for (; begin + kLanes <= end; begin += kLanes) body(begin, Whole{});
  if (begin < end) body(begin, Part{end - begin});
}

inline Float silu(Float z) { return z / (splat(1.0f) + exp(-z)); }

// A part of a row. The next row is asked for on the way: the prefetchers of the hardware begin anew in every
// page, and rows that are parts of longer ones leave them little of each.
template <class T>
struct Row {
  T* data = nullptr;
  int64_t next = 0;

  void fetch_next(int64_t c) const { __builtin_prefetch(data + c + next, !std::is_const_v<T>); }
};

template <class T>
Row<T> part_of(const NormRows& rows, int64_t row, int64_t c) {
  if (rows.data == nullptr) return {};
  return {row_of<T>(rows, row) + c, rows.stride};
}

// A group of a row, from its first channel on.
template <class T, class W>
struct Group {
  Row<const T> x, z;
  const W* weight;
  int64_t size;
};

template <class T, class W>
Group<T, W> group_of(const GatedRmsNormParams& p, int64_t row, int64_t group) {
  const int64_t c = group * p.group;
  return {part_of<const T>(p.x, row, c), part_of<const T>(p.z, row, c), static_cast<const W*>(p.weight) + c,
          p.group};
}

// Writes out and returns r.
template <NormGate kGate, class T, class W>
float forward_group(const Group<T, W>& in, double eps, Row<T> out) {
  alignas(64) float kept[kKept];
  const auto normed = [&](int64_t c, auto part) {
    const Float x = part.load(in.x.data + c);
    return kGate == NormGate::kBefore ? x * silu(part.load(in.z.data + c)) : x;
  };
  double squares = 0;
  for (int64_t begin = 0; begin < in.size; begin += kKept) {
    Float total = splat(0.0f);
    each_vector(begin, smaller(in.size, begin + kKept), [&](int64_t c, auto part) {
      in.x.fetch_next(c);
      if (kGate != NormGate::kNone) in.z.fetch_next(c);
      const Float v = normed(c, part);
      if (begin == 0) store(kept + c, v);
      total = fma(v, v, total);
    });
    squares += sum(total);
  }
  const float r = float(1.0 / std::sqrt(squares / double(in.size) + eps));
  each_vector(0, in.size, [&](int64_t c, auto part) {
    out.fetch_next(c);
    const Float v = c < kKept ? load(kept + c) : normed(c, part);
    Float y = v * splat(r) * part.load(in.weight + c);
    if (kGate == NormGate::kAfter) y = y * silu(part.load(in.z.data + c));
    part.store(out.data + c, y);
  });
  return r;
}

struct Gate {
  Float value, slope;  // s(z) and s'(z)
};

inline Gate gate_of(Float z) {
  const Float s = sigmoid(z);
  return {z * s, s * fma(z, splat(1.0f) - s, splat(1.0f))};
}

// Writes dx and dz, and adds to dweight unless this is its `first` row.
template <NormGate kGate, class T, class W>
void backward_group(const Group<T, W>& in, Row<const T> dout, float r, bool first, Row<T> dx, Row<T> dz,
                    float* dweight) {
  alignas(64) float values[kKept], slopes[kKept];
  const auto gate_at = [&](int64_t c, auto part) {
    if (kGate == NormGate::kNone) return Gate{};
    return gate_of(part.load(in.z.data + c));
  };
  double products = 0;
  for (int64_t begin = 0; begin < in.size; begin += kKept) {
    Float total = splat(0.0f);
    each_vector(begin, smaller(in.size, begin + kKept), [&](int64_t c, auto part) {
      in.x.fetch_next(c);
      dout.fetch_next(c);
      if (kGate != NormGate::kNone) in.z.fetch_next(c);
      const Gate gate = gate_at(c, part);
      if (kGate != NormGate::kNone && begin == 0) {
        store(values + c, gate.value);
        store(slopes + c, gate.slope);
      }
      Float n = part.load(in.x.data + c) * splat(r), g = part.load(dout.data + c);
      if (kGate == NormGate::kBefore) n = n * gate.value;
      if (kGate == NormGate::kAfter) g = g * gate.value;
      const Float product = g * n;
      part.store(dweight + c, first ? product : product + part.load(dweight + c));
      total = fma(product, part.load(in.weight + c), total);
    });
    products += sum(total);
  }
  const Float mean = splat(float(products / double(in.size)));
  each_vector(0, in.size, [&](int64_t c, auto part) {
    Gate gate{};
    if (kGate != NormGate::kNone)
      gate = c < kKept ? Gate{load(values + c), load(slopes + c)} : gate_at(c, part);
    dx.fetch_next(c);
    if (kGate != NormGate::kNone) dz.fetch_next(c);
    const Float x = part.load(in.x.data + c), scaled = part.load(dout.data + c) * part.load(in.weight + c);
    Float n = x * splat(r), g = scaled;
    if (kGate == NormGate::kBefore) n = n * gate.value;
    if (kGate == NormGate::kAfter) g = g * gate.value;
    const Float dv = splat(r) * (g - n * mean);
    part.store(dx.data + c, kGate == NormGate::kBefore ? dv * gate.value : dv);
    if (kGate == NormGate::kBefore) part.store(dz.data + c, dv * x * gate.slope);
    if (kGate == NormGate::kAfter) part.store(dz.data + c, scaled * n * gate.slope);
  });
}

template <NormGate kGate, class T, class W>
void forward_unit(const GatedRmsNormParams& p, const Grid& grid, const Unit& u) {
  for (int64_t row = u.row_begin; row < u.row_end; ++row) {
    for (int64_t group = u.group_begin; group < u.group_end; ++group) {
      static_cast<float*>(p.rstd)[row * grid.groups + group] =
          forward_group<kGate>(group_of<T, W>(p, row, group), p.eps, part_of<T>(p.out, row, group * p.group));
    }
  }
}

template <NormGate kGate, class T, class W>
void backward_unit(const GatedRmsNormParams& p, const Grid& grid, const Unit& u) {
  float* dweight = static_cast<float*>(p.workspace) + u.part * p.dim;
  for (int64_t row = u.row_begin; row < u.row_end; ++row) {
    for (int64_t group = u.group_begin; group < u.group_end; ++group) {
      const int64_t c = group * p.group;
      backward_group<kGate>(group_of<T, W>(p, row, group), part_of<const T>(p.dout, row, c),
                            static_cast<const float*>(p.rstd)[row * grid.groups + group], row == u.row_begin,
                            part_of<T>(p.dx, row, c), part_of<T>(p.dz, row, c), dweight + c);
    }
  }
}

// dweight of a tile of channels, out of the parts in their order.
template <class W>
void reduce_tile(const GatedRmsNormParams& p, int64_t parts, int64_t begin, int64_t end) {
  double total[kReduceChannels] = {};
  const float* from = static_cast<const float*>(p.workspace);
  for (int64_t part = 0; part < parts; ++part, from += p.dim) {
    for (int64_t c = begin; c < end; ++c) total[c - begin] += from[c];
  }
  for (int64_t c = begin; c < end; ++c) narrow_to(static_cast<W*>(p.dweight) + c, float(total[c - begin]));
}

// Calls body.operator()<gate>().
template <class Body>
void with_gate(const GatedRmsNormParams& p, const Body& body) {
  switch (p.gate) {
    case NormGate::kNone:
      return body.template operator()<NormGate::kNone>();
    case NormGate::kBefore:
      return body.template operator()<NormGate::kBefore>();
    default:
      return body.template operator()<NormGate::kAfter>();
  }
}

template <class T, class W>
void forward(const GatedRmsNormParams& p, int threads) {
  const Grid grid(p);
  with_gate(p, [&]<NormGate kGate>() {
    parallel_chunks(grid.units(), useful_threads(p, threads),
                    [&](int64_t index) { forward_unit<kGate, T, W>(p, grid, grid.unit(p, index)); });
  });
}

template <class T, class W>
void backward(const GatedRmsNormParams& p, int threads) {
  const Grid grid(p);
  threads = useful_threads(p, threads);
  with_gate(p, [&]<NormGate kGate>() {
    parallel_chunks(grid.units(), threads,
                    [&](int64_t index) { backward_unit<kGate, T, W>(p, grid, grid.unit(p, index)); });
  });
  parallel_chunks(divide_up(p.dim, kReduceChannels), threads, [&](int64_t tile) {
    const int64_t begin = tile * kReduceChannels;
    reduce_tile<W>(p, grid.parts, begin, smaller(p.dim, begin + kReduceChannels));
  });
}

// ---- float64, untuned: the formula as it stands ----------------------------------------------------

struct DoubleGate {
  double value = 1, slope = 0;
};

DoubleGate gate_at(const GatedRmsNormParams& p, int64_t row, int64_t c) {
  if (p.gate == NormGate::kNone) return {};
  const double z = row_of<const double>(p.z, row)[c], s = 1 / (1 + std::exp(-z));
  return {z * s, s * (1 + z * (1 - s))};
}

void forward_double(const GatedRmsNormParams& p, int threads) {
  const int64_t groups = p.dim / p.group;
  parallel_chunks(p.rows * groups, useful_threads(p, threads), [&](int64_t index) {
    const int64_t row = index / groups, begin = index % groups * p.group;
    const double* x = row_of<const double>(p.x, row);
    const auto normed = [&](int64_t c) {
      return p.gate == NormGate::kBefore ? x[c] * gate_at(p, row, c).value : x[c];
    };
    double squares = 0;
    for (int64_t c = begin; c < begin + p.group; ++c) squares += normed(c) * normed(c);
    const double r = 1 / std::sqrt(squares / double(p.group) + p.eps);
    static_cast<double*>(p.rstd)[index] = r;
    for (int64_t c = begin; c < begin + p.group; ++c) {
      const double y = normed(c) * r * static_cast<const double*>(p.weight)[c];
      row_of<double>(p.out, row)[c] = p.gate == NormGate::kAfter ? y * gate_at(p, row, c).value : y;
    }
  });
}

void backward_double(const GatedRmsNormParams& p, int threads) {
  const int64_t groups = p.dim / p.group;
  const double* weight = static_cast<const double*>(p.weight);
  double* dweight = static_cast<double*>(p.dweight);
  parallel_chunks(groups, useful_threads(p, threads), [&](int64_t group) {
    const int64_t begin = group * p.group, end = begin + p.group;
    for (int64_t c = begin; c < end; ++c) dweight[c] = 0;
    for (int64_t row = 0; row < p.rows; ++row) {
      const double r = static_cast<const double*>(p.rstd)[row * groups + group];
      const double *x = row_of<const double>(p.x, row), *dout = row_of<const double>(p.dout, row);
      const auto n = [&](int64_t c) {
        return x[c] * r * (p.gate == NormGate::kBefore ? gate_at(p, row, c).value : 1);
      };
      const auto g = [&](int64_t c) {
        return dout[c] * (p.gate == NormGate::kAfter ? gate_at(p, row, c).value : 1);
      };
      double mean = 0;
      for (int64_t c = begin; c < end; ++c) {
        dweight[c] += g(c) * n(c);
        mean += g(c) * n(c) * weight[c] / double(p.group);
      }
      for (int64_t c = begin; c < end; ++c) {
        const DoubleGate gate = gate_at(p, row, c);
        const double dv = r * (g(c) * weight[c] - n(c) * mean);
        row_of<double>(p.dx, row)[c] = p.gate == NormGate::kBefore ? dv * gate.value : dv;
        if (p.gate == NormGate::kBefore) row_of<double>(p.dz, row)[c] = dv * x[c] * gate.slope;
        if (p.gate == NormGate::kAfter)
          row_of<double>(p.dz, row)[c] = dout[c] * weight[c] * n(c) * gate.slope;
      }
    }
  });
}

}  // namespace

void gated_rms_norm_fwd_cpu(const GatedRmsNormParams& p, int threads) {
  const bool wide = p.weight_dtype == DType::kFloat32;
  switch (p.dtype) {
    case DType::kFloat64:
      return forward_double(p, threads);
    case DType::kFloat32:
      return forward<float, float>(p, threads);
    case DType::kBFloat16:
      return wide ? forward<bf16, float>(p, threads) : forward<bf16, bf16>(p, threads);
    default:
      return wide ? forward<fp16, float>(p, threads) : forward<fp16, fp16>(p, threads);
  }
}

void gated_rms_norm_bwd_cpu(const GatedRmsNormParams& p, int threads) {
  const bool wide = p.weight_dtype == DType::kFloat32;
  switch (p.dtype) {
    case DType::kFloat64:
      return backward_double(p, threads);
    case DType::kFloat32:
      return backward<float, float>(p, threads);
    case DType::kBFloat16:
      return wide ? backward<bf16, float>(p, threads) : backward<bf16, bf16>(p, threads);
    default:
      return wide ? backward<fp16, float>(p, threads) : backward<fp16, fp16>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
