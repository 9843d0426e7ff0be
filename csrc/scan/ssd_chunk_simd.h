// What both CPU passes of the SSD scan need: scratch memory, rows of the tensors, the steps of one head.
#pragma once

#include "core/integers.h"
#include "core/threads.h"
#include "scan/gemm_simd.h"
#include "scan/ssd_chunk_scan.h"

namespace tilewright::TW_ISA {
namespace {

using scan::kSsdChunk;
using scan::SsdChunk;
using scan::SsdChunkScanParams;
using scan::SsdTensor;

// Hands out a workspace piece by piece; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
};

// Rows and columns of the matrices, padded.
template <class Real>
struct Extents {
  int64_t steps = padded<Real>(kSsdChunk), states, dims;
  explicit Extents(const SsdChunkScanParams& p)
      : states(padded<Real>(p.states)), dims(padded<Real>(p.head_dim)) {}
};

// ---- rows of tensors ----

template <class T>
inline T* row_of(const SsdTensor& t, int64_t batch, int64_t step, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch + step * t.step + head * t.head;
}

// body(T{}), T being the type of tensors of this dtype.
template <class Real, class Body>
inline void with_type(DType dtype, const Body& body) {
  if constexpr (std::is_same_v<Real, double>) {
    body(double{});
  } else if (dtype == DType::kFloat32) {
    body(float{});
  } else if (dtype == DType::kBFloat16) {
    body(bf16{});
  } else {
    body(fp16{});
  }
}

template <class Real>
void read_row(Real* row, const SsdTensor& t, DType dtype, int64_t batch, int64_t step, int64_t head,
              int64_t count, int64_t padded_count) {
  with_type<Real>(dtype, [&](auto type) {
    load_row(row, row_of<decltype(type)>(t, batch, step, head), t.inner, count, padded_count);
  });
}

template <class Real>
void write_row(const SsdTensor& t, DType dtype, int64_t batch, int64_t step, int64_t head, const Real* row,
               int64_t count) {
  with_type<Real>(dtype, [&](auto type) {
    store_row(row_of<decltype(type)>(t, batch, step, head), t.inner, row, count);
  });
}

// A state in memory, (head_dim, states), and in scratch, [states][head_dim] padded.
template <class Real>
void load_state(Real* scratch, const void* states, int64_t index, const SsdChunkScanParams& p,
                const Extents<Real>& size) {
  std::memset(scratch, 0, size_t(size.states * size.dims) * sizeof(Real));
  if (states == nullptr) return;
  const int64_t numel = int64_t{p.head_dim} * p.states;
  transpose_exactly(scratch, size.dims, static_cast<const Real*>(states) + index * numel, p.states,
                    p.head_dim, p.states);
}

template <class Real>
void store_state(void* states, int64_t index, const Real* scratch, const SsdChunkScanParams& p,
                 const Extents<Real>& size) {
  if (states == nullptr) return;
  const int64_t numel = int64_t{p.head_dim} * p.states;
  transpose_exactly(static_cast<Real*>(states) + index * numel, p.states, scratch, size.dims, p.states,
                    p.head_dim);
}

// The kept states, [chunk][head][states][head_dim] without padding.
template <class Real>
Real* kept_state(void* states, const SsdChunkScanParams& p, int64_t chunk, int64_t head) {
  return static_cast<Real*>(states) + (chunk * p.heads + head) * p.states * p.head_dim;
}

template <class Real>
void keep_state(Real* kept, const Real* scratch, const SsdChunkScanParams& p, const Extents<Real>& size) {
  if (kept == scratch) return;
  for (int32_t n = 0; n < p.states; ++n) {
    std::memcpy(kept + int64_t{n} * p.head_dim, scratch + n * size.dims, size_t(p.head_dim) * sizeof(Real));
  }
}

// Whether a kept state can be an operand itself: it needs no padding.
template <class Real>
bool fills_tiles(const SsdChunkScanParams& p, const Extents<Real>& size) {
  return size.states == p.states && size.dims == p.head_dim;
}

// A kept state as an operand of stride size.dims: itself where it needs no padding, else a copy.
template <class Real>
const Real* operand_state(const Real* kept, Real* scratch, const SsdChunkScanParams& p,
                          const Extents<Real>& size) {
  if (fills_tiles(p, size)) return kept;
  std::memset(scratch, 0, size_t(size.states * size.dims) * sizeof(Real));
  for (int32_t n = 0; n < p.states; ++n) {
    std::memcpy(scratch + n * size.dims, kept + int64_t{n} * p.head_dim, size_t(p.head_dim) * sizeof(Real));
  }
  return scratch;
}

// ---- pieces: the parts of a chunk between resets of the state ----

struct Piece {
  int first, count;
  bool continues;  // from the state before the chunk, if that may be anything but zeros
  bool ends;       // its state is the one after the chunk, if anything depends on that
};

inline bool continues_before(const SsdChunkScanParams& p, const SsdChunk& chunk) {
  if (chunk.start == ssd_sequence_start(p, chunk.sequence)) return p.initial_state != nullptr;
  return !ssd_resets(p, chunk.batch, chunk.start);
}

inline bool is_last(const SsdChunkScanParams& p, const SsdChunk& chunk) {
  return chunk.start + chunk.length == ssd_sequence_end(p, chunk.sequence);
}

inline Piece piece_from(const SsdChunkScanParams& p, const SsdChunk& chunk, int first) {
  int end = first + 1;
  while (end < chunk.length && !ssd_resets(p, chunk.batch, chunk.start + end)) ++end;
  return {first, end - first, first == 0 && continues_before(p, chunk),
          end == chunk.length && (p.dfinal_state != nullptr || !is_last(p, chunk))};
}

inline Piece last_piece(const SsdChunkScanParams& p, const SsdChunk& chunk) {
  int first = chunk.length - 1;
  while (first > 0 && !ssd_resets(p, chunk.batch, chunk.start + first)) --first;
  return {first, chunk.length - first, first == 0 && continues_before(p, chunk), true};
}

// ---- what is read soon ----

// Brings rows to the second-level cache, to be read or to be written, a share of them with every call of
// next(): from memory they come too late if they are asked for only when they are needed.
class Fetch {
 public:
  Fetch() = default;
  Fetch(const void* data, int64_t rows, int64_t row_bytes, int64_t stride, int64_t calls, bool write = false)
      : write_(write),
        at_(static_cast<const char*>(data)),
        rows_(data == nullptr ? 0 : rows),
        row_bytes_(row_bytes),
        stride_(stride),
        share_(divide_up(rows, calls)) {}

  __attribute__((always_inline)) void next() {
    for (int64_t i = 0; i < share_ && rows_ > 0; ++i, --rows_, at_ += stride_) {
      for (int64_t byte = 0; byte < row_bytes_; byte += 64) {
        if (write_) {
          __builtin_prefetch(at_ + byte, 1, 2);
        } else {
          __builtin_prefetch(at_ + byte, 0, 2);
        }
      }
    }
  }

 private:
  bool write_ = false;
  const char* at_ = nullptr;
  int64_t rows_ = 0, row_bytes_ = 0, stride_ = 0, share_ = 0;
};

template <class Real>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return divide_up(rows, Lanes<Real>::kRows) * divide_up(columns, 2 * Lanes<Real>::kCount);
}

template <class Real>
Fetch fetch_state(const Real* kept, const SsdChunkScanParams& p, int64_t calls) {
  const int64_t bytes = p.head_dim * int64_t{sizeof(Real)};
  return {kept, p.states, bytes, bytes, calls};
}

// A head's rows of `count` steps from `step` on; none where their elements do not lie side by side.
inline Fetch fetch_rows(const SsdTensor& t, const SsdChunkScanParams& p, int64_t batch, int64_t step,
                        int64_t count, int64_t head, int64_t calls, bool write = false) {
  if (t.inner != 1 || head >= p.heads || step < 0) return {};
  const int64_t element = itemsize(p.dtype);
  const char* const data =
      static_cast<const char*>(t.data) + (batch * t.batch + step * t.step + head * t.head) * element;
  return {data, count, p.head_dim * element, t.step * element, calls, write};
}

// ---- the steps of one head in one piece ----

// With cum[i] the sum of dt A over steps 0..i of the piece. It is kept in two parts, so that differences of
// large sums are as exact as the sum of the steps between.
template <class Real>
struct Steps {
  Real *raw, *active, *dt;  // before softplus, between it and the clamp, after it
  Real *high, *low;         // cum
  Real* from_start;         // exp(cum[i]): of the state before the piece, at step i
  Real* to_end;             // exp(cum[last] - cum[i]): of step i, in the state after the piece
  Real decay;               // exp(cum[last])
  int count;

  Steps(Arena& arena, const Extents<Real>& size) {
    for (Real** part : {&raw, &active, &dt, &high, &low, &from_start, &to_end})
      *part = arena.take<Real>(size.steps);
  }

  // exp(cum[i] - cum[j]) for a vector of j.
  Vector<Real> decay_from(int i, int j) const {
    return exp((splat(high[i]) - load(high + j)) + (splat(low[i]) - load(low + j)));
  }
};

inline double softplus_of(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

template <class Real>
void activate(const SsdChunkScanParams& p, Steps<Real>& s, const Extents<Real>& size) {
  for (int64_t i = 0; i < size.steps; i += Lanes<Real>::kCount) {
    Vector<Real> active = load(s.raw + i);
    if constexpr (std::is_same_v<Real, double>) {
      if (p.softplus) active = softplus_of(active);
    } else {
      if (p.softplus) active = softplus(active);
    }
    store(s.active + i, active);
    store(s.dt + i, active);
  }
  const Real lowest = Real(p.dt_min), highest = Real(p.dt_max);
  for (int i = 0; i < s.count; ++i) {
    s.dt[i] = s.dt[i] < lowest ? lowest : s.dt[i] > highest ? highest : s.dt[i];  // a NaN stays
  }
}

template <class Real>
void prepare_steps(const SsdChunkScanParams& p, Steps<Real>& s, const Extents<Real>& size,
                   const SsdChunk& chunk, const Piece& piece, int64_t head) {
  s.count = piece.count;
  const Real bias = p.dt_bias == nullptr ? Real(0) : static_cast<const Real*>(p.dt_bias)[head];
  const Real* source = row_of<Real>(p.dt, chunk.batch, chunk.start + piece.first, head);
  for (int64_t i = 0; i < size.steps; ++i) s.raw[i] = i < s.count ? source[i * p.dt.step] + bias : Real(0);
  activate(p, s, size);
  const double rate = double(static_cast<const Real*>(p.A)[head]);
  double cum = 0;
  for (int64_t i = 0; i < size.steps; ++i) {
    if (i < s.count) cum += scan::ssd_log_decay(double(s.dt[i]), rate);
    s.high[i] = Real(cum);
    s.low[i] = std::isfinite(s.high[i]) ? Real(cum - double(s.high[i])) : Real(0);
  }
  for (int64_t i = 0; i < size.steps; i += Lanes<Real>::kCount) {
    const Vector<Real> e = exp(load(s.high + i));
    store(s.from_start + i, e * (splat(Real(1)) + load(s.low + i)));
    store(s.to_end + i, s.decay_from(s.count - 1, int(i)));
  }
  s.decay = s.from_start[s.count - 1];
}

// The rows of a piece; something else may come nearer meanwhile.
template <class Real>
void read_rows(Real* rows, int64_t stride, const SsdTensor& t, DType dtype, const SsdChunk& chunk,
               const Piece& piece, int64_t head, int64_t count, Fetch next = {}) {
  with_type<Real>(dtype, [&](auto type) {
    const auto* source = row_of<decltype(type)>(t, chunk.batch, chunk.start + piece.first, head);
    for (int i = 0; i < piece.count; ++i, source += t.step) {
      next.next();
      load_row(rows + i * stride, source, t.inner, count, stride);
    }
  });
}

// Rows of B or C as an operand whose columns are steps: where they lie, if they are Reals side by side that
// fill the tiles, else as a copy.
template <class Real>
Rows<Real> rows_across(Real* copy, const Extents<Real>& size, const SsdTensor& t, const SsdChunkScanParams& p,
                       const SsdChunk& chunk, const Piece& piece, int64_t group) {
  const bool is_real = std::is_same_v<Real, double> || p.dtype == DType::kFloat32;
  if (is_real && t.inner == 1 && p.states % Lanes<Real>::kRows == 0) {
    return {row_of<Real>(t, chunk.batch, chunk.start + piece.first, group), 1, t.step};
  }
  read_rows(copy, size.states, t, p.dtype, chunk, piece, group, p.states);
  return transposed(copy, size.states);
}

// D of a head, for each of its channels.
template <class Real>
void read_D(const SsdChunkScanParams& p, Real* row, int64_t head, int64_t padded_count) {
  const Real* D = static_cast<const Real*>(p.D) + (p.D_wide ? head * p.head_dim : head);
  load_row(row, D, p.D_wide ? 1 : 0, p.head_dim, padded_count);
}

template <class Real>
void scale_row(Real* row, Real factor, int64_t padded_count) {
  for (int64_t i = 0; i < padded_count; i += Lanes<Real>::kCount) {
    store(row + i, load(row + i) * splat(factor));
  }
}

// [i][j] = C_i B_j for the lower triangle; B_columns is B transposed.
template <class Real>
void multiply_C_B(Real* CB, const Real* C_rows, const Real* B_columns, const SsdChunkScanParams& p,
                  const Extents<Real>& size, int count) {
  for_tiles<Real>(count, padded_columns<Real>(count),
                  [&](auto tile, int i, int64_t j) __attribute__((always_inline)) {
                    if (j > i + tile.kRows - 1) return;
                    tile.clear();
                    tile.multiply(plain(C_rows, size.states), i, B_columns + j, size.steps, 0, p.states);
                    tile.store_to(CB + i * size.steps + j, size.steps);
                  });
}

inline int64_t first_head(const SsdChunkScanParams& p, int64_t group, int64_t block, int64_t blocks) {
  const int64_t per_group = p.heads / p.groups;
  return group * per_group + per_group * block / blocks;
}

template <class Real>
Vector<Real> sigmoid_of(Vector<Real> x) {
  return splat(Real(1)) / (splat(Real(1)) + exp(-x));
}

}  // namespace
}  // namespace tilewright::TW_ISA
