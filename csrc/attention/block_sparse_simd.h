// What attention's passes on a CPU share: products of small matrices in cache, rows of tensors brought into
// units, transposition, and which keys of a tile a query sees.
#pragma once

#include "attention/block_sparse.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "core/simd_transpose.h"
#include "core/simd_units.h"
#include "core/threads.h"

namespace tilewright::TW_ISA {
namespace {

using attention::BlockLists;
using attention::BlockSparseParams;
using attention::HeadsTensor;
using attention::KeyRange;

// A tile of results is kept in registers: rows_for(vectors) times `vectors`.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
constexpr int rows_for(int vectors) { return vectors == 4 ? 6 : vectors == 2 ? 12 : 16; }
#else
constexpr int kVectors = 2;
constexpr int rows_for(int vectors) { return vectors == 2 ? 6 : 12; }
#endif
constexpr int kQueries = kVectors * kLanes;               // of a tile, along the lanes
constexpr int kKeys = 64;                                 // of a tile, one a row
constexpr int64_t kStride = attention::kMaxHeadDim + 16;  // of packed rows: no power of 2, so no aliases

// ---- products ----

// How to walk through an operand read unit by unit.
template <int64_t kRow, int64_t kDepth>
struct Walk {
  static constexpr int64_t kRowStep = kRow, kDepthStep = kDepth;
};
using PackedRows = Walk<kStride, 1>;     // a row of it for a row of the result
using PackedColumns = Walk<1, kStride>;  // its transpose
using TileRows = Walk<kQueries, 1>;      // the same for a tile of scores
using TileColumns = Walk<1, kQueries>;

struct Product {
  float* c;  // [rows][c_stride]
  int64_t c_stride;
  const float* a;  // in units, as its Walk says
  const float* b;  // [depth][b_stride] in units
  int64_t b_stride;
  int rows, depth;
  bool accumulate;
};

template <class Units, class A, int kRows, int kColumns>
__attribute__((always_inline)) inline void multiply_tile(const Product& p, int64_t row, int64_t column) {
  Float sums[kRows][kColumns];
  float* c = p.c + row * p.c_stride + column;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v)
      sums[r][v] = p.accumulate ? load(c + r * p.c_stride + v * kLanes) : splat(0.0f);
  }
  const float* a = p.a + row * A::kRowStep;
  const float* b = p.b + column;
  const int64_t b_stride = p.b_stride;
  for (int k = p.depth; k > 0; --k, a += A::kDepthStep, b += b_stride) {
    Float columns[kColumns];
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Float factor = splat(a[r * A::kRowStep]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v) sums[r][v] = Units::step(factor, columns[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kColumns; ++v) store(c + r * p.c_stride + v * kLanes, sums[r][v]);
  }
}

template <class Units, class A, int kColumns>
__attribute__((noinline)) void multiply_panel(const Product& p, int64_t column) {
  constexpr int kRows = rows_for(kColumns);
  int row = 0;
  for (; row + kRows <= p.rows; row += kRows) multiply_tile<Units, A, kRows, kColumns>(p, row, column);
  for (; row + 2 <= p.rows; row += 2) multiply_tile<Units, A, 2, kColumns>(p, row, column);
  if (row < p.rows) multiply_tile<Units, A, 1, kColumns>(p, row, column);
}

// c = (c +) a b. A panel of b's columns is finished before the next, so that it stays in the first cache.
// Columns are whole vectors.
template <class Units, class A>
void multiply(const Product& p, int64_t columns) {
  int64_t column = 0;
  if constexpr (kVectors == 4) {
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes) multiply_panel<Units, A, 4>(p, column);
  }
  for (; column + 2 * kLanes <= columns; column += 2 * kLanes) multiply_panel<Units, A, 2>(p, column);
  if (column < columns) multiply_panel<Units, A, 1>(p, column);
}

// ---- rows of tensors ----

template <class T>
const T* row_at(const HeadsTensor& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
}

// A row as floats, times factor, with zeros up to whole vectors.
template <class T>
void read_floats(float* to, const T* from, int64_t stride, int64_t count, float factor = 1.0f) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i) * factor);
    if (i < count) store(to + i, load_some(from + i, count - i) * factor);
    return;
  }
  for (; i < count; ++i) to[i] = widen(from[i * stride]) * factor;
  for (; i % kLanes != 0; ++i) to[i] = 0.0f;
}

// The same without a factor in any unit: as it is, where units are pairs.
template <class Units, class T>
void read_units(float* to, const T* from, int64_t stride, int64_t count) {
  if constexpr (Units::kPerUnit == 1) {
    read_floats(to, from, stride, count);
  } else {
    T* halves = reinterpret_cast<T*>(to);
    int64_t i = 0;
    if (stride == 1) {
      for (; i + 2 * kLanes <= count; i += 2 * kLanes)
        store(to + i / 2, load(reinterpret_cast<const float*>(from + i)));
    }
    for (; i < count; ++i) {
      if (i % (2 * kLanes) == 0) std::memset(halves + i, 0, sizeof(float) * kLanes);
      halves[i] = from[i * stride];
    }
  }
}

// Rows [row, row + count) of a head one behind the other, kStride apart.
template <class Units, class T>
void read_rows(float* to, const HeadsTensor& t, int64_t batch, int64_t head, int64_t row, int64_t count,
               int64_t dim) {
  const T* from = row_at<T>(t, batch, head, row);
  for (int64_t i = 0; i < count; ++i, from += t.row, to += kStride) read_units<Units>(to, from, t.inner, dim);
}

inline void clear_rows(float* to, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < count; ++i) std::memset(to + i * kStride, 0, size_t(round_up(dim, kLanes)) * 4);
}

template <class T>
void write_row(const HeadsTensor& t, int64_t batch, int64_t head, int64_t row, const float* from, int64_t dim,
               float factor = 1.0f) {
  T* to = static_cast<T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
  int64_t i = 0;
  if (t.inner == 1) {
    for (; i + kLanes <= dim; i += kLanes) store_fast(to + i, load(from + i) * factor);
  }
  for (; i < dim; ++i) narrow_to(to + i * t.inner, from[i] * factor);
}

// ---- which keys a query sees ----

// Some keys of a block, side by side in a tile.
struct Keys {
  int64_t first;
  int32_t count, offset;  // offset: place in the tile
  int32_t table, column;  // table -1: the block is full; column: place in the block
};

// Bit j: the query sees key j of them.
inline uint64_t visible_bits(const BlockSparseParams& p, const Keys& keys, const KeyRange& range,
                             int64_t query) {
  const int64_t from = range.from - keys.first, to = range.to - keys.first;
  if (from >= keys.count || to <= 0) return 0;
  uint64_t result = ~uint64_t{0};
  if (to < keys.count || keys.count < 64) {
    const int64_t end = to < keys.count ? to : keys.count;
    result = (uint64_t{1} << end) - 1;
  }
  if (from > 0) result &= ~uint64_t{0} << from;
  if (keys.table >= 0) {
    result &= table_bits(p.mask, keys.table, query % p.mask.block_q, keys.column, keys.count);
  }
  return result;
}

inline bool range_covers(const KeyRange& range, const Keys& keys) {
  return range.from <= keys.first && keys.first + keys.count <= range.to;
}

// What a query sees of a tile of keys, lane by lane: bit j of word j / 32.
struct Visible {
  alignas(64) int32_t words[2][kQueries];
  bool all;  // then the words are not to be looked at

  void set(int lane, uint64_t bits) {
    words[0][lane] = int32_t(uint32_t(bits));
    words[1][lane] = int32_t(uint32_t(bits >> 32));
  }
};

// x where the bit is set, else `otherwise`.
inline Float where_bit(Int words, int32_t bit, Float x, Float otherwise) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(otherwise, _mm512_test_epi32_mask((__m512i)words, _mm512_set1_epi32(bit)), x);
#else
  const Int set = (words & bit) != 0;
  return from_bits((bits(x) & set) | (bits(otherwise) & ~set));
#endif
}

inline Int load_words(const int32_t* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline bool any_above(Float a, Float b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
#else
  const Int above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

}  // namespace
}  // namespace tilewright::TW_ISA
