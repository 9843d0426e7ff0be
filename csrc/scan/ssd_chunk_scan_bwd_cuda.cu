// The SSD scan backward on the GPU, in the dual form (the formulas are in ssd_chunk_scan_bwd_cpu.cpp):
//
//   0. ssd_states              the state before each chunk, which the forward pass did not keep: of Mamba-2's
//   usual
//                              sizes they are four times x in 16 bits
//   1. chunk_gradients_kernel  a block per chunk, head and 64 x 64 tile: what the chunk adds to the gradient
//   of
//                              the state before it
//   2. pass_gradients_kernel   a thread per element of a state, back through the chunks: the gradient of the
//                              state after each
//   1 and 2. run_gradients_kernel, where sequences and heads are enough: a block per sequence, head and tile
//   3. differentiate_kernel    a block per chunk, group and block of its heads: all gradients, as partial
//   sums
//                              where they run over heads, chunks or batch rows
//   4. sum_states_kernel, sum_heads_kernel  add the partial sums in a fixed order
//
// Products run on the FMA units in fp32; those of 16-bit dtypes on tensor cores
// (ssd_chunk_scan_bwd_*_mma_cuda.cu), and here what these leave. Roofline: a step of a head costs 2 * (5 P N
// + 3 Q P / 2) FLOPs, Q = kSsdChunk, at P 64, N 128 94 kFLOP, against 20 P bytes of x, dout and dx and 16 P N
// / Q of states: it is bound by the FMA units.
#include "scan/ssd_chunk_fma_cuda.h"

namespace tilewright::scan {
namespace {

struct Smem {
  Matrix left, right;
  Matrix CB;        // at[i][j] = C[i] B[j]
  Matrix decayed;   // at[i][j] = C[i] B[j] exp(cum[i] - cum[j]); at last the sum of K over heads
  Matrix crossing;  // at[i][j] = C[i] B[j] K[i][j], then its sums over rows from i on; at last K's sum
                    // transposed
  Pieces pieces;
  Steps steps;
  float direct[kTile], from_C[kTile], from_B[kTile];
  float warps[kThreads / device::kWarpSize];
};

// The gradient of y: dout, through the gate.
template <class T>
struct GradientRows {
  RowsOf<T> dout, z;
  bool gated;

  __device__ __forceinline__ GradientRows(const SsdChunkScanParams& p, const SsdChunk& chunk, int64_t head)
      : dout(p.dout, chunk, head, p.head_dim), z(p.z, chunk, head, p.head_dim), gated(p.z.data != nullptr) {}

  __device__ __forceinline__ float operator()(int row, int d) const {
    if (!dout.has(row, d)) return 0.0f;
    const float gradient = dout(row, d);
    if (!gated) return gradient;
    const float gate = z(row, d);
    return gradient * (gate * sigmoid(gate));
  }
};

__device__ __forceinline__ int depth_of(int extent, int from) {
  return extent - from < kTile ? extent - from : kTile;
}

// ---- 1 and 2: gradients of states ----

// What a chunk adds to a tile of the gradient of the state before it.
template <class T>
__device__ __forceinline__ void add_chunk(const SsdChunkScanParams& p, Smem& smem, const Place& place,
                                          const TilePlace& at, Own& added) {
  const SsdChunk& chunk = place.chunk;
  prepare(p, chunk, place.head, smem);
  RowsOf<T> C(p.C, chunk, place.group, p.states);
  const GradientRows<T> g(p, chunk, place.head);
  C.to = smem.pieces.head_end;
  fill<false>(smem.left, [&](int i, int n) { return C(i, at.n0 + n); });
  fill<false>(smem.right,
              [&](int i, int d) { return i < C.to ? g(i, at.d0 + d) * smem.steps.from_start[i] : 0.0f; });
  device::sync_block();
  clear(added);
  multiply(added, smem.left, smem.right, C.to);
}

// Four blocks of a multiprocessor: left to itself, ptxas takes 48 registers for a fifth, and spills.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    chunk_gradients_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  Smem& smem = device::shared_memory<Smem>();
  each_block(params.odd_states, tasks_of(p) * state_tiles(p), [&](int64_t block) {
    write_added<Own>(p, passage_of(params), smem, place_of_block(p, block, state_tiles(p)),
                     [&](const Place& place, const TilePlace& at, Own& added) {
                       add_chunk<T>(p, smem, place, at, added);
                     });
  });
}

__global__ void __launch_bounds__(kThreads)
    pass_gradients_kernel(const __grid_constant__ SsdBackward params) {
  pass_element(params.p, passage_of(params));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    run_gradients_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  Smem& smem = device::shared_memory<Smem>();
  each_block(params.odd_states, runs_of(p), [&](int64_t block) {
    take_through<Own>(p, passage_of(params), smem, run_of_block(p, block, state_tiles(p)),
                      [&](const Place& place, const TilePlace& at, Own& added) {
                        add_chunk<T>(p, smem, place, at, added);
                      });
  });
}

// ---- 3: one chunk, heads of one group ----

template <class T>
__device__ __forceinline__ void multiply_C_B(const SsdChunkScanParams& p, Smem& smem, const Heads& h) {
  Own own;
  clear(own);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill_states<T>(smem.left, p, p.C, h.chunk, h.group, n0);
    fill_states<T>(smem.right, p, p.B, h.chunk, h.group, n0);
    device::sync_block();
    multiply(own, smem.left, smem.right, depth_of(p.states, n0));
  }
  store_own(smem.CB, own);
}

// K from g and x; adds it to K_sum and leaves decayed and crossing behind.
template <class T>
__device__ __forceinline__ void multiply_K(const SsdChunkScanParams& p, Smem& smem, const Heads& h,
                                           Own& K_sum) {
  const GradientRows<T> g(p, h.chunk, h.head);
  const RowsOf<T> x(p.x, h.chunk, h.head, p.head_dim);
  Own own;
  clear(own);
  for (int d0 = 0; d0 < p.head_dim; d0 += kTile) {
    device::sync_block();
    fill<true>(smem.left, [&](int i, int d) { return g(i, d0 + d); });
    fill<true>(smem.right, [&](int j, int d) { return x(j, d0 + d); });
    device::sync_block();
    multiply(own, smem.left, smem.right, depth_of(p.head_dim, d0));
  }
  Own crossing;
  each_own([&](int r, int c) {
    const int i = own_row() + r, j = own_column() + c;
    const bool reached = j <= i && smem.pieces.begin[i] <= j;
    const float L = reached ? smem.steps.decay(i, j) : 0.0f, CB = smem.CB.at[i][j];
    const float K = reached ? own[r][c] * (L * smem.steps.dt[j]) : 0.0f;
    K_sum[r][c] += K;
    own[r][c] = reached ? CB * L : 0.0f;
    crossing[r][c] = reached && j < i ? CB * K : 0.0f;
  });
  store_own(smem.decayed, own);
  store_own(smem.crossing, crossing);
}

// Sums of crossing over the rows from i on, for each column: additions alone, as on the CPU.
__device__ __forceinline__ void sum_rows_upwards(Smem& smem) {
  if (threadIdx.x >= kTile) return;
  float total = 0.0f;
  for (int i = kTile - 1; i > int(threadIdx.x); --i) {
    total += smem.crossing.at[i][threadIdx.x];
    smem.crossing.at[i][threadIdx.x] = total;
  }
}

// dx, dz, and in smem.direct the sum of U x over head_dim, from U of one tile in `own`; left holds g.
template <class T>
__device__ __forceinline__ void finish_x(const SsdBackward& params, Smem& smem, const Heads& h,
                                         const Own& own, int d0) {
  const SsdChunkScanParams& p = params.p;
  float direct[kOwn] = {};
  each_own([&](int r, int c) {
    const int j = own_row() + r, d = d0 + own_column() + c;
    if (j >= h.chunk.length || d >= p.head_dim) return;
    const auto at = [&](const SsdTensor& t) {
      return row_of<T>(t, h.chunk.batch, h.chunk.start + j, h.head) + d * t.inner;
    };
    const float D =
        p.D == nullptr ? 0.0f : static_cast<const float*>(p.D)[p.D_wide ? h.head * p.head_dim + d : h.head];
    const float skip = p.D == nullptr ? 0.0f : D * smem.left.at[j][d - d0];
    direct[r] = device::fma_rn(own[r][c], device::to_float(*at(p.x)), direct[r]);
    *at(p.dx) = device::from_float<T>(device::fma_rn(smem.steps.dt[j], own[r][c], skip));
    if (p.z.data != nullptr) {
      const float z = device::to_float(*at(p.z)), gate = sigmoid(z);
      const float slope = gate * (1.0f + z * (1.0f - gate));
      *at(p.dz) = device::from_float<T>(device::to_float(*at(p.dout)) * device::to_float(*at(p.y)) * slope);
    }
  });
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const float total = sum_columns(direct[r]);
    if (own_column() == 0) smem.direct[own_row() + r] = d0 == 0 ? total : smem.direct[own_row() + r] + total;
  }
  if (p.D != nullptr && threadIdx.x < kTile && d0 + int(threadIdx.x) < p.head_dim) {
    const RowsOf<T> x(p.x, h.chunk, h.head, p.head_dim);
    float total = 0.0f;
    for (int j = 0; j < h.chunk.length; ++j) {
      total = device::fma_rn(smem.left.at[j][threadIdx.x], x(j, d0 + threadIdx.x), total);
    }
    params.dD[(h.number * p.heads + h.head) * p.head_dim + d0 + threadIdx.x] = total;
  }
}

template <class T>
__device__ __forceinline__ void differentiate_x(const SsdBackward& params, Smem& smem, const Heads& h) {
  const SsdChunkScanParams& p = params.p;
  const GradientRows<T> g(p, h.chunk, h.head);
  const float* G = params.G + state_offset(p, h.number, h.head);
  for (int d0 = 0; d0 < p.head_dim; d0 += kTile) {
    Own own;
    clear(own);
    for (int n0 = 0; n0 < p.states; n0 += kTile) {
      device::sync_block();
      fill_states<T>(smem.left, p, p.B, h.chunk, h.group, n0);
      fill<false>(smem.right, StateTile{G, p.states, p.head_dim, n0, d0});
      device::sync_block();
      multiply(own, smem.left, smem.right, depth_of(p.states, n0));
    }
    each_own([&](int r, int c) {
      const int j = own_row() + r;
      own[r][c] = j >= smem.pieces.tail && j < h.chunk.length ? own[r][c] * smem.steps.to_end[j] : 0.0f;
    });
    device::sync_block();
    fill<false>(smem.left, [&](int i, int d) { return g(i, d0 + d); });
    device::sync_block();
    multiply_triangle<true>(own, smem.decayed, smem.left, smem.pieces.begin);
    finish_x<T>(params, smem, h, own, d0);
  }
}

// Adds to the partial sums of dB or dC; an element is always the same thread's.
__device__ __forceinline__ void add_partial(float* sums, const SsdChunkScanParams& p, const Heads& h,
                                            const Own& own, int n0, bool start) {
  each_own([&](int r, int c) {
    const int i = own_row() + r, n = n0 + own_column() + c;
    if (i >= h.chunk.length || n >= p.states) return;
    const int64_t row =
        ((h.block * p.batch + h.chunk.batch) * p.length + h.chunk.start + i) * p.groups + h.group;
    float& sum = sums[row * p.states + n];
    sum = start ? own[r][c] : sum + own[r][c];
  });
}

// What goes through a state: for steps [from, to) rows(step, d) times the state, added to `sums`; in `along`
// for each step the product of that with the step's C or B, which is `states`.
template <class T, class Rows>
__device__ __forceinline__ void multiply_state(const SsdChunkScanParams& p, Smem& smem, const Heads& h,
                                               float* sums, float (&along)[kTile], const float* state,
                                               const SsdTensor& states, int from, int to, const Rows& rows) {
  const RowsOf<T> by(states, h.chunk, h.group, p.states);
  float total[kOwn] = {};
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    Own own;
    clear(own);
    for (int d0 = 0; from < to && d0 < p.head_dim; d0 += kTile) {
      device::sync_block();
      fill<true>(smem.left, [&](int i, int d) { return i >= from && i < to ? rows(i, d0 + d) : 0.0f; });
      fill<true>(smem.right, StateTile{state, p.states, p.head_dim, n0, d0});
      device::sync_block();
      multiply(own, smem.left, smem.right, depth_of(p.head_dim, d0));
    }
    each_own([&](int r, int c) {
      const int i = own_row() + r;
      const bool reached = i >= from && i < to;
      own[r][c] = reached ? own[r][c] : 0.0f;
      if (reached) total[r] = device::fma_rn(own[r][c], by(i, n0 + own_column() + c), total[r]);
    });
    add_partial(sums, p, h, own, n0, h.head == h.begin);
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r) {
    const float sum = sum_columns(total[r]);
    if (own_column() == 0) along[own_row() + r] = sum;
  }
}

// The product of S and G, if a state runs through the chunk: each thread has the sum of a warp's share.
__device__ __forceinline__ void multiply_states(const SsdBackward& params, Smem& smem, const Heads& h) {
  const SsdChunkScanParams& p = params.p;
  const int64_t offset = state_offset(p, h.number, h.head);
  const float* S = static_cast<const float*>(p.chunk_states) + offset;
  float total = 0.0f;
  if (runs_through(h.chunk, smem.pieces)) {
    for (int64_t i = threadIdx.x; i < int64_t{p.states} * p.head_dim; i += kThreads) {
      total = device::fma_rn(S[i], params.G[offset + i], total);
    }
  }
  total = device::add_lanes(total);
  if (device::lane_id() == 0) smem.warps[device::warp_id()] = total;
}

// ddt of every step, by warps 0 and 1, and the sums of dA and ddt_bias over the chunk.
__device__ __forceinline__ void finish_steps(const SsdBackward& params, Smem& smem, const Heads& h) {
  const SsdChunkScanParams& p = params.p;
  const int t = int(threadIdx.x);
  float d_rate = 0.0f, gradient = 0.0f;
  if (t < h.chunk.length) {
    for (int j = 0; j < t; ++j) d_rate += smem.crossing.at[t][j];
    for (int i = t; i < h.chunk.length; ++i) d_rate += smem.from_C[i];
    for (int j = 0; j < t; ++j) d_rate += smem.from_B[j];
    if (runs_through(h.chunk, smem.pieces)) {
      float through = 0.0f;
      for (const float share : smem.warps) through += share;
      d_rate += through * smem.steps.from_start[h.chunk.length - 1];
    }
    const float rate = static_cast<const float*>(p.A)[h.head];
    gradient = through_activation(p, device::fma_rn(rate, d_rate, smem.direct[t]), smem.steps.raw[t]);
    *row_of<float>(p.ddt, h.chunk.batch, h.chunk.start + t, h.head) = gradient;
    d_rate *= smem.steps.dt[t];
  }
  device::sync_block();
  const float dA = device::add_lanes(d_rate), dbias = device::add_lanes(gradient);
  if (t == device::kWarpSize) {
    smem.warps[0] = dA;
    smem.warps[1] = dbias;
  }
  device::sync_block();
  if (t == 0) {
    params.dA[h.number * p.heads + h.head] = dA + smem.warps[0];
    params.ddt_bias[h.number * p.heads + h.head] = dbias + smem.warps[1];
  }
}

template <class T>
__device__ __forceinline__ void differentiate_head(const SsdBackward& params, Smem& smem, const Heads& h,
                                                   Own& K_sum) {
  const SsdChunkScanParams& p = params.p;
  device::sync_block();
  if (device::warp_id() == 0) prepare_steps(p, h.chunk, h.head, smem.pieces, smem.steps);
  device::sync_block();
  multiply_K<T>(p, smem, h, K_sum);
  device::sync_block();
  sum_rows_upwards(smem);
  differentiate_x<T>(params, smem, h);
  const int64_t offset = state_offset(p, h.number, h.head);
  const GradientRows<T> g(p, h.chunk, h.head);
  const RowsOf<T> x(p.x, h.chunk, h.head, p.head_dim);
  multiply_state<T>(p, smem, h, params.dC, smem.from_C, static_cast<const float*>(p.chunk_states) + offset,
                    p.C, 0, smem.pieces.head_end,
                    [&](int i, int d) { return g(i, d) * smem.steps.from_start[i]; });
  multiply_state<T>(p, smem, h, params.dB, smem.from_B, params.G + offset, p.B, smem.pieces.tail,
                    h.chunk.length,
                    [&](int j, int d) { return x(j, d) * (smem.steps.to_end[j] * smem.steps.dt[j]); });
  multiply_states(params, smem, h);
  device::sync_block();
  finish_steps(params, smem, h);
}

template <class T>
__device__ __forceinline__ void finish_group(const SsdBackward& params, Smem& smem, const Heads& h,
                                             const Own& K_sum) {
  const SsdChunkScanParams& p = params.p;
  const RowsOf<T> B(p.B, h.chunk, h.group, p.states), C(p.C, h.chunk, h.group, p.states);
  device::sync_block();
  store_own(smem.decayed, K_sum);
  store_own_transposed(smem.crossing, K_sum);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill<false>(smem.left, [&](int j, int n) { return B(j, n0 + n); });
    fill<false>(smem.right, [&](int i, int n) { return C(i, n0 + n); });
    device::sync_block();
    Own own;
    clear(own);
    multiply_triangle<false>(own, smem.crossing, smem.left, smem.pieces.begin);
    add_partial(params.dC, p, h, own, n0, false);
    clear(own);
    multiply_triangle<true>(own, smem.decayed, smem.right, smem.pieces.begin);
    add_partial(params.dB, p, h, own, n0, false);
  }
}

template <class T>
__device__ __forceinline__ void differentiate(const SsdBackward& params, Smem& smem, int64_t block) {
  const SsdChunkScanParams& p = params.p;
  Heads heads = heads_of_block(params, block);
  if (heads.chunk.length == 0) return;
  if (device::warp_id() == 0) find_pieces(p, heads.chunk, smem.pieces);
  device::sync_block();
  multiply_C_B<T>(p, smem, heads);
  Own K_sum;
  clear(K_sum);
  for (; heads.head < heads.end; ++heads.head) differentiate_head<T>(params, smem, heads, K_sum);
  finish_group<T>(params, smem, heads, K_sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) differentiate_kernel(const __grid_constant__ SsdBackward params) {
  Smem& smem = device::shared_memory<Smem>();
  each_block(params.odd_heads, blocks_of_heads(params),
             [&](int64_t block) { differentiate<T>(params, smem, block); });
}

// ---- 4: sums over partial sums ----

template <class T>
__global__ void __launch_bounds__(kThreads) sum_states_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  const int64_t stride = p.batch * p.length * p.groups * p.states;
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (element >= stride) return;
  const int64_t n = element % p.states, row = element / p.states, group = row % p.groups;
  const int64_t step = row / p.groups % p.length, batch = row / p.groups / p.length;
  float dB = 0.0f, dC = 0.0f;
  for (int block = 0; block < params.blocks; ++block) {
    dB += params.dB[block * stride + element];
    dC += params.dC[block * stride + element];
  }
  row_of<T>(p.dB, batch, step, group)[n * p.dB.inner] = device::from_float<T>(dB);
  row_of<T>(p.dC, batch, step, group)[n * p.dC.inner] = device::from_float<T>(dC);
}

// A warp per head and weight: dA, ddt_bias, D's weights.
__global__ void __launch_bounds__(kThreads) sum_heads_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  const int64_t warp = int64_t{blockIdx.x} * (kThreads / device::kWarpSize) + device::warp_id();
  const int weights = 2 + (p.dD == nullptr ? 0 : p.D_wide ? p.head_dim : 1);
  const int64_t head = warp / weights;
  const int which = int(warp % weights);
  if (head >= p.heads) return;
  const float* source = which == 0 ? params.dA : which == 1 ? params.ddt_bias : params.dD;
  const int width = which < 2 ? 1 : p.head_dim;
  const int first = which < 2 || !p.D_wide ? 0 : which - 2;
  const int last = which < 2 || p.D_wide ? first + 1 : p.head_dim;
  const int64_t chunks = ssd_chunk_count(p);
  float total = 0.0f;
  for (int64_t number = device::lane_id(); number < chunks; number += device::kWarpSize) {
    if (ssd_chunk(p, number).length == 0) continue;
    for (int d = first; d < last; ++d) total += source[(number * p.heads + head) * width + d];
  }
  total = device::add_lanes(total);
  void* const target = which == 0 ? p.dA : which == 1 ? p.ddt_bias : p.dD;
  const int64_t place = which < 2 || !p.D_wide ? head : head * p.head_dim + which - 2;
  if (device::lane_id() == 0 && target != nullptr) static_cast<float*>(target)[place] = total;
}

}  // namespace

int64_t ssd_lay_out(SsdBackward& params) {
  SsdChunkScanParams& p = params.p;
  const bool tensor_cores = p.dtype != DType::kFloat32;
  params.blocks = ssd_head_blocks(p, tensor_cores ? kSsdEnoughMma : kSsdEnoughCuda);
  const int64_t sums = params.blocks * p.batch * p.length * p.groups * p.states, tasks = tasks_of(p);
  Workspace workspace{static_cast<char*>(p.workspace)};
  workspace.take_states(p);
  workspace.take(params.G, tasks * p.states * p.head_dim);
  for (float** piece : {&params.decay, &params.dA, &params.ddt_bias}) workspace.take(*piece, tasks);
  workspace.take(params.dD, tasks * p.head_dim);
  for (float** piece : {&params.dB, &params.dC}) workspace.take(*piece, sums);
  if (tensor_cores) {
    const int64_t down = tiles(p.states);
    for (float** piece : {&params.along_B, &params.along_C}) workspace.take(*piece, tasks * down * kTile);
    workspace.take(params.through, tasks * down);
    const int64_t runs = runs_of(p), chunks = tasks * state_tiles(p);
    workspace.take(params.odd_states, chunks > runs ? chunks : runs);
    workspace.take(params.odd_sums, blocks_of_heads(params) * down);
    workspace.take(params.odd_heads, blocks_of_heads(params));
  }
  return workspace.bytes;
}

int64_t ssd_chunk_scan_workspace_cuda(const SsdChunkScanParams& p, bool backward) {
  SsdForward forward{};
  SsdBackward back{};
  forward.p = back.p = p;
  return backward ? ssd_lay_out(back) : ssd_lay_out(forward);
}

void ssd_chunk_scan_bwd_cuda(const SsdChunkScanParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  SsdBackward params{};
  params.p = p;
  ssd_lay_out(params);
  using Kernel = device::Kernel<SsdBackward>;
  const auto pick = [&](Kernel float32, Kernel half, Kernel brain) {
    return by_dtype<SsdBackward>(p.dtype, float32, half, brain);
  };
  const Kernel differentiate =
      pick(differentiate_kernel<float>, differentiate_kernel<fp16>, differentiate_kernel<bf16>);
  const Kernel sum_states = pick(sum_states_kernel<float>, sum_states_kernel<fp16>, sum_states_kernel<bf16>);

  const auto launch = [&](Kernel kernel, int64_t elements, int64_t each) {
    launch_over(kernel, divide_up(elements, each), kThreads, 0, stream, params);
  };
  const int64_t weights = 2 + (p.dD == nullptr ? 0 : p.D_wide ? p.head_dim : 1);
  params.running = ssd_enough_runs(p, device);
  ssd_states({params.p, params.decay, params.odd_states, nullptr, params.running}, device, stream);
  if (params.odd_states != nullptr) ssd_state_gradients_mma(params, stream);
  if (params.running) {
    const Kernel run =
        pick(run_gradients_kernel<float>, run_gradients_kernel<fp16>, run_gradients_kernel<bf16>);
    launch_each(run, params.odd_states, runs_of(p), sizeof(Smem), device, stream, params);
  } else {
    const Kernel chunk_gradients =
        pick(chunk_gradients_kernel<float>, chunk_gradients_kernel<fp16>, chunk_gradients_kernel<bf16>);
    launch_each(chunk_gradients, params.odd_states, tasks_of(p) * state_tiles(p), sizeof(Smem), device,
                stream, params);
    launch(pass_gradients_kernel, p.sequences * p.heads * p.states * p.head_dim, kThreads);
  }
  if (params.odd_heads != nullptr) {
    ssd_sums_mma(params, stream);
    ssd_heads_mma(params, stream);
  }
  launch_each(differentiate, params.odd_heads, blocks_of_heads(params), sizeof(Smem), device, stream, params);
  launch(sum_states, p.batch * p.length * p.groups * p.states, kThreads);
  launch(sum_heads_kernel, p.heads * weights, kThreads / device::kWarpSize);
}

}  // namespace tilewright::scan
