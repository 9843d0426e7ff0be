// The SSD scan backward on tensor cores, what goes through states: of the kernels of
// ssd_chunk_scan_bwd_cuda.cu the first and, with ssd_chunk_scan_bwd_heads_mma_cuda.cu, the main one, cut in
// two.
//
//   chunk_gradients, run_gradients   as there
//   sums   a block per chunk, share of a group's heads and 64 states: what goes through states into dB and
//          dC, whose sums over heads stay in registers
//
// Roofline, with the states computed again: a step of a head costs 2 (15 P N + 2 Q P) FLOPs in bf16 (x and
// dout of bf16, no gate), at P 64, N 128 262 kFLOP, 0.44 ns at the 60% of sm_90's 989 TFLOP/s that mma.sync
// reaches. Its bytes, 14 P of x and dout (three times each) and dx and five times 4 P N / Q of states (nine,
// if they go from kernel to kernel), are 3.5 KB, 0.72 ns of 4.8 TB/s, and up to 1 KB of partial sums where
// chunks are few: it is bound by the memory of states.
#include "scan/ssd_chunk_bwd_mma_cuda.h"

namespace tilewright::scan {
namespace {

// ---- gradients of states ----

template <class T, int kPieces>
struct GradientsSmem {
  union {
    Tile<3> weighted;
    Stage stage;
  };
  Tile<kPieces> g;
  Pieces pieces;
  Steps steps;
};

// What a chunk adds to a tile of the gradient of the state before it.
template <class T, int kPieces>
__device__ __forceinline__ void add_chunk(const SsdChunkScanParams& p, GradientsSmem<T, kPieces>& smem,
                                          const Place& place, const TilePlace& at, Results& added,
                                          uint32_t& odd) {
  const SsdChunk& chunk = place.chunk;
  prepare(p, chunk, place.head, smem);
  ChunksOf<T> C(p.C, chunk, place.group, p.states);
  GradientChunks<T, kPieces> g(p, chunk, place.head);
  C.to = g.dout.to = smem.pieces.head_end;
  fill(smem.weighted, odd, [&](int i, int n) {
    Vector<float, kChunk> values = to_floats(C(i, at.n0 + n));
    const float weight = i < C.to ? smem.steps.from_start[i] : 0.0f;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) values[c] *= weight;
    return values;
  });
  fill(smem.g, odd, [&](int i, int d) { return g(i, at.d0 + d); });
  device::sync_block();
  clear(added);
  multiply<Summed::kRows, Summed::kRows>(added, smem.weighted, smem.g, squares_of(C.to, 0));
  note_odd(odd, added);
  device::sync_block();
}

template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads)
    chunk_gradients_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  auto& smem = device::shared_memory<GradientsSmem<T, kPieces>>();
  uint32_t odd = 0;
  write_added<Results>(p, passage_of(params), smem, place_of_block(p, blockIdx.x, state_tiles(p)),
                       [&](const Place& place, const TilePlace& at, Results& added) {
                         add_chunk(p, smem, place, at, added, odd);
                       });
  report(params.odd_states, odd);
}

template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads, kPieces == 1 ? 4 : 3)
    run_gradients_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  auto& smem = device::shared_memory<GradientsSmem<T, kPieces>>();
  uint32_t odd = 0;
  take_through<Results>(p, passage_of(params), smem, run_of_block(p, blockIdx.x, state_tiles(p)),
                        [&](const Place& place, const TilePlace& at, Results& added) {
                          add_chunk(p, smem, place, at, added, odd);
                        });
  report(params.odd_states, odd);
}

// ---- what goes through states into dB and dC ----

template <class T, int kPieces>
struct SumsSmem {
  Tile<kPiecesOf<T>> B, C, x;
  Tile<kPieces> g;
  union {
    Tile<3> state;  // before the chunk, then the gradient of the one after it
    Stage stage;
  };
  Pieces pieces;
  Steps steps;
  float warps[kThreads / device::kWarpSize];
};
static_assert(sizeof(SumsSmem<fp16, 3>) <= kMostShared);

// Fills smem.state with that after the chunk; returns what this thread adds to its product with the one
// before.
template <class Smem>
__device__ __forceinline__ float fill_after(Smem& smem, const FloatChunks& before, const FloatChunks& after,
                                            int n0, int d0, uint32_t& odd) {
  float product = 0.0f;
  fill(smem.state, odd, [&](int n, int d) {
    const auto S = before(n0 + n, d0 + d), G = after(n0 + n, d0 + d);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) product = device::fma_rn(S[i], G[i], product);
    return G;
  });
  return product;
}

// Adds c, its rows times weight(row), to the sums; in `along` for each row the product of that with the rows
// of `by`.
template <int kPieces, class Weight>
__device__ __forceinline__ void add_weighted(Results& sum, const Results& c, const Tile<kPieces>& by,
                                             float* along, uint32_t& odd, const Weight& weight) {
  using Pair = Vector<bf16, 2>;
  note_odd(odd, c);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own_row(half);
    const float factor = weight(row);
    float total = 0.0f;
    note_odd(odd, factor);
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      float factors[2] = {};
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const bf16* at = by.piece[piece] + place_of(row, n) + device::lane_id() % 4 * 2;
        const Pair pair = device::load(reinterpret_cast<const Pair*>(at));
        factors[0] += device::to_float(pair[0]);
        factors[1] += device::to_float(pair[1]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = c[n][2 * half + i] * factor;
        sum[n][2 * half + i] += value;
        total = device::fma_rn(value, factors[i], total);
      }
    }
    total = sum_row(total);
    if (device::lane_id() % 4 == 0) along[row] = total;
  }
}

template <class T, int kPieces>
__device__ __forceinline__ void sum_head(const SsdBackward& params, SumsSmem<T, kPieces>& smem,
                                         const Heads& h, int tile, Results& dB, Results& dC, uint32_t& odd) {
  const SsdChunkScanParams& p = params.p;
  const GradientChunks<T, kPieces> g(p, h.chunk, h.head);
  const ChunksOf<T> x(p.x, h.chunk, h.head, p.head_dim);
  const FloatChunks before = state_chunks(p, p.chunk_states, h.number, h.head);
  const FloatChunks after = state_chunks(p, params.G, h.number, h.head);
  Results to_B, to_C;
  clear(to_B);
  clear(to_C);
  float product = 0.0f;
  for (int d0 = 0; d0 < p.head_dim; d0 += kTile) {
    device::sync_block();
    if (d0 == 0 && device::warp_id() == 0) prepare_steps(p, h.chunk, h.head, smem.pieces, smem.steps);
    fill(smem.g, odd, [&](int i, int d) { return g(i, d0 + d); });
    fill(smem.x, odd, [&](int j, int d) { return x(j, d0 + d); });
    fill(smem.state, odd, [&](int n, int d) { return before(tile * kTile + n, d0 + d); });
    device::sync_block();
    const Range depth = squares_of(p.head_dim, d0);
    multiply<Summed::kColumns, Summed::kColumns>(to_C, smem.g, smem.state, depth);
    device::sync_block();
    product += fill_after(smem, before, after, tile * kTile, d0, odd);
    device::sync_block();
    multiply<Summed::kColumns, Summed::kColumns>(to_B, smem.x, smem.state, depth);
  }
  const int64_t at = tile_of_states(params, h, tile);
  const Pieces& pieces = smem.pieces;
  const Steps& steps = smem.steps;
  add_weighted(dC, to_C, smem.C, params.along_C + at * kTile, odd,
               [&](int i) { return i < pieces.head_end ? steps.from_start[i] : 0.0f; });
  add_weighted(dB, to_B, smem.B, params.along_B + at * kTile, odd, [&](int j) {
    return j >= pieces.tail && j < h.chunk.length ? steps.to_end[j] * steps.dt[j] : 0.0f;
  });
  product = device::add_lanes(product);
  if (device::lane_id() == 0) smem.warps[device::warp_id()] = product;
  device::sync_block();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (const float share : smem.warps) total += share;
    params.through[at] = total;
  }
}

template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads, 2) sums_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  auto& smem = device::shared_memory<SumsSmem<T, kPieces>>();
  const int tile = int(blockIdx.x % unsigned(tiles(p.states))), n0 = tile * kTile;
  Heads h = heads_of_block(params, blockIdx.x / unsigned(tiles(p.states)));
  if (h.chunk.length == 0) return report(params.odd_sums, 0);
  if (device::warp_id() == 0) find_pieces(p, h.chunk, smem.pieces);
  uint32_t odd = 0;
  const ChunksOf<T> B(p.B, h.chunk, h.group, p.states), C(p.C, h.chunk, h.group, p.states);
  fill(smem.B, odd, [&](int j, int n) { return B(j, n0 + n); });
  fill(smem.C, odd, [&](int i, int n) { return C(i, n0 + n); });
  Results dB, dC;
  clear(dB);
  clear(dC);
  for (; h.head < h.end; ++h.head) sum_head<T, kPieces>(params, smem, h, tile, dB, dC, odd);
  device::sync_block();
  const FloatChunks to_B = partial_sums(params, params.dB, h), to_C = partial_sums(params, params.dC, h);
  each_chunk(smem.stage, dB,
             [&](int j, int n, const Vector<float, kChunk>& values) { to_B.store(j, n0 + n, values); });
  each_chunk(smem.stage, dC,
             [&](int i, int n, const Vector<float, kChunk>& values) { to_C.store(i, n0 + n, values); });
  report(params.odd_sums, odd);
}

template <class T, int kPieces>
struct StateGradients {
  static void over(const SsdBackward& params, Stream stream) {
    const SsdChunkScanParams& p = params.p;
    launch_over(params.running ? run_gradients_kernel<T, kPieces> : chunk_gradients_kernel<T, kPieces>,
                params.running ? runs_of(p) : tasks_of(p) * state_tiles(p), kThreads,
                sizeof(GradientsSmem<T, kPieces>), stream, params);
  }
};

template <class T, int kPieces>
struct Sums {
  static void over(const SsdBackward& params, Stream stream) {
    launch_over(sums_kernel<T, kPieces>, blocks_of_heads(params) * tiles(params.p.states), kThreads,
                sizeof(SumsSmem<T, kPieces>), stream, params);
  }
};

}  // namespace

void ssd_state_gradients_mma(const SsdBackward& params, Stream stream) {
  launch_by_dtype<StateGradients>(params, stream);
}

void ssd_sums_mma(const SsdBackward& params, Stream stream) { launch_by_dtype<Sums>(params, stream); }

}  // namespace tilewright::scan
