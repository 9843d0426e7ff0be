// The best of many, or of each row, on the CPU; compiled once per instruction-set level.
//
// The order of magnitudes is that of their bits as integers, so the key of the last one kept, the threshold,
// is found by counting: 16 bits of it a pass, from the top. Whoever is above is kept, and of the equals the
// first, which takes the numbers of equals in each chunk only where some of them are left out. Nothing is
// sorted.
//
// Where there are many, a sample says first between which keys the threshold lies: one pass then counts those
// above and gathers the few between, among which the threshold is found. If the sample misled, all digits are
// counted.
//
// Roofline: one pass that reads, one that reads and writes a byte.
#include "core/threads.h"
#include "prune/segment_cpu.h"
#include "prune/select.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

constexpr int64_t kChunk = 1 << 16;  // elements of a unit of work
constexpr int kDigitBits = 16, kBins = 1 << kDigitBits;
constexpr int64_t kMany = 1 << 20, kSample = 1 << 15;
constexpr int64_t kListed = kChunk / 16, kList = kListed + kSegment;  // gathered of a chunk; room for them

// What lies in the workspace: tables of the chunks, then a histogram for each thread.
struct Chunks {
  const SelectParams& p;
  int64_t* first;   // [count + 1]: chunks first[s] .. first[s + 1] - 1 are of source s
  int64_t* equals;  // [all chunks]: elements equal to the threshold; later those before the chunk
  uint32_t* bins;   // [threads][kBins]
  int64_t* listed;  // [all chunks]: how many of a chunk are gathered; -1: more than there is room for
  int64_t* above;   // [all chunks]: elements above the gathered ones
  float* sample;    // [kSample]
  float* lists;     // [all chunks][kList]

  static int64_t of(const SelectSource& source) { return divide_up(source.rows * source.columns, kChunk); }

  static int64_t all(const SelectParams& p) {
    int64_t chunks = 0;
    for (int64_t s = 0; s < p.count; ++s) chunks += of(p.sources[s]);
    return chunks;
  }

  explicit Chunks(const SelectParams& params) : p(params) {
    bins = static_cast<uint32_t*>(p.workspace);
    first = reinterpret_cast<int64_t*>(bins + int64_t{p.threads} * kBins);
    equals = first + p.count + 1;
    listed = equals + all(p);
    above = listed + all(p);
    sample = reinterpret_cast<float*>(above + all(p));
    lists = sample + kSample;
    first[0] = 0;
    for (int64_t s = 0; s < p.count; ++s) first[s + 1] = first[s] + of(p.sources[s]);
  }

  int64_t count() const { return first[p.count]; }

  static int64_t elements(const SelectParams& p) {
    int64_t numel = 0;
    for (int64_t s = 0; s < p.count; ++s) numel += p.sources[s].rows * p.sources[s].columns;
    return numel;
  }

  static int64_t bytes(const SelectParams& p) {
    const int64_t sampled = elements(p) < kMany ? 0 : (kSample + all(p) * kList) * int64_t{sizeof(float)};
    return int64_t{p.threads} * kBins * int64_t{sizeof(uint32_t)} + (3 * all(p) + p.count + 1) * 8 + sampled;
  }

  int64_t source_of(int64_t chunk) const {
    int64_t low = 0, high = p.count;  // first[low] <= chunk < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }
};

// Calls body(values, count, mask) for the pieces of a chunk, in order.
template <class T, class Body>
void read_pieces(const SelectSource& source, int64_t begin, int64_t end, const Body& body) {
  Real<T> buffer[kSegment];
  const bool flat = source.rows == 1 || source.scores.row == source.columns * source.scores.column;
  const int64_t columns = flat ? source.rows * source.columns : source.columns;
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / columns, column = at % columns;
    const int64_t count = smaller(smaller(kSegment, end - at), columns - column);
    const T* from =
        static_cast<const T*>(source.scores.data) + row * source.scores.row + column * source.scores.column;
    body(read_segment(from, source.scores.column, count, buffer), count, source.mask + at);
    at += count;
  }
}

template <class R, class Body>
void read_chunk(const Chunks& chunks, int64_t chunk, const Body& body) {
  const int64_t s = chunks.source_of(chunk);
  const SelectSource& source = chunks.p.sources[s];
  const int64_t begin = (chunk - chunks.first[s]) * kChunk;
  const int64_t end = smaller(begin + kChunk, source.rows * source.columns);
  if constexpr (std::is_same_v<R, double>) {
    read_pieces<double>(source, begin, end, body);
  } else if (source.dtype == DType::kFloat32) {
    read_pieces<float>(source, begin, end, body);
  } else if (source.dtype == DType::kBFloat16) {
    read_pieces<bf16>(source, begin, end, body);
  } else {
    read_pieces<fp16>(source, begin, end, body);
  }
}

// The threshold, and how many elements are equal to it and how many of those are kept.
template <class R>
struct Threshold {
  Key<R> key;
  int64_t equal, kept;
};

// Where a pass finds its values: in the sources, or among those that are gathered.
struct ReadSources {
  const Chunks& chunks;
  template <class R, class Body>
  void read(int64_t chunk, const Body& body) const {
    read_chunk<R>(chunks, chunk, body);
  }
};

struct ReadLists {
  const Chunks& chunks;
  template <class R, class Body>
  void read(int64_t chunk, const Body& body) const {
    body(chunks.lists + chunk * kList, chunks.listed[chunk], static_cast<uint8_t*>(nullptr));
  }
};

// Counts the next digit of those whose higher digits are `prefix`.
template <class R, class From>
void count_digits(const From& from, int shift, Key<R> prefix) {
  const Chunks& chunks = from.chunks;
  const int threads = chunks.p.threads;
  std::memset(chunks.bins, 0, size_t(threads) * kBins * sizeof(uint32_t));
  const bool top = shift + kDigitBits >= int(8 * sizeof(R));
  parallel_slots(chunks.count(), threads, [&](int64_t chunk, int slot) {
    uint32_t* bins = chunks.bins + int64_t{slot} * kBins;
    from.template read<R>(chunk, [&](const R* x, int64_t count, uint8_t*) {
      if (top) {
        for (int64_t i = 0; i < count; ++i) ++bins[key_of(x[i]) >> shift];
        return;
      }
      for (int64_t i = 0; i < count; ++i) {
        const Key<R> key = key_of(x[i]) >> shift;
        if (key >> kDigitBits == prefix) ++bins[key & (kBins - 1)];
      }
    });
  });
  for (int slot = 1; slot < threads; ++slot)
    for (int bin = 0; bin < kBins; ++bin) chunks.bins[bin] += chunks.bins[int64_t{slot} * kBins + bin];
}

bool all_bf16(const SelectParams& p) {
  for (int64_t s = 0; s < p.count; ++s)
    if (p.sources[s].dtype != DType::kBFloat16) return false;
  return true;
}

// The bins of the first digit tell what is not finite.
template <class R>
bool any_infinite(const Chunks& chunks, int shift) {
  for (int bin = int(kInfinityKey<R> >> shift); bin < kBins; ++bin)
    if (chunks.bins[bin] > 0) return true;
  return false;
}

// Of the values that `from` reads, `kept` are to be kept.
template <class R, class From>
Threshold<R> find_threshold(const From& from, int64_t kept) {
  constexpr int kTop = 8 * int(sizeof(R)) - kDigitBits;
  const Chunks& chunks = from.chunks;
  const int lowest = all_bf16(chunks.p) ? kDigitBits : 0;  // their lower digit is zero
  Threshold<R> found{0, 0, kept};
  for (int shift = kTop; shift >= lowest; shift -= kDigitBits) {
    count_digits<R>(from, shift, found.key);
    if (shift == kTop && any_infinite<R>(chunks, shift)) report_invalid(chunks.p.invalid);
    int bin = kBins - 1;
    for (; bin > 0 && chunks.bins[bin] < found.kept; --bin) found.kept -= chunks.bins[bin];
    found.key = found.key << kDigitBits | bin;
    found.equal = chunks.bins[bin];
    if (found.equal == found.kept || shift == lowest) {
      found.key <<= shift;
      break;
    }
  }
  return found;
}

// Which of the equals are a chunk's, where some of them are left out.
template <class R, class From>
void count_equals(const From& from, Key<R> threshold) {
  const Chunks& chunks = from.chunks;
  parallel_chunks(chunks.count(), chunks.p.threads, [&](int64_t chunk) {
    int64_t equal = 0;
    from.template read<R>(chunk, [&](const R* x, int64_t count, uint8_t*) {
      int32_t here = 0;
      for (int64_t i = 0; i < count; ++i) here += key_of(x[i]) == threshold;
      equal += here;
    });
    chunks.equals[chunk] = equal;
  });
  for (int64_t chunk = 0, before = 0; chunk < chunks.count(); ++chunk) {
    const int64_t equal = chunks.equals[chunk];
    chunks.equals[chunk] = before;
    before += equal;
  }
}

template <class R>
int64_t count_from(const Key<R>* keys, int64_t count, Key<R> lowest) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>) {  // the compiler makes one sum of it, and waits for it
    constexpr int kSums = 4;
    const int64_t whole = count / (kSums * kLanes);
    const __m512i bound = _mm512_set1_epi32(lowest), one = _mm512_set1_epi32(1);
    __m512i sums[kSums] = {};
    for (int64_t i = 0; i < whole; ++i) {
      for (int k = 0; k < kSums; ++k, keys += kLanes) {
        const __mmask16 from = _mm512_cmpge_epi32_mask(_mm512_loadu_si512(keys), bound);
        sums[k] = _mm512_mask_add_epi32(sums[k], from, sums[k], one);
      }
    }
    int64_t reached = 0;
    for (int k = 0; k < kSums; ++k) reached += _mm512_reduce_add_epi32(sums[k]);
    for (int64_t i = whole * kSums * kLanes; i < count; ++i, ++keys) reached += *keys >= lowest;
    return reached;
  }
#endif
  Key<R> reached = 0;
  for (int64_t i = 0; i < count; ++i) reached += keys[i] >= lowest;
  return reached;
}

// The key that `kept` of these are not below, if there is one; a bit is found at a time.
template <class R>
Key<R> threshold_of(const Key<R>* keys, int64_t count, int64_t kept) {
  Key<R> threshold = 0;
  for (int bit = 8 * int(sizeof(R)) - 2; bit >= 0; --bit) {
    const Key<R> candidate = threshold | Key<R>{1} << bit;
    const int64_t reached = count_from<R>(keys, count, candidate);
    if (reached >= kept) threshold = candidate;
    if (reached == kept) break;
  }
  return threshold;
}

// Elements at about the same distances from each other, so that all columns have their share.
void read_sample(const Chunks& chunks, int32_t* keys) {
  const int64_t step = Chunks::elements(chunks.p) / kSample;
  int64_t s = 0, before = 0;  // elements of the sources before s
  for (int64_t i = 0; i < kSample; ++i) {
    const int64_t at = i * step + int64_t((uint64_t(i) * 0x9E3779B97F4A7C15u >> 33) % uint64_t(step));
    while (at - before >= chunks.p.sources[s].rows * chunks.p.sources[s].columns) {
      before += chunks.p.sources[s].rows * chunks.p.sources[s].columns;
      ++s;
    }
    const SelectSource& source = chunks.p.sources[s];
    const int64_t row = (at - before) / source.columns, column = (at - before) % source.columns;
    const int64_t offset = row * source.scores.row + column * source.scores.column;
    with_type(source.dtype, [&](auto type) {
      using T = decltype(type);
      keys[i] = key_of(float(widen(static_cast<const T*>(source.scores.data)[offset])));
    });
  }
}

struct Bracket {
  int32_t low, high;
};

// Six standard deviations of the sample's rank to either side.
Bracket guess_bracket(const Chunks& chunks) {
  auto* keys = reinterpret_cast<int32_t*>(chunks.sample);
  read_sample(chunks, keys);
  const double share = double(chunks.p.kept) / double(Chunks::elements(chunks.p));
  const double margin = 6 * __builtin_sqrt(double(kSample) * share * (1 - share)) + 6;
  const int64_t first = int64_t(double(kSample) * share - margin);
  const int64_t last = int64_t(double(kSample) * share + margin);
  return {last <= kSample ? threshold_of<float>(keys, kSample, last) : 0,
          first >= 1 ? threshold_of<float>(keys, kSample, first) : INT32_MAX};
}

struct Gathered {
  int64_t above, listed;
  int32_t highest;
};

// Counts what is above the bracket and appends to the list, which has room, what is in it.
void gather(const float* x, int64_t count, Bracket bracket, float* list, Gathered& found) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i low = _mm512_set1_epi32(bracket.low), high = _mm512_set1_epi32(bracket.high);
  const __m512i magnitude = _mm512_set1_epi32(INT32_MAX);
  __m512i highest = _mm512_set1_epi32(found.highest);
  for (; i + kLanes <= count; i += kLanes) {
    const __m512i key = _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude);
    highest = _mm512_max_epi32(highest, key);
    const __mmask16 above = _mm512_cmpgt_epi32_mask(key, high);
    const __mmask16 inside = _mm512_cmpge_epi32_mask(key, low) & ~above;
    found.above += __builtin_popcount(above);
    _mm512_storeu_si512(list + found.listed, _mm512_maskz_compress_epi32(inside, key));
    found.listed += __builtin_popcount(inside);
  }
  found.highest = _mm512_reduce_max_epi32(highest);
#endif
  for (; i < count; ++i) {
    const int32_t key = key_of(x[i]);
    found.highest = key > found.highest ? key : found.highest;
    found.above += key > bracket.high;
    list[found.listed] = float_of(uint32_t(key));
    found.listed += key >= bracket.low && key <= bracket.high;
  }
}

// By a sample. False if the threshold is not where it should be, or too many elements are there.
bool find_between(const Chunks& chunks, Threshold<float>& threshold) {
  const Bracket bracket = guess_bracket(chunks);
  parallel_chunks(chunks.count(), chunks.p.threads, [&](int64_t chunk) {
    Gathered found{0, 0, 0};
    bool room = true;
    read_chunk<float>(chunks, chunk, [&](const float* x, int64_t count, uint8_t*) {
      room = room && found.listed <= kListed;
      if (room) gather(x, count, bracket, chunks.lists + chunk * kList, found);
    });
    chunks.above[chunk] = found.above;
    chunks.listed[chunk] = room ? found.listed : -1;
    if (found.highest >= kInfinityKey<float>) report_invalid(chunks.p.invalid);
  });
  int64_t kept = chunks.p.kept, listed = 0;
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
    if (chunks.listed[chunk] < 0) return false;
    kept -= chunks.above[chunk];
    listed += chunks.listed[chunk];
  }
  if (kept < 1 || kept > listed) return false;
  threshold = find_threshold<float>(ReadLists{chunks}, kept);
  if (threshold.equal != threshold.kept) count_equals<float>(ReadLists{chunks}, threshold.key);
  return true;
}

// Keeps what is above the bound.
template <class R>
void keep_above(const R* x, int64_t count, Key<R> bound, uint8_t* mask) {
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float>) {
    for (; i + kLanes <= count; i += kLanes)
      store_bytes(mask + i, (Int)((bits(load(x + i)) & 0x7fffffff) > splat(bound)) & 1);
  }
  for (; i < count; ++i) mask[i] = key_of(x[i]) > bound;
}

// Keeps what is above the threshold, and of those that are equal to it the first `left`, which it takes off.
template <class R>
void keep_some(const R* x, int64_t count, Key<R> threshold, int64_t& left, uint8_t* mask) {
  for (int64_t i = 0; i < count; ++i) {
    const Key<R> key = key_of(x[i]);
    const bool counted = key == threshold && left > 0;
    mask[i] = key > threshold || counted;
    left -= counted;
  }
}

template <class R>
void select_all(const SelectParams& p) {
  const Chunks chunks(p);
  Threshold<R> found;
  bool done = false;
  if constexpr (std::is_same_v<R, float>) done = Chunks::elements(p) >= kMany && find_between(chunks, found);
  if (!done) {
    found = find_threshold<R>(ReadSources{chunks}, p.kept);
    if (found.equal != found.kept) count_equals<R>(ReadSources{chunks}, found.key);
  }
  const bool all = found.equal == found.kept;
  parallel_chunks(chunks.count(), p.threads, [&](int64_t chunk) {
    int64_t left = all ? kChunk : found.kept - chunks.equals[chunk];  // equals of this chunk that are kept
    const bool every = left >= kChunk;
    read_chunk<R>(chunks, chunk, [&](const R* x, int64_t count, uint8_t* mask) {
      if (every) return keep_above<R>(x, count, found.key - 1, mask);
      if (left <= 0) return keep_above<R>(x, count, found.key, mask);
      keep_some<R>(x, count, found.key, left, mask);
    });
  });
}

template <class R>
struct Reached {
  int64_t count;
  Key<R> highest;
};

// Keeps the keys from `lowest` on. (Bytes may alias anything, so loops that write them are vectors by hand.)
template <class R>
Reached<R> keep_from(const Key<R>* keys, int64_t count, Key<R> lowest, uint8_t* mask) {
  Reached<R> reached{0, 0};
  int64_t i = 0;
  if constexpr (std::is_same_v<R, float>) {
    Int highest{}, sum{};
    for (; i + kLanes <= count; i += kLanes) {
      Int key;
      std::memcpy(&key, keys + i, sizeof key);
      const Int kept = (Int)(key > splat(lowest - 1)) & 1;
      store_bytes(mask + i, kept);
      sum += kept;
      highest = max(highest, key);
    }
    for (int lane = 0; lane < kLanes; ++lane) reached.count += sum[lane];
    reached.highest = reduce_max(highest);
  }
  for (; i < count; ++i) {
    mask[i] = keys[i] >= lowest;
    reached.count += mask[i];
    reached.highest = keys[i] > reached.highest ? keys[i] : reached.highest;
  }
  return reached;
}

template <class T>
void select_row(const SelectRowsParams& p, int64_t row, Key<Real<T>>* keys) {
  using R = Real<T>;
  const T* from = static_cast<const T*>(p.scores.data) + row * p.scores.row;
  R buffer[kSegment];
  for (int64_t first = 0; first < p.columns; first += kSegment) {
    const int64_t count = smaller(kSegment, p.columns - first);
    const R* x = read_segment(from + first * p.scores.column, p.scores.column, count, buffer);
    const R* by = static_cast<const R*>(p.factors);
    if (by == nullptr) {
      for (int64_t i = 0; i < count; ++i) keys[first + i] = key_of(x[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) keys[first + i] = key_of(x[i] * by[first + i]);
    }
  }
  const Key<R> threshold = threshold_of<R>(keys, p.columns, p.kept);
  uint8_t* mask = p.mask + row * p.columns;
  const Reached<R> reached = keep_from<R>(keys, p.columns, threshold, mask);
  if (reached.highest >= kInfinityKey<R>) report_invalid(p.invalid);
  int64_t surplus = reached.count - p.kept;
  for (int64_t i = p.columns - 1; surplus > 0; --i) {  // the last of the equals go
    if (keys[i] != threshold) continue;
    mask[i] = 0;
    --surplus;
  }
}

// A row of a mask, of the groups' row that it lies in.
void expand_row(const ExpandParams& p, int64_t row) {
  const uint8_t* units = p.units + row / p.group_rows * divide_up(p.columns, p.group_columns);
  uint8_t* mask = p.mask + row * p.columns;
  for (int64_t first = 0; first < p.columns; first += p.group_columns, ++units)
    std::memset(mask + first, *units, size_t(smaller(p.group_columns, p.columns - first)));
}

}  // namespace

int64_t select_workspace_cpu(const SelectParams& p) { return Chunks::bytes(p); }

void select_cpu(const SelectParams& p) {
  p.count > 0 && p.sources[0].dtype == DType::kFloat64 ? select_all<double>(p) : select_all<float>(p);
}

void select_rows_cpu(const SelectRowsParams& p, int threads) {
  const int64_t batch = larger(kChunk / larger(p.columns, 1), 1);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_slots(divide_up(p.rows, batch), threads, [&](int64_t chunk, int slot) {
      auto* keys = reinterpret_cast<Key<Real<T>>*>(static_cast<char*>(p.workspace) +
                                                   slot * select_rows_workspace(p.columns, 1));
      for (int64_t row = chunk * batch; row < smaller((chunk + 1) * batch, p.rows); ++row)
        select_row<T>(p, row, keys);
    });
  });
}

void expand_cpu(const ExpandParams& p, int threads) {
  const int64_t batch = larger(kChunk / larger(p.columns, 1), 1);
  parallel_chunks(divide_up(p.rows, batch), threads, [&](int64_t chunk) {
    for (int64_t row = chunk * batch; row < smaller((chunk + 1) * batch, p.rows); ++row) {
      if (row > chunk * batch && row % p.group_rows != 0) {
        std::memcpy(p.mask + row * p.columns, p.mask + (row - 1) * p.columns, size_t(p.columns));
      } else {
        expand_row(p, row);
      }
    }
  });
}

}  // namespace tilewright::TW_ISA
