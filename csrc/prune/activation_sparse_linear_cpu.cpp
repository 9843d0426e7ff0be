// The activation-sparse linear layer on the CPU; compiled once per instruction-set level.
//
//   keep:     the best of a row are those of `select_rows_cpu`
//   product:  y_t = bias + sum over kept i of x_ti W_i
//
// Roofline of the product: bytes = rows read * out * itemsize, 2 FLOPs an element and token. A unit of work
// is a block of active rows and a slice of outputs whose sums stay in the L1 cache. It walks kRows rows at
// once, so that sums are loaded and stored once for as many loads of weights, and asks ahead of time for what
// comes next: which row that is is known here, and to no prefetcher. The split into units depends on the
// shapes alone, and partial sums are added in the order of the rows: the same bits for any number of threads.
#include "core/half.h"
#include "core/integers.h"
#include "core/simd.h"
#include "core/threads.h"
#include "prune/activation_sparse_linear.h"
#include "prune/segment_cpu.h"
#include "prune/select.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

// ---- which inputs a token keeps ----

template <class T>
void keep_above(const KeepInputsParams& p, int64_t token) {
  const T* x = static_cast<const T*>(p.x.data) + token * p.x.row;
  const auto threshold = *static_cast<const Real<T>*>(p.threshold);
  uint8_t* keep = p.keep + token * p.in;
  int64_t i = 0;
  if constexpr (std::is_same_v<Real<T>, float>) {
    for (; p.x.column == 1 && i + kLanes <= p.in; i += kLanes)
      store_bytes(keep + i, ~(Int)(abs(load(x + i)) <= splat(threshold)) & 1);
  }
  for (; i < p.in; ++i) {
    const Real<T> value = widen(x[i * p.x.column]);
    keep[i] = uint8_t(!((value < 0 ? -value : value) <= threshold));
  }
}

// ---- the product ----

constexpr int kRows = kLanes == 16 ? 8 : 4;  // walked at once: as many as registers hold
constexpr int64_t kMaxRowsPerSum = 512;

// Slices of about the same size, whose sums stay in the L1 cache.
int64_t slice_outputs(int tokens, int64_t out) {
  const int64_t most = tokens <= 1 ? 6144 : tokens <= 2 ? 3072 : 1024;
  return divide_up(divide_up(out, divide_up(out, most)), 64) * 64;
}

// A cache line's elements as vectors. Of bfloat16, of each two vectors the first has the elements at even
// places and the second those at odd ones: that takes a shift and a mask, and no shuffle, as long as all that
// is added to them is in the same order.
template <class T>
constexpr int kLine = 64 / int(sizeof(T));
template <class T>
constexpr int kParts = kLine<T> / kLanes;

template <class T>
void load_line(const T* p, Float* parts) {
  for (int v = 0; v < kParts<T>; v += 2) {
    if constexpr (std::is_same_v<T, bf16>) {
      Int both;
      std::memcpy(&both, p + v * kLanes, sizeof both);
      parts[v] = from_bits(both << 16), parts[v + 1] = from_bits(both & -0x10000);
    } else {
      parts[v] = load(p + v * kLanes);
      if constexpr (kParts<T> > 1) parts[v + 1] = load(p + (v + 1) * kLanes);
    }
  }
}

template <class T>
void store_line(T* p, const Float* parts) {
  for (int v = 0; v < kParts<T>; ++v) {
    if constexpr (std::is_same_v<T, bf16>) {
      bf16 even[kLanes], odd[kLanes];
      store(even, parts[v]), store(odd, parts[++v]);
      const Int both = load_halves(&even->bits) | load_halves(&odd->bits) << 16;
      std::memcpy(p + (v - 1) * kLanes, &both, sizeof both);
    } else {
      store(p + v * kLanes, parts[v]);
    }
  }
}

// sum + x[0] w[0] + ... + x[(R - 1) T] w[R - 1], in two chains.
template <int R, int T>
Float add_products(Float sum, const Float* w, const float* x) {
  Float even = splat(x[0]) * w[0];
  if constexpr (R == 1) return sum + even;
  Float odd = splat(x[T]) * w[R > 1];
  for (int r = 2; r < R; r += 2) {
    even = fma(splat(x[r * T]), w[r], even);
    odd = fma(splat(x[(r + 1) * T]), w[r + (R > 1)], odd);
  }
  return sum + (even + odd);
}

// sums[t][j] += x[0][t] rows[0][j] + ... + x[R - 1][t] rows[R - 1][j], lines in the order of load_line; asks
// for what comes soon, in these rows and then in the `next`.
template <int R, int T, class W>
void add_rows(const W* const* rows, const W* const* next, const float* x, float* sums, int64_t stride,
              int64_t count) {
  // With few instructions a line the CPU's own window reaches far, but does not know where a row leads.
  constexpr bool kStartsOnly = sizeof(W) == 4 && T == 1;
  constexpr int64_t kAhead = 8 * kLine<W>, kStart = 16 * kLine<W>;
  int64_t j = 0;
  for (; j + kLine<W> <= count; j += kLine<W>) {
    const bool here = j + kAhead < count;
    Float w[kParts<W>][R];
    for (int r = 0; r < R; ++r) {
      if constexpr (kStartsOnly) {
        if (j < kStart) __builtin_prefetch(next[r] + j, 0, 2);
      } else {
        __builtin_prefetch(here ? rows[r] + j + kAhead : next[r] + (j + kAhead - count));
      }
      Float line[kParts<W>];
      load_line(rows[r] + j, line);
      for (int v = 0; v < kParts<W>; ++v) w[v][r] = line[v];
    }
    for (int t = 0; t < T; ++t) {
      for (int v = 0; v < kParts<W>; ++v) {
        float* to = sums + t * stride + j + v * kLanes;
        store(to, add_products<R, T>(load(to), w[v], x + t));
      }
    }
  }
  for (; j < count; j += kLanes) {
    const int64_t some = smaller(count - j, kLanes);
    Float w[R];
    for (int r = 0; r < R; ++r) w[r] = load_some(rows[r] + j, some);
    for (int t = 0; t < T; ++t) {
      float* to = sums + t * stride + j;
      store_some(to, add_products<R, T>(load_some(to, some), w, x + t), some);
    }
  }
}

// Any dtype, one row: of float64.
template <int R, int T>
void add_rows(const double* const* rows, const double* const*, const double* x, double* sums, int64_t stride,
              int64_t count) {
  for (int r = 0; r < R; ++r) {
    for (int t = 0; t < T; ++t) {
      for (int64_t j = 0; j < count; ++j) sums[t * stride + j] += x[r * T + t] * rows[r][j];
    }
  }
}

struct Active {
  int32_t* rows;  // the numbers of those that a token keeps, ascending
  int64_t count;
  void* sums;  // [blocks][padded tokens][out] of float or double
};

Active active_rows(const ActivationSparseLinearParams& p) {
  Active active{static_cast<int32_t*>(p.workspace), 0, nullptr};
  for (int64_t i = 0; i < p.in; ++i) {
    uint8_t any = p.keep[i];
    for (int64_t t = 1; t < p.tokens; ++t) any |= p.keep[t * p.in + i];
    active.rows[active.count] = int32_t(i);
    active.count += any != 0;
  }
  active.sums = static_cast<char*>(p.workspace) + divide_up(p.in * 4, 64) * 64;
  return active;
}

// The tokens' values at the rows of a block, 0 where a token drops one: [rows][T].
template <int T, class W, class Sum>
void gather_values(const ActivationSparseLinearParams& p, const int32_t* rows, int64_t count, Sum* values) {
  const W* x = static_cast<const W*>(p.x.data);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t i = rows[r];
    for (int64_t t = 0; t < T; ++t) {
      const bool kept = t < p.tokens && p.keep[t * p.in + i] != 0;
      values[r * T + t] = kept ? Sum(widen(x[t * p.x.row + i * p.x.column])) : Sum(0);
    }
  }
}

template <int T, class W, class Sum>
void sum_block(const ActivationSparseLinearParams& p, const Active& active, int64_t block, int64_t slice) {
  const int64_t per_sum = active_rows_per_sum(p.tokens), begin = block * per_sum;
  const int64_t count = smaller(per_sum, active.count - begin);
  const int64_t first = slice * slice_outputs(T, p.out);
  const int64_t outputs = smaller(slice_outputs(T, p.out), p.out - first);
  const int32_t* numbers = active.rows + begin;
  Sum values[kMaxRowsPerSum * T];
  gather_values<T, W>(p, numbers, count, values);
  Sum* sums = static_cast<Sum*>(active.sums) + block * T * p.out + first;
  for (int t = 0; t < T; ++t) {
    for (int64_t j = 0; j < outputs; ++j) sums[t * p.out + j] = 0;
  }
  const auto row = [&](int64_t r) {
    return static_cast<const W*>(p.weight) + numbers[smaller(r, count - 1)] * p.weight_row + first;
  };
  const W *rows[kRows], *next[kRows];
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    for (int i = 0; i < kRows; ++i) rows[i] = row(r + i), next[i] = row(r + kRows + i);
    add_rows<kRows, T>(rows, next, values + r * T, sums, p.out, outputs);
  }
  for (; r < count; ++r) {
    rows[0] = row(r), next[0] = row(r + 1);
    add_rows<1, T>(rows, next, values + r * T, sums, p.out, outputs);
  }
}

// y = bias + the partial sums, first to last, which lie `stride` apart.
template <class W>
void add_sums(const float* sums, int64_t blocks, int64_t stride, const W* bias, W* y, int64_t count) {
  int64_t j = 0;
  for (; j + kLine<W> <= count; j += kLine<W>) {
    Float line[kParts<W>] = {};
    if (bias != nullptr) load_line(bias + j, line);
    for (int64_t b = 0; b < blocks; ++b)
      for (int v = 0; v < kParts<W>; ++v) line[v] = line[v] + load(sums + b * stride + j + v * kLanes);
    store_line(y + j, line);
  }
  for (; j < count; j += kLanes) {
    const int64_t some = smaller(count - j, kLanes);
    Float sum = bias == nullptr ? splat(0.0f) : load_some(bias + j, some);
    for (int64_t b = 0; b < blocks; ++b) sum = sum + load_some(sums + b * stride + j, some);
    store_some(y + j, sum, some);
  }
}

void add_sums(const double* sums, int64_t blocks, int64_t stride, const double* bias, double* y,
              int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    y[j] = bias == nullptr ? 0 : bias[j];
    for (int64_t b = 0; b < blocks; ++b) y[j] += sums[b * stride + j];
  }
}

template <int T, class W>
void multiply(const ActivationSparseLinearParams& p, int threads) {
  using Sum = Real<W>;
  const Active active = active_rows(p);
  const int64_t blocks = divide_up(active.count, active_rows_per_sum(p.tokens));
  const int64_t width = slice_outputs(T, p.out), slices = divide_up(p.out, width);
  parallel_chunks(blocks * slices, threads,
                  [&](int64_t unit) { sum_block<T, W, Sum>(p, active, unit / slices, unit % slices); });
  const W* bias = static_cast<const W*>(p.bias);
  parallel_chunks(p.tokens * slices, threads, [&](int64_t unit) {
    const int64_t token = unit / slices, first = unit % slices * width;
    const Sum* sums = static_cast<const Sum*>(active.sums) + token * p.out + first;
    add_sums(sums, blocks, T * p.out, bias == nullptr ? nullptr : bias + first,
             static_cast<W*>(p.y) + token * p.out + first, smaller(width, p.out - first));
  });
}

template <class W>
void multiply_tokens(const ActivationSparseLinearParams& p, int threads) {
  switch (padded_tokens(p.tokens)) {
    case 1:
      return multiply<1, W>(p, threads);
    case 2:
      return multiply<2, W>(p, threads);
    case 4:
      return multiply<4, W>(p, threads);
    default:
      return multiply<8, W>(p, threads);
  }
}

}  // namespace

void keep_inputs_cpu(const KeepInputsParams& p, int threads) {
  if (p.scale == nullptr) {
    with_type(p.dtype, [&](auto type) {
      parallel_chunks(p.tokens, threads, [&](int64_t token) { keep_above<decltype(type)>(p, token); });
    });
    return;
  }
  int32_t invalid = 0;  // here what is not finite has its place in the order
  const int64_t count = p.count < 0 ? 0 : smaller(p.count, p.in);
  select_rows_cpu({p.scale, p.x, p.keep, &invalid, p.workspace, p.tokens, p.in, count, p.dtype}, threads);
}

void activation_sparse_linear_cpu(const ActivationSparseLinearParams& p, int threads) {
  with_type(p.dtype, [&](auto type) { multiply_tokens<decltype(type)>(p, threads); });
}

}  // namespace tilewright::TW_ISA
