// Products of small matrices in cache: a register tile of kRows rows times one or two vectors of columns, and
// loops over tiles. An A operand is read element by element (any two strides), a B operand by rows of
// vectors. Triangular A operands are read in their triangle only: what lies outside of it may be anything.
// Real is float, by vectors, or double, one element at a time.
#pragma once

#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_transpose.h"

namespace tilewright::TW_ISA {

// A double as a vector of one.
static inline double splat(double x) { return x; }
static inline double load(const double* p) { return *p; }
static inline void store(double* p, double x) { *p = x; }
static inline double fma(double a, double b, double c) { return a * b + c; }
static inline double exp(double x) { return std::exp(x); }
static inline double sum(double x) { return x; }

// The first `count` elements of a vector, zeros after.
static inline double keep_first(double x, int count) { return count > 0 ? x : 0.0; }
static inline Float keep_first(Float x, int count) {
  alignas(64) static constexpr int32_t kMask[2 * kLanes] = {
      -1, -1, -1, -1,
#if defined(__AVX2__)
      -1, -1, -1, -1,
#endif
#if defined(__AVX512F__)
      -1, -1, -1, -1, -1, -1, -1, -1,
#endif
  };
  if (count >= kLanes) return x;
  Int mask;
  std::memcpy(&mask, kMask + kLanes - (count < 0 ? 0 : count), sizeof mask);
  return from_bits(bits(x) & mask);
}

namespace {

template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  using Vector = Float;
  static constexpr int kCount = kLanes;
#if defined(__AVX512F__)
  static constexpr int kRows = 8;  // 16 of 32 registers accumulate
#else
  static constexpr int kRows = 4;  // 8 of 16
#endif
};

template <>
struct Lanes<double> {
  using Vector = double;
  static constexpr int kCount = 1;
  static constexpr int kRows = 4;
};

template <class Real>
using Vector = typename Lanes<Real>::Vector;

template <class Real>
constexpr int64_t padded_columns(int64_t n) {
  return (n + Lanes<Real>::kCount - 1) / Lanes<Real>::kCount * Lanes<Real>::kCount;
}

// Padded so that it can be rows or columns.
template <class Real>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t unit =
      Lanes<Real>::kCount > Lanes<Real>::kRows ? Lanes<Real>::kCount : Lanes<Real>::kRows;
  static_assert(unit % Lanes<Real>::kRows == 0 && unit % Lanes<Real>::kCount == 0);
  return (n + unit - 1) / unit * unit;
}

// An A operand: element (row, k).
template <class Real>
struct Rows {
  const Real* data;
  int64_t row_step, k_step;
};

template <class Real>
Rows<Real> plain(const Real* data, int64_t stride) {
  return {data, stride, 1};
}

template <class Real>
Rows<Real> transposed(const Real* data, int64_t stride) {
  return {data, 1, stride};
}

template <class Real, int kVectors>
struct Tile {
  static constexpr int kRows = Lanes<Real>::kRows, kCount = Lanes<Real>::kCount;
  Vector<Real> at[kRows][kVectors];

  template <class Body>
  __attribute__((always_inline)) void each(const Body& body) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) body(at[r][v], r, v * kCount);
    }
  }

  template <class Body>
  __attribute__((always_inline)) void each_vector(const Body& body) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) body(v);
  }

  __attribute__((always_inline)) void clear() {
    each([](Vector<Real>& a, int, int) { a = splat(Real(0)); });
  }

  // Row r times factors[r].
  __attribute__((always_inline)) void scale_rows(const Real* factors) {
    each([&](Vector<Real>& a, int r, int) { a = a * splat(factors[r]); });
  }

  __attribute__((always_inline)) void scale(Real factor) {
    each([&](Vector<Real>& a, int, int) { a = a * splat(factor); });
  }

  // One k of the product, for tile rows [first, last).
  __attribute__((always_inline)) void step(const Real* a, int64_t row_step, const Real* b, int first,
                                           int last) {
    Vector<Real> columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kCount);
#pragma GCC unroll 8
    for (int r = first; r < last; ++r) {
      const Vector<Real> factor = splat(a[r * row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) at[r][v] = fma(factor, columns[v], at[r][v]);
    }
  }

  // Adds rows [row, row + kRows) of A times B, over k in [from, to). b points at the tile's first column.
  __attribute__((always_inline)) void multiply(Rows<Real> a, int row, const Real* b, int64_t stride, int from,
                                               int to) {
    const Real* left = a.data + row * a.row_step + from * a.k_step;
    const Real* right = b + from * stride;
    for (int k = from; k < to; ++k, left += a.k_step, right += stride)
      step(left, a.row_step, right, 0, kRows);
  }

  // The same for an A whose elements right of the diagonal count as zeros, `size` rows and columns.
  __attribute__((always_inline)) void multiply_lower(Rows<Real> a, int row, const Real* b, int64_t stride,
                                                     int size) {
    multiply(a, row, b, stride, 0, row);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int k = row + r;
      if (k < size) step(a.data + row * a.row_step + k * a.k_step, a.row_step, b + k * stride, r, kRows);
    }
  }

  // And left of the diagonal.
  __attribute__((always_inline)) void multiply_upper(Rows<Real> a, int row, const Real* b, int64_t stride,
                                                     int size) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int k = row + r;
      if (k < size) step(a.data + row * a.row_step + k * a.k_step, a.row_step, b + k * stride, 0, r + 1);
    }
    multiply(a, row, b, stride, row + kRows < size ? row + kRows : size, size);
  }

  __attribute__((always_inline)) void load_from(const Real* c, int64_t stride) {
    each([&](Vector<Real>& a, int r, int column) { a = load(c + r * stride + column); });
  }

  __attribute__((always_inline)) void store_to(Real* c, int64_t stride) {
    each([&](Vector<Real>& a, int r, int column) { store(c + r * stride + column, a); });
  }
};

// body(tile, row, column) for every tile of a matrix; columns is padded. A panel of columns is finished
// before the next, so that the B operand's panel stays in the first cache.
template <class Real, class Body>
inline void for_tiles(int rows, int64_t columns, const Body& body) {
  constexpr int kRows = Lanes<Real>::kRows, kCount = Lanes<Real>::kCount;
  int64_t column = 0;
  for (; column + 2 * kCount <= columns; column += 2 * kCount) {
    for (int row = 0; row < rows; row += kRows) {
      Tile<Real, 2> tile;
      body(tile, row, column);
    }
  }
  if (column >= columns) return;
  for (int row = 0; row < rows; row += kRows) {
    Tile<Real, 1> tile;
    body(tile, row, column);
  }
}

// ---- rows in memory of any type and stride, and rows of Real, padded with zeros ----

template <class T, class Real>
inline void load_row(Real* row, const T* source, int64_t stride, int64_t count, int64_t padded_count) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<Real, double>) {
    if (stride == 1) {
      for (; i + kLanes <= count; i += kLanes) store(row + i, load(source + i));
    }
  }
  for (; i < count; ++i) row[i] = Real(widen(source[i * stride]));
  for (; i < padded_count; ++i) row[i] = Real(0);
}

inline void narrow_to(double* target, double value) { *target = value; }
inline void narrow_to(float* target, float value) { *target = value; }
inline void narrow_to(bf16* target, float value) { *target = narrow_bf16(value); }
inline void narrow_to(fp16* target, float value) { *target = narrow_fp16(value); }

template <class T, class Real>
inline void store_row(T* target, int64_t stride, const Real* row, int64_t count) {
  int64_t i = 0;
  if constexpr (!std::is_same_v<Real, double>) {
    if (stride == 1) {
      for (; i + kLanes <= count; i += kLanes) store(target + i, load(row + i));
    }
  }
  for (; i < count; ++i) narrow_to(target + i * stride, row[i]);
}

// to[j][i] = from[i][j]; rows of `to` beyond `columns` and elements beyond `rows` are left alone.
template <class Real>
inline void transpose_exactly(Real* to, int64_t to_stride, const Real* from, int64_t from_stride,
                              int64_t rows, int64_t columns) {
  const auto part = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = first; j < last; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
  };
  if constexpr (std::is_same_v<Real, float>) {
    const int64_t row_squares = rows / kLanes * kLanes, column_squares = columns / kLanes * kLanes;
    transpose(to, to_stride, from, from_stride, row_squares, column_squares);
    part(0, row_squares, column_squares, columns);
    part(row_squares, rows, 0, columns);
  } else {
    part(0, rows, 0, columns);
  }
}

}  // namespace
}  // namespace tilewright::TW_ISA
