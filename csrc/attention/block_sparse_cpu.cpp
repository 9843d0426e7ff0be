// Block-sparse attention forward, for float32 and the 16-bit floats. Keys lie along the rows of a tile of
// scores and queries along its lanes:
//
//   S = K Q^T,  m' = max(m, max_j S[j]),  P = exp(S - m'),  l' = exp(m - m') l + sum_j P[j],
//   O^T' = exp(m - m') O^T + V^T P
//
// so that the maxima and sums of the softmax are lanes of vectors, and K and V are read element by element,
// as they are. The unit of work is up to kGroup queries of a block row. Its keys are packed in tiles of
// kKeys, which may span several blocks of the list and serve all queries of the unit. The reference m of a
// query only follows its maximum when that has grown by 2^kSlack: the powers stay in range, and sums are
// rarely rescaled.
//
// Roofline: 4 D FLOPs a pair of query and key, 11 vector instructions of softmax beside D / 4 of products
// (D/8 in pairs of bf16): bound by the FMA units.
#include "attention/block_sparse_simd.h"

namespace tilewright::TW_ISA {
namespace {

constexpr int kGroup = 128;  // queries that share packed keys
constexpr int kTiles = kGroup / kQueries;
constexpr float kSlack = 8;
constexpr float kInfinity = __builtin_inff();

struct Unit {
  int64_t batch, head, block, first, count;  // queries [first, first + count) of a block row
};

int64_t pieces_of(const BlockSparseParams& p) { return (p.mask.block_q + kGroup - 1) / kGroup; }
int64_t unit_count(const BlockSparseParams& p) { return p.batch * p.heads * p.mask.q2k.rows * pieces_of(p); }

Unit unit_at(const BlockSparseParams& p, int64_t number) {
  const int64_t pieces = pieces_of(p), piece = number % pieces, row = number / pieces;
  const int64_t block = row % p.mask.q2k.rows, head = row / p.mask.q2k.rows;
  const int64_t start = block * p.mask.block_q, first = start + piece * kGroup;
  int64_t end = first + kGroup;
  end = end < start + p.mask.block_q ? end : start + p.mask.block_q;
  end = end < p.q_len ? end : p.q_len;
  return {head / p.heads, head % p.heads, block, first, end > first ? end - first : 0};
}

// ---- tiles of keys ----

struct KeyTile {
  Keys parts[kKeys];
  int part_count, keys;
};

// Goes along the list of a block row, as far as queries of the unit can see.
class KeyList {
 public:
  KeyList(const BlockSparseParams& params, const Unit& unit) : p(params) {
    const BlockLists& lists = p.mask.q2k;
    const int64_t row = row_of(lists, unit.batch, unit.head, unit.block);
    count_ = lists.counts[row];
    indices_ = lists.indices + row * lists.capacity;
    tables_ = lists.bits == nullptr ? nullptr : lists.bits + row * lists.capacity;
    from_ = key_range(p, unit.first).from;
    to_ = key_range(p, unit.first + unit.count - 1).to;
  }

  bool next(KeyTile& tile) {
    tile.part_count = tile.keys = 0;
    while (tile.keys < kKeys && at_ < count_) {
      const int64_t start = int64_t{indices_[at_]} * p.mask.block_kv;
      int64_t begin = start > from_ ? start : from_, end = start + p.mask.block_kv;
      begin = begin > done_ ? begin : done_;
      end = end < to_ ? end : to_;
      if (begin >= end) {
        ++at_;
        continue;
      }
      const int64_t left = end - begin, room = kKeys - tile.keys, taken = left < room ? left : room;
      tile.parts[tile.part_count++] = {begin, int32_t(taken), tile.keys,
                                       tables_ == nullptr ? -1 : tables_[at_], int32_t(begin - start)};
      tile.keys += int(taken);
      done_ = begin + taken;
    }
    return tile.keys > 0;
  }

 private:
  const BlockSparseParams& p;
  const int32_t *indices_, *tables_;
  int64_t count_, from_, to_, at_ = 0, done_ = 0;
};

// Whether any of the queries sees any of the keys, and which.
bool look(const BlockSparseParams& p, const KeyTile& tile, int64_t first, int64_t count, Visible& visible) {
  const KeyRange earliest = key_range(p, first), latest = key_range(p, first + count - 1);
  visible.all = true;
  for (int i = 0; i < tile.part_count; ++i) {
    const Keys& part = tile.parts[i];
    visible.all &= part.table < 0 && range_covers({latest.from, earliest.to}, part);
  }
  if (visible.all) return true;
  const uint64_t everything = tile.keys < 64 ? (uint64_t{1} << tile.keys) - 1 : ~uint64_t{0};
  uint64_t any = 0, all = everything;
  for (int64_t i = 0; i < count; ++i) {
    const KeyRange range = key_range(p, first + i);
    uint64_t bits = 0;
    for (int part = 0; part < tile.part_count; ++part)
      bits |= visible_bits(p, tile.parts[part], range, first + i) << tile.parts[part].offset;
    visible.set(int(i), bits);
    any |= bits;
    all &= bits;
  }
  for (int64_t i = count; i % kLanes != 0; ++i) visible.set(int(i), everything);
  visible.all = all == everything;
  return any != 0;
}

// ---- scratch ----

// What a tile of queries carries along the keys. Lanes are queries.
struct Queries {
  float *q, *out;    // [units of head_dim][kQueries], [value_dim][kQueries]
  float *max, *sum;  // [kQueries]; max as an exponent of 2
  bool fresh;        // has seen no key yet; then out is not set
};

struct Scratch {
  Arena arena;
  Queries queries[kTiles];
  float *k, *v, *scores, *pairs, *stage;
  KeyTile* tile;
  Visible* visible;

  Scratch(const BlockSparseParams& p, char* base) : arena{base} {
    for (Queries& tile : queries) {
      tile.q = arena.take<float>(round_up(p.head_dim, kLanes) * kQueries);
      tile.out = arena.take<float>(round_up(p.value_dim, kLanes) * kQueries);
      tile.max = arena.take<float>(kQueries);
      tile.sum = arena.take<float>(kQueries);
    }
    k = arena.take<float>(kKeys * kStride);
    v = arena.take<float>(kKeys * kStride);
    stage = arena.take<float>((kKeys > kQueries ? kKeys : kQueries) * kStride);
    scores = arena.take<float>(kKeys * kQueries);
    pairs = arena.take<float>(kKeys / 2 * kQueries);
    tile = arena.take<KeyTile>(1);
    visible = arena.take<Visible>(1);
  }
};

// ---- packing ----

template <class T>
void pack_keys(const BlockSparseParams& p, Scratch& s, const KeyTile& tile, int64_t batch, int64_t head) {
  using Units = typename UnitsOf<T>::Type;
  float* const values = Units::kPerUnit == 1 ? s.v : s.stage;
  for (int i = 0; i < tile.part_count; ++i) {
    const Keys& part = tile.parts[i];
    const int64_t at = part.offset * kStride;
    read_rows<Units, T>(s.k + at, p.k, batch, head, part.first, part.count, p.head_dim);
    read_rows<Units, T>(values + at, p.v, batch, head, part.first, part.count, p.value_dim);
  }
  if constexpr (Units::kPerUnit == 2) {
    if (tile.keys % 2 != 0) clear_rows(s.stage + tile.keys * kStride, 1, p.value_dim);
    for (int j = 0; j < tile.keys; j += 2) {
      const uint16_t* low = reinterpret_cast<const uint16_t*>(s.stage + j * kStride);
      const uint16_t* high = reinterpret_cast<const uint16_t*>(s.stage + (j + 1) * kStride);
      for (int64_t d = 0; d < p.value_dim; d += kLanes)
        store(s.v + j / 2 * kStride + d, from_bits(load_halves(low + d) | load_halves(high + d) << 16));
    }
  }
}

// Scores are counted in |scale|: a negative scale turns q around.
template <class Units>
void apply_sign(float* q, int64_t count, double scale) {
  const int32_t signs = Units::kPerUnit == 1 ? int32_t(0x80000000) : int32_t(0x80008000);
  if (scale > 0) return;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Float x = load(q + i);
    store(q + i, scale == 0 ? splat(0.0f) : from_bits(bits(x) ^ signs));
  }
}

template <class T>
void pack_queries(const BlockSparseParams& p, Scratch& s, const Unit& unit, int tile) {
  using Units = typename UnitsOf<T>::Type;
  Queries& to = s.queries[tile];
  const int64_t first = tile * kQueries, left = unit.count - first, count = left < kQueries ? left : kQueries;
  const int64_t units = round_up((p.head_dim + Units::kPerUnit - 1) / Units::kPerUnit, kLanes);
  read_rows<Units, T>(s.stage, p.q, unit.batch, unit.head, unit.first + first, count, p.head_dim);
  clear_rows(s.stage + count * kStride, round_up(count, kLanes) - count, units);
  transpose(to.q, kQueries, s.stage, kStride, count, units);
  apply_sign<Units>(to.q, units * kQueries, p.scale);
  for (int i = 0; i < kQueries; ++i) {
    to.max[i] = -kInfinity;
    to.sum[i] = 0;
  }
  to.fresh = true;
}

// ---- softmax ----

inline Float max_of(const float* s, int keys) {
  Float found[4];
  for (Float& x : found) x = splat(-kInfinity);
  int j = 0;
  for (; j + 4 <= keys; j += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) found[i] = max(load(s + (j + i) * kQueries), found[i]);
  }
  for (; j < keys; ++j) found[0] = max(load(s + j * kQueries), found[0]);
  return max(max(found[0], found[1]), max(found[2], found[3]));
}

inline void hide(float* s, int keys, const Visible& visible, int lane) {
  for (int word = 0; word * 32 < keys; ++word) {
    const Int words = load_words(visible.words[word] + lane);
    const int end = keys - word * 32 < 32 ? keys - word * 32 : 32;
    for (int j = 0; j < end; ++j) {
      float* at = s + (word * 32 + j) * kQueries;
      store(at, where_bit(words, int32_t(uint32_t{1} << j), load(at), splat(-kInfinity)));
    }
  }
}

// Powers of two neighbouring keys, as the product with v wants them.
template <class Units>
inline void keep_powers(float* scores, [[maybe_unused]] float* pairs, int key, Float low, Float high,
                        bool both) {
  if constexpr (Units::kPerUnit == 1) {
    store(scores + key * kQueries, low);
    if (both) store(scores + (key + 1) * kQueries, high);
  } else {
#if defined(__AVX512BF16__)
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i order = _mm512_load_si512(kOrder);
    store(pairs + key / 2 * kQueries, _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, halves)));
#endif
  }
}

template <class Units>
inline Float exponentiate(float* scores, float* pairs, int keys, Float factor, Float reference) {
  Float even = splat(0.0f), odd = splat(0.0f);
  int j = 0;
  for (; j + 2 <= keys; j += 2) {
    const Float low = exp2(fma(load(scores + j * kQueries), factor, -reference));
    const Float high = exp2(fma(load(scores + (j + 1) * kQueries), factor, -reference));
    even = even + low;
    odd = odd + high;
    keep_powers<Units>(scores, pairs, j, low, high, true);
  }
  if (j < keys) {
    const Float low = exp2(fma(load(scores + j * kQueries), factor, -reference));
    even = even + low;
    keep_powers<Units>(scores, pairs, j, low, splat(0.0f), false);
  }
  return even + odd;
}

// Lanes whose maximum has grown beyond the slack take it as their reference; what they have summed follows.
void raise_reference(Queries& tile, int lane, Float found, int64_t value_dim) {
  const Float old = load(tile.max + lane);
  if (!any_above(found, old + kSlack)) return;
  const Float raised = select_above(found, old + kSlack, found, old);
  store(tile.max + lane, raised);
  if (tile.fresh) return;
  // -inf - -inf would be NaN: nothing is summed there yet.
  const Float decay = exp2(select_above(raised, splat(-kInfinity), old - raised, splat(0.0f)));
  store(tile.sum + lane, load(tile.sum + lane) * decay);
  for (int64_t d = 0; d < value_dim; ++d) {
    float* at = tile.out + d * kQueries + lane;
    store(at, load(at) * decay);
  }
}

// Scores to powers, for the queries of one vector.
template <class Units>
void soften(const BlockSparseParams& p, Scratch& s, Queries& tile, int keys, int lane) {
  float* scores = s.scores + lane;
  float factor = float(__builtin_fabs(p.scale) * 1.4426950408889634);
  if (p.scale == 0) factor = kLog2E;
  if (p.softcap > 0) {
    const float inner = float(__builtin_fabs(p.scale) / p.softcap);
    for (int j = 0; j < keys; ++j) store(scores + j * kQueries, tanh(load(scores + j * kQueries) * inner));
    factor = float(p.softcap * 1.4426950408889634);
  }
  if (!s.visible->all) hide(scores, keys, *s.visible, lane);
  raise_reference(tile, lane, max_of(scores, keys) * factor, p.value_dim);
  const Float reference = load(tile.max + lane);
  const Float finite = select_above(reference, splat(-kInfinity), reference, splat(0.0f));
  const Float sum = exponentiate<Units>(scores, s.pairs + lane, keys, splat(factor), finite);
  store(tile.sum + lane, load(tile.sum + lane) + sum);
}

// ---- a unit of work ----

template <class T>
void attend(const BlockSparseParams& p, Scratch& s, Queries& tile, int keys, int64_t columns) {
  using Units = typename UnitsOf<T>::Type;
  constexpr int kPer = Units::kPerUnit;
  multiply<Units, PackedRows>(
      {s.scores, kQueries, s.k, tile.q, kQueries, keys, (p.head_dim + kPer - 1) / kPer, false}, columns);
  for (int lane = 0; lane < columns; lane += kLanes) soften<Units>(p, s, tile, keys, lane);
  multiply<Units, PackedColumns>({tile.out, kQueries, s.v, kPer == 1 ? s.scores : s.pairs, kQueries,
                                  p.value_dim, (keys + kPer - 1) / kPer, !tile.fresh},
                                 columns);
  tile.fresh = false;
}

template <class T>
void finish(const BlockSparseParams& p, Scratch& s, const Unit& unit, int64_t first, int64_t count,
            Queries& tile) {
  const int64_t dims = round_up(p.value_dim, kLanes);
  if (tile.fresh) std::memset(tile.out, 0, size_t(dims * kQueries) * sizeof(float));
  transpose(s.stage, kStride, tile.out, kQueries, dims, round_up(count, kLanes));
  float* lse = static_cast<float*>(p.lse) + (unit.batch * p.heads + unit.head) * p.q_len;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t query = unit.first + first + i;
    const float sum = tile.sum[i];
    float* row = s.stage + i * kStride;
    if (sum == 0) clear_rows(row, 1, p.value_dim);
    write_row<T>(p.out, unit.batch, unit.head, query, row, p.value_dim, sum == 0 ? 0.0f : 1 / sum);
    lse[query] = sum == 0 ? -kInfinity : float(tile.max[i] * 0.6931471805599453 + std::log(double(sum)));
  }
}

template <class T>
void run(const BlockSparseParams& p, Scratch& s, const Unit& unit) {
  if (unit.count == 0) return;
  const int tiles = int((unit.count + kQueries - 1) / kQueries);
  const int64_t kv_head = unit.head / (p.heads / p.kv_heads);
  for (int t = 0; t < tiles; ++t) pack_queries<T>(p, s, unit, t);
  KeyList list(p, unit);
  while (list.next(*s.tile)) {
    pack_keys<T>(p, s, *s.tile, unit.batch, kv_head);
    for (int t = 0; t < tiles; ++t) {
      const int64_t first = t * kQueries, left = unit.count - first,
                    count = left < kQueries ? left : kQueries;
      if (!look(p, *s.tile, unit.first + first, count, *s.visible)) continue;
      attend<T>(p, s, s.queries[t], s.tile->keys, round_up(count, kLanes));
    }
  }
  for (int t = 0; t < tiles; ++t) {
    const int64_t first = t * kQueries, left = unit.count - first;
    finish<T>(p, s, unit, first, left < kQueries ? left : kQueries, s.queries[t]);
  }
}

// ---- all units, the dearest first ----

// Blocks of keys that a unit has to look at, nearly.
int64_t cost_of(const BlockSparseParams& p, const Unit& unit) {
  if (unit.count == 0) return 0;
  const BlockLists& lists = p.mask.q2k;
  const int64_t listed = lists.counts[row_of(lists, unit.batch, unit.head, unit.block)];
  const KeyRange first = key_range(p, unit.first), last = key_range(p, unit.first + unit.count - 1);
  const int64_t reach = (last.to - first.from + p.mask.block_kv - 1) / p.mask.block_kv;
  return reach <= 0 ? 0 : listed < reach ? listed : reach;
}

// order: units by falling cost, and by number where costs are equal. A counting sort; starts has
// capacity + 2 entries.
void order_units(const BlockSparseParams& p, int64_t* order, int64_t* starts) {
  const int64_t units = unit_count(p), highest = p.mask.q2k.capacity;
  std::memset(starts, 0, size_t(highest + 2) * sizeof(int64_t));
  for (int64_t i = 0; i < units; ++i) ++starts[highest - cost_of(p, unit_at(p, i)) + 1];
  for (int64_t c = 0; c <= highest; ++c) starts[c + 1] += starts[c];
  for (int64_t i = 0; i < units; ++i) order[starts[highest - cost_of(p, unit_at(p, i))]++] = i;
}

template <class T>
void forward(const BlockSparseParams& p, int threads) {
  Arena arena{static_cast<char*>(p.workspace)};
  int64_t* const order = arena.take<int64_t>(unit_count(p));
  order_units(p, order, arena.take<int64_t>(p.mask.q2k.capacity + 2));
  char* const base = arena.base + arena.used;
  const int64_t bytes = Scratch(p, nullptr).arena.used;
  parallel_queue(unit_count(p), threads, [&](int64_t i, int slot) {
    Scratch scratch(p, base + slot * bytes);
    run<T>(p, scratch, unit_at(p, order[i]));
  });
}

}  // namespace

int64_t block_sparse_fwd_workspace_cpu(const BlockSparseParams& p, int threads) {
  if (p.dtype == DType::kFloat64) return 0;
  Arena arena{nullptr};
  arena.take<int64_t>(unit_count(p));
  arena.take<int64_t>(p.mask.q2k.capacity + 2);
  return arena.used + (threads > 1 ? threads : 1) * Scratch(p, nullptr).arena.used;
}

void block_sparse_fwd_cpu(const BlockSparseParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return block_sparse_fwd_float64_cpu(p, threads);
    case DType::kFloat16:
      return forward<fp16>(p, threads);
    case DType::kBFloat16:
      return forward<bf16>(p, threads);
    default:
      return forward<float>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
