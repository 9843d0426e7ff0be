// The SSD scan backward, by products of matrices. With g the gradient of y (before the gate), S and G the
// state before a chunk and the gradient of the state after it, cum and dt as in the forward pass,
// L[i][j] = exp(cum[i] - cum[j]), and i, j, t steps of the chunk:
//
//   G' = exp(cum[last]) G + sum_i exp(cum[i]) g[i] C[i]^T                      the gradient of S
//   U[j] = sum_{i>=j} (C[i] B[j]) L[i][j] g[i] + exp(cum[last] - cum[j]) G B[j];  dx[j] = dt[j] U[j] + D g[j]
//   K[i][j] = L[i][j] dt[j] (g[i] x[j])
//   dC[i] = sum_{j<=i} K[i][j] B[j] + exp(cum[i]) S^T g[i]                     the second term is dC_S
//   dB[j] = sum_{i>=j} K[i][j] C[i] + exp(cum[last] - cum[j]) dt[j] G^T x[j]   the second term is dB_G
//   d(dt[t] A) = sum over all that decays by step t: sum_{j<t<=i} (C[i] B[j]) K[i][j] + sum_{i>=t} C[i]
//   dC_S[i]
//                + sum_{j<t} B[j] dB_G[j] + exp(cum[last]) <G, S>
//   ddt[t] = U[t] x[t] + A d(dt[t] A)
//
// The sums over decaying parts are built up by additions alone: a difference of two cumulative sums would
// lose them where decay is strong.
//
// Two passes, as forward: the first runs back through the chunks of one head and keeps G, the second computes
// each chunk by itself. K is summed over the heads of a group before it meets B and C. Sums over heads,
// chunks and batch rows go over partial results in a fixed order.
//
// Roofline: a step of a head costs 2 * (4 P N + Q P) FLOPs, Q = kSsdChunk: at P 64, N 128 73.7 kFLOP against
// 8 P bytes of x, dout and dx in fp32 and 16 P N / Q of states. It is bound by the FMA units.
#include "scan/ssd_chunk_simd.h"

namespace tilewright::TW_ISA {
namespace {

template <class Real>
struct Scratch {
  Extents<Real> size;
  Arena arena;
  Steps<Real> steps;
  Real *S, *G;                                            // [states][head_dim]
  Real *B_rows, *C_rows, *dB_rows, *dC_rows;              // [steps][states]
  Real *B_columns, *C_columns, *dB_columns, *dC_columns;  // [states][steps]
  Real *CB, *K, *K_sum, *decayed, *crossing;              // [steps][steps], crossing [steps]
  Real *x, *g, *U;                                        // [steps][head_dim]
  Real *x_columns, *g_columns;                            // [head_dim][steps]
  Real *from_C, *from_B, *d_rate, *slope, *row, *other, *D, *dD;
  Real* partial;  // [steps][lanes]

  Scratch(const SsdChunkScanParams& p, char* base) : size(p), arena{base}, steps(arena, size) {
    for (Real** state : {&S, &G}) *state = arena.take<Real>(size.states * size.dims);
    for (Real** rows :
         {&B_rows, &C_rows, &dB_rows, &dC_rows, &B_columns, &C_columns, &dB_columns, &dC_columns}) {
      *rows = arena.take<Real>(size.steps * size.states);
    }
    for (Real** square : {&CB, &K, &K_sum, &decayed}) *square = arena.take<Real>(size.steps * size.steps);
    for (Real** rows : {&x, &g, &U, &x_columns, &g_columns}) *rows = arena.take<Real>(size.steps * size.dims);
    for (Real** vector : {&crossing, &from_C, &from_B, &d_rate, &slope})
      *vector = arena.take<Real>(size.steps);
    for (Real** vector : {&D, &dD}) *vector = arena.take<Real>(size.dims);
    partial = arena.take<Real>(size.steps * Lanes<Real>::kCount);
    for (Real** vector : {&row, &other})
      *vector = arena.take<Real>(size.dims > size.states ? size.dims : size.states);
  }
};

// What lies in the workspace: G of every chunk, partial sums, then each thread's scratch.
template <class Real>
struct Workspace {
  Real* G;                   // [chunk][head][states][head_dim]
  Real *dA, *ddt_bias, *dD;  // [chunk][head], dD [chunk][head][head_dim]
  Real *dB, *dC;             // [block][batch][step][group][states], if there is more than one block
  char* scratch;
  int64_t scratch_bytes, blocks, bytes;

  Workspace(const SsdChunkScanParams& p, int threads) : blocks(ssd_head_blocks(p, scan::kSsdEnoughCpu)) {
    Arena arena{static_cast<char*>(p.workspace)};
    const int64_t parts = ssd_chunk_count(p) * p.heads;
    G = arena.take<Real>(parts * p.states * p.head_dim);
    for (Real** sums : {&dA, &ddt_bias}) *sums = arena.take<Real>(parts);
    dD = arena.take<Real>(parts * p.head_dim);
    for (Real** sums : {&dB, &dC}) {
      *sums = arena.take<Real>(blocks > 1 ? blocks * p.batch * p.length * p.groups * p.states : 0);
    }
    scratch_bytes = Scratch<Real>(p, nullptr).arena.used;
    scratch = arena.base + arena.used;
    bytes = arena.used + scratch_bytes * (threads > 1 ? threads : 1);
  }
};

// dout of one step becomes g, and dz is written, where there is a gate.
template <class Real>
void gate_gradient(const SsdChunkScanParams& p, Scratch<Real>& s, Real* g, const SsdChunk& chunk,
                   int64_t step, int64_t head, bool write_dz) {
  const int64_t dims = s.size.dims;
  read_row(s.row, p.z, p.dtype, chunk.batch, step, head, p.head_dim, dims);
  if (write_dz) read_row(s.other, p.y, p.dtype, chunk.batch, step, head, p.head_dim, dims);
  for (int64_t d = 0; d < dims; d += Lanes<Real>::kCount) {
    const auto z = load(s.row + d), dout = load(g + d), gate = sigmoid_of<Real>(z);
    store(g + d, dout * (z * gate));
    if (!write_dz) continue;
    const auto one = splat(Real(1));
    store(s.other + d, dout * load(s.other + d) * (gate * (one + z * (one - gate))));
  }
  if (write_dz) write_row(p.dz, p.dtype, chunk.batch, step, head, s.other, p.head_dim);
}

// g of every step; something else may come nearer meanwhile.
template <class Real>
void read_gradients(const SsdChunkScanParams& p, Scratch<Real>& s, const SsdChunk& chunk, const Piece& piece,
                    int64_t head, bool write_dz, Fetch next = {}) {
  read_rows(s.g, s.size.dims, p.dout, p.dtype, chunk, piece, head, p.head_dim, next);
  for (int i = 0; p.z.data != nullptr && i < piece.count; ++i) {
    gate_gradient(p, s, s.g + i * s.size.dims, chunk, chunk.start + piece.first + i, head, write_dz);
  }
}

// ---- the first pass: gradients of states ----

// The gradient of the state before a chunk, from that of the one after it; the two may be one.
template <class Real>
void update_state_gradient(const SsdChunkScanParams& p, Scratch<Real>& s, const SsdChunk& chunk, int64_t head,
                           const Real* after, Real* before) {
  const Piece piece = piece_from(p, chunk, 0);
  const auto& size = s.size;
  if (!piece.continues) {
    std::memset(before, 0, size_t(size.states * size.dims) * sizeof(Real));
    return;
  }
  prepare_steps(p, s.steps, size, chunk, piece, head);
  const Rows<Real> C = rows_across(s.C_rows, size, p.C, p, chunk, piece, head / (p.heads / p.groups));
  read_gradients(p, s, chunk, piece, head, false);
  for (int i = 0; i < piece.count; ++i) scale_row(s.g + i * size.dims, s.steps.from_start[i], size.dims);
  Fetch next = fetch_rows(p.dout, p, chunk.batch, chunk.start - kSsdChunk, kSsdChunk, head,
                          tiles_of<Real>(p.states, p.head_dim));
  for_tiles<Real>(p.states, padded_columns<Real>(p.head_dim),
                  [&](auto tile, int n, int64_t d) __attribute__((always_inline)) {
                    next.next();
                    const int64_t at = n * size.dims + d;
                    tile.clear();
                    if (piece.ends) {
                      tile.load_from(after + at, size.dims);
                      tile.scale(s.steps.decay);
                    }
                    tile.multiply(C, n, s.g + d, size.dims, 0, piece.count);
                    tile.store_to(before + at, size.dims);
                  });
}

template <class Real>
void scan_state_gradients(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                          int64_t sequence, int64_t head) {
  load_state(s.G, p.dfinal_state, sequence * p.heads + head, p, s.size);
  const int64_t steps = ssd_sequence_end(p, sequence) - ssd_sequence_start(p, sequence);
  const int64_t base = ssd_chunk_base(p, sequence);
  Real* G = s.G;
  for (int64_t c = (steps + kSsdChunk - 1) / kSsdChunk - 1; c >= 0; --c) {
    keep_state(kept_state<Real>(w.G, p, base + c, head), G, p, s.size);
    Real* const before = c > 0 && fills_tiles(p, s.size) ? kept_state<Real>(w.G, p, base + c - 1, head) : s.G;
    update_state_gradient(p, s, ssd_chunk_at(p, sequence, c), head, G, before);
    G = before;
  }
  store_state(p.dinitial_state, sequence * p.heads + head, G, p, s.size);
}

// ---- the second pass: one head of one piece ----

// The sum of each vector, a square of them at a time: one by one, that takes longer than to fill them. Sums
// beyond `count`, up to a multiple of a vector, may be anything.
inline void sum_vectors(float* sums, const float* vectors, int count) {
  for (int i = 0; i < count; i += kLanes) store(sums + i, row_sums<kLanes>(vectors + i * kLanes, kLanes));
}
inline void sum_vectors(double* sums, const double* vectors, int count) {
  std::memcpy(sums, vectors, size_t(count) * sizeof(double));
}

// From K = g x^T: decayed = (C B) L, K, the sum of K over heads, and crossing[t] = sum_{j<t<=i} (C[i] B[j])
// K[i][j]. Rows run upwards, so that U[j], the sum of what row i >= t adds to column j < t, only grows.
template <class Real>
void decay_products(Scratch<Real>& s) {
  constexpr int kCount = Lanes<Real>::kCount;
  const int64_t stride = s.size.steps;
  Real* const columns = s.crossing;
  std::memset(columns, 0, size_t(stride) * sizeof(Real));
  for (int i = s.steps.count - 1; i >= 0; --i) {
    Vector<Real> total = splat(Real(0));
    for (int j = 0; j <= i; j += kCount) {
      const Vector<Real> L = s.steps.decay_from(i, j), products = load(s.CB + i * stride + j);
      const Vector<Real> K = load(s.K + i * stride + j) * L * load(s.steps.dt + j);
      store(s.decayed + i * stride + j, products * L);
      store(s.K_sum + i * stride + j, load(s.K_sum + i * stride + j) + K);
      const Vector<Real> reached = keep_first(load(columns + j) + products * K, i - j);
      store(columns + j, reached);
      total = total + reached;
    }
    store(s.partial + i * kCount, total);
  }
  sum_vectors(s.d_rate, s.partial, s.steps.count);
}

template <class Real>
void multiply_g_x(const SsdChunkScanParams& p, Scratch<Real>& s, int count, Fetch next) {
  const auto& size = s.size;
  for_tiles<Real>(count, padded_columns<Real>(count),
                  [&](auto tile, int i, int64_t j) __attribute__((always_inline)) {
                    next.next();
                    if (j > i + tile.kRows - 1) return;
                    tile.clear();
                    tile.multiply(plain(s.g, size.dims), i, s.x_columns + j, size.steps, 0, p.head_dim);
                    tile.store_to(s.K + i * size.steps + j, size.steps);
                  });
}

// U, given G or null for zeros; S comes nearer meanwhile.
template <class Real>
void multiply_U(const SsdChunkScanParams& p, Scratch<Real>& s, const Real* G, const Real* S, int count) {
  const auto& size = s.size;
  Fetch next = fetch_state(S, p, tiles_of<Real>(count, p.head_dim));
  for_tiles<Real>(count, padded_columns<Real>(p.head_dim),
                  [&](auto tile, int j, int64_t d) __attribute__((always_inline)) {
                    next.next();
                    tile.clear();
                    if (G != nullptr) {
                      tile.multiply(plain(s.B_rows, size.states), j, G + d, size.dims, 0, p.states);
                      tile.scale_rows(s.steps.to_end + j);
                    }
                    tile.multiply_upper(transposed(s.decayed, size.steps), j, s.g + d, size.dims, count);
                    tile.store_to(s.U + j * size.dims + d, size.dims);
                  });
}

// sums += state * columns, and along[i] = sum over the states n of by[n][i] times what was added.
template <class Real>
void multiply_state(const SsdChunkScanParams& p, Real* sums, Real* along, const Real* state,
                    const Real* columns, const Real* by, const Extents<Real>& size, int count, Fetch next) {
  std::memset(along, 0, size_t(size.steps) * sizeof(Real));
  if (state == nullptr) return;
  for_tiles<Real>(p.states, padded_columns<Real>(count),
                  [&](auto tile, int n, int64_t i) __attribute__((always_inline)) {
                    next.next();
                    tile.clear();
                    tile.multiply(plain(state, size.dims), n, columns + i, size.steps, 0, p.head_dim);
                    Vector<Real> totals[2];
                    tile.each_vector([&](int v) { totals[v] = load(along + i + v * Lanes<Real>::kCount); });
                    tile.each([&](Vector<Real>& added, int r, int v) __attribute__((always_inline)) {
                      Real* const sum = sums + (n + r) * size.steps + i + v;
                      Vector<Real>& total = totals[v / Lanes<Real>::kCount];
                      total = fma(load(by + (n + r) * size.steps + i + v), added, total);
                      store(sum, load(sum) + added);
                    });
                    tile.each_vector([&](int v) { store(along + i + v * Lanes<Real>::kCount, totals[v]); });
                  });
}

// columns[d][i] = rows[i][d] factors[i]
template <class Real>
void transpose_scaled(Real* columns, const Real* rows, const Real* factors, const Extents<Real>& size,
                      const SsdChunkScanParams& p, int count) {
  transpose_exactly(columns, size.steps, rows, size.dims, count, p.head_dim);
  for (int32_t d = 0; d < p.head_dim; ++d) {
    for (int64_t i = 0; i < count; i += Lanes<Real>::kCount) {
      store(columns + d * size.steps + i, load(columns + d * size.steps + i) * load(factors + i));
    }
  }
}

// Of as many as a multiple of 4 vectors, in 4 sums: one would wait for itself.
template <class Real>
Real dot_of_states(const Real* a, const Real* b, int64_t padded_count) {
  constexpr int kSums = 4, kCount = Lanes<Real>::kCount;
  Vector<Real> totals[kSums];
  for (Vector<Real>& total : totals) total = splat(Real(0));
  for (int64_t i = 0; i < padded_count; i += kSums * kCount) {
    for (int j = 0; j < kSums; ++j)
      totals[j] = fma(load(a + i + j * kCount), load(b + i + j * kCount), totals[j]);
  }
  return Real(sum((totals[0] + totals[1]) + (totals[2] + totals[3])));
}

// slope = what dt's gradient is multiplied with on its way through the clamp and softplus.
template <class Real>
void slopes(const SsdChunkScanParams& p, const Steps<Real>& steps, Real* slope) {
  for (int i = 0; i < steps.count; i += Lanes<Real>::kCount) {
    store(slope + i, p.softplus ? sigmoid_of<Real>(load(steps.raw + i)) : splat(Real(1)));
  }
  const Real lowest = Real(p.dt_min), highest = Real(p.dt_max);
  for (int i = 0; i < steps.count; ++i) {
    if (p.softplus && steps.raw[i] > Real(20)) slope[i] = Real(1);  // softplus is its argument there
    if (steps.active[i] < lowest || steps.active[i] > highest) slope[i] = Real(0);
  }
}

// ddt of every step, from d_rate = crossing, from_C and from_B as they lie in the scratch.
template <class Real>
void finish_steps(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                  const SsdChunk& chunk, int64_t number, const Piece& piece, int64_t head, Real through) {
  const int count = piece.count;
  const Real rate = static_cast<const Real*>(p.A)[head];
  double after = 0, before = 0, dA = 0, dbias = 0;
  for (int t = 0; t < count; ++t) {
    Vector<Real> direct = splat(Real(0));
    const Real *U = s.U + t * s.size.dims, *x = s.x + t * s.size.dims;
    for (int64_t d = 0; d < padded_columns<Real>(p.head_dim); d += Lanes<Real>::kCount)
      direct = fma(load(U + d), load(x + d), direct);
    store(s.partial + t * Lanes<Real>::kCount, direct);
  }
  sum_vectors(s.crossing, s.partial, count);
  for (int t = count - 1; t >= 0; --t) {
    after += double(s.from_C[t]);
    s.d_rate[t] = Real(double(s.d_rate[t]) + after + double(through));
  }
  Real* ddt = row_of<Real>(p.ddt, chunk.batch, chunk.start + piece.first, head);
  slopes(p, s.steps, s.slope);
  for (int t = 0; t < count; ++t) {
    const Real d_rate = Real(double(s.d_rate[t]) + before);
    before += double(s.from_B[t]);
    const Real gradient = (s.crossing[t] + rate * d_rate) * s.slope[t];
    ddt[t * p.ddt.step] = gradient;
    dA += double(d_rate) * double(s.steps.dt[t]);
    dbias += double(gradient);
  }
  w.dA[number * p.heads + head] += Real(dA);
  w.ddt_bias[number * p.heads + head] += Real(dbias);
}

template <class Real>
void finish_rows(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                 const SsdChunk& chunk, int64_t number, const Piece& piece, int64_t head) {
  const int64_t dims = s.size.dims;
  const bool skips = p.D != nullptr;
  if (skips) read_D(p, s.D, head, dims);
  std::memset(s.dD, 0, size_t(dims) * sizeof(Real));
  with_type<Real>(p.dtype, [&](auto type) {
    using T = decltype(type);
    T* target = row_of<T>(p.dx, chunk.batch, chunk.start + piece.first, head);
    for (int j = 0; j < piece.count; ++j, target += p.dx.step) {
      const Real *U = s.U + j * dims, *g = s.g + j * dims, *x = s.x + j * dims;
      const Vector<Real> dt = splat(s.steps.dt[j]);
      for (int64_t d = 0; d < dims; d += Lanes<Real>::kCount) {
        Vector<Real> dx = dt * load(U + d);
        if (skips) {
          dx = fma(load(s.D + d), load(g + d), dx);
          store(s.dD + d, fma(load(g + d), load(x + d), load(s.dD + d)));
        }
        store(s.row + d, dx);
      }
      store_row(target, p.dx.inner, s.row, p.head_dim);
    }
  });
  Real* const dD = w.dD + (number * p.heads + head) * p.head_dim;
  for (int32_t d = 0; d < p.head_dim; ++d) dD[d] += s.dD[d];
}

template <class Real>
void differentiate_head(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                        const SsdChunk& chunk, int64_t number, const Piece& piece, int64_t head) {
  const auto& size = s.size;
  const int count = piece.count;
  prepare_steps(p, s.steps, size, chunk, piece, head);
  read_rows(s.x, size.dims, p.x, p.dtype, chunk, piece, head, p.head_dim);
  read_gradients(p, s, chunk, piece, head, true,
                 fetch_state(kept_state<Real>(w.G, p, number, head), p, count));
  transpose_exactly(s.x_columns, size.steps, s.x, size.dims, count, p.head_dim);
  multiply_g_x(p, s, count,
               fetch_rows(p.dx, p, chunk.batch, chunk.start + piece.first, count, head,
                          tiles_of<Real>(count, count), true));
  decay_products(s);
  const Real *S = nullptr, *G = nullptr;
  if (piece.continues) S = operand_state(kept_state<Real>(p.chunk_states, p, number, head), s.S, p, size);
  if (piece.ends) G = operand_state(kept_state<Real>(w.G, p, number, head), s.G, p, size);
  multiply_U(p, s, G, S, count);
  transpose_scaled(s.g_columns, s.g, s.steps.from_start, size, p, count);
  const auto of_next_head = [&](const SsdTensor& t) {
    return fetch_rows(t, p, chunk.batch, chunk.start + piece.first, count, head + 1,
                      tiles_of<Real>(p.states, count));
  };
  multiply_state(p, s.dC_columns, s.from_C, S, s.g_columns, s.C_columns, size, count, of_next_head(p.x));
  for (int64_t j = 0; j < size.steps; j += Lanes<Real>::kCount) {
    store(s.crossing + j, load(s.steps.to_end + j) * load(s.steps.dt + j));
  }
  transpose_scaled(s.x_columns, s.x, s.crossing, size, p, count);
  multiply_state(p, s.dB_columns, s.from_B, G, s.x_columns, s.B_columns, size, count, of_next_head(p.dout));
  const Real through =
      S != nullptr && G != nullptr ? s.steps.decay * dot_of_states(S, G, size.states * size.dims) : Real(0);
  finish_steps(p, s, w, chunk, number, piece, head, through);
  finish_rows(p, s, w, chunk, number, piece, head);
}

// dB and dC of a piece, from the sum of K over heads and the parts that went through states.
template <class Real>
void finish_group(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                  const SsdChunk& chunk, const Piece& piece, int64_t group, int64_t block) {
  const auto& size = s.size;
  const int count = piece.count;
  const int64_t columns = padded_columns<Real>(p.states);
  transpose_exactly(s.dB_rows, size.states, s.dB_columns, size.steps, p.states, count);
  transpose_exactly(s.dC_rows, size.states, s.dC_columns, size.steps, p.states, count);
  for_tiles<Real>(count, columns, [&](auto tile, int i, int64_t n) __attribute__((always_inline)) {
    tile.load_from(s.dC_rows + i * size.states + n, size.states);
    tile.multiply_lower(plain(s.K_sum, size.steps), i, s.B_rows + n, size.states, count);
    tile.store_to(s.dC_rows + i * size.states + n, size.states);
  });
  for_tiles<Real>(count, columns, [&](auto tile, int j, int64_t n) __attribute__((always_inline)) {
    tile.load_from(s.dB_rows + j * size.states + n, size.states);
    tile.multiply_upper(transposed(s.K_sum, size.steps), j, s.C_rows + n, size.states, count);
    tile.store_to(s.dB_rows + j * size.states + n, size.states);
  });
  for (int i = 0; i < count; ++i) {
    const int64_t step = chunk.start + piece.first + i;
    const Real *dB = s.dB_rows + i * size.states, *dC = s.dC_rows + i * size.states;
    if (w.blocks == 1) {
      write_row(p.dB, p.dtype, chunk.batch, step, group, dB, p.states);
      write_row(p.dC, p.dtype, chunk.batch, step, group, dC, p.states);
      continue;
    }
    const int64_t row = (((block * p.batch + chunk.batch) * p.length + step) * p.groups + group) * p.states;
    std::memcpy(w.dB + row, dB, size_t(p.states) * sizeof(Real));
    std::memcpy(w.dC + row, dC, size_t(p.states) * sizeof(Real));
  }
}

template <class Real>
void differentiate_chunk(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w,
                         int64_t number, int64_t group, int64_t block) {
  const SsdChunk chunk = ssd_chunk(p, number);
  const auto& size = s.size;
  const int64_t begin = first_head(p, group, block, w.blocks),
                end = first_head(p, group, block + 1, w.blocks);
  for (int64_t part = number * p.heads + begin; part < number * p.heads + end; ++part) {
    w.dA[part] = w.ddt_bias[part] = Real(0);
    std::memset(w.dD + part * p.head_dim, 0, size_t(p.head_dim) * sizeof(Real));
  }
  for (int first = 0; first < chunk.length;) {
    const Piece piece = piece_from(p, chunk, first);
    read_rows(s.B_rows, size.states, p.B, p.dtype, chunk, piece, group, p.states);
    read_rows(s.C_rows, size.states, p.C, p.dtype, chunk, piece, group, p.states);
    for (Real* zeroed : {s.B_columns, s.C_columns, s.dB_columns, s.dC_columns}) {
      std::memset(zeroed, 0, size_t(size.steps * size.states) * sizeof(Real));
    }
    std::memset(s.K_sum, 0, size_t(size.steps * size.steps) * sizeof(Real));
    transpose_exactly(s.B_columns, size.steps, s.B_rows, size.states, piece.count, p.states);
    transpose_exactly(s.C_columns, size.steps, s.C_rows, size.states, piece.count, p.states);
    multiply_C_B(s.CB, s.C_rows, s.B_columns, p, size, piece.count);
    for (int64_t head = begin; head < end; ++head) {
      differentiate_head(p, s, w, chunk, number, piece, head);
    }
    finish_group(p, s, w, chunk, piece, group, block);
    first += piece.count;
  }
}

// ---- sums over partial results ----

template <class Real>
void sum_head(const SsdChunkScanParams& p, const Workspace<Real>& w, int64_t head) {
  const int64_t chunks = ssd_chunk_count(p);
  const auto total = [&](const Real* partial, int64_t width, int64_t from, int64_t to) {
    double result = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int64_t d = from; d < to; ++d) result += double(partial[(chunk * p.heads + head) * width + d]);
    }
    return Real(result);
  };
  if (p.dA != nullptr) static_cast<Real*>(p.dA)[head] = total(w.dA, 1, 0, 1);
  if (p.ddt_bias != nullptr) static_cast<Real*>(p.ddt_bias)[head] = total(w.ddt_bias, 1, 0, 1);
  if (p.dD == nullptr) return;
  Real* dD = static_cast<Real*>(p.dD);
  if (!p.D_wide) dD[head] = total(w.dD, p.head_dim, 0, p.head_dim);
  for (int32_t d = 0; p.D_wide && d < p.head_dim; ++d) {
    dD[head * p.head_dim + d] = total(w.dD, p.head_dim, d, d + 1);
  }
}

template <class Real>
void sum_blocks(const SsdChunkScanParams& p, Scratch<Real>& s, const Workspace<Real>& w, int64_t row) {
  const int64_t step = row / p.groups % p.length, batch = row / p.groups / p.length, group = row % p.groups;
  const int64_t stride = p.batch * p.length * p.groups * p.states;
  for (int which = 0; which < 2; ++which) {
    const Real* partial = (which == 0 ? w.dB : w.dC) + row * p.states;
    std::memcpy(s.row, partial, size_t(p.states) * sizeof(Real));
    for (int64_t block = 1; block < w.blocks; ++block) {
      for (int32_t n = 0; n < p.states; ++n) s.row[n] += partial[block * stride + n];
    }
    write_row(which == 0 ? p.dB : p.dC, p.dtype, batch, step, group, s.row, p.states);
  }
}

template <class Real>
void backward(const SsdChunkScanParams& p, int threads) {
  const Workspace<Real> w(p, threads);
  const auto scratch = [&](int slot) { return Scratch<Real>(p, w.scratch + slot * w.scratch_bytes); };
  parallel_slots(p.sequences * p.heads, threads, [&](int64_t task, int slot) {
    Scratch<Real> s = scratch(slot);
    scan_state_gradients(p, s, w, task / p.heads, task % p.heads);
  });
  const int64_t per_chunk = p.groups * w.blocks;
  parallel_slots(ssd_chunk_count(p) * per_chunk, threads, [&](int64_t task, int slot) {
    Scratch<Real> s = scratch(slot);
    const int64_t part = task % per_chunk;
    differentiate_chunk(p, s, w, task / per_chunk, part / w.blocks, part % w.blocks);
  });
  parallel_chunks(p.heads, threads, [&](int64_t head) { sum_head(p, w, head); });
  if (w.blocks == 1) return;
  constexpr int64_t kRows = 64;
  const int64_t rows = p.batch * p.length * p.groups;
  parallel_slots((rows + kRows - 1) / kRows, threads, [&](int64_t task, int slot) {
    Scratch<Real> s = scratch(slot);
    const int64_t end = (task + 1) * kRows < rows ? (task + 1) * kRows : rows;
    for (int64_t row = task * kRows; row < end; ++row) sum_blocks(p, s, w, row);
  });
}

}  // namespace

int64_t ssd_chunk_scan_bwd_workspace_cpu(const SsdChunkScanParams& p, int threads) {
  return p.dtype == DType::kFloat64 ? Workspace<double>(p, threads).bytes
                                    : Workspace<float>(p, threads).bytes;
}

void ssd_chunk_scan_bwd_cpu(const SsdChunkScanParams& p, int threads) {
  p.dtype == DType::kFloat64 ? backward<double>(p, threads) : backward<float>(p, threads);
}

}  // namespace tilewright::TW_ISA
