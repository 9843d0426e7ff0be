// The best of many, or of each row, on the CPU; compiled once per instruction-set level.
//
// The order of magnitudes is that of their bits as integers, so the key of the last one kept, the threshold,
// is found by counting: 16 bits of it a pass, from the top. Whoever is above is kept, and of the equals the
// first, which takes the numbers of equals in each chunk only where some of them are left out. Nothing is
// sorted.
//
// Roofline: two passes over fp32 (one over bf16) that read, one that reads and writes a byte.
#include "core/threads.h"
#include "prune/segment_cpu.h"
#include "prune/select.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

constexpr int64_t kChunk = 1 << 16;  // elements of a unit of work
constexpr int kDigitBits = 16, kBins = 1 << kDigitBits;

// What lies in the workspace: tables of the chunks, then a histogram for each thread.
struct Chunks {
  const SelectParams& p;
  int64_t* first;   // [count + 1]: chunks first[s] .. first[s + 1] - 1 are of source s
  int64_t* equals;  // [all chunks]: elements equal to the threshold; later those before the chunk
  uint32_t* bins;   // [threads][kBins]

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
    first[0] = 0;
    for (int64_t s = 0; s < p.count; ++s) first[s + 1] = first[s] + of(p.sources[s]);
  }

  int64_t count() const { return first[p.count]; }

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

// Counts the next digit of those whose higher digits are `prefix`.
template <class R>
void count_digits(const Chunks& chunks, int shift, Key<R> prefix) {
  const int threads = chunks.p.threads;
  std::memset(chunks.bins, 0, size_t(threads) * kBins * sizeof(uint32_t));
  const bool top = shift + kDigitBits >= int(8 * sizeof(R));
  parallel_slots(chunks.count(), threads, [&](int64_t chunk, int slot) {
    uint32_t* bins = chunks.bins + int64_t{slot} * kBins;
    read_chunk<R>(chunks, chunk, [&](const R* x, int64_t count, uint8_t*) {
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

template <class R>
Threshold<R> find_threshold(const Chunks& chunks) {
  constexpr int kTop = 8 * int(sizeof(R)) - kDigitBits;
  const int lowest = all_bf16(chunks.p) ? kDigitBits : 0;  // their lower digit is zero
  Threshold<R> found{0, 0, chunks.p.kept};
  for (int shift = kTop; shift >= lowest; shift -= kDigitBits) {
    count_digits<R>(chunks, shift, found.key);
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

template <class R>
void count_equals(const Chunks& chunks, Key<R> threshold) {
  parallel_chunks(chunks.count(), chunks.p.threads, [&](int64_t chunk) {
    int64_t equal = 0;
    read_chunk<R>(chunks, chunk, [&](const R* x, int64_t count, uint8_t*) {
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
  const Threshold<R> found = find_threshold<R>(chunks);
  const bool all = found.equal == found.kept;
  if (!all) count_equals<R>(chunks, found.key);
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

// The keys of a row stay in a cache, so there a bit is found at a time.
template <class R>
Key<R> row_threshold(const Key<R>* keys, int64_t columns, int64_t kept) {
  Key<R> threshold = 0;
  for (int bit = 8 * int(sizeof(R)) - 2; bit >= 0; --bit) {
    const Key<R> candidate = threshold | Key<R>{1} << bit;
    Key<R> count = 0;
    for (int64_t i = 0; i < columns; ++i) count += keys[i] >= candidate;
    if (count >= kept) threshold = candidate;
    if (count == kept) break;
  }
  return threshold;
}

template <class T>
void select_row(const SelectRowsParams& p, int64_t row, Key<Real<T>>* keys) {
  using R = Real<T>;
  const T* from = static_cast<const T*>(p.scores.data) + row * p.scores.row;
  R buffer[kSegment];
  for (int64_t first = 0; first < p.columns; first += kSegment) {
    const int64_t count = smaller(kSegment, p.columns - first);
    const R* x = read_segment(from + first * p.scores.column, p.scores.column, count, buffer);
    for (int64_t i = 0; i < count; ++i) keys[first + i] = key_of(x[i]);
  }
  const Key<R> threshold = row_threshold<R>(keys, p.columns, p.kept);
  uint8_t* mask = p.mask + row * p.columns;
  Key<R> highest = 0, at_least = 0;
  for (int64_t i = 0; i < p.columns; ++i) {
    mask[i] = keys[i] >= threshold;
    at_least += keys[i] >= threshold;
    highest = keys[i] > highest ? keys[i] : highest;
  }
  if (highest >= kInfinityKey<R>) report_invalid(p.invalid);
  for (int64_t i = p.columns - 1; at_least > p.kept; --i) {  // the last of the equals go
    if (keys[i] != threshold) continue;
    mask[i] = 0;
    --at_least;
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

int64_t select_workspace_cpu(const SelectParams& p) {
  return int64_t{p.threads} * kBins * int64_t{sizeof(uint32_t)} + (Chunks::all(p) + p.count + 1) * 8;
}

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
