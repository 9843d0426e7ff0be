// Gradients of block-sparse attention, for float32 and the 16-bit floats, in float32. With P = exp(S - lse)
// and delta[i] = dout[i] . out[i] - dlse[i], per tile of keys (rows) and queries (lanes):
//
//   S = K Q^T, dP = V dO^T, dS = P (dP - delta);  dV += P dO, dK += scale dS Q, dQ += scale dS^T K
//
// five products, each pair of query and key met once. The unit of work is a range of key blocks of one head
// of k and v: its dK and dV are summed in one place, and dQ in the unit's own copy. How many ranges a head is
// cut into, and where, depends on shapes and lists alone, so results do not depend on the threads. Units are
// taken head by head, and who ends the last one of a head adds up its copies: so there need to be copies of
// no more heads than threads, which are still in cache then. A tile takes its queries from several blocks of
// the list, without those that see no key.
//
// Roofline: 10 D FLOPs a pair, 12 vector instructions of softmax beside 5 D / 16 of products: FMA-bound.
#include "attention/block_sparse_simd.h"

namespace tilewright::TW_ISA {
namespace {

constexpr int64_t kEnoughUnits = 32;                // for machines with many cores
constexpr int64_t kMostCopies = int64_t{64} << 20;  // floats of dQ that more ranges may cost

int64_t dq_width(const BlockSparseParams& p) { return round_up(p.head_dim, kLanes); }
int64_t dq_size(const BlockSparseParams& p) { return p.q_len * dq_width(p); }

int64_t range_count(const BlockSparseParams& p) {
  const int64_t heads = p.batch * p.kv_heads, all = p.batch * p.heads * dq_size(p);
  if (heads == 0 || all == 0) return 1;
  int64_t wanted = (kEnoughUnits + heads - 1) / heads;
  wanted = wanted < kMostCopies / all ? wanted : kMostCopies / all;
  wanted = wanted < p.mask.k2q.rows ? wanted : p.mask.k2q.rows;
  return wanted > 1 ? wanted : 1;
}

int64_t group_of(const BlockSparseParams& p) { return p.heads / p.kv_heads; }
int64_t head_count(const BlockSparseParams& p) { return p.batch * p.kv_heads; }  // of k and v

// Where the heads of k and v keep their copies of dQ: at a place that a head holds from its first unit to its
// last. Units are taken in order, so no more heads than threads are at it at any time. (A critical section
// with a name would be a symbol that the objects of all instruction sets share.)
struct Places {
  struct Head {
    int32_t place, units_left;
  };
  int32_t *free, *free_count;
  int64_t* next;  // unit
  Head* heads;

  void reset(int64_t head_total, int64_t ranges, int64_t places) {
    *next = 0;
    *free_count = int32_t(places);
    for (int64_t i = 0; i < places; ++i) free[i] = int32_t(places - 1 - i);
    for (int64_t i = 0; i < head_total; ++i) heads[i] = {-1, int32_t(ranges)};
  }

  int64_t take_unit() { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

  int64_t place_of(int64_t head) {
    int32_t place;
#pragma omp critical
    {
      if (heads[head].place < 0) heads[head].place = free[--*free_count];
      place = heads[head].place;
    }
    return place;
  }

  // Whether that was the head's last unit.
  bool end_unit(int64_t head) {
    bool last;
#pragma omp critical
    last = --heads[head].units_left == 0;
    return last;
  }

  void leave(int64_t head) {
#pragma omp critical
    free[(*free_count)++] = heads[head].place;
  }
};

// What lies in the workspace for all units.
struct Shared {
  Arena arena;
  float *exponents, *deltas;  // [batch][heads][q_len]: lse as an exponent of 2 (inf for empty rows), delta
  float* dq;                  // [place][head of the group][range][q_len][dq_width]
  uint8_t* touched;           // [place][head of the group][range][blocks of queries]: whether dq is set there
  Places places;
  int64_t place_count;

  Shared(const BlockSparseParams& p, char* base, int threads) : arena{base} {
    const int64_t rows = p.batch * p.heads, heads = head_count(p);
    place_count = threads < 1 ? 1 : threads < heads ? threads : heads;
    const int64_t copies = place_count * group_of(p) * range_count(p);
    exponents = arena.take<float>(rows * p.q_len);
    deltas = arena.take<float>(rows * p.q_len);
    dq = arena.take<float>(copies * dq_size(p));
    touched = arena.take<uint8_t>(copies * p.mask.q2k.rows);
    places.free = arena.take<int32_t>(place_count);
    places.free_count = arena.take<int32_t>(1);
    places.next = arena.take<int64_t>(1);
    places.heads = arena.take<Places::Head>(heads);
  }
};

// ---- tiles of queries ----

struct Run {
  int64_t first;  // queries [first, first + count), at a place in the tile
  int32_t count, offset;
};

struct QueryTile {
  Run runs[kQueries];
  int run_count, queries;
  Visible visible;
};

// Goes along the list of a block of keys, for some keys of the block, past queries that see none of them.
class QueryList {
 public:
  QueryList(const BlockSparseParams& params, int64_t batch, int64_t head, int64_t block, Keys keys)
      : p(params), keys_(keys) {
    const BlockLists& lists = p.mask.k2q;
    const int64_t row = row_of(lists, batch, head, block);
    count_ = lists.counts[row];
    indices_ = lists.indices + row * lists.capacity;
    tables_ = lists.bits == nullptr ? nullptr : lists.bits + row * lists.capacity;
    everything_ = keys.count < 64 ? (uint64_t{1} << keys.count) - 1 : ~uint64_t{0};
  }

  bool next(QueryTile& tile) {
    tile.run_count = tile.queries = 0;
    tile.visible.all = true;
    while (tile.queries < kQueries && at_ < count_) take(tile);
    for (int i = tile.queries; i % kLanes != 0; ++i) tile.visible.set(i, everything_);
    return tile.queries > 0;
  }

 private:
  // The next run of the block of queries at hand; at its end, on to the next block.
  void take(QueryTile& tile) {
    const int64_t start = int64_t{indices_[at_]} * p.mask.block_q;
    int64_t end = start + p.mask.block_q;
    end = end < p.q_len ? end : p.q_len;
    keys_.table = tables_ == nullptr ? -1 : tables_[at_];
    int64_t query = done_ > start ? done_ : start;
    while (query < end && bits_of_query(query) == 0) ++query;
    Run run{query, 0, tile.queries};
    for (; query < end && tile.queries < kQueries; ++query) {
      const uint64_t bits = bits_of_query(query);
      if (bits == 0) break;
      tile.visible.all &= bits == everything_;
      tile.visible.set(tile.queries++, bits);
      ++run.count;
    }
    if (run.count > 0) tile.runs[tile.run_count++] = run;
    done_ = query;
    if (query >= end) ++at_;
  }

  uint64_t bits_of_query(int64_t query) const { return visible_bits(p, keys_, key_range(p, query), query); }

  const BlockSparseParams& p;
  Keys keys_;
  const int32_t *indices_, *tables_;
  uint64_t everything_;
  int64_t count_, at_ = 0, done_ = 0;
};

// ---- scratch ----

struct Scratch {
  Arena arena;
  float *k, *v, *dk, *dv;           // [kKeys][kStride]
  float *q, *dout;                  // [kQueries][kStride]
  float *q_lanes, *dout_lanes;      // transposed
  float *scores, *dscores;          // [kKeys][kQueries]
  float *exponents, *deltas, *row;  // [kQueries]; [kStride]
  QueryTile* tile;

  Scratch(const BlockSparseParams& p, char* base) : arena{base} {
    for (float** rows : {&k, &v, &dk, &dv}) *rows = arena.take<float>(kKeys * kStride);
    for (float** rows : {&q, &dout}) *rows = arena.take<float>(kQueries * kStride);
    q_lanes = arena.take<float>(round_up(p.head_dim, kLanes) * kQueries);
    dout_lanes = arena.take<float>(round_up(p.value_dim, kLanes) * kQueries);
    for (float** rows : {&scores, &dscores}) *rows = arena.take<float>(kKeys * kQueries);
    for (float** rows : {&exponents, &deltas}) *rows = arena.take<float>(kQueries);
    row = arena.take<float>(kStride);
    tile = arena.take<QueryTile>(1);
  }
};

// ---- what each query brings ----

template <class T>
void prepare_query(const BlockSparseParams& p, const Shared& shared, float* out, float* dout, int64_t row,
                   int64_t i) {
  const int64_t batch = row / p.heads, head = row % p.heads, at = row * p.q_len + i;
  read_floats(out, row_at<T>(p.out, batch, head, i), p.out.inner, p.value_dim);
  read_floats(dout, row_at<T>(p.dout, batch, head, i), p.dout.inner, p.value_dim);
  Float sum_of = splat(0.0f);
  for (int64_t d = 0; d < p.value_dim; d += kLanes) sum_of = fma(load(out + d), load(dout + d), sum_of);
  float delta = float(sum(sum_of));
  if (p.dlse != nullptr) delta -= static_cast<const float*>(p.dlse)[at];
  const float lse = static_cast<const float*>(p.lse)[at];
  const bool empty = lse == -__builtin_inff();
  shared.exponents[at] = empty ? __builtin_inff() : float(double(lse) * 1.4426950408889634);
  shared.deltas[at] = empty ? 0 : delta;
}

template <class T>
void pack_queries(const BlockSparseParams& p, const Shared& shared, Scratch& s, int64_t batch, int64_t head) {
  const QueryTile& tile = *s.tile;
  for (int i = 0; i < tile.run_count; ++i) {
    const Run& run = tile.runs[i];
    const int64_t at = run.offset * kStride, from = (batch * p.heads + head) * p.q_len + run.first;
    read_rows<Singles, T>(s.q + at, p.q, batch, head, run.first, run.count, p.head_dim);
    read_rows<Singles, T>(s.dout + at, p.dout, batch, head, run.first, run.count, p.value_dim);
    std::memcpy(s.exponents + run.offset, shared.exponents + from, size_t(run.count) * sizeof(float));
    std::memcpy(s.deltas + run.offset, shared.deltas + from, size_t(run.count) * sizeof(float));
  }
  const int64_t lanes = round_up(tile.queries, kLanes), unused = lanes - tile.queries;
  clear_rows(s.q + tile.queries * kStride, unused, p.head_dim);
  clear_rows(s.dout + tile.queries * kStride, unused, p.value_dim);
  for (int64_t i = tile.queries; i < lanes; ++i) {
    s.exponents[i] = __builtin_inff();
    s.deltas[i] = 0;
  }
  transpose(s.q_lanes, kQueries, s.q, kStride, lanes, p.head_dim);
  transpose(s.dout_lanes, kQueries, s.dout, kStride, lanes, p.value_dim);
}

// ---- scores to powers and their gradients ----

template <bool kCapped>
void weigh(const BlockSparseParams& p, Scratch& s, int keys, int lane) {
  const float factor = float((kCapped ? p.softcap : p.scale) * 1.4426950408889634);
  const float inner = kCapped ? float(p.scale / p.softcap) : 0;
  const Float exponent = load(s.exponents + lane), delta = load(s.deltas + lane);
  const Visible& visible = s.tile->visible;
  for (int j = 0; j < keys; ++j) {
    float* score = s.scores + j * kQueries + lane;
    float* dscore = s.dscores + j * kQueries + lane;
    Float x = load(score), slope = splat(1.0f);
    if constexpr (kCapped) {
      x = tanh(x * inner);
      slope = 1.0f - x * x;
    }
    Float power = exp2(fma(x, splat(factor), -exponent));
    if (!visible.all) {
      const Int words = load_words(visible.words[j / 32] + lane);
      power = where_bit(words, int32_t(uint32_t{1} << (j & 31)), power, splat(0.0f));
    }
    const Float gradient = power * (load(dscore) - delta);
    store(score, power);
    store(dscore, kCapped ? gradient * slope : gradient);
  }
}

// ---- a unit of work ----

struct Unit {
  int64_t batch, kv_head, range, place;
};

Unit unit_at(const BlockSparseParams& p, int64_t head, int64_t range, int64_t place) {
  return {head / p.kv_heads, head % p.kv_heads, range, place};
}

// A head's place among the copies, as a number of its group.
int64_t copy_at(const BlockSparseParams& p, const Unit& unit, int64_t in_group, int64_t range) {
  return (unit.place * group_of(p) + in_group) * range_count(p) + range;
}

// As the first to write to a block of queries, the product sets it; what it does not reach is zeroed before.
void add_to_dq(const BlockSparseParams& p, const Shared& shared, const Scratch& s, int64_t copy, int keys) {
  const int64_t width = dq_width(p);
  float* const dq = shared.dq + copy * dq_size(p);
  uint8_t* const touched = shared.touched + copy * p.mask.q2k.rows;
  for (int i = 0; i < s.tile->run_count; ++i) {
    const Run& run = s.tile->runs[i];
    const int64_t block = run.first / p.mask.block_q, start = block * p.mask.block_q;
    const int64_t left = p.q_len - start, count = left < p.mask.block_q ? left : p.mask.block_q;
    const bool set = !touched[block] && run.count == count;
    if (!touched[block] && !set) std::memset(dq + start * width, 0, size_t(count * width) * sizeof(float));
    touched[block] = 1;
    multiply<Singles, TileColumns>(
        {dq + run.first * width, width, s.dscores + run.offset, s.k, kStride, run.count, keys, !set}, width);
  }
}

template <class T>
void run_tile(const BlockSparseParams& p, const Shared& shared, Scratch& s, const Unit& unit,
              int64_t in_group, int keys) {
  const int queries = s.tile->queries;
  const int64_t lanes = round_up(queries, kLanes);
  pack_queries<T>(p, shared, s, unit.batch, unit.kv_head * group_of(p) + in_group);
  multiply<Singles, PackedRows>({s.scores, kQueries, s.k, s.q_lanes, kQueries, keys, p.head_dim, false},
                                lanes);
  multiply<Singles, PackedRows>({s.dscores, kQueries, s.v, s.dout_lanes, kQueries, keys, p.value_dim, false},
                                lanes);
  for (int lane = 0; lane < lanes; lane += kLanes)
    p.softcap > 0 ? weigh<true>(p, s, keys, lane) : weigh<false>(p, s, keys, lane);
  multiply<Singles, TileRows>({s.dv, kStride, s.scores, s.dout, kStride, keys, queries, true},
                              round_up(p.value_dim, kLanes));
  multiply<Singles, TileRows>({s.dk, kStride, s.dscores, s.q, kStride, keys, queries, true}, dq_width(p));
  add_to_dq(p, shared, s, copy_at(p, unit, in_group, unit.range), keys);
}

template <class T>
void run_keys(const BlockSparseParams& p, const Shared& shared, Scratch& s, const Unit& unit, int64_t block,
              const Keys& keys) {
  read_rows<Singles, T>(s.k, p.k, unit.batch, unit.kv_head, keys.first, keys.count, p.head_dim);
  read_rows<Singles, T>(s.v, p.v, unit.batch, unit.kv_head, keys.first, keys.count, p.value_dim);
  clear_rows(s.dk, keys.count, p.head_dim);
  clear_rows(s.dv, keys.count, p.value_dim);
  for (int64_t in_group = 0; in_group < group_of(p); ++in_group) {
    QueryList list(p, unit.batch, unit.kv_head * group_of(p) + in_group, block, keys);
    while (list.next(*s.tile)) run_tile<T>(p, shared, s, unit, in_group, keys.count);
  }
  for (int64_t j = 0; j < keys.count; ++j) {
    write_row<T>(p.dk, unit.batch, unit.kv_head, keys.first + j, s.dk + j * kStride, p.head_dim,
                 float(p.scale));
    write_row<T>(p.dv, unit.batch, unit.kv_head, keys.first + j, s.dv + j * kStride, p.value_dim);
  }
}

// Listed pairs of blocks of a block of keys, and one for the rest of its work.
int64_t cost_of(const BlockSparseParams& p, int64_t batch, int64_t kv_head, int64_t block) {
  const int64_t group = group_of(p);
  int64_t cost = 1;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    cost += p.mask.k2q.counts[row_of(p.mask.k2q, batch, head, block)];
  return cost;
}

template <class T>
void run(const BlockSparseParams& p, const Shared& shared, Scratch& s, const Unit& unit) {
  const int64_t blocks = p.mask.k2q.rows, ranges = range_count(p), rows = p.mask.q2k.rows;
  for (int64_t in_group = 0; in_group < group_of(p); ++in_group)
    std::memset(shared.touched + copy_at(p, unit, in_group, unit.range) * rows, 0, size_t(rows));
  int64_t total = 0, before = 0;
  for (int64_t block = 0; block < blocks; ++block) total += cost_of(p, unit.batch, unit.kv_head, block);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t cost = cost_of(p, unit.batch, unit.kv_head, block);
    const bool mine = (2 * before + cost) * ranges / (2 * total) == unit.range;
    before += cost;
    if (!mine) continue;
    const int64_t start = block * p.mask.block_kv, end = start + p.mask.block_kv;
    const int64_t length = end < p.kv_len ? end : p.kv_len;
    for (int64_t first = start; first < length; first += kKeys) {
      const int64_t left = length - first, count = left < kKeys ? left : kKeys;
      run_keys<T>(p, shared, s, unit, block, {first, int32_t(count), 0, -1, int32_t(first - start)});
    }
  }
}

// The sum of the copies for a block of queries of a head of q; unit: any of the head.
template <class T>
void finish_queries(const BlockSparseParams& p, const Shared& shared, float* sums, const Unit& unit,
                    int64_t in_group, int64_t block) {
  const int64_t start = block * p.mask.block_q, end = start + p.mask.block_q, width = dq_width(p);
  const int64_t head = unit.kv_head * group_of(p) + in_group, first = copy_at(p, unit, in_group, 0);
  const float* copies[kEnoughUnits];
  int count = 0;
  for (int64_t copy = first; copy < first + range_count(p); ++copy) {
    if (shared.touched[copy * p.mask.q2k.rows + block]) copies[count++] = shared.dq + copy * dq_size(p);
  }
  for (int64_t i = start; i < end && i < p.q_len; ++i) {
    for (int64_t d = 0; d < width; d += kLanes) {
      Float sum_of = splat(0.0f);
      for (int copy = 0; copy < count; ++copy) sum_of = sum_of + load(copies[copy] + i * width + d);
      store(sums + d, sum_of);
    }
    write_row<T>(p.dq, unit.batch, head, i, sums, p.head_dim, float(p.scale));
  }
}

// All units. Where every head has a place of its own, all threads together add up the copies at the end.
template <class T>
void run_all(const BlockSparseParams& p, Shared& shared, char* base, int64_t bytes, int threads) {
  const int64_t heads = head_count(p), ranges = range_count(p), blocks = p.mask.q2k.rows;
  const bool at_the_end = shared.place_count == heads;
  shared.places.reset(heads, ranges, shared.place_count);
  parallel_slots(threads > 1 ? threads : 1, threads, [&](int64_t, int slot) {
    Scratch s(p, base + slot * bytes);
    for (int64_t task; (task = shared.places.take_unit()) < heads * ranges;) {
      const int64_t head = task / ranges;
      const Unit unit = unit_at(p, head, task % ranges, shared.places.place_of(head));
      run<T>(p, shared, s, unit);
      if (!shared.places.end_unit(head) || at_the_end) continue;
      for (int64_t i = 0; i < group_of(p) * blocks; ++i)
        finish_queries<T>(p, shared, s.row, unit, i / blocks, i % blocks);
      shared.places.leave(head);
    }
  });
  if (!at_the_end) return;
  parallel_slots(p.batch * p.heads * blocks, threads, [&](int64_t task, int slot) {
    Scratch s(p, base + slot * bytes);
    const int64_t row = task / blocks, head = row / group_of(p);
    const Unit unit = unit_at(p, head, 0, shared.places.heads[head].place);
    finish_queries<T>(p, shared, s.row, unit, row % group_of(p), task % blocks);
  });
}

template <class T>
void backward(const BlockSparseParams& p, int threads) {
  Shared shared(p, static_cast<char*>(p.workspace), threads);
  char* const base = shared.arena.base + shared.arena.used;
  const int64_t bytes = Scratch(p, nullptr).arena.used;
  const int64_t blocks = p.mask.q2k.rows;
  parallel_slots(p.batch * p.heads * blocks, threads, [&](int64_t task, int slot) {
    Scratch s(p, base + slot * bytes);
    const int64_t start = task % blocks * p.mask.block_q, end = start + p.mask.block_q;
    for (int64_t i = start; i < end && i < p.q_len; ++i)
      prepare_query<T>(p, shared, s.row, s.q, task / blocks, i);
  });
  run_all<T>(p, shared, base, bytes, threads);
}

}  // namespace

int64_t block_sparse_bwd_workspace_cpu(const BlockSparseParams& p, int threads) {
  if (p.dtype == DType::kFloat64) return 0;
  return Shared(p, nullptr, threads).arena.used +
         (threads > 1 ? threads : 1) * Scratch(p, nullptr).arena.used;
}

void block_sparse_bwd_cpu(const BlockSparseParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return block_sparse_bwd_float64_cpu(p, threads);
    case DType::kFloat16:
      return backward<fp16>(p, threads);
    case DType::kBFloat16:
      return backward<bf16>(p, threads);
    default:
      return backward<float>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
