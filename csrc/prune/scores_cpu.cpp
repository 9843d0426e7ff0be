// Scores of groups of weights on the CPU; compiled once per instruction-set level.
//
// A unit of work is a strip of some groups next to each other, at most kPartRows rows of it. Its rows are
// added up column by column into a buffer in the L1 cache, then the columns of each group. All loops run over
// neighbours, and sums have an order that neither threads nor the width of vectors change.
//
// Roofline: each weight is read once, a score is written for each group.
#include <cmath>

#include "core/philox.h"
#include "core/threads.h"
#include "prune/scores.h"
#include "prune/segment_cpu.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

constexpr int64_t kWork = 1 << 16;  // elements of a unit of work, about
constexpr int kSums = 16;

float magnitude(float x) { return __builtin_fabsf(x); }
double magnitude(double x) { return __builtin_fabs(x); }

// The magnitude of what is larger in magnitude; NaN counts as largest.
template <class R>
R largest(R a, R b) {
  const Key<R> key = key_of(a) > key_of(b) ? key_of(a) : key_of(b);
  R result;
  std::memcpy(&result, &key, sizeof result);
  return result;
}

// sums[i] takes in w[i], whose factor or gradient is by[i].
template <Score kScore, class R>
void take_in(R* sums, const R* w, const R* by, double power, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const R product = w[i] * by[i];
    if constexpr (kScore == Score::kSum) sums[i] += magnitude(product);
    if constexpr (kScore == Score::kSquares) sums[i] += product * product;
    if constexpr (kScore == Score::kLargest) sums[i] = largest(product, sums[i]);
    if constexpr (kScore == Score::kPowers) sums[i] += R(::pow(double(magnitude(product)), power));
    if constexpr (kScore == Score::kProducts) sums[i] += product;
  }
}

template <class R>
void take_in(Score score, R* sums, const R* w, const R* by, double power, int64_t count) {
  switch (score) {
    case Score::kSum:
      return take_in<Score::kSum>(sums, w, by, power, count);
    case Score::kSquares:
      return take_in<Score::kSquares>(sums, w, by, power, count);
    case Score::kLargest:
      return take_in<Score::kLargest>(sums, w, by, power, count);
    case Score::kPowers:
      return take_in<Score::kPowers>(sums, w, by, power, count);
    case Score::kProducts:
      return take_in<Score::kProducts>(sums, w, by, power, count);
  }
}

template <class R>
R join(Score score, R a, R b) {
  return score == Score::kLargest ? largest(a, b) : a + b;
}

// All of them, as kSums sums side by side.
template <class R>
R join_all(Score score, const R* x, int64_t count) {
  R sums[kSums] = {};
  int64_t i = 0;
  if (score == Score::kLargest) {
    for (; i + kSums <= count; i += kSums)
      for (int k = 0; k < kSums; ++k) sums[k] = largest(x[i + k], sums[k]);
  } else {
    for (; i + kSums <= count; i += kSums)
      for (int k = 0; k < kSums; ++k) sums[k] += x[i + k];
  }
  R result = 0;
  if (i > 0) {
    for (int half = kSums / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] = join(score, sums[k], sums[k + half]);
    result = sums[0];
  }
  for (; i < count; ++i) result = join(score, result, x[i]);
  return result;
}

template <class R>
R finished(const GroupScoresParams& p, R sum) {
  switch (p.score) {
    case Score::kSquares:
      return std::sqrt(sum);
    case Score::kPowers:
      return R(::pow(double(sum), 1 / p.power));
    default:
      return magnitude(sum);
  }
}

template <class T>
struct Strips {
  using R = Real<T>;
  const GroupScoresParams& p;
  int64_t across, parts, width, strips;  // groups in a row of them; parts of a group; columns of a strip

  explicit Strips(const GroupScoresParams& params) : p(params) {
    across = divide_up(p.columns, p.group_columns);
    parts = group_parts(p);
    width = larger(kSegment / p.group_columns, 1) * p.group_columns;
    strips = divide_up(p.columns, width);
  }

  int64_t count() const { return divide_up(p.rows, p.group_rows) * parts * strips; }

  void run(int64_t number) const {
    const int64_t strip = number % strips, part = number / strips % parts,
                  group_row = number / strips / parts;
    const int64_t top = group_row * p.group_rows + part * kPartRows;
    const int64_t limit = smaller((group_row + 1) * p.group_rows, p.rows);
    const int64_t bottom = parts > 1 ? smaller(top + kPartRows, limit) : limit;
    const int64_t left = strip * width, right = smaller(left + width, p.columns);
    const int64_t down = divide_up(p.rows, p.group_rows);
    R* to = parts > 1 ? static_cast<R*>(p.workspace) + part * down * across : static_cast<R*>(p.scores);
    to += group_row * across + left / p.group_columns;
    R sums[kSegment], total = 0;
    for (int64_t first = left; first < right; first += kSegment) {
      const int64_t count = smaller(kSegment, right - first);
      add_columns(sums, first, count, top, bottom);
      if (p.group_columns > kSegment) {
        total = join(p.score, total, join_all(p.score, sums, count));
        continue;
      }
      for (int64_t i = 0; i < count; i += p.group_columns, ++to)
        put(to, join_all(p.score, sums + i, smaller(p.group_columns, count - i)));
    }
    if (p.group_columns > kSegment) put(to, total);
  }

  void put(R* to, R sum) const { *to = parts > 1 ? sum : finished(p, sum); }

  void add_columns(R* sums, int64_t first, int64_t count, int64_t top, int64_t bottom) const {
    R weights[kSegment], others[kSegment];
    for (int64_t i = 0; i < count; ++i) sums[i] = 0;
    const R* by = static_cast<const R*>(p.factors);
    if (by != nullptr) by += first;
    if (by == nullptr && p.score != Score::kProducts) {
      for (int64_t i = 0; i < count; ++i) others[i] = 1;
      by = others;
    }
    for (int64_t row = top; row < bottom; ++row) {
      const R* w = read(p.weight, row, first, count, weights);
      if (p.score == Score::kProducts) by = read(p.gradient, row, first, count, others);
      take_in(p.score, sums, w, by, p.power, count);
    }
  }

  static const R* read(const Matrix& m, int64_t row, int64_t first, int64_t count, R* buffer) {
    const T* from = static_cast<const T*>(m.data) + row * m.row + first * m.column;
    return read_segment(from, m.column, count, buffer);
  }
};

template <class T>
void run(const GroupScoresParams& p, int threads) {
  using R = Real<T>;
  const Strips<T> strips(p);
  const int64_t elements =
      smaller(strips.width, p.columns) * smaller(smaller(p.group_rows, p.rows), kPartRows);
  const int64_t batch = larger(kWork / larger(elements, 1), 1), count = strips.count();
  parallel_chunks(divide_up(count, batch), threads, [&](int64_t chunk) {
    for (int64_t i = chunk * batch; i < smaller((chunk + 1) * batch, count); ++i) strips.run(i);
  });
  if (strips.parts == 1) return;
  const int64_t groups = divide_up(p.rows, p.group_rows) * strips.across;
  const R* sums = static_cast<const R*>(p.workspace);
  parallel_chunks(divide_up(groups, kSegment), threads, [&](int64_t chunk) {
    for (int64_t i = chunk * kSegment; i < smaller((chunk + 1) * kSegment, groups); ++i) {
      R sum = sums[i];
      for (int64_t part = 1; part < strips.parts; ++part) sum = join(p.score, sum, sums[part * groups + i]);
      static_cast<R*>(p.scores)[i] = finished(p, sum);
    }
  });
}

}  // namespace

void group_scores_cpu(const GroupScoresParams& p, int threads) {
  with_type(p.dtype, [&](auto type) { run<decltype(type)>(p, threads); });
}

void random_scores_cpu(const RandomScoresParams& p, int threads) {
  parallel_chunks(divide_up(p.count, kWork), threads, [&](int64_t chunk) {
    const int64_t end = smaller((chunk + 1) * kWork, p.count);
    for (int64_t i = chunk * kWork; i < end; i += 4) {
      const PhiloxWords random = philox(uint32_t(i / 4), uint32_t(uint64_t(i / 4) >> 32), p.stream, 0,
                                        uint32_t(p.seed), uint32_t(p.seed >> 32));
      for (int64_t k = 0; k < smaller(4, end - i); ++k)
        p.scores[i + k] = float(random.word[k] >> 8) * 0x1p-24f;
    }
  });
}

}  // namespace tilewright::TW_ISA
