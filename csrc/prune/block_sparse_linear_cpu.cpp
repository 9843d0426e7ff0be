// The block-sparse linear layer on a CPU, for float32 and the 16-bit floats: y and dx. Both products are made
// of one: a register tile of kRows rows times up to two vectors,
//
//   c[i][lane] += sum_k a[i][k] b[k][lane],
//
// where a is read element by element as it lies in memory (any two strides), b by vectors.
//
//   y, dx   a: a block of W or its transpose, in place; b: a panel of kTokens tokens of x or dz, tokens along
//           the lanes. A tile's sums stay in registers along all blocks of a block row.
//   y of up to kFew tokens   W streams by once, vectors along the columns.
//
// Work is cut into chunks of block rows whose weights fit the second-level cache, times groups of tokens.
//
// Roofline: 2 FLOPs a kept weight and token, bound by the FMA units (16-bit pairs double them) from a dozen
// tokens on; below, by reading the kept weights once.
#include "prune/block_sparse_linear.h"

#include "prune/linear_simd.h"
#include "prune/register_tile.h"
#include "prune/segment_cpu.h"

namespace tilewright::TW_ISA {

// float64, untuned; block_sparse_linear_float64_cpu.cpp
void block_sparse_linear_float64_cpu(const prune::BlockSparseLinearParams&, prune::BlockSparseCall,
                                     int threads);

// dW; block_sparse_linear_weight_cpu.cpp
int64_t block_sparse_linear_weight_workspace_cpu(const prune::BlockSparseLinearParams&);
void block_sparse_linear_weight_cpu(const prune::BlockSparseLinearParams&, int threads);

namespace {

using prune::BlockPattern;
using prune::BlockSparseCall;
using prune::BlockSparseLinearParams;

constexpr int kTokens = 2 * kLanes;      // of a panel
constexpr int kGroupPanels = 8;          // panels that go through a chunk of weights together
constexpr int64_t kChunkWords = 131072;  // of weights: a quarter of a second-level cache
constexpr int64_t kFew = 8;
constexpr int64_t kAhead = 4096;  // bytes: the hardware alone stays too close
constexpr int kMaxBlock = 128;

// ---- y and dx: which blocks, and how they are read ----

// W for y; its transpose for dx.
struct Side {
  const int32_t *first, *across, *block;  // block null: they are numbered along this side
  int64_t rows, width, depth_width;       // block rows of the result, its width, that of the other operand
  int32_t height, depth;                  // of a block, as seen from this side
  bool transposed;
  int64_t panels_across;

  Side(const BlockSparseLinearParams& p, BlockSparseCall call) {
    const BlockPattern& w = p.pattern;
    transposed = call == BlockSparseCall::kInput;
    first = transposed ? w.t_first : w.first;
    across = transposed ? w.t_row : w.column;
    block = transposed ? w.t_block : nullptr;
    rows = transposed ? w.columns : w.rows;
    panels_across = transposed ? w.rows : w.columns;
    width = transposed ? p.in : p.out;
    depth_width = transposed ? p.out : p.in;
    height = transposed ? w.block_columns : w.block_rows;
    depth = transposed ? w.block_rows : w.block_columns;
  }

  int64_t block_of(int64_t at) const { return block == nullptr ? at : block[at]; }
  int64_t block_size() const { return int64_t{height} * depth; }
};

// Whether blocks are multiplied where they lie; otherwise a block row is brought into words first.
template <class T>
bool in_place(const Side& side) {
  return std::is_same_v<T, float> || (UnitsOf<T>::Type::kPerUnit == 2 && !side.transposed);
}

struct Sizes {
  int64_t panels, panel_words;  // of the operand with tokens along the lanes
  int64_t scratch_words;        // a thread: blocks brought into words
};

template <class T>
Sizes sizes_of(const BlockSparseLinearParams& p, const Side& side) {
  using Units = typename UnitsOf<T>::Type;
  Sizes s;
  s.panels = divide_up(p.tokens, kTokens);
  s.panel_words = round_up(side.panels_across * side.depth / Units::kPerUnit, kLanes) * kTokens;
  s.scratch_words = in_place<T>(side) ? 0 : side.panels_across * side.block_size() / Units::kPerUnit;
  return s;
}

inline int panel_width(int64_t tokens, int64_t panel) {
  return tokens - panel * kTokens > kLanes ? kTokens : kLanes;
}

// A panel's words [k][token], asking for the rows' next pieces meanwhile; tokens that are not there are
// zeros.
template <class T>
void pack_panel(const BlockSparseLinearParams& p, const Matrix& from, int64_t depth_width, int64_t words,
                float* to, int64_t panel) {
  using Units = typename UnitsOf<T>::Type;
  constexpr int64_t kPiece = 64, kStride = kPiece + 16;
  alignas(64) float stage[kTokens * kStride];
  const int64_t token = panel * kTokens, count = smaller(p.tokens - token, kTokens);
  const int width = panel_width(p.tokens, panel);
  for (int64_t k = 0; k < words; k += kPiece) {
    const int64_t piece = smaller(words - k, kPiece), column = k * Units::kPerUnit;
    const int64_t left = smaller(larger(depth_width - column, 0), piece * Units::kPerUnit);
    for (int64_t i = 0; i < width; ++i) {
      const T* row = element<T>(from, token + smaller(i, count - 1), column);
      read_words<Units>(stage + i * kStride, row, from.column, i < count ? left : 0, piece);
      if (from.column == 1) fetch(row + kPiece * Units::kPerUnit, kPiece * Units::kPerUnit);
    }
    transpose(to + k * width, width, stage, kStride, width, piece);
  }
}

// The blocks of a block row as words [k][height] (pairs along k), one behind the other. They lie anywhere in
// memory, so the blocks that follow, of the next rows too, are asked for.
template <class T>
void convert_row(const BlockSparseLinearParams& p, const Side& side, int64_t row, float* to) {
  using Units = typename UnitsOf<T>::Type;
  const T* values = static_cast<const T*>(p.values);
  const int64_t size = side.block_size(), last = side.first[side.rows] - 1;
  const int64_t ahead = larger(1, kAhead / (size * int64_t(sizeof(T))));
  for (int64_t at = side.first[row]; at < side.first[row + 1]; ++at) {
    const T* from = values + side.block_of(at) * size;
    const T* later = values + side.block_of(smaller(at + ahead, last)) * size;
    fetch(later, size);
    if constexpr (Units::kPerUnit == 1) {
      read_words<Units>(to, from, 1, size, size);
    } else {
      for (int64_t k = 0; k < side.depth; k += 2, from += 2 * side.height)
        pair_rows(to + k / 2 * side.height, from, from + side.height, side.height);
    }
    to += size / Units::kPerUnit;
  }
}

// How the element (row, k) of a block is found from its first word.
template <class T>
Operands walk(const Side& side) {
  using Units = typename UnitsOf<T>::Type;
  Operands o{};
  o.row_step = side.transposed ? 1 : side.depth / Units::kPerUnit;
  o.depth_step = side.transposed ? side.height : 1;
  o.depth = side.depth / Units::kPerUnit;
  return o;
}

// ---- y and dx: results ----

// A block row's results [height][panel width], through bias and activation to (tokens, width).
template <class T>
void write_results(const BlockSparseLinearParams& p, const Side& side, const float* sums, int width,
                   int64_t row, int64_t token, const Matrix& to, Activation activation) {
  alignas(64) float square[kLanes * kLanes];
  const int64_t column = row * side.height, columns = smaller(side.width - column, side.height);
  const int64_t count = smaller(p.tokens - token, width);
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) {
      transpose_square(square, kLanes, sums + j * width + i, width);
      for (int64_t t = 0; t < smaller(count - i, kLanes); ++t) {
        float* line = square + t * kLanes;
        if (activation != Activation::kNone) store(line, activate(activation, load(line)));
        write_row(element<T>(to, token + i + t, column + j), to.column, line, smaller(columns - j, kLanes));
      }
    }
  }
}

template <class T>
void add_bias(const BlockSparseLinearParams& p, const Side& side, int64_t row, float* sums, int width) {
  const T* bias = static_cast<const T*>(p.bias) + row * side.height;
  const int64_t columns = smaller(side.width - row * side.height, side.height);
  for (int64_t j = 0; j < columns; ++j) {
    const Float b = splat(widen(bias[j]));
    for (int i = 0; i < width; i += kLanes) store(sums + j * width + i, load(sums + j * width + i) + b);
  }
}

template <class T, int kVectors>
__attribute__((noinline)) void multiply_row(const BlockSparseLinearParams& p, const Side& side, int64_t row,
                                            const float* converted, const float* panel, float* sums) {
  using Units = typename UnitsOf<T>::Type;
  const int64_t size = side.block_size() / Units::kPerUnit;
  const auto* blocks = converted != nullptr ? converted : static_cast<const float*>(p.values);
  const int64_t begin = side.first[row], end = side.first[row + 1];
  Operands o = walk<T>(side);
  o.b_stride = kVectors * kLanes;
  const int64_t step = o.depth * o.b_stride;
  // Weights are asked for 128 steps of the sum ahead, tokens 16: after a tile's last block comes the next
  // tile's first, after the last tile the next row.
  const int64_t near = larger(1, 16 / o.depth), far = larger(1, 128 / o.depth), count = end - begin;
  const int64_t last = converted ? end - 1 : side.first[side.rows] - 1;
  const auto start = [&](int64_t at) { return blocks + (converted ? at - begin : side.block_of(at)) * size; };
  const auto later = [&](int64_t at, int64_t j) {
    if (at < end) return start(at) + j * o.row_step;
    if (j + kRows >= side.height) return start(smaller(at, last));
    return start(smaller(at - count, end - 1)) + (j + kRows) * o.row_step;
  };
  for (int64_t j = 0; j < side.height; j += kRows) {
    Tile<kVectors> tile;
    tile.each([](Float& x, int, int) { x = splat(0.0f); });
    for (int64_t at = begin; at < end; ++at) {
      o.a = start(at) + j * o.row_step;
      o.b = panel + side.across[at] * step;
      o.later_a = later(at + far, j);
      o.later_b = panel + side.across[smaller(at + near, end - 1)] * step;
      tile.template add_product<Units>(o);
    }
    tile.each([&](Float& x, int r, int v) { store(sums + (j + r) * o.b_stride + v, x); });
  }
}

template <class T>
void result_row(const BlockSparseLinearParams& p, const Side& side, int64_t row, int64_t panel,
                const float* converted, const float* words) {
  alignas(64) float sums[kMaxBlock * kTokens];
  const int width = panel_width(p.tokens, panel);
  if (width == kTokens) {
    multiply_row<T, 2>(p, side, row, converted, words, sums);
  } else {
    multiply_row<T, 1>(p, side, row, converted, words, sums);
  }
  const int64_t token = panel * kTokens;
  if (side.transposed) return write_results<T>(p, side, sums, width, row, token, p.dx, Activation::kNone);
  if (p.bias != nullptr) add_bias<T>(p, side, row, sums, width);
  if (p.z.data != nullptr) write_results<T>(p, side, sums, width, row, token, p.z, Activation::kNone);
  write_results<T>(p, side, sums, width, row, token, p.y, p.activation);
}

// ---- y and dx: the whole ----

// Chunk i is the block rows bounds[i] .. bounds[i + 1] - 1. Returns how many there are.
inline int64_t split_rows(const Side& side, int64_t words_per_block, int threads, int32_t* bounds) {
  const int64_t all = side.first[side.rows] * words_per_block;
  const int64_t target = smaller(kChunkWords, all / (int64_t{8} * (threads < 1 ? 1 : threads)));
  int64_t count = 0, words = 0;
  bounds[0] = 0;
  for (int64_t row = 0; row < side.rows; ++row) {
    words += (side.first[row + 1] - side.first[row]) * words_per_block;
    if (words < target && row + 1 < side.rows) continue;
    bounds[++count] = int32_t(row + 1);
    words = 0;
  }
  return count;
}

struct Workspace {
  float *panels, *scratch;
  int32_t* bounds;
  int64_t bytes;

  Workspace(void* base, const Side& side, const Sizes& s, int threads) {
    Arena arena{static_cast<char*>(base)};
    panels = arena.take<float>(s.panels * s.panel_words);
    scratch = arena.take<float>((threads < 1 ? 1 : threads) * s.scratch_words);
    bounds = arena.take<int32_t>(side.rows + 1);
    bytes = arena.used;
  }
};

template <class T>
void multiply_all(const BlockSparseLinearParams& p, BlockSparseCall call, int threads) {
  using Units = typename UnitsOf<T>::Type;
  const Side side(p, call);
  const Sizes s = sizes_of<T>(p, side);
  const Workspace w(p.workspace, side, s, threads);
  const Matrix& operand = side.transposed ? p.y : p.x;
  const int64_t words = side.panels_across * side.depth / Units::kPerUnit;
  parallel_chunks(s.panels, threads, [&](int64_t panel) {
    pack_panel<T>(p, operand, side.depth_width, words, w.panels + panel * s.panel_words, panel);
  });
  const int64_t chunks = split_rows(side, side.block_size() / Units::kPerUnit, threads, w.bounds);
  const int64_t groups = divide_up(s.panels, kGroupPanels);
  parallel_queue(chunks * groups, threads, [&](int64_t unit, int slot) {
    const int64_t chunk = unit / groups, begin = unit % groups * kGroupPanels;
    const int64_t end = smaller(begin + kGroupPanels, s.panels);
    const int64_t first = w.bounds[chunk], last = w.bounds[chunk + 1];
    if (s.scratch_words == 0) {
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t row = first; row < last; ++row)
          result_row<T>(p, side, row, panel, nullptr, w.panels + panel * s.panel_words);
      }
      return;
    }
    float* const converted = w.scratch + slot * s.scratch_words;
    for (int64_t row = first; row < last; ++row) {
      convert_row<T>(p, side, row, converted);
      for (int64_t panel = begin; panel < end; ++panel)
        result_row<T>(p, side, row, panel, converted, w.panels + panel * s.panel_words);
    }
  });
}

// ---- y of a few tokens ----

// Vectors go along a row of a block, or along several rows where those are shorter than a vector; the
// tokens' words are repeated to match.
template <class T>
struct Stream {
  static constexpr int kPerUnit = UnitsOf<T>::Type::kPerUnit;
  int words, line, lines;  // of a block: words a row, words and number of its lines
  int64_t token_words;

  explicit Stream(const BlockPattern& w) {
    words = w.block_columns / kPerUnit;
    line = words < kLanes ? kLanes : words;
    lines = w.block_rows * words / line;
    token_words = w.columns * line;
  }

  int64_t slot_words(int64_t tokens) const { return round_up(tokens * token_words, kLanes); }
};

template <class T>
Float load_weights(const T* block, int64_t word) {
  if constexpr (Stream<T>::kPerUnit == 1) {
    return load(block + word);
  } else {
    return load(reinterpret_cast<const float*>(block) + word);
  }
}

template <class T>
void repeat_tokens(const BlockSparseLinearParams& p, const Stream<T>& s, float* to) {
  using Units = typename UnitsOf<T>::Type;
  const int32_t width = p.pattern.block_columns;
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t column = 0; column < p.pattern.columns; ++column, to += s.line) {
      const int64_t from = column * width, count = smaller(p.in - from, width);
      read_words<Units>(to, element<T>(p.x, t, from), p.x.column, count, s.words);
      for (int i = s.words; i < s.line; ++i) to[i] = to[i - s.words];
    }
  }
}

// sums[line][token] += of one block.
template <class T, int kT, int kLinesAtOnce>
__attribute__((always_inline)) inline void stream_block(const Stream<T>& s, const T* block, const float* x,
                                                        float* sums) {
  using Units = typename UnitsOf<T>::Type;
  constexpr int kPerUnit = Stream<T>::kPerUnit;
  for (int line = 0; line < s.lines; line += kLinesAtOnce) {
    Float found[kLinesAtOnce][kT];
    float* at = sums + line * kT * kLanes;
#pragma GCC unroll 8
    for (int i = 0; i < kLinesAtOnce * kT; ++i) found[i / kT][i % kT] = load(at + i * kLanes);
    for (int word = 0; word < s.line; word += kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < kLinesAtOnce; ++i) {
        const int64_t at_word = int64_t{line + i} * s.line + word;
        const Float weights = load_weights(block, at_word);
        __builtin_prefetch(reinterpret_cast<const char*>(block + at_word * kPerUnit) + kAhead);
#pragma GCC unroll 4
        for (int t = 0; t < kT; ++t)
          found[i][t] = Units::step(weights, load(x + t * s.token_words + word), found[i][t]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kLinesAtOnce * kT; ++i) store(at + i * kLanes, found[i / kT][i % kT]);
  }
}

// sums[line][token] of all blocks of a row, for blocks of kLines single vectors: their sums stay in
// registers.
template <class T, int kT, int kLines>
__attribute__((always_inline)) inline void stream_small(const BlockPattern& w, int64_t row, const T* block,
                                                        const Stream<T>& s, const float* x, float* sums) {
  using Units = typename UnitsOf<T>::Type;
  constexpr int64_t kStep = kLanes * Stream<T>::kPerUnit;
  Float found[kLines][kT];
#pragma GCC unroll 16
  for (int i = 0; i < kLines * kT; ++i) found[i / kT][i % kT] = splat(0.0f);
  for (int64_t at = w.first[row]; at < w.first[row + 1]; ++at) {
    const float* const tokens = x + w.column[at] * int64_t{kLanes};
#pragma GCC unroll 16
    for (int i = 0; i < kLines; ++i, block += kStep) {
      const Float weights = load_weights(block, 0);
      __builtin_prefetch(reinterpret_cast<const char*>(block) + kAhead);
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t)
        found[i][t] = Units::step(weights, load(tokens + t * s.token_words), found[i][t]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLines * kT; ++i) store(sums + i * kLanes, found[i / kT][i % kT]);
}

// sums[line][token] of all blocks of a row.
template <class T, int kT>
__attribute__((always_inline)) inline void stream_blocks(const BlockPattern& w, int64_t row, const T* block,
                                                         const Stream<T>& s, const float* x, float* sums) {
  constexpr int kMost = kT == 1 ? 4 : 2, kHeld = kLanes / kT, kHalf = kHeld > 1 ? kHeld / 2 : 1;
  if (s.line == kLanes && s.lines == kHeld) return stream_small<T, kT, kHeld>(w, row, block, s, x, sums);
  if (s.line == kLanes && s.lines == kHalf) return stream_small<T, kT, kHalf>(w, row, block, s, x, sums);
  for (int64_t at = w.first[row]; at < w.first[row + 1]; ++at, block += w.block_rows * w.block_columns) {
    const float* tokens = x + w.column[at] * int64_t{s.line};
    if (s.lines >= kMost) {
      stream_block<T, kT, kMost>(s, block, tokens, sums);
    } else {  // the smallest blocks of pairs have two lines
      stream_block<T, kT, 2>(s, block, tokens, sums);
    }
  }
}

// Tokens [token, token + kT) of a block row.
template <class T, int kT>
__attribute__((noinline)) void stream_row(const BlockSparseLinearParams& p, const Stream<T>& s,
                                          const float* x, int64_t row, int64_t token) {
  const BlockPattern& w = p.pattern;
  alignas(64) float sums[kMaxBlock * kT * kLanes];
  alignas(64) float result[kMaxBlock];
  const int lanes = s.words < kLanes ? s.words : kLanes;  // vectors, too, that hold the sums of kLanes rows
  std::memset(sums, 0, sizeof(float) * size_t(round_up(s.lines, lanes)) * kT * kLanes);
  const T* block = static_cast<const T*>(p.values) + int64_t{w.first[row]} * w.block_rows * w.block_columns;
  stream_blocks<T, kT>(w, row, block, s, x + token * s.token_words, sums);
  const int64_t column = row * w.block_rows, columns = smaller(p.out - column, w.block_rows);
  for (int t = 0; t < kT; ++t) {
    for (int64_t j = 0; j < columns; j += kLanes)
      store(result + j, row_sums(sums + (j / kLanes * lanes * kT + t) * kLanes, kT * kLanes, lanes));
    if (p.bias != nullptr) {
      for (int64_t j = 0; j < columns; ++j) result[j] += widen(static_cast<const T*>(p.bias)[column + j]);
    }
    if (p.z.data != nullptr) write_row(element<T>(p.z, token + t, column), p.z.column, result, columns);
    for (int64_t j = 0; j < columns; j += kLanes) store(result + j, activate(p.activation, load(result + j)));
    write_row(element<T>(p.y, token + t, column), p.y.column, result, columns);
  }
}

// Every thread has the tokens' words to itself: they lie in no other core's cache.
template <class T>
void stream_all(const BlockSparseLinearParams& p, int threads) {
  const Stream<T> s(p.pattern);
  float* const words = static_cast<float*>(p.workspace);
  const auto words_of = [&](int slot) { return words + slot * s.slot_words(p.tokens); };
  parallel_slots(
      p.pattern.rows, threads, [&](int slot) { repeat_tokens<T>(p, s, words_of(slot)); },
      [&](int64_t row, int slot) {
        const float* const x = words_of(slot);
        int64_t t = 0;
        for (; t + 4 <= p.tokens; t += 4) stream_row<T, 4>(p, s, x, row, t);
        for (; t + 2 <= p.tokens; t += 2) stream_row<T, 2>(p, s, x, row, t);
        if (t < p.tokens) stream_row<T, 1>(p, s, x, row, t);
      });
}

// ---- dispatch ----

template <class T>
int64_t workspace_bytes(const BlockSparseLinearParams& p, BlockSparseCall call, int threads) {
  const Side side(p, call);
  if (call == BlockSparseCall::kForward && p.tokens <= kFew) {
    return larger(threads, 1) * Stream<T>(p.pattern).slot_words(p.tokens) * int64_t(sizeof(float));
  }
  return Workspace(nullptr, side, sizes_of<T>(p, side), threads).bytes;
}

template <class T>
void run(const BlockSparseLinearParams& p, BlockSparseCall call, int threads) {
  if (call == BlockSparseCall::kForward && p.tokens <= kFew) {
    stream_all<T>(p, threads);
  } else {
    multiply_all<T>(p, call, threads);
  }
}

}  // namespace

int64_t block_sparse_linear_workspace_cpu(const BlockSparseLinearParams& p, BlockSparseCall call,
                                          int threads) {
  if (call == BlockSparseCall::kWeight) return block_sparse_linear_weight_workspace_cpu(p);
  int64_t bytes = 0;
  with_type(p.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) bytes = workspace_bytes<T>(p, call, threads);
  });
  return bytes;
}

void block_sparse_linear_cpu(const BlockSparseLinearParams& p, BlockSparseCall call, int threads) {
  if (p.dtype == DType::kFloat64) return block_sparse_linear_float64_cpu(p, call, threads);
  if (call == BlockSparseCall::kWeight) return block_sparse_linear_weight_cpu(p, threads);
  with_type(p.dtype, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, double>) run<T>(p, call, threads);
  });
}

}  // namespace tilewright::TW_ISA
