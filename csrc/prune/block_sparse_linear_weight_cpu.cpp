// dW of the block-sparse linear layer on a CPU, for float32 and the 16-bit floats: the register tile of y and
// dx with dz for a and x for b, tokens along k. Both are packed first, in panels about as wide as a tile, so
// that it reads two streams from beginning to end.
#include "prune/block_sparse_linear.h"
#include "prune/linear_simd.h"
#include "prune/register_tile.h"
#include "prune/segment_cpu.h"

namespace tilewright::TW_ISA {
namespace {

using prune::BlockPattern;
using prune::BlockSparseLinearParams;

constexpr int kWidest = 2 * kLanes;  // of a panel
constexpr int64_t kStepsAtOnce = 4;  // of k: their rows of x fit the ways of the first-level cache
constexpr int64_t kStepsAhead = 32;  // that a tile asks for
constexpr int64_t kChunk = 16384;    // elements of blocks that a thread takes at once

// Panels [width / across][k][across] of words, pairs along the tokens.
template <class T>
struct WeightPanels {
  int64_t steps;              // of k
  int32_t dz_across, across;  // of a panel of dz and of x
  float *dz, *x;
  int64_t bytes;

  // Vectors may reach past the last panel's last row.
  explicit WeightPanels(const BlockSparseLinearParams& p) {
    const BlockPattern& w = p.pattern;
    steps = divide_up(p.tokens, UnitsOf<T>::Type::kPerUnit);
    across = smaller(w.block_columns, kWidest);
    dz_across = smaller(w.block_rows, 2 * kRows);
    Arena arena{static_cast<char*>(p.workspace)};
    dz = arena.take<float>(w.rows * w.block_rows * steps);
    x = arena.take<float>(w.columns * w.block_columns * steps + kWidest);
    bytes = arena.used;
  }
};

// Steps [begin, end) of all panels of a matrix (tokens, width).
template <class T>
void pack_panels(const BlockSparseLinearParams& p, const Matrix& from, int64_t width, int64_t steps,
                 int32_t across, int64_t panels, int64_t begin, int64_t end, float* to) {
  using Units = typename UnitsOf<T>::Type;
  constexpr int kUnit = Units::kPerUnit;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * across, count = larger(smaller(width - first, across), 0);
    for (int64_t k = begin; k < end; ++k) {
      float* words = to + (panel * steps + k) * across;
      const T* rows[kUnit];
      alignas(64) T copy[kUnit][kWidest];
      for (int i = 0; i < kUnit; ++i) {
        const int64_t token = kUnit * k + i;
        rows[i] = element<T>(from, smaller(token, p.tokens - 1), first);
        if (from.column == 1 && count == across && token < p.tokens) {
          __builtin_prefetch(rows[i] + 4 * kWidest);
          continue;
        }
        for (int64_t j = 0; j < across; ++j)
          copy[i][j] = token < p.tokens && j < count ? rows[i][j * from.column] : T{};
        rows[i] = copy[i];
      }
      if constexpr (kUnit == 1) {
        read_words<Units>(words, rows[0], 1, across, across);
      } else {
        pair_rows(words, rows[0], rows[1], across);
      }
    }
  }
}

template <class T, int kTileRows, int kVectors>
__attribute__((noinline)) void weight_block(const BlockPattern& w, const WeightPanels<T>& panels,
                                            const float* dz, const float* x, T* to) {
  using Units = typename UnitsOf<T>::Type;
  Operands o{};
  o.row_step = 1, o.depth_step = panels.dz_across, o.b_stride = panels.across, o.depth = int(panels.steps);
  for (int64_t i = 0; i < w.block_columns; i += panels.across) {
    for (int64_t j = 0; j < w.block_rows; j += kTileRows) {
      const int64_t inside = j % panels.dz_across;
      o.a = dz + (j - inside) * panels.steps + inside;
      o.b = x + i * panels.steps;
      Tile<kVectors, kTileRows> tile;
      tile.each([](Float& sum, int, int) { sum = splat(0.0f); });
      o.later_a = o.a + kStepsAhead * o.depth_step, o.later_b = o.b + kStepsAhead * o.b_stride;
      tile.template add_product<Units>(o);
      tile.each([&](Float& sum, int r, int v) {
        T* at = to + (j + r) * w.block_columns + i + v;
        w.block_columns < kLanes ? store_some(at, sum, w.block_columns) : store_fast(at, sum);
      });
    }
  }
}

// Zeros where a block sticks out of the weight: what is infinite in dz or x has made NaN of them.
template <class T>
void clear_outside(const BlockSparseLinearParams& p, int64_t block, T* to) {
  const BlockPattern& w = p.pattern;
  const int64_t rows = p.out - int64_t{w.row[block]} * w.block_rows;
  const int64_t columns = p.in - int64_t{w.column[block]} * w.block_columns;
  if (rows >= w.block_rows && columns >= w.block_columns) return;
  for (int64_t j = 0; j < w.block_rows; ++j) {
    for (int64_t i = j < rows ? columns : 0; i < w.block_columns; ++i) to[j * w.block_columns + i] = T{};
  }
}

template <class T, int kTileRows, int kVectors>
void weight_blocks(const BlockSparseLinearParams& p, const WeightPanels<T>& panels, int threads) {
  const BlockPattern& w = p.pattern;
  const int64_t size = int64_t{w.block_rows} * w.block_columns, at_once = larger(1, kChunk / size);
  parallel_chunks(divide_up(w.blocks, at_once), threads, [&](int64_t chunk) {
    for (int64_t block = chunk * at_once; block < smaller((chunk + 1) * at_once, w.blocks); ++block) {
      const float* dz = panels.dz + w.row[block] * panels.steps * w.block_rows;
      const float* x = panels.x + w.column[block] * panels.steps * w.block_columns;
      T* to = static_cast<T*>(p.values) + block * size;
      weight_block<T, kTileRows, kVectors>(w, panels, dz, x, to);
      clear_outside<T>(p, block, to);
    }
  });
}

template <class T>
void weight_gradient(const BlockSparseLinearParams& p, int threads) {
  const BlockPattern& w = p.pattern;
  const WeightPanels<T> panels(p);
  parallel_chunks(divide_up(panels.steps, kStepsAtOnce), threads, [&](int64_t piece) {
    const int64_t begin = piece * kStepsAtOnce, end = smaller(begin + kStepsAtOnce, panels.steps);
    const auto pack = [&](const Matrix& from, int64_t width, int64_t whole, int32_t across, float* to) {
      pack_panels<T>(p, from, width, panels.steps, across, whole / across, begin, end, to);
    };
    pack(p.y, p.out, w.rows * w.block_rows, panels.dz_across, panels.dz);
    pack(p.x, p.in, w.columns * w.block_columns, panels.across, panels.x);
  });
  if (panels.across > kLanes) return weight_blocks<T, kRows, 2>(p, panels, threads);
  if (panels.dz_across == kRows) return weight_blocks<T, kRows, 1>(p, panels, threads);
  weight_blocks<T, 2 * kRows, 1>(p, panels, threads);
}

}  // namespace

int64_t block_sparse_linear_weight_workspace_cpu(const BlockSparseLinearParams& p) {
  int64_t bytes = 0;
  with_type(p.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) bytes = WeightPanels<T>(p).bytes;
  });
  return bytes;
}

void block_sparse_linear_weight_cpu(const BlockSparseLinearParams& p, int threads) {
  with_type(p.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) weight_gradient<T>(p, threads);
  });
}

}  // namespace tilewright::TW_ISA
