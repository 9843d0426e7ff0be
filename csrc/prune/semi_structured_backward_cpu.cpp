// The gradients of the semi-structured linear layer on the CPU; compiled once per instruction-set level.
//
//   dx[t][c] = sum over o of dz[t][o] w[o][c];   dW[o][c] = sum over t of dz[t][o] x[t][c], where c is kept
//
// dx: tokens lie along the vectors, as forward with many tokens; the sums of some columns stay in the first
// cache while all rows of the weight pass. Roofline: out * kept * tokens multiply-adds, each with a load and
// a store of its sum.
//
// dW: a dense product, tiles of 8 rows and two vectors of columns in registers, of which the kept elements
// are written. Roofline: out * in * tokens multiply-adds: what is not kept is computed too.
#include "core/threads.h"
#include "prune/semi_structured_simd.h"

namespace tilewright::TW_ISA {
namespace {

constexpr int64_t kSumColumns = 64;  // of dx, in the first cache
constexpr int64_t kGatherRows = 64;  // of dz, transposed at a time
constexpr int64_t kRowsAhead = 8;    // whose columns are asked for

// ---- dx ----

constexpr int64_t sum_columns(const SemiStructuredWeight& w) {
  return divide_up(kSumColumns, columns_together(w.m)) * columns_together(w.m);
}

template <class T, int kVectors>
void transpose_gradients(const SemiStructuredLinearParams& p, int64_t block, int64_t begin, int64_t end,
                         float* to) {
  constexpr int64_t kStep = kVectors * kLanes;
  const int64_t first = block * kStep, count = smaller(p.tokens - first, kStep);
  for (int64_t t = 0; t < kStep; ++t) {
    const T* row = static_cast<const T*>(p.y.data) + (first + t) * p.y.row;
    for (int64_t o = begin; o < end; ++o)
      to[o * kStep + t] = t < count ? float(widen(row[o * p.y.column])) : 0.0f;
  }
}

template <class T, bool kTwoOfFour, int kVectors>
void scatter_row(float* sums, const SemiStructuredWeight& w, int64_t row, int64_t begin, int64_t end,
                 const float* gradients) {
  constexpr int64_t kStep = kVectors * kLanes;
  Float gradient[kVectors];
  for (int v = 0; v < kVectors; ++v) gradient[v] = load(gradients + v * kLanes);
  const T* values = static_cast<const T*>(w.values) + row * w.kept() + begin / w.m * w.n;
  const uint8_t* positions = w.positions + row * position_bytes(w.in) + begin / 8;
  const auto add = [&](float* column) __attribute__((always_inline)) {
    const Float weight = splat(widen(*values++));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store(column + v * kLanes, fma(weight, gradient[v], load(column + v * kLanes)));
  };
  if constexpr (kTwoOfFour) {
    for (; begin + 8 <= end; begin += 8, sums += 8 * kStep) {
      const unsigned byte = *positions++;
      add(sums + (byte & 3) * kStep);
      add(sums + (byte >> 2 & 3) * kStep);
      add(sums + (4 + (byte >> 4 & 3)) * kStep);
      add(sums + (4 + (byte >> 6)) * kStep);
    }
    if (begin < end) {
      add(sums + (*positions & 3) * kStep);
      add(sums + (*positions >> 2 & 3) * kStep);
    }
  } else {
    const T* last = static_cast<const T*>(w.values) + row * w.kept() + end / w.m * w.n;
    for (; begin < end; begin += 8, sums += 8 * kStep) {
      for (unsigned bits = *positions++; bits != 0 && values != last; bits &= bits - 1)
        add(sums + __builtin_ctz(bits) * kStep);
    }
  }
}

template <class T, bool kTwoOfFour, int kVectors>
void input_gradient(const SemiStructuredLinearParams& p, int threads) {
  constexpr int64_t kStep = kVectors * kLanes;
  const SemiStructuredWeight& w = p.weight;
  const int64_t columns = sum_columns(w), panels = divide_up(w.in, columns);
  const int64_t blocks = divide_up(p.tokens, kStep), parts = divide_up(w.out, kGatherRows);
  float* gradients = static_cast<float*>(p.workspace);
  float* all_sums = gradients + blocks * w.out * kStep;
  parallel_chunks(blocks * parts, threads, [&](int64_t chunk) {
    const int64_t block = chunk / parts, begin = chunk % parts * kGatherRows;
    transpose_gradients<T, kVectors>(p, block, begin, smaller(begin + kGatherRows, w.out),
                                     gradients + block * w.out * kStep);
  });
  parallel_slots(panels * blocks, threads, [&](int64_t unit, int slot) {
    const int64_t block = unit % blocks, begin = unit / blocks * columns,
                  end = smaller(begin + columns, w.in);
    float* sums = all_sums + slot * columns * kStep;
    std::memset(sums, 0, size_t(columns * kStep) * sizeof(float));
    for (int64_t row = 0; row < w.out; ++row) {
      if (row + kRowsAhead < w.out) prefetch_columns<T>(w, row + kRowsAhead, begin, end);
      scatter_row<T, kTwoOfFour, kVectors>(sums, w, row, begin, end,
                                           gradients + (block * w.out + row) * kStep);
    }
    const int64_t count = smaller(p.tokens - block * kStep, kStep);
    for (int64_t t = 0; t < count; ++t) {
      T* to = static_cast<T*>(p.dx.data) + (block * kStep + t) * p.dx.row;
      for (int64_t c = begin; c < end; ++c) narrow_to(to + c * p.dx.column, sums[(c - begin) * kStep + t]);
    }
  });
}

template <class T, bool kTwoOfFour>
void input_gradient(const SemiStructuredLinearParams& p, int threads) {
  if (vectors_of(p.tokens) == 1) return input_gradient<T, kTwoOfFour, 1>(p, threads);
  if (vectors_of(p.tokens) == 2) return input_gradient<T, kTwoOfFour, 2>(p, threads);
  input_gradient<T, kTwoOfFour, 4>(p, threads);
}

// ---- dW ----

#if defined(__AVX512F__)
constexpr int kTileRows = 8;  // 16 of 32 registers accumulate
#else
constexpr int kTileRows = 4;  // 8 of 16
#endif
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kUnitTiles = 16;  // tiles of rows of a unit of work

// Columns of a token's row that a panel holds side by side; zeros behind the end.
template <class T, int64_t kColumns>
void pack_panel(const Matrix& from, int64_t tokens, int64_t begin, int64_t end, float* to) {
  for (int64_t t = 0; t < tokens; ++t, to += kColumns) {
    const T* row = static_cast<const T*>(from.data) + t * from.row;
    for (int64_t i = 0; i < kColumns; ++i)
      to[i] = begin + i < end ? float(widen(row[(begin + i) * from.column])) : 0.0f;
  }
}

void multiply_tile(float* to, const float* gradients, const float* x, int64_t tokens) {
  Float sums[kTileRows][2];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) sums[r][0] = sums[r][1] = splat(0.0f);
  for (int64_t t = 0; t < tokens; ++t, gradients += kTileRows, x += kTileColumns) {
    const Float low = load(x), high = load(x + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Float gradient = splat(gradients[r]);
      sums[r][0] = fma(gradient, low, sums[r][0]);
      sums[r][1] = fma(gradient, high, sums[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    store(to + r * kTileColumns, sums[r][0]);
    store(to + r * kTileColumns + kLanes, sums[r][1]);
  }
}

// The gradients of the kept elements of columns [begin, end) of a row, out of those of all its columns.
template <class T>
void keep_gradients(const SemiStructuredLinearParams& p, int64_t row, int64_t begin, int64_t end,
                    const float* dense) {
  T* to = static_cast<T*>(p.dvalues) + row * p.weight.kept();
  for_kept(p.weight, row, begin, end,
           [&](int64_t element, int64_t column) { narrow_to(to + element, dense[column - begin]); });
}

constexpr int64_t gradient_columns(const SemiStructuredWeight& w) {
  const int64_t unit = columns_together(w.m);
  return unit > kTileColumns ? unit : kTileColumns / unit * unit;
}

template <class T>
void weight_gradient(const SemiStructuredLinearParams& p, int threads) {
  const SemiStructuredWeight& w = p.weight;
  // A panel has the width of a tile and is full where m is a power of two; else as many columns as fit, or
  // several tiles.
  const int64_t columns = gradient_columns(w), panels = divide_up(w.in, columns);
  const int64_t tiles = divide_up(columns, kTileColumns), row_tiles = divide_up(w.out, kTileRows);
  float* x = static_cast<float*>(p.workspace);
  float* gradients = x + panels * tiles * p.tokens * kTileColumns;
  parallel_chunks(panels * tiles + row_tiles, threads, [&](int64_t chunk) {
    if (chunk < panels * tiles) {
      const int64_t begin = chunk / tiles * columns, end = smaller(begin + columns, w.in);
      pack_panel<T, kTileColumns>(p.x, p.tokens, begin + chunk % tiles * kTileColumns, end,
                                  x + chunk * p.tokens * kTileColumns);
    } else {
      const int64_t tile = chunk - panels * tiles;
      pack_panel<T, kTileRows>(p.y, p.tokens, tile * kTileRows, w.out,
                               gradients + tile * p.tokens * kTileRows);
    }
  });
  const int64_t units = divide_up(row_tiles, kUnitTiles);
  parallel_chunks(panels * units, threads, [&](int64_t unit) {
    const int64_t panel = unit / units, begin = panel * columns, end = smaller(begin + columns, w.in);
    const int64_t first = unit % units * kUnitTiles;
    constexpr int64_t kMostColumns = 8 * 32;
    alignas(64) float dense[kTileRows][kMostColumns];
    alignas(64) float tile_sums[kTileRows * kTileColumns];
    for (int64_t row_tile = first; row_tile < smaller(first + kUnitTiles, row_tiles); ++row_tile) {
      for (int64_t tile = 0; tile < tiles; ++tile) {
        multiply_tile(tile_sums, gradients + row_tile * p.tokens * kTileRows,
                      x + (panel * tiles + tile) * p.tokens * kTileColumns, p.tokens);
        for (int r = 0; r < kTileRows; ++r)
          std::memcpy(dense[r] + tile * kTileColumns, tile_sums + r * kTileColumns,
                      kTileColumns * sizeof(float));
      }
      const int64_t row = row_tile * kTileRows, rows = smaller(w.out - row, kTileRows);
      for (int64_t r = 0; r < rows; ++r) keep_gradients<T>(p, row + r, begin, end, dense[r]);
    }
  });
}

// ---- float64, for tests of gradients ----

void input_gradient_float64(const SemiStructuredLinearParams& p, int threads) {
  parallel_chunks(p.tokens, threads, [&](int64_t t) {
    const double* values = static_cast<const double*>(p.weight.values);
    double* to = static_cast<double*>(p.dx.data) + t * p.dx.row;
    for (int64_t c = 0; c < p.weight.in; ++c) to[c * p.dx.column] = 0;
    for (int64_t row = 0; row < p.weight.out; ++row) {
      const double gradient = static_cast<const double*>(p.y.data)[t * p.y.row + row * p.y.column];
      for_kept(p.weight, row, 0, p.weight.in, [&](int64_t element, int64_t column) {
        to[column * p.dx.column] += gradient * values[row * p.weight.kept() + element];
      });
    }
  });
}

void weight_gradient_float64(const SemiStructuredLinearParams& p, int threads) {
  parallel_chunks(p.weight.out, threads, [&](int64_t row) {
    double* to = static_cast<double*>(p.dvalues) + row * p.weight.kept();
    for_kept(p.weight, row, 0, p.weight.in, [&](int64_t element, int64_t column) {
      double sum = 0;
      for (int64_t t = 0; t < p.tokens; ++t)
        sum += static_cast<const double*>(p.y.data)[t * p.y.row + row * p.y.column] *
               static_cast<const double*>(p.x.data)[t * p.x.row + column * p.x.column];
      to[element] = sum;
    });
  });
}

template <class T>
void backward(const SemiStructuredLinearParams& p, SemiStructuredCall call, int threads) {
  if (call == SemiStructuredCall::kWeight) return weight_gradient<T>(p, threads);
  p.weight.two_of_four() ? input_gradient<T, true>(p, threads) : input_gradient<T, false>(p, threads);
}

}  // namespace

int64_t semi_structured_backward_workspace_cpu(const SemiStructuredLinearParams& p, SemiStructuredCall call,
                                               int threads) {
  const SemiStructuredWeight& w = p.weight;
  int64_t floats = 0;
  if (call == SemiStructuredCall::kInput) {
    const int64_t step = vectors_of(p.tokens) * kLanes;
    floats = (divide_up(p.tokens, step) * w.out + larger(threads, 1) * sum_columns(w)) * step;
  } else {
    const int64_t columns = gradient_columns(w), tiles = divide_up(columns, kTileColumns);
    floats = p.tokens *
             (divide_up(w.in, columns) * tiles * kTileColumns + divide_up(w.out, kTileRows) * kTileRows);
  }
  return floats * int64_t{sizeof(float)};
}

void semi_structured_backward_cpu(const SemiStructuredLinearParams& p, SemiStructuredCall call, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return call == SemiStructuredCall::kWeight ? weight_gradient_float64(p, threads)
                                                 : input_gradient_float64(p, threads);
    case DType::kFloat16:
      return backward<fp16>(p, call, threads);
    case DType::kBFloat16:
      return backward<bf16>(p, call, threads);
    default:
      return backward<float>(p, call, threads);
  }
}

}  // namespace tilewright::TW_ISA
