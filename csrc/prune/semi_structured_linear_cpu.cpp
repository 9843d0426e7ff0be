// The semi-structured linear layer forward on the CPU; compiled once per instruction-set level.
//
//   y[t][o] = activation(sum over kept c of w[o][c] x[t][c] + bias[o])
//
// Few tokens, and any number of bfloat16 ones where the CPU multiplies pairs: four rows of the weight are
// walked together, a vector of elements at a time. With AVX-512 the columns that 2:4 elements belong to are
// computed from their positions by two or three instructions, and picked out of x by one (vpermt2ps or
// vpermt2w); elements of other patterns are spread over the columns (vpexpand). Roofline: the weight is read
// once, 68 bytes of float32 values and positions for 32 columns (72 bytes for 64 of bfloat16), some 7
// instructions each.
//
// Many tokens: tokens lie along the vectors. x is transposed once; a kept element is broadcast and multiplied
// with its column's vectors, so what was pruned costs nothing. Roofline: out * kept * tokens multiply-adds,
// of which each reads a vector from the first cache.
#include "core/threads.h"
#include "prune/activation.h"
#include "prune/linear_simd.h"
#include "prune/semi_structured_simd.h"

namespace tilewright::TW_ISA {
namespace {

constexpr int64_t kFewTokens = 32;
constexpr int64_t kFewBytes = 640 << 10;  // of x, in the second cache
constexpr int64_t kPrefetchBytes = 2048;  // of values, ahead of what is being multiplied
constexpr int64_t kRowsTogether = 4;
#if defined(__AVX512F__)
constexpr int kTokensTogether = 4;
#else
constexpr int kTokensTogether = 2;  // 16 registers
#endif
constexpr int64_t kFewRows = 32, kManyRows = 64;  // of the weight, in a unit of work
constexpr int64_t kPanelColumns = 64;             // of x, in the first cache

constexpr int64_t padded_columns(int64_t in) { return divide_up(in, 64) * 64; }

// Products of pairs are twice as many a step: there the walk along the columns stays ahead with any tokens.
template <class T, bool kTwoOfFour>
constexpr bool is_few(const SemiStructuredLinearParams& p) {
  return p.tokens <= kFewTokens || !std::is_same_v<typename Spread<T, kTwoOfFour>::X, float>;
}

// ---- results ----

// Results of rows and tokens, that of token t and row r from sums[t * token_stride + r * row_stride].
template <class T>
void write_results(const Matrix& to, const float* sums, int64_t token_stride, int64_t row_stride,
                   int64_t token, int64_t tokens, int64_t row, int64_t rows) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r)
      narrow_to(element<T>(to, token + t, row + r), sums[t * token_stride + r * row_stride]);
  }
}

// Sums of products with the bias, `count` of them in whole vectors, become results.
template <class Write>
void finish(const SemiStructuredLinearParams& p, float* sums, int64_t count, const Write& write) {
  if (p.z.data != nullptr) write(p.z);
  if (p.activation != Activation::kNone) {
    for (int64_t i = 0; i < count; i += kLanes) store(sums + i, activate(p.activation, load(sums + i)));
  }
  write(p.y);
}

template <class T>
float bias_of(const SemiStructuredLinearParams& p, int64_t row) {
  return p.bias == nullptr ? 0.0f : widen(static_cast<const T*>(p.bias)[row]);
}

// ---- few tokens ----

template <class T, class X>
void copy_tokens(const SemiStructuredLinearParams& p, X* to, int threads) {
  const int64_t in = p.weight.in, padded = padded_columns(in);
  parallel_chunks(p.tokens, threads, [&](int64_t t) {
    const T* from = static_cast<const T*>(p.x.data) + t * p.x.row;
    X* row = to + t * padded;
    for (int64_t c = 0; c < in; ++c) {
      if constexpr (std::is_same_v<X, T>) {
        row[c] = from[c * p.x.column];
      } else {
        row[c] = widen(from[c * p.x.column]);
      }
    }
    std::memset(row + in, 0, size_t(padded - in) * sizeof(X));
  });
}

// Rows [row, row + kRows) with tokens [token, token + kTokens).
template <class T, bool kTwoOfFour, int kRows, int kTokens>
void multiply_few(const SemiStructuredLinearParams& p, int64_t row, int64_t token,
                  const typename Spread<T, kTwoOfFour>::X* x) {
  using S = Spread<T, kTwoOfFour>;
  const SemiStructuredWeight& w = p.weight;
  const int64_t in = w.in, bytes = position_bytes(in), padded = padded_columns(in);
  const T* values[kRows];
  Float sums[kRows][kTokens];
  for (int r = 0; r < kRows; ++r) {
    values[r] = static_cast<const T*>(w.values) + (row + r) * w.kept();
    for (int t = 0; t < kTokens; ++t) sums[r][t] = splat(0.0f);
  }
  const uint8_t* positions = w.positions + row * bytes;
  x += token * padded;
  alignas(64) uint8_t codes[kRows][kCodeColumns / 8];
  for (int64_t block = 0; block < in; block += kCodeColumns) {
    const int64_t columns = smaller(in - block, kCodeColumns), whole = columns / S::kColumns * S::kColumns;
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* next = positions + r * bytes + block / 8;
      __builtin_prefetch(next + 2 * kCodeColumns / 8);
      read_codes(codes[r], next, bytes - block / 8);
    }
    const auto* at = x + block;
    for (int64_t c = 0; c < whole; c += S::kColumns, at += S::kColumns) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        __builtin_prefetch(reinterpret_cast<const char*>(values[r]) + kPrefetchBytes);
        const auto weights = S::next(values[r], codes[r] + c / 8);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) S::add(sums[r][t], weights, at + t * padded);
      }
    }
    if (whole == columns) continue;
    for (int r = 0; r < kRows; ++r) {
      const auto weights = S::some(values[r], codes[r] + whole / 8, int(columns - whole));
      for (int t = 0; t < kTokens; ++t) S::add(sums[r][t], weights, at + t * padded);
    }
  }
  float results[divide_up(kRows * kTokens, kLanes) * kLanes] = {};
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kTokens; ++t)
      results[t * kRows + r] = float(sum(sums[r][t])) + bias_of<T>(p, row + r);
  }
  finish(p, results, kRows * kTokens,
         [&](const Matrix& to) { write_results<T>(to, results, kRows, 1, token, kTokens, row, kRows); });
}

template <class T, bool kTwoOfFour, int kRows, class X>
void multiply_few_rows(const SemiStructuredLinearParams& p, int64_t row, int64_t token, int64_t end,
                       const X* x) {
  for (; token + kTokensTogether <= end; token += kTokensTogether)
    multiply_few<T, kTwoOfFour, kRows, kTokensTogether>(p, row, token, x);
  for (; token < end; ++token) multiply_few<T, kTwoOfFour, kRows, 1>(p, row, token, x);
}

// A unit of work is some rows with as many tokens as leave their x in the second cache.
template <class T, bool kTwoOfFour>
void forward_few(const SemiStructuredLinearParams& p, int threads) {
  using X = typename Spread<T, kTwoOfFour>::X;
  X* x = static_cast<X*>(p.workspace);
  copy_tokens<T>(p, x, threads);
  const int64_t fitting = kFewBytes / (padded_columns(p.weight.in) * int64_t{sizeof(X)});
  const int64_t together = larger(fitting / kTokensTogether, 1) * kTokensTogether;
  const int64_t token_units = divide_up(p.tokens, together);
  parallel_chunks(divide_up(p.weight.out, kFewRows) * token_units, threads, [&](int64_t unit) {
    const int64_t token = unit % token_units * together, last = smaller(token + together, p.tokens);
    int64_t row = unit / token_units * kFewRows;
    const int64_t end = smaller(row + kFewRows, p.weight.out);
    for (; row + kRowsTogether <= end; row += kRowsTogether)
      multiply_few_rows<T, kTwoOfFour, kRowsTogether>(p, row, token, last, x);
    for (; row < end; ++row) multiply_few_rows<T, kTwoOfFour, 1>(p, row, token, last, x);
  });
}

// ---- many tokens ----

// Adds a row's products over columns that begin and end at a byte and a group. `panel` is x of the first of
// them, transposed: kVectors vectors of tokens a column.
template <class T, bool kTwoOfFour, int kVectors>
void add_columns(float* sums, const SemiStructuredWeight& w, int64_t row, int64_t begin, int64_t end,
                 const float* panel) {
  Float sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + v * kLanes);
  const T* values = static_cast<const T*>(w.values) + row * w.kept() + begin / w.m * w.n;
  const auto add = [&](const float* column) __attribute__((always_inline)) {
    const Float weight = splat(widen(*values++));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(weight, load(column + v * kLanes), sum[v]);
  };
  constexpr int64_t kStep = kVectors * kLanes;
  const uint8_t* positions = w.positions + row * position_bytes(w.in) + begin / 8;
  if constexpr (kTwoOfFour) {
    for (; begin + 8 <= end; begin += 8, panel += 8 * kStep) {
      const unsigned byte = *positions++;
      add(panel + (byte & 3) * kStep);
      add(panel + (byte >> 2 & 3) * kStep);
      add(panel + (4 + (byte >> 4 & 3)) * kStep);
      add(panel + (4 + (byte >> 6)) * kStep);
    }
    if (begin < end) {
      add(panel + (*positions & 3) * kStep);
      add(panel + (*positions >> 2 & 3) * kStep);
    }
  } else {
    const T* last = static_cast<const T*>(w.values) + row * w.kept() + end / w.m * w.n;
    for (; begin < end; begin += 8, panel += 8 * kStep) {
      for (unsigned bits = *positions++; bits != 0 && values != last; bits &= bits - 1)
        add(panel + __builtin_ctz(bits) * kStep);
    }
  }
  for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, sum[v]);
}

template <class T, int kVectors>
void transpose_tokens(const SemiStructuredLinearParams& p, int64_t block, int64_t begin, int64_t end,
                      float* panel) {
  constexpr int64_t kStep = kVectors * kLanes;
  const int64_t first = block * kStep, count = smaller(p.tokens - first, kStep);
  for (int64_t t = 0; t < kStep; ++t) {
    const T* row = static_cast<const T*>(p.x.data) + (first + t) * p.x.row;
    for (int64_t c = begin; c < end; ++c)
      panel[c * kStep + t] = t < count ? float(widen(row[c * p.x.column])) : 0.0f;
  }
}

template <class T, bool kTwoOfFour, int kVectors>
void forward_many(const SemiStructuredLinearParams& p, int threads) {
  constexpr int64_t kStep = kVectors * kLanes;
  const SemiStructuredWeight& w = p.weight;
  const int64_t in = w.in, blocks = divide_up(p.tokens, kStep), units = divide_up(w.out, kManyRows);
  const int64_t columns = divide_up(kPanelColumns, columns_together(w.m)) * columns_together(w.m);
  const int64_t panels = divide_up(in, columns);
  float* x = static_cast<float*>(p.workspace);
  float* all_sums = x + blocks * in * kStep;
  parallel_chunks(blocks * panels, threads, [&](int64_t chunk) {
    const int64_t block = chunk / panels, begin = chunk % panels * columns;
    transpose_tokens<T, kVectors>(p, block, begin, smaller(begin + columns, in), x + block * in * kStep);
  });
  parallel_slots(units * blocks, threads, [&](int64_t unit, int slot) {
    const int64_t block = unit % blocks, first = unit / blocks * kManyRows;
    const int64_t rows = smaller(w.out - first, kManyRows), count = smaller(p.tokens - block * kStep, kStep);
    float* sums = all_sums + slot * kManyRows * kStep;
    std::memset(sums, 0, size_t(rows * kStep) * sizeof(float));
    for (int64_t begin = 0; begin < in; begin += columns) {
      const float* panel = x + (block * in + begin) * kStep;
      const int64_t end = smaller(begin + columns, in), next = smaller(end + columns, in);
      for (int64_t r = 0; r < rows; ++r) {
        if (end < in) prefetch_columns<T>(w, first + r, end, next);
        add_columns<T, kTwoOfFour, kVectors>(sums + r * kStep, w, first + r, begin, end, panel);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Float bias = splat(bias_of<T>(p, first + r));
      for (int64_t i = r * kStep; i < (r + 1) * kStep; i += kLanes) store(sums + i, load(sums + i) + bias);
    }
    finish(p, sums, rows * kStep, [&](const Matrix& to) {
      write_results<T>(to, sums, 1, kStep, block * kStep, count, first, rows);
    });
  });
}

template <class T, bool kTwoOfFour>
void forward(const SemiStructuredLinearParams& p, int threads) {
  if (is_few<T, kTwoOfFour>(p)) return forward_few<T, kTwoOfFour>(p, threads);
  if (vectors_of(p.tokens) == 1) return forward_many<T, kTwoOfFour, 1>(p, threads);
  if (vectors_of(p.tokens) == 2) return forward_many<T, kTwoOfFour, 2>(p, threads);
  forward_many<T, kTwoOfFour, 4>(p, threads);
}

template <class T>
void forward(const SemiStructuredLinearParams& p, int threads) {
  p.weight.two_of_four() ? forward<T, true>(p, threads) : forward<T, false>(p, threads);
}

void forward_float64(const SemiStructuredLinearParams& p, int threads) {
  parallel_chunks(p.weight.out, threads, [&](int64_t row) {
    const double* values = static_cast<const double*>(p.weight.values);
    for (int64_t t = 0; t < p.tokens; ++t) {
      const double* x = static_cast<const double*>(p.x.data) + t * p.x.row;
      double sum = 0;
      for_kept(p.weight, row, 0, p.weight.in, [&](int64_t element, int64_t column) {
        sum += values[row * p.weight.kept() + element] * x[column * p.x.column];
      });
      if (p.bias != nullptr) sum += static_cast<const double*>(p.bias)[row];
      if (p.z.data != nullptr) *element<double>(p.z, t, row) = sum;
      *element<double>(p.y, t, row) = activate(p.activation, sum);
    }
  });
}

// Of any dtype: the larger of what the two ways take.
int64_t forward_workspace(const SemiStructuredLinearParams& p, int threads) {
  const int64_t few = p.tokens * padded_columns(p.weight.in);
  if (p.tokens <= kFewTokens) return few * int64_t{sizeof(float)};
  const int64_t step = vectors_of(p.tokens) * kLanes, slots = larger(threads, 1);
  const int64_t many = (divide_up(p.tokens, step) * p.weight.in + slots * kManyRows) * step;
  return larger(few, many) * int64_t{sizeof(float)};
}

}  // namespace

int64_t semi_structured_workspace_cpu(const SemiStructuredLinearParams& p, SemiStructuredCall call,
                                      int threads) {
  if (p.dtype == DType::kFloat64) return 0;
  if (call == SemiStructuredCall::kForward) return forward_workspace(p, threads);
  return semi_structured_backward_workspace_cpu(p, call, threads);
}

void semi_structured_linear_cpu(const SemiStructuredLinearParams& p, SemiStructuredCall call, int threads) {
  if (call != SemiStructuredCall::kForward) return semi_structured_backward_cpu(p, call, threads);
  switch (p.dtype) {
    case DType::kFloat64:
      return forward_float64(p, threads);
    case DType::kFloat16:
      return forward<fp16>(p, threads);
    case DType::kBFloat16:
      return forward<bf16>(p, threads);
    default:
      return forward<float>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
