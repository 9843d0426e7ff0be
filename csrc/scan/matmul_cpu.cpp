// Dense float32 products on the CPU, compiled once per instruction-set level.
//
// Roofline: 2 m n k FLOP; two fused multiply-adds of kLanes a cycle. With what it reads in the second-level
// cache, the tile comes within a few percent of that on AVX-512; what is lost is lost around it.
//
// B is taken in blocks of kBlockPanels panels, a panel being as wide as the tile, and kDepth deep, each
// copied to where it lies in the order of its reading and stays in the second-level cache. The tile's rows of
// A lie in the first-level cache meanwhile. They are read where they are if k is their last axis; else (a
// weight's gradient) they are copied too, all of them, since every block of B needs them again.
//
// A sum over k is cut at kDepth and nowhere else, so the result does not depend on the number of threads.
#include "scan/matmul.h"

#include "core/integers.h"
#include "core/threads.h"
#include "scan/gemm_simd.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::scan;

using MatmulTile = Tile<float, 2>;
constexpr int kTileRows = MatmulTile::kRows, kPanel = 2 * kLanes;
constexpr int64_t kDepth = 512, kBlockPanels = 8;
constexpr int64_t kSerial = 1 << 18;  // multiplications below which a second thread costs more than it saves
constexpr int64_t kLine = 64 / sizeof(float);

// Who computes what: a grid of parts of C. A part copies the columns of B it needs, and rows of A if those
// are copied, once for itself.
struct Grid {
  int64_t row_panels, column_panels, row_parts = 1, column_parts = 1, blocks = 1;
  int64_t depth;  // of all blocks but the last
  bool copies_a;

  Grid(const MatmulParams& p, int threads) {
    row_panels = divide_up(p.m, kTileRows);
    column_panels = divide_up(p.n, kPanel);
    copies_a = p.a_k != 1 && p.k > 1;
    depth = divide_up(divide_up(p.k, larger(1, divide_up(p.k, kDepth))), kLanes) * kLanes;
    if (p.m * p.n * p.k < kSerial) threads = 1;
    int64_t least = INT64_MAX;
    for (int64_t parts = 1; parts <= threads; ++parts) {
      const int64_t cost = cost_of_part(parts, threads / parts);
      if (cost < least) least = cost, row_parts = parts, column_parts = threads / parts;
    }
    column_parts = smaller(column_parts, column_panels);
    blocks = divide_up(divide_up(column_panels, column_parts), kBlockPanels);
    if (!copies_a) column_parts *= blocks, blocks = 1;  // nothing in common: parts of one block each
  }

  int64_t rows_of_part() const { return divide_up(row_panels, row_parts) * kTileRows; }
  int64_t block_panels() const { return divide_up(divide_up(column_panels, column_parts), blocks); }

  // Multiplications of the largest part, an element copied counted as kCopy of them.
  int64_t cost_of_part(int64_t rows, int64_t columns) const {
    constexpr int64_t kCopy = 16;
    const int64_t height = divide_up(row_panels, rows) * kTileRows;
    const int64_t width = divide_up(column_panels, columns) * kPanel;
    return height * width + kCopy * (width + (copies_a ? height : 0));
  }
};

int64_t floats_of_a(const Grid& grid, int64_t k) {
  return (grid.copies_a ? grid.rows_of_part() : kTileRows) * larger(k, 1);
}

int64_t floats_of_slot(const Grid& grid, int64_t k) {
  const int64_t floats = floats_of_a(grid, k) + grid.block_panels() * kPanel * grid.depth;
  return divide_up(floats, kLine) * kLine + kLine;
}

// kWidth columns side by side, zeros from `count` on: to[k][kWidth].
template <int kWidth>
inline void copy_columns(float* to, const float* from, int64_t k_step, int64_t step, int64_t depth,
                         int64_t count) {
  for (int64_t k = 0; k < depth; ++k, to += kWidth, from += k_step) {
    if (step == 1 && count == kWidth) {
      std::memcpy(to, from, kWidth * sizeof(float));
    } else {
      load_row(to, from, step, count, kWidth);
    }
  }
}

// The same where k is the axis whose elements lie side by side.
inline void copy_panel_transposed(float* to, const float* from, int64_t step, int64_t depth, int64_t count) {
  if (count < kPanel) {
    for (int64_t i = 0; i < depth * kPanel; ++i) to[i] = 0.0f;
  }
  transpose_exactly(to, kPanel, from, step, count, depth);
}

class Part {
 public:
  Part(const MatmulParams& params, const Grid& of, int64_t index, float* workspace)
      : p(params), grid(of), a_copy(workspace), b_copy(workspace + floats_of_a(of, params.k)) {
    const int64_t row = index / grid.column_parts, column = index % grid.column_parts;
    row_begin = grid.row_panels * row / grid.row_parts;
    row_end = grid.row_panels * (row + 1) / grid.row_parts;
    column_begin = grid.column_panels * column / grid.column_parts;
    column_end = grid.column_panels * (column + 1) / grid.column_parts;
  }

  void run() {
    const int64_t panels = column_end - column_begin;
    for (int64_t i = 0; i < grid.blocks; ++i) {
      const int64_t begin = column_begin + panels * i / grid.blocks;
      const int64_t end = column_begin + panels * (i + 1) / grid.blocks;
      int64_t from = 0;
      do {
        multiply_block(begin, end, from, smaller(grid.depth, p.k - from), i == 0);
        from += grid.depth;
      } while (from < p.k);
    }
  }

 private:
  void multiply_block(int64_t begin, int64_t end, int64_t from, int64_t depth, bool first) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* const to = b_copy + (panel - begin) * kPanel * depth;
      const float* const source = p.b + from * p.b_k + panel * kPanel * p.b_column;
      const int64_t count = smaller(kPanel, p.n - panel * kPanel);
      if (p.b_k == 1 && p.b_column != 1) {
        copy_panel_transposed(to, source, p.b_column, depth, count);
      } else {
        copy_columns<kPanel>(to, source, p.b_k, p.b_column, depth, count);
      }
    }
    for (int64_t panel = row_begin; panel < row_end; ++panel) {
      const float* const source = p.a + panel * kTileRows * p.a_row + from * p.a_k;
      const int64_t count = smaller(kTileRows, p.m - panel * kTileRows);
      if (!grid.copies_a && count == kTileRows) {
        multiply_rows(Rows<float>{source, p.a_row, 1}, panel, begin, end, from, depth);
        continue;
      }
      float* const copy = grid.copies_a
                              ? a_copy + grid.rows_of_part() * from + (panel - row_begin) * kTileRows * depth
                              : a_copy;
      if (first || !grid.copies_a) copy_columns<kTileRows>(copy, source, p.a_k, p.a_row, depth, count);
      multiply_rows(Rows<float>{copy, 1, kTileRows}, panel, begin, end, from, depth);
    }
  }

  // One panel of rows times all columns of the block.
  __attribute__((always_inline)) void multiply_rows(Rows<float> a, int64_t panel, int64_t begin, int64_t end,
                                                    int64_t from, int64_t depth) {
    const int64_t row = panel * kTileRows;
    // The copies of the next panel follow; from the third-level cache they would come too late.
    const float* ahead = a.data + kTileRows * depth;
    const int64_t lines = grid.copies_a ? divide_up(kTileRows * depth, kLine * (end - begin)) : 0;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t line = 0; line < lines; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
      MatmulTile tile;
      tile.clear();
      tile.multiply(a, 0, b_copy + (i - begin) * kPanel * depth, kPanel, 0, int(depth));
      put(tile, row, i * kPanel, from == 0);
    }
  }

  __attribute__((always_inline)) void put(MatmulTile& tile, int64_t row, int64_t column, bool first) {
    float* const c = p.c + row * p.c_row + column;
    if (row + kTileRows <= p.m && column + kPanel <= p.n) {
      const float* const bias = p.bias + column;
      if (!first) {
        tile.each(
            [&](Float& x, int r, int at) { store(c + r * p.c_row + at, load(c + r * p.c_row + at) + x); });
      } else if (p.bias != nullptr) {
        tile.each([&](Float& x, int r, int at) { store(c + r * p.c_row + at, load(bias + at) + x); });
      } else {
        tile.store_to(c, p.c_row);
      }
      return;
    }
    float at_the_edge[kTileRows * kPanel];
    tile.store_to(at_the_edge, kPanel);
    for (int64_t r = 0; r < smaller(kTileRows, p.m - row); ++r) {
      for (int64_t i = 0; i < smaller(kPanel, p.n - column); ++i) {
        float* const to = c + r * p.c_row + i;
        const float before = !first ? *to : p.bias != nullptr ? p.bias[column + i] : 0.0f;
        *to = before + at_the_edge[r * kPanel + i];
      }
    }
  }

  const MatmulParams& p;
  const Grid& grid;
  float *a_copy, *b_copy;
  int64_t row_begin, row_end, column_begin, column_end;
};

}  // namespace

int64_t matmul_workspace_cpu(const MatmulParams& p, int threads) {
  return larger(1, threads) * floats_of_slot(Grid(p, threads), p.k) * int64_t{sizeof(float)};
}

void matmul_cpu(const MatmulParams& p, int threads) {
  const Grid grid(p, threads);
  const int64_t parts = grid.row_parts * grid.column_parts;
  parallel_slots(parts, p.m * p.n * p.k < kSerial ? 1 : threads, [&](int64_t part, int slot) {
    Part(p, grid, part, static_cast<float*>(p.workspace) + slot * floats_of_slot(grid, p.k)).run();
  });
}

}  // namespace tilewright::TW_ISA
