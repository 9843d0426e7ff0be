// The SSD scan forward, by products of matrices (the dual form). With cum the sum of dt A over a chunk's
// steps, S the state before it, and i, j steps of it:
//
//   S' = exp(cum[last]) S + sum_j exp(cum[last] - cum[j]) dt[j] x[j] B[j]^T
//   y[i] = exp(cum[i]) S C[i] + sum_{j<=i} (C[i] B[j]) exp(cum[i] - cum[j]) dt[j] x[j] + D x[i]
//
// Two passes. The first runs through the chunks of one head of one sequence and keeps the state before each.
// The second computes each chunk's outputs by itself; heads of a group share C B^T. Where the state is reset
// within a chunk, the parts between resets are chunks of their own, so nothing is masked and a NaN stays in
// its sequence.
//
// Roofline: a step of a head costs 2 * (2 P N + Q P / 2) FLOPs plus Q N / (heads a group), Q = kSsdChunk: at
// P 64, N 128 36.9 kFLOP against 4 P bytes of x and out in 16 bits. It is bound by the FMA units.
#include "scan/ssd_chunk_simd.h"

namespace tilewright::TW_ISA {
namespace {

template <class Real>
struct Scratch {
  Extents<Real> size;
  Arena arena;
  Steps<Real> steps;
  Real *state, *B_rows, *C_rows, *B_columns, *CB, *decayed, *x, *y, *z, *D;

  Scratch(const SsdChunkScanParams& p, char* base) : size(p), arena{base}, steps(arena, size) {
    state = arena.take<Real>(size.states * size.dims);
    for (Real** rows : {&B_rows, &C_rows, &B_columns}) *rows = arena.take<Real>(size.steps * size.states);
    for (Real** square : {&CB, &decayed}) *square = arena.take<Real>(size.steps * size.steps);
    for (Real** rows : {&x, &y}) *rows = arena.take<Real>(size.steps * size.dims);
    for (Real** vector : {&z, &D}) *vector = arena.take<Real>(size.dims);
  }
};

// The state after a chunk, from the one before it; the two may be one.
template <class Real>
void update_state(const SsdChunkScanParams& p, Scratch<Real>& s, const SsdChunk& chunk, int64_t head,
                  const Real* before, Real* after) {
  const Piece piece = last_piece(p, chunk);
  const auto& size = s.size;
  prepare_steps(p, s.steps, size, chunk, piece, head);
  const Rows<Real> B = rows_across(s.B_rows, size, p.B, p, chunk, piece, head / (p.heads / p.groups));
  read_rows(s.x, size.dims, p.x, p.dtype, chunk, piece, head, p.head_dim);
  for (int j = 0; j < piece.count; ++j)
    scale_row(s.x + j * size.dims, s.steps.to_end[j] * s.steps.dt[j], size.dims);
  Fetch next = fetch_rows(p.x, p, chunk.batch, chunk.start + kSsdChunk,
                          smaller(kSsdChunk, p.length - chunk.start - kSsdChunk), head,
                          tiles_of<Real>(p.states, p.head_dim));
  for_tiles<Real>(p.states, padded_columns<Real>(p.head_dim),
                  [&](auto tile, int n, int64_t d) __attribute__((always_inline)) {
                    next.next();
                    const int64_t at = n * size.dims + d;
                    tile.clear();
                    if (piece.continues) {
                      tile.load_from(before + at, size.dims);
                      tile.scale(s.steps.decay);
                    }
                    tile.multiply(B, n, s.x + d, size.dims, 0, piece.count);
                    tile.store_to(after + at, size.dims);
                  });
}

template <class Real>
void scan_states(const SsdChunkScanParams& p, Scratch<Real>& s, int64_t sequence, int64_t head) {
  load_state(s.state, p.initial_state, sequence * p.heads + head, p, s.size);
  const int64_t base = ssd_chunk_base(p, sequence);
  Real* state = s.state;
  for (int64_t c = 0;; ++c) {
    const SsdChunk chunk = ssd_chunk_at(p, sequence, c);
    if (chunk.length == 0) break;
    keep_state(kept_state<Real>(p.chunk_states, p, base + c, head), state, p, s.size);
    const bool last = is_last(p, chunk);
    if (last && p.final_state == nullptr) break;
    Real* const after =
        !last && fills_tiles(p, s.size) ? kept_state<Real>(p.chunk_states, p, base + c + 1, head) : s.state;
    update_state(p, s, chunk, head, state, after);
    state = after;
  }
  store_state(p.final_state, sequence * p.heads + head, state, p, s.size);
}

// decayed[i][j] = (C[i] B[j]) exp(cum[i] - cum[j]) dt[j], right for j <= i.
template <class Real>
void decay_products(Scratch<Real>& s, Fetch next) {
  for (int i = 0; i < s.steps.count; ++i) {
    next.next();
    const Real* products = s.CB + i * s.size.steps;
    Real* row = s.decayed + i * s.size.steps;
    for (int j = 0; j <= i; j += Lanes<Real>::kCount) {
      store(row + j, load(products + j) * s.steps.decay_from(i, j) * load(s.steps.dt + j));
    }
  }
}

template <class Real>
void finish_row(const SsdChunkScanParams& p, Scratch<Real>& s, const SsdChunk& chunk, int64_t step, int row,
                int64_t head) {
  Real* y = s.y + row * s.size.dims;
  const Real* x = s.x + row * s.size.dims;
  if (p.D != nullptr) {
    for (int64_t d = 0; d < s.size.dims; d += Lanes<Real>::kCount)
      store(y + d, fma(load(s.D + d), load(x + d), load(y + d)));
  }
  if (p.y.data != nullptr) write_row(p.y, p.dtype, chunk.batch, step, head, y, p.head_dim);
  if (p.z.data != nullptr) {
    read_row(s.z, p.z, p.dtype, chunk.batch, step, head, p.head_dim, s.size.dims);
    for (int64_t d = 0; d < s.size.dims; d += Lanes<Real>::kCount) {
      const auto z = load(s.z + d);
      store(y + d, load(y + d) * (z * sigmoid_of<Real>(z)));
    }
  }
  write_row(p.out, p.dtype, chunk.batch, step, head, y, p.head_dim);
}

template <class Real>
void scan_head(const SsdChunkScanParams& p, Scratch<Real>& s, const SsdChunk& chunk, int64_t number,
               const Piece& piece, int64_t head) {
  const auto& size = s.size;
  prepare_steps(p, s.steps, size, chunk, piece, head);
  read_rows(s.x, size.dims, p.x, p.dtype, chunk, piece, head, p.head_dim);
  if (p.D != nullptr) read_D(p, s.D, head, size.dims);
  decay_products(s, fetch_state(kept_state<Real>(p.chunk_states, p, number, head), p, piece.count));
  const Real* state = piece.continues
                          ? operand_state(kept_state<Real>(p.chunk_states, p, number, head), s.state, p, size)
                          : nullptr;
  Fetch next = fetch_rows(p.x, p, chunk.batch, chunk.start + piece.first, piece.count, head + 1,
                          tiles_of<Real>(piece.count, p.head_dim));
  Fetch results = fetch_rows(p.out, p, chunk.batch, chunk.start + piece.first, piece.count, head,
                             tiles_of<Real>(piece.count, p.head_dim), true);
  for_tiles<Real>(piece.count, padded_columns<Real>(p.head_dim),
                  [&](auto tile, int i, int64_t d) __attribute__((always_inline)) {
                    next.next();
                    results.next();
                    tile.clear();
                    if (state != nullptr) {
                      tile.multiply(plain(s.C_rows, size.states), i, state + d, size.dims, 0, p.states);
                      tile.scale_rows(s.steps.from_start + i);
                    }
                    tile.multiply_lower(plain(s.decayed, size.steps), i, s.x + d, size.dims, piece.count);
                    tile.store_to(s.y + i * size.dims + d, size.dims);
                  });
  const int64_t start = chunk.start + piece.first;
  for (int i = 0; i < piece.count; ++i) finish_row(p, s, chunk, start + i, i, head);
}

template <class Real>
void scan_chunk(const SsdChunkScanParams& p, Scratch<Real>& s, int64_t number, int64_t group, int64_t block,
                int64_t blocks) {
  const SsdChunk chunk = ssd_chunk(p, number);
  for (int first = 0; first < chunk.length;) {
    const Piece piece = piece_from(p, chunk, first);
    read_rows(s.B_rows, s.size.states, p.B, p.dtype, chunk, piece, group, p.states);
    read_rows(s.C_rows, s.size.states, p.C, p.dtype, chunk, piece, group, p.states);
    transpose_exactly(s.B_columns, s.size.steps, s.B_rows, s.size.states, piece.count, p.states);
    multiply_C_B(s.CB, s.C_rows, s.B_columns, p, s.size, piece.count);
    const int64_t end = first_head(p, group, block + 1, blocks);
    for (int64_t head = first_head(p, group, block, blocks); head < end; ++head) {
      scan_head(p, s, chunk, number, piece, head);
    }
    first += piece.count;
  }
}

template <class Real>
int64_t scratch_bytes(const SsdChunkScanParams& p) {
  return Scratch<Real>(p, nullptr).arena.used;
}

template <class Real>
void forward(const SsdChunkScanParams& p, int threads) {
  char* const base = static_cast<char*>(p.workspace);
  const int64_t bytes = scratch_bytes<Real>(p);
  parallel_slots(p.sequences * p.heads, threads, [&](int64_t task, int slot) {
    Scratch<Real> scratch(p, base + slot * bytes);
    scan_states(p, scratch, task / p.heads, task % p.heads);
  });
  const int64_t blocks = ssd_head_blocks(p, scan::kSsdEnoughCpu), per_chunk = p.groups * blocks;
  parallel_slots(ssd_chunk_count(p) * per_chunk, threads, [&](int64_t task, int slot) {
    Scratch<Real> scratch(p, base + slot * bytes);
    const int64_t part = task % per_chunk;
    scan_chunk(p, scratch, task / per_chunk, part / blocks, part % blocks, blocks);
  });
}

}  // namespace

int64_t ssd_chunk_scan_fwd_workspace_cpu(const SsdChunkScanParams& p, int threads) {
  const int64_t slots = threads > 1 ? threads : 1;
  return slots * (p.dtype == DType::kFloat64 ? scratch_bytes<double>(p) : scratch_bytes<float>(p));
}

void ssd_chunk_scan_fwd_cpu(const SsdChunkScanParams& p, int threads) {
  p.dtype == DType::kFloat64 ? forward<double>(p, threads) : forward<float>(p, threads);
}

}  // namespace tilewright::TW_ISA
