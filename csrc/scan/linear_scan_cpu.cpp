// Linear scans on the CPU, compiled once per instruction-set level.
//
// Roofline: a step reads a, b and writes h, 12 bytes in float32 against 2 FLOPs; its gradient reads a, g, h
// and writes da, db, 20 bytes against 4. Memory decides, if the work in registers stays below what hides
// behind it. Two ways to visit the elements:
//
// Across: lanes hold neighbours along the inner axis, a tile of them goes through time with its state in the
// L1 cache. Two loads, one fma and one store a vector.
// Along: lanes hold neighbours in time. A vector is composed by log2(kLanes) shifts of (a, b) pairs, 8 shifts
// and 9 multiplications for 16 steps; transposing 16 x 16 blocks in registers would take 12 shifts, and
// walk 16 rows at once, whose lines would compete for the same sets of the cache.
//
// The products of a in the second way, and in long sequences that are split, can overflow where the
// recurrence itself does not (0 * inf). So what comes out not finite is computed again, step by step.
#include <algorithm>

#include "core/threads.h"
#include "scan/linear_scan.h"
#include "scan/linear_scan_simd.h"

namespace tilewright::TW_ISA {
namespace {

using ::tilewright::scan::kMinAcross;
using ::tilewright::scan::LinearScanParams;
using ::tilewright::scan::ScanTensor;

// Inner elements of a tile, whose states stay in the L1 cache: the wider, the longer the streams.
constexpr int64_t kWidest = 4096;
constexpr int64_t kNarrowest = 64;
constexpr int64_t kTileRoom = kWidest + 2 * kMinAcross;
constexpr int64_t kUnitsPerThread = 4;  // tiles get narrower until there are so many
constexpr int64_t kBlockSteps = 1024;
constexpr int64_t kSerialElements = 1 << 14;  // below this, waking a second thread costs more than it saves
// Elements that one thread works through before it asks for more. Pages of fresh results are 2 MiB: two
// threads that come to one at a time would both fill it with zeros, and one of them for nothing.
constexpr int64_t kSmallestGroup = 1 << 15, kLargestGroup = 1 << 20, kGroupsPerThread = 16;
constexpr int64_t kStreamBytes = 8 << 20;  // results larger than the caches are written around them

// Sequences are split along the steps where there are fewer units than this, into chunks that are composed,
// then swept; kWave chunks at a time, so that the second visit finds them in a cache.
constexpr int64_t kFewUnits = 8;
constexpr int64_t kWave = 32;
constexpr int64_t kChunkElementsAlong = 8192;
constexpr int64_t kChunkElementsAcross = 32768;

template <class T>
struct Stream {
  T* data;              // of the sweep's first step; null: absent
  int64_t step, inner;  // in elements; step is negative where the sweep descends
  T* at(int64_t s) const { return data + s * step; }
};

// What one thread works on: one sequence of one row, and of it `width` neighbours along inner.
template <class T>
struct Unit {
  using Scalar = typename Numbers<T>::Scalar;
  Stream<const T> a, x, h;  // h: the state before the step
  Stream<T> y, da;
  Stream<const Scalar> h0;
  Stream<Scalar> dh0;
  int64_t steps, width;
  bool around_caches;
};

// What the steps of a block lie in, ascending in memory; h[i] is the state before step i.
template <class T>
struct Block {
  const T *a, *x, *h;
  T *y, *da;
  bool around_caches;
};

template <class T>
void read_strided(T* out, const T* in, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = in[i * stride];
}

template <class T>
void write_strided(T* out, const T* in, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i * stride] = in[i];
}

template <class T, class Lanes>
inline void put(T* p, Lanes value, bool around_caches) {
  if (around_caches) {
    stream(p, value);
  } else {
    store(p, value);
  }
}

// ---- along: lanes are neighbours in time ----

template <bool kBackward, class T, class Scalar>
inline Scalar take_step(Scalar a, Scalar x, Scalar before, Scalar carry, T* y, T* da) {
  if constexpr (kBackward) {
    const Scalar lam = plus(x, carry);
    store_scalar(y, lam);
    if (da != nullptr) store_scalar(da, times(lam, conjugate(before)));
    return times(conjugate(a), lam);
  } else {
    const Scalar h = times_plus(a, carry, x);
    store_scalar(y, h);
    return h;
  }
}

template <bool kBackward, bool kDescending, class T, class Scalar>
Scalar sweep_serially(const Block<T>& block, int64_t begin, int64_t count, Scalar carry) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = kDescending ? begin + count - 1 - k : begin + k;
    const bool wants_da = kBackward && block.da != nullptr;
    carry = take_step<kBackward>(to_scalar(block.a[i]), to_scalar(block.x[i]),
                                 wants_da ? to_scalar(block.h[i]) : Scalar{}, carry, block.y + i,
                                 wants_da ? block.da + i : nullptr);
  }
  return carry;
}

// kLanes steps as pairs: s -> a s + b is what happens to a state up to and with each of them.
template <bool kBackward, bool kDescending, class T, class Lanes>
inline void compose_vector(const T* a_in, Lanes x, Lanes& a, Lanes& b, Lanes one) {
  a = load(a_in);
  b = x;
  if constexpr (kBackward) {
    a = conjugate(a);
    b = times(a, x);
  }
  compose_lanes<kDescending, 1>(a, b, one);
}

template <bool kBackward, bool kDescending, class T, class Lanes>
inline Lanes sweep_vector(const Block<T>& block, int64_t i, Lanes carry, Lanes one) {
  const Lanes x = load(block.x + i);
  Lanes a, b;
  compose_vector<kBackward, kDescending>(block.a + i, x, a, b, one);
  const Lanes after = times_plus(a, carry, b);
  if (__builtin_expect(!all_finite(after), 0)) {
    return splat(sweep_serially<kBackward, kDescending>(block, i, kLanes, lane(carry, 0)));
  }
  if constexpr (kBackward) {
    const Lanes lam = plus(x, shift<kDescending, 1>(after, carry));
    put(block.y + i, lam, block.around_caches);
    if (block.da != nullptr) {
      put(block.da + i, times(lam, conjugate(load(block.h + i))), block.around_caches);
    }
  } else {
    put(block.y + i, after, block.around_caches);
  }
  return spread_last<kDescending>(after);
}

template <bool kBackward, bool kDescending, class T, class Scalar>
Scalar sweep_block(const Block<T>& block, int64_t count, Scalar carry) {
  if constexpr (Numbers<T>::kHasLanes) {
    typename Numbers<T>::Lanes one, state = splat(carry);
    set_one(one);
    int64_t done = 0;
    for (; done + kLanes <= count; done += kLanes) {
      const int64_t i = kDescending ? count - done - kLanes : done;
      state = sweep_vector<kBackward, kDescending>(block, i, state, one);
    }
    const int64_t rest = count - done;
    return sweep_serially<kBackward, kDescending>(block, kDescending ? 0 : done, rest, lane(state, 0));
  } else {
    return sweep_serially<kBackward, kDescending>(block, 0, count, carry);
  }
}

template <class T>
struct Scratch {
  alignas(64) T a[kBlockSteps], x[kBlockSteps], h[kBlockSteps], y[kBlockSteps], da[kBlockSteps];
};

// Steps s to s + count of a stream, ascending in memory.
template <bool kDescending, class T>
const T* steps_of(Stream<const T> from, int64_t s, int64_t count, T* scratch) {
  if (from.data == nullptr) return nullptr;
  const T* low = from.at(kDescending ? s + count - 1 : s);
  const int64_t stride = kDescending ? -from.step : from.step;
  if (stride == 1) return low;
  read_strided(scratch, low, stride, count);
  return scratch;
}

template <bool kDescending, class T>
T* room_for(Stream<T> to, int64_t s, int64_t count, T* scratch) {
  if (to.data == nullptr) return nullptr;
  const bool dense = to.step == (kDescending ? -1 : 1);
  return dense ? to.at(kDescending ? s + count - 1 : s) : scratch;
}

template <bool kDescending, class T>
void give_back(Stream<T> to, int64_t s, int64_t count, const T* scratch) {
  T* low = to.at(kDescending ? s + count - 1 : s);
  if (low != scratch) write_strided(low, scratch, kDescending ? -to.step : to.step, count);
}

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Float) == 0; }

template <bool kBackward, bool kDescending, class T, class Scalar>
Scalar sweep_steps(const Unit<T>& unit, int64_t begin, int64_t end, Scalar carry) {
  Scratch<T> scratch;
  int64_t count;
  for (int64_t s = begin; s < end; s += count) {
    count = end - s < kBlockSteps ? end - s : kBlockSteps;
    Block<T> block{};
    block.a = steps_of<kDescending>(unit.a, s, count, scratch.a);
    block.x = steps_of<kDescending>(unit.x, s, count, scratch.x);
    block.y = room_for<kDescending>(unit.y, s, count, scratch.y);
    if (kBackward) {
      block.h = steps_of<kDescending>(unit.h, s, count, scratch.h);
      block.da = room_for<kDescending>(unit.da, s, count, scratch.da);
    }
    const int64_t first = kDescending ? count % kLanes : 0;
    block.around_caches = unit.around_caches && is_aligned(block.y + first) &&
                          (block.da == nullptr || is_aligned(block.da + first));
    carry = sweep_block<kBackward, kDescending>(block, count, carry);
    give_back<kDescending>(unit.y, s, count, block.y);
    if (block.da != nullptr) give_back<kDescending>(unit.da, s, count, block.da);
  }
  return carry;
}

template <bool kBackward, bool kDescending, class T>
struct Along {
  using Scalar = typename Numbers<T>::Scalar;

  static void sweep(const Unit<T>& unit, int64_t begin, int64_t end, Scalar* carry) {
    const bool enters = kBackward && unit.da.data != nullptr && end == unit.steps && begin < end;
    *carry = sweep_steps<kBackward, kDescending>(unit, begin, enters ? end - 1 : end, *carry);
    if (!enters) return;  // else the state before the last step is h0
    const int64_t s = end - 1;
    const Scalar before = unit.h0.data != nullptr ? *unit.h0.data : Scalar{};
    *carry = take_step<kBackward>(to_scalar(*unit.a.at(s)), to_scalar(*unit.x.at(s)), before, *carry,
                                  unit.y.at(s), unit.da.at(s));
  }

  static void compose(const Unit<T>& unit, int64_t begin, int64_t end, Scalar* total_a, Scalar* total_b) {
    if constexpr (Numbers<T>::kHasLanes) {
      using Lanes = typename Numbers<T>::Lanes;
      alignas(64) T scratch[2][kLanes];
      Lanes one, a, b, product, sum{};
      set_one(one);
      product = one;
      for (int64_t s = begin; s < end; s += kLanes) {  // chunks that are composed are whole vectors
        const Lanes x = load(steps_of<kDescending>(unit.x, s, kLanes, scratch[0]));
        const T* a_in = steps_of<kDescending>(unit.a, s, kLanes, scratch[1]);
        compose_vector<kBackward, kDescending>(a_in, x, a, b, one);
        a = spread_last<kDescending>(a);
        sum = times_plus(a, sum, spread_last<kDescending>(b));
        product = times(a, product);
      }
      *total_a = lane(product, 0);
      *total_b = lane(sum, 0);
    }
  }
};

// ---- across: lanes are neighbours along inner ----

template <class T>
const T* row_of(Stream<const T> from, int64_t s, int64_t width, T* scratch) {
  if (from.inner == 1) return from.at(s);
  read_strided(scratch, from.at(s), from.inner, width);
  return scratch;
}

// Calls body(slot, offset) for vectors that cover `width` elements; the last one overlaps its neighbour where
// the width is no multiple.
template <class Body>
inline void for_each_slot(int64_t width, const Body& body) {
  int64_t slot = 0;
  for (; (slot + 1) * kLanes <= width; ++slot) body(slot, slot * kLanes);
  if (slot * kLanes < width) body(slot, width - kLanes);
}

template <bool kBackward, class T>
struct Across {
  using Scalar = typename Numbers<T>::Scalar;
  using Lanes = typename Numbers<T>::Lanes;
  static constexpr int64_t kSlots = kTileRoom / kLanes + 1;

  template <class H>
  static void sweep_row(const Unit<T>& unit, int64_t s, const H* before, Lanes* state, T* scratch_a,
                        T* scratch_x) {
    const T* a = row_of(unit.a, s, unit.width, scratch_a);
    const T* x = row_of(unit.x, s, unit.width, scratch_x);
    T *y = unit.y.at(s), *da = kBackward && unit.da.data != nullptr ? unit.da.at(s) : nullptr;
    const T *next_a = unit.a.at(s + 1), *next_x = unit.x.at(s + 1);
    for_each_slot(unit.width, [&](int64_t slot, int64_t i) {
      __builtin_prefetch(next_a + i);  // a row may end at a page, where the hardware's prefetch stops
      __builtin_prefetch(next_x + i);
      if constexpr (kBackward) {
        const Lanes lam = plus(load(x + i), state[slot]);
        put(y + i, lam, unit.around_caches);
        if (da != nullptr) put(da + i, times(lam, conjugate(load(before + i))), unit.around_caches);
        state[slot] = times(conjugate(load(a + i)), lam);
      } else {
        const Lanes h = times_plus(load(a + i), state[slot], load(x + i));
        put(y + i, h, unit.around_caches);
        state[slot] = h;
      }
    });
  }

  static void sweep(const Unit<T>& unit, int64_t begin, int64_t end, Scalar* carry) {
    alignas(64) T scratch[3][kTileRoom];
    alignas(64) Lanes state[kSlots];
    for_each_slot(unit.width, [&](int64_t slot, int64_t i) { state[slot] = load(carry + i); });
    const bool enters = kBackward && unit.da.data != nullptr && end == unit.steps;
    const int64_t plain_end = enters ? end - 1 : end;
    for (int64_t s = begin; s < plain_end; ++s) {
      const T* before = nullptr;
      if (kBackward && unit.da.data != nullptr) before = row_of(unit.h, s, unit.width, scratch[2]);
      sweep_row(unit, s, before, state, scratch[0], scratch[1]);
    }
    if (enters && begin < end) {
      alignas(64) Scalar before[kTileRoom] = {};
      if (unit.h0.data != nullptr) read_strided(before, unit.h0.data, unit.h0.inner, unit.width);
      sweep_row(unit, end - 1, before, state, scratch[0], scratch[1]);
    }
    for_each_slot(unit.width, [&](int64_t slot, int64_t i) { store(carry + i, state[slot]); });
  }

  static void compose(const Unit<T>& unit, int64_t begin, int64_t end, Scalar* total_a, Scalar* total_b) {
    alignas(64) T scratch[2][kTileRoom];
    alignas(64) Lanes product[kSlots], sum[kSlots];
    for_each_slot(unit.width, [&](int64_t slot, int64_t) {
      set_one(product[slot]);
      sum[slot] = Lanes{};
    });
    for (int64_t s = begin; s < end; ++s) {
      const T* a_in = row_of(unit.a, s, unit.width, scratch[0]);
      const T* x_in = row_of(unit.x, s, unit.width, scratch[1]);
      for_each_slot(unit.width, [&](int64_t slot, int64_t i) {
        const Lanes a = kBackward ? conjugate(load(a_in + i)) : load(a_in + i), x = load(x_in + i);
        product[slot] = times(a, product[slot]);
        sum[slot] = kBackward ? times(a, plus(x, sum[slot])) : times_plus(a, sum[slot], x);
      });
    }
    for_each_slot(unit.width, [&](int64_t slot, int64_t i) {
      store(total_a + i, product[slot]);
      store(total_b + i, sum[slot]);
    });
  }
};

// ---- from the tensors to units ----

struct Plan {
  bool across;
  int64_t rows, tiles, units;  // units = sequences * rows * tiles
  int64_t chunk;               // steps of a chunk where sequences are split, else 0
};

// Where sequences are split decides about bits: that is for the shape alone to say, as the narrowest tiles
// have it. How wide tiles are does not show in the results.
Plan plan_of(const LinearScanParams& p, bool has_lanes, int threads) {
  Plan plan{};
  plan.across = has_lanes && lanes_across(p);
  plan.rows = plan.across ? p.outer : p.outer * p.inner;
  const auto cut_into = [&](int64_t width) {
    plan.tiles = plan.across ? (p.inner + width - 1) / width : 1;
    plan.units = p.sequences * plan.rows * plan.tiles;
  };
  cut_into(kNarrowest);
  const int64_t narrow = p.inner < kNarrowest ? p.inner : kNarrowest;
  const int64_t chunk = plan.across ? kChunkElementsAcross / narrow : kChunkElementsAlong;
  if (has_lanes && plan.units < kFewUnits && p.length >= 4 * chunk) {
    plan.chunk = chunk / kLanes * kLanes;
    return plan;
  }
  const int64_t enough = threads > 1 ? kUnitsPerThread * threads : 1;
  int64_t width = kWidest;
  for (cut_into(width); plan.across && plan.units < enough && width > kNarrowest; cut_into(width)) width /= 2;
  return plan;
}

// Where a row lies in a tensor, and where the sequence's first visited step does.
int64_t row_offset(const LinearScanParams& p, const ScanTensor& t, int64_t row, int64_t inner) {
  int64_t offset = inner * t.inner;
  for (int axis = p.outer_axes - 1; axis >= 0; --axis) {
    offset += row % p.sizes[axis] * t.outer[axis];
    row /= p.sizes[axis];
  }
  return offset;
}

template <class T>
Stream<T> stream_of(const LinearScanParams& p, const ScanTensor& t, int64_t row, int64_t inner,
                    int64_t first) {
  if (t.data == nullptr) return {};
  auto* data = static_cast<T*>(t.data) + row_offset(p, t, row, inner) + first * t.step;
  return {data, p.descending ? -t.step : t.step, t.inner};
}

template <class T>
Stream<T> state_of(const LinearScanParams& p, const ScanTensor& t, int64_t row, int64_t inner,
                   int64_t sequence) {
  if (t.data == nullptr) return {};
  return {static_cast<T*>(t.data) + row_offset(p, t, row, inner) + sequence * t.sequence, 0, t.inner};
}

template <class T>
Unit<T> unit_of(const LinearScanParams& p, const Plan& plan, int64_t index) {
  using Scalar = typename Numbers<T>::Scalar;
  const int64_t tile = index % plan.tiles, sequence = index / plan.tiles / plan.rows;
  int64_t row = index / plan.tiles % plan.rows, inner = 0;
  Unit<T> unit{};
  unit.width = 1;
  if (plan.across) {
    const int64_t blocks = p.inner / kMinAcross;
    inner = blocks * tile / plan.tiles * kMinAcross;
    const int64_t end = tile + 1 < plan.tiles ? blocks * (tile + 1) / plan.tiles * kMinAcross : p.inner;
    unit.width = end - inner;
  } else {
    inner = row % p.inner;
    row /= p.inner;
  }
  const int64_t start = p.seqlens != nullptr ? p.seqlens[sequence] : 0;
  unit.steps = (p.seqlens != nullptr ? p.seqlens[sequence + 1] : p.length) - start;
  const int64_t first = p.descending ? start + unit.steps - 1 : start;
  unit.a = stream_of<const T>(p, p.a, row, inner, first);
  unit.x = stream_of<const T>(p, p.x, row, inner, first);
  unit.y = stream_of<T>(p, p.y, row, inner, first);
  if (p.backward && p.da.data != nullptr) {
    unit.da = stream_of<T>(p, p.da, row, inner, first);
    unit.h = stream_of<const T>(p, p.h, row, inner, first);
    unit.h.data += unit.h.step;  // the sweep visits next what came before
  }
  unit.h0 = state_of<const Scalar>(p, p.h0, row, inner, sequence);
  unit.dh0 = state_of<Scalar>(p, p.dh0, row, inner, sequence);
  const int64_t bytes = p.outer * p.inner * p.length * int64_t{sizeof(T)};
  unit.around_caches = bytes >= kStreamBytes;
  if (plan.across) {
    const bool rows_aligned = unit.y.step * int64_t{sizeof(T)} % int64_t{sizeof(Float)} == 0;
    unit.around_caches = unit.around_caches && rows_aligned && unit.width % kLanes == 0 &&
                         is_aligned(unit.y.data) && (unit.da.data == nullptr || is_aligned(unit.da.data));
  }
  return unit;
}

// ---- the sweep of a unit ----

template <class T, class Scalar>
void enter(const Unit<T>& unit, bool backward, Scalar* carry) {
  for (int64_t i = 0; i < unit.width; ++i) {
    carry[i] = !backward && unit.h0.data != nullptr ? unit.h0.data[i * unit.h0.inner] : Scalar{};
  }
}

template <class T, class Scalar>
void leave(const Unit<T>& unit, const Scalar* carry) {
  if (unit.dh0.data != nullptr) write_strided(unit.dh0.data, carry, unit.dh0.inner, unit.width);
}

template <class Way, class T>
void sweep_whole(const LinearScanParams& p, const Unit<T>& unit) {
  alignas(64) typename Way::Scalar carry[kTileRoom];
  enter(unit, p.backward, carry);
  Way::sweep(unit, 0, unit.steps, carry);
  leave(unit, carry);
}

template <class Way, class T>
void sweep_split(const LinearScanParams& p, const Unit<T>& unit, int64_t chunk, int threads) {
  using Scalar = typename Way::Scalar;
  constexpr int64_t kRoom = 2 * kNarrowest;  // tiles are the narrowest where sequences are split
  struct Chunk {
    alignas(64) Scalar a[kRoom], b[kRoom], carry[kRoom];
  };
  Chunk chunks[kWave];
  alignas(64) Scalar carry[kRoom];
  enter(unit, p.backward, carry);
  const auto end_of = [&](int64_t begin) { return begin + chunk < unit.steps ? begin + chunk : unit.steps; };
  for (int64_t wave = 0; wave < unit.steps; wave += kWave * chunk) {
    const int64_t left = (unit.steps - wave + chunk - 1) / chunk, count = left < kWave ? left : kWave;
    parallel_chunks(count, threads, [&](int64_t c) {
      const int64_t begin = wave + c * chunk;
      if (begin + chunk <= unit.steps) Way::compose(unit, begin, begin + chunk, chunks[c].a, chunks[c].b);
    });
    for (int64_t c = 0; c < count; ++c) {
      const int64_t begin = wave + c * chunk;
      std::memcpy(chunks[c].carry, carry, sizeof carry);
      if (begin + chunk > unit.steps) continue;
      bool sound = true;
      for (int64_t i = 0; i < unit.width; ++i) {
        const Scalar after = times_plus(chunks[c].a[i], carry[i], chunks[c].b[i]);
        sound &= is_finite(after) || is_nan(carry[i]);
        carry[i] = after;
      }
      if (sound) continue;
      std::memcpy(carry, chunks[c].carry, sizeof carry);
      Way::sweep(unit, begin, begin + chunk, carry);
    }
    parallel_chunks(count, threads, [&](int64_t c) {
      const int64_t begin = wave + c * chunk;
      Way::sweep(unit, begin, end_of(begin), chunks[c].carry);
    });
    std::memcpy(carry, chunks[count - 1].carry, sizeof carry);
  }
  leave(unit, carry);
}

template <class Way, class T>
void sweep_units(const LinearScanParams& p, const Plan& plan, int threads) {
  if constexpr (Numbers<T>::kHasLanes) {
    for (int64_t index = 0; plan.chunk != 0 && index < plan.units; ++index) {
      sweep_split<Way>(p, unit_of<T>(p, plan, index), plan.chunk, threads);
    }
    if (plan.chunk != 0) return;
  }
  const int64_t elements = p.outer * p.inner * p.length, each = elements / plan.units + 1;
  const int64_t share = elements / (kGroupsPerThread * (threads > 1 ? threads : 1));
  const int64_t wanted = std::clamp(share, kSmallestGroup, kLargestGroup);
  const int64_t group = each < wanted ? wanted / each : 1;
  const int64_t groups = (plan.units + group - 1) / group;
  parallel_chunks(groups, elements < kSerialElements ? 1 : threads, [&](int64_t g) {
    const int64_t end = (g + 1) * group < plan.units ? (g + 1) * group : plan.units;
    for (int64_t index = g * group; index < end; ++index) {
      sweep_whole<Way>(p, unit_of<T>(p, plan, index));
    }
  });
}

template <bool kBackward, class T>
void sweep_all(const LinearScanParams& p, int threads) {
  const Plan plan = plan_of(p, Numbers<T>::kHasLanes, threads);
  if (plan.units == 0) return;
  if constexpr (Numbers<T>::kHasLanes) {
    if (plan.across) return sweep_units<Across<kBackward, T>, T>(p, plan, threads);
  }
  if (p.descending) {
    sweep_units<Along<kBackward, true, T>, T>(p, plan, threads);
  } else {
    sweep_units<Along<kBackward, false, T>, T>(p, plan, threads);
  }
}

template <class T>
void run_as(const LinearScanParams& p, int threads) {
  if (p.backward) {
    sweep_all<true, T>(p, threads);
  } else {
    sweep_all<false, T>(p, threads);
  }
}

}  // namespace

void linear_scan_cpu(const LinearScanParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run_as<float>(p, threads);
    case DType::kBFloat16:
      return run_as<bf16>(p, threads);
    case DType::kFloat16:
      return run_as<fp16>(p, threads);
    case DType::kFloat64:
      return run_as<double>(p, threads);
    case DType::kComplex64:
      return run_as<Cx64>(p, threads);
    default:
      return run_as<Cx128>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
