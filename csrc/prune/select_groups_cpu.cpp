// n of m neighbours on the CPU; compiled once per instruction-set level.
//
// An element's rank is the number of those in its group that beat it: that are larger, or equal and before
// it. It is kept if its rank is below n. Vectors hold whole groups if m divides their lanes: each turn of the
// groups by one lane brings another member to every lane, and "equal and before" is "larger than the key
// minus one".
//
// Roofline: each weight is read once, a byte is written for it; a vector takes 3 (m - 1) instructions and
// ten.
#include "core/threads.h"
#include "prune/segment_cpu.h"
#include "prune/select.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

constexpr int64_t kWork = 1 << 16;  // elements of a unit of work, about

Int permute(Int x, Int lanes) {
#if defined(__AVX512F__)
  return (Int)_mm512_permutexvar_epi32((__m512i)lanes, (__m512i)x);
#elif defined(__AVX2__)
  return (Int)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)lanes);
#else
  return Int{x[lanes[0]], x[lanes[1]], x[lanes[2]], x[lanes[3]]};
#endif
}

// The groups' turns: from which lane a lane gets a member, and 1 where that one stands before its own.
template <int M>
struct Turns {
  Int lanes[M], before[M];

  Turns() {
    for (int turn = 1; turn < M; ++turn) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int from = (lane + turn) % M;
        lanes[turn][lane] = lane - lane % M + from;
        before[turn][lane] = from < lane % M;
      }
    }
  }
};

template <int M>
Int kept_lanes(Int key, const Turns<M>& turns, Int n) {
  Int rank{};
  for (int turn = 1; turn < M; ++turn)
    rank -= (Int)(permute(key, turns.lanes[turn]) > key - turns.before[turn]);
  return (Int)(rank < n) & 1;
}

// Returns the highest key.
template <int M>
int32_t choose_vectors(const float* w, int64_t count, int32_t n, uint8_t* mask) {
  const Turns<M> turns;
  const Int most = splat(n);
  Int highest{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Int key = bits(load(w + i)) & 0x7fffffff;
    highest = max(highest, key);
    store_bytes(mask + i, kept_lanes<M>(key, turns, most));
  }
  if (i < count) {
    const Int key = bits(load_some(w + i, count - i)) & 0x7fffffff;
    highest = max(highest, key);
    uint8_t some[kLanes];
    store_bytes(some, kept_lanes<M>(key, turns, most));
    std::memcpy(mask + i, some, size_t(count - i));
  }
  return reduce_max(highest);
}

template <class R>
Key<R> choose_groups(const R* w, int64_t count, int32_t n, int32_t m, uint8_t* mask) {
  Key<R> keys[kLargestGroup], highest = 0;
  for (int64_t first = 0; first < count; first += m) {
    for (int i = 0; i < m; ++i) {
      keys[i] = key_of(w[first + i]);
      highest = keys[i] > highest ? keys[i] : highest;
    }
    for (int i = 0; i < m; ++i) {
      int32_t rank = 0;
      for (int j = 0; j < i; ++j) rank += keys[j] >= keys[i];
      for (int j = i + 1; j < m; ++j) rank += keys[j] > keys[i];
      mask[first + i] = rank < n;
    }
  }
  return highest;
}

template <class R>
Key<R> choose(const R* w, int64_t count, int32_t n, int32_t m, uint8_t* mask) {
  if constexpr (std::is_same_v<R, float>) {
    if (m == 2) return choose_vectors<2>(w, count, n, mask);
    if (m == 4) return choose_vectors<4>(w, count, n, mask);
    if constexpr (kLanes >= 8) {
      if (m == 8) return choose_vectors<8>(w, count, n, mask);
    }
    if constexpr (kLanes >= 16) {
      if (m == 16) return choose_vectors<16>(w, count, n, mask);
    }
  }
  return choose_groups(w, count, n, m, mask);
}

template <class T>
void run(const SelectGroupsParams& p, int threads) {
  using R = Real<T>;
  const int64_t segment = kSegment / p.m * p.m;
  const int64_t strips = divide_up(p.columns, segment), units = p.rows * strips;
  const int64_t batch = larger(kWork / smaller(segment, p.columns), 1);
  parallel_chunks(divide_up(units, batch), threads, [&](int64_t chunk) {
    R buffer[kSegment], scaled[kSegment];
    Key<R> highest = 0;
    for (int64_t unit = chunk * batch; unit < smaller((chunk + 1) * batch, units); ++unit) {
      const int64_t row = unit / strips, first = unit % strips * segment;
      const int64_t count = smaller(segment, p.columns - first);
      const R* w =
          read_segment(static_cast<const T*>(p.weight.data) + row * p.weight.row + first * p.weight.column,
                       p.weight.column, count, buffer);
      if (p.factors != nullptr) {
        const R* by = static_cast<const R*>(p.factors) + first;
        for (int64_t i = 0; i < count; ++i) scaled[i] = w[i] * by[i];
        w = scaled;
      }
      const Key<R> found = choose(w, count, p.n, p.m, p.mask + row * p.columns + first);
      highest = found > highest ? found : highest;
    }
    if (highest >= kInfinityKey<R>) report_invalid(p.invalid);
  });
}

}  // namespace

void select_groups_cpu(const SelectGroupsParams& p, int threads) {
  with_type(p.dtype, [&](auto type) { run<decltype(type)>(p, threads); });
}

}  // namespace tilewright::TW_ISA
