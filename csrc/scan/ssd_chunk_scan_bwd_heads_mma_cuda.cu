// The SSD scan backward on tensor cores, what stays in a chunk: a block per chunk and share of a group's
// heads, for each of them K, and with it dx, dz, ddt; at last the sum of K over heads meets B and C. The
// roofline is in ssd_chunk_scan_bwd_states_mma_cuda.cu, whose kernel runs before.
//
// K and what is made of it lie transposed, rows j and columns i: that is how the next product takes it, from
// registers.
#include "core/tune.h"
#include "scan/ssd_chunk_bwd_mma_cuda.h"

namespace tilewright::scan {
namespace {

// Blocks that a multiprocessor should hold at once, which limits registers.
constexpr int kHeadsBlocks = TW_TUNED(SSD_CHUNK_SCAN_HEADS_BLOCKS, 2);

template <class T, int kPieces>
struct HeadsSmem {
  union {
    Tile<kPiecesOf<T>> x;
    Tile<3> after;  // the gradient of the state after the chunk; at last K's sum
    Stage stage;
  };
  union {
    Tile<kPieces> g;
    Tile<kPiecesOf<T>> C;  // before the first head and after the last
  };
  Tile<kPiecesOf<T>> B;
  union {
    Vector<float, 4> CB[kChunks][kThreads];  // each thread its results
    Stage sums;
  };
  Pieces pieces;
  Steps steps;
  float crossing[kSquares][kTile];  // of each warp's rows: what decays through a step, without states
  float dD[kSquares][kTile];
  float direct[kTile];
};
static_assert(sizeof(HeadsSmem<fp16, 3>) <= kMostShared);

template <class T, int kPieces>
__device__ __forceinline__ void multiply_B_C(const SsdChunkScanParams& p, HeadsSmem<T, kPieces>& smem,
                                             const Heads& h, uint32_t& odd) {
  const ChunksOf<T> B(p.B, h.chunk, h.group, p.states), C(p.C, h.chunk, h.group, p.states);
  Results CB;
  clear(CB);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill(smem.B, odd, [&](int j, int n) { return B(j, n0 + n); });
    fill(smem.C, odd, [&](int i, int n) { return C(i, n0 + n); });
    device::sync_block();
    multiply<Summed::kColumns, Summed::kColumns>(CB, smem.B, smem.C, squares_of(p.states, n0),
                                                 upper_squares());
  }
  note_odd(odd, CB);
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
    device::store(&smem.CB[n][threadIdx.x], {CB[n][0], CB[n][1], CB[n][2], CB[n][3]});
  }
}

// Halves the values again and again, adding those of the lanes that are 16, 8 ... apart: of all values a lane
// keeps two, summed over them. Returns the first one's number.
template <int kHalf, int kDistance = 16, int kCount>
__device__ __forceinline__ int add_halves(float (&values)[kCount]) {
  const bool upper = (device::lane_id() & kDistance) != 0;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float kept = upper ? values[i + kHalf] : values[i], given = upper ? values[i] : values[i + kHalf];
    values[i] = kept + device::shfl_xor(given, kDistance);
  }
  const int first = upper ? kHalf : 0;
  if constexpr (kHalf == 2) {
    return first;
  } else {
    return first + add_halves<kHalf / 2, kDistance / 2>(values);
  }
}

// Of a row's two neighbours in each lane that shares it the sums from each on to the row's end, `later` being
// what comes behind them, which then has them too. Additions alone: nothing cancels.
__device__ __forceinline__ void sum_onwards(float (&pair)[2], float& later) {
  const int lane = device::lane_id(), place = lane % 4;
  const float own = pair[0] + pair[1];
  const float one = device::shfl_down(own, 1), two = device::shfl_down(own, 2),
              three = device::shfl_down(own, 3);
  const float behind = (place < 3 ? one : 0.0f) + (place < 2 ? two : 0.0f) + (place < 1 ? three : 0.0f);
  pair[1] += behind + later;
  pair[0] += pair[1];
  later += device::shfl(own + behind, lane - place);
}

// K from its product of x and g, added to its sum; k becomes C B' with its decay. Leaves in smem.crossing the
// sums of C B' K over the rows before and the columns from each step on.
template <class Smem>
__device__ __forceinline__ void decay_K(Smem& smem, Results& k, Results& K_sum) {
  const Steps& steps = smem.steps;
  float through[2 * kChunks] = {}, later[2] = {};
#pragma unroll
  for (int n = kChunks - 1; n >= 0; --n) {
    if (n < 2 * device::warp_id()) continue;  // left of the diagonal
    const Vector<float, 4> CB = device::load(&smem.CB[n][threadIdx.x]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = own_row(half);
      float pair[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = own_column(n) + e;
        const bool reached = j <= i && smem.pieces.begin[i] <= j;
        const float L = reached ? steps.decay(i, j) : 0.0f, product = CB[2 * half + e];
        float& value = k[n][2 * half + e];
        const float K = reached ? value * (L * steps.dt[j]) : 0.0f;
        K_sum[n][2 * half + e] += K;
        value = reached ? product * L : 0.0f;
        pair[e] = reached && j < i ? product * K : 0.0f;
      }
      sum_onwards(pair, later[half]);
#pragma unroll
      for (int e = 0; e < 2; ++e) through[2 * n + e] += j < own_column(n) + e ? pair[e] : 0.0f;
    }
  }
  const int first = add_halves<kChunks>(through);
  float* to = smem.crossing[device::warp_id()] + own_column(first / 2);
  device::store(reinterpret_cast<Vector<float, 2>*>(to), {through[0], through[1]});
}

// dx, dz, the sums over head_dim of U x into smem.direct, and dD, from U of one tile.
template <class T, int kPieces>
__device__ __forceinline__ void finish_x(const SsdBackward& params, HeadsSmem<T, kPieces>& smem,
                                         const Heads& h, const Results& U, int d0) {
  const SsdChunkScanParams& p = params.p;
  const auto rows = [&](const SsdTensor& t) { return ChunksOf<T>(t, h.chunk, h.head, p.head_dim); };
  const auto x = rows(p.x), dx = rows(p.dx), z = rows(p.z), dz = rows(p.dz), y = rows(p.y);
  const GradientChunks<T, kPieces> g(p, h.chunk, h.head);
  const float* D = static_cast<const float*>(p.D);
  float dD[kChunk] = {};
  each_chunk(smem.stage, U, [&](int j, int column, Vector<float, kChunk> values) {
    const int d = d0 + column;
    const Vector<float, kChunk> xs = to_floats(x(j, d)), gs = to_floats(g(j, d));
    float direct = 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      direct = device::fma_rn(values[i], xs[i], direct);
      dD[i] = device::fma_rn(gs[i], xs[i], dD[i]);
      const float weight = D == nullptr         ? 0.0f
                           : !p.D_wide          ? D[h.head]
                           : d + i < p.head_dim ? D[h.head * p.head_dim + d + i]
                                                : 0.0f;
      values[i] = device::fma_rn(smem.steps.dt[j], values[i], D == nullptr ? 0.0f : weight * gs[i]);
    }
#pragma unroll
    for (int distance = kChunks / 2; distance > 0; distance /= 2) {
      direct += device::shfl_xor(direct, distance);
    }
    if (column == 0) smem.direct[j] = d0 == 0 ? direct : smem.direct[j] + direct;
    dx.store(j, d, values);
    if (p.z.data == nullptr || !z.has(j, d)) return;
    const Vector<float, kChunk> zs = to_floats(z(j, d)), ys = to_floats(y(j, d));
    Vector<float, kChunk> slopes = to_floats(g.dout(j, d));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float gate = sigmoid(zs[i]);
      slopes[i] *= ys[i] * (gate * (1.0f + zs[i] * (1.0f - gate)));
    }
    dz.store(j, d, slopes);
  });
  if (D == nullptr) return;
  const int first = add_halves<kChunk / 2>(dD), column = device::lane_id() % kChunks * kChunk + first;
  device::store(reinterpret_cast<Vector<float, 2>*>(&smem.dD[device::warp_id()][column]), {dD[0], dD[1]});
  device::sync_block();
  const int d = d0 + int(threadIdx.x);
  if (threadIdx.x >= kTile || d >= p.head_dim) return;
  float total = 0.0f;
  for (const auto& share : smem.dD) total += share[threadIdx.x];
  params.dD[(h.number * p.heads + h.head) * p.head_dim + d] = total;
}

// `decayed` is C B' with its decay; g of the last tile of head_dim is still there.
template <class T, int kPieces>
__device__ __forceinline__ void differentiate_x(const SsdBackward& params, HeadsSmem<T, kPieces>& smem,
                                                const Heads& h, const Results& decayed, uint32_t& odd) {
  const SsdChunkScanParams& p = params.p;
  const GradientChunks<T, kPieces> g(p, h.chunk, h.head);
  const ChunksOf<T> B(p.B, h.chunk, h.group, p.states);
  const FloatChunks after = state_chunks(p, params.G, h.number, h.head);
  for (int d0 = 0; d0 < p.head_dim; d0 += kTile) {
    Results U;
    clear(U);
    for (int n0 = 0; n0 < p.states; n0 += kTile) {
      device::sync_block();
      if (n0 == 0 && p.head_dim > kTile) fill(smem.g, odd, [&](int i, int d) { return g(i, d0 + d); });
      fill(smem.B, odd, [&](int j, int n) { return B(j, n0 + n); });
      fill(smem.after, odd, [&](int n, int d) { return after(n0 + n, d0 + d); });
      device::sync_block();
      multiply<Summed::kColumns, Summed::kRows>(U, smem.B, smem.after, squares_of(p.states, n0));
    }
    note_odd(odd, U);
    each_result(U, [&](int j, int, float& value) {
      value = j >= smem.pieces.tail && j < h.chunk.length ? value * smem.steps.to_end[j] : 0.0f;
    });
    multiply_results<3>(U, decayed, smem.g, upper_squares(), odd);
    note_odd(odd, U);
    device::sync_block();
    finish_x(params, smem, h, U, d0);
  }
}

// ddt of every step and the sums of dA and ddt_bias over the chunk; by warp 0, a lane's steps are its number
// and that plus 32.
template <class Smem>
__device__ __forceinline__ void finish_steps(const SsdBackward& params, const Smem& smem, const Heads& h) {
  const SsdChunkScanParams& p = params.p;
  constexpr int kWarp = device::kWarpSize;
  const int lane = device::lane_id(), down = tiles(p.states);
  float before[2] = {}, onwards[2] = {}, whole = 0.0f;
  for (int tile = 0; tile < down; ++tile) {
    const int64_t at = tile_of_states(params, h, tile);
    for (int half = 0; half < 2; ++half) {
      before[half] += params.along_B[at * kTile + half * kWarp + lane];
      onwards[half] += params.along_C[at * kTile + half * kWarp + lane];
    }
    whole += params.through[at];
  }
  for (int half = 0; half < 2; ++half) {
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float up = device::shfl_up(before[half], distance);
      const float below = device::shfl_down(onwards[half], distance);
      if (lane >= distance) before[half] += up;
      if (lane + distance < kWarp) onwards[half] += below;
    }
  }
  const float first = device::shfl(before[0], kWarp - 1), last = device::shfl(onwards[1], 0);
  const float rate = static_cast<const float*>(p.A)[h.head];
  float dA = 0.0f, dbias = 0.0f;
  for (int half = 0; half < 2; ++half) {
    const int t = half * kWarp + lane;
    const float up = device::shfl_up(before[half], 1);  // B's sums are over the steps before
    if (t >= h.chunk.length) continue;
    float d_rate = onwards[half] + (half == 0 ? last : 0.0f);
    d_rate += (lane > 0 ? up : 0.0f) + (half == 1 ? first : 0.0f);
    for (const auto& share : smem.crossing) d_rate += share[t];
    if (runs_through(h.chunk, smem.pieces)) {
      d_rate = device::fma_rn(whole, smem.steps.from_start[h.chunk.length - 1], d_rate);
    }
    const float gradient =
        through_activation(p, device::fma_rn(rate, d_rate, smem.direct[t]), smem.steps.raw[t]);
    *row_of<float>(p.ddt, h.chunk.batch, h.chunk.start + t, h.head) = gradient;
    dA = device::fma_rn(d_rate, smem.steps.dt[t], dA);
    dbias += gradient;
  }
  dA = device::add_lanes(dA);
  dbias = device::add_lanes(dbias);
  if (lane != 0) return;
  params.dA[h.number * p.heads + h.head] = dA;
  params.ddt_bias[h.number * p.heads + h.head] = dbias;
}

template <class T, int kPieces>
__device__ __forceinline__ void differentiate_head(const SsdBackward& params, HeadsSmem<T, kPieces>& smem,
                                                   const Heads& h, Results& K_sum, uint32_t& odd) {
  const SsdChunkScanParams& p = params.p;
  const GradientChunks<T, kPieces> g(p, h.chunk, h.head);
  const ChunksOf<T> x(p.x, h.chunk, h.head, p.head_dim);
  Results k;
  clear(k);
  for (int d0 = 0; d0 < p.head_dim; d0 += kTile) {
    device::sync_block();
    if (d0 == 0 && device::warp_id() == 0) prepare_steps(p, h.chunk, h.head, smem.pieces, smem.steps);
    fill(smem.g, odd, [&](int i, int d) { return g(i, d0 + d); });
    fill(smem.x, odd, [&](int j, int d) { return x(j, d0 + d); });
    device::sync_block();
    multiply<Summed::kColumns, Summed::kColumns>(k, smem.x, smem.g, squares_of(p.head_dim, d0),
                                                 upper_squares());
  }
  note_odd(odd, k);
  decay_K(smem, k, K_sum);
  differentiate_x(params, smem, h, k, odd);
  device::sync_block();
  if (device::warp_id() == 0) finish_steps(params, smem, h);
}

// Left in smem.after, for the product that takes it transposed.
template <class Smem>
__device__ __forceinline__ void keep_K_sum(Smem& smem, const Results& K_sum, uint32_t& odd) {
  using Pair = Vector<uint32_t, 1>;
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t pair[3];
      split(pair, K_sum[n][2 * half], K_sum[n][2 * half + 1], odd);
      const int place = place_of(own_row(half), n) + device::lane_id() % 4 * 2;
#pragma unroll
      for (int piece = 0; piece < 3; ++piece) {
        device::store(reinterpret_cast<Pair*>(smem.after.piece[piece] + place), {pair[piece]});
      }
    }
  }
}

template <class T, int kPieces>
__device__ __forceinline__ void finish_group(const SsdBackward& params, HeadsSmem<T, kPieces>& smem,
                                             const Heads& h, const Results& K_sum, uint32_t& odd) {
  const SsdChunkScanParams& p = params.p;
  const ChunksOf<T> B(p.B, h.chunk, h.group, p.states), C(p.C, h.chunk, h.group, p.states);
  const auto add = [&](float* sums, const Results& c, int n0) {
    const FloatChunks to = partial_sums(params, sums, h);
    each_chunk(smem.sums, c, [&](int row, int n, Vector<float, kChunk> values) {
      const Vector<float, kChunk> before = to(row, n0 + n);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] += before[i];
      to.store(row, n0 + n, values);
    });
  };
  device::sync_block();
  keep_K_sum(smem, K_sum, odd);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill(smem.B, odd, [&](int j, int n) { return B(j, n0 + n); });
    fill(smem.C, odd, [&](int i, int n) { return C(i, n0 + n); });
    device::sync_block();
    Results c;
    clear(c);
    multiply_results<3>(c, K_sum, smem.C, upper_squares(), odd);
    note_odd(odd, c);
    add(params.dB, c, n0);
    clear(c);
    multiply<Summed::kRows, Summed::kRows>(c, smem.after, smem.B, lower_squares());
    note_odd(odd, c);
    add(params.dC, c, n0);
  }
}

template <class T, int kPieces>
__global__ void __launch_bounds__(kThreads, kHeadsBlocks)
    heads_kernel(const __grid_constant__ SsdBackward params) {
  const SsdChunkScanParams& p = params.p;
  auto& smem = device::shared_memory<HeadsSmem<T, kPieces>>();
  Heads h = heads_of_block(params, blockIdx.x);
  if (h.chunk.length == 0) return report(params.odd_heads, 0);
  if (device::warp_id() == 0) find_pieces(p, h.chunk, smem.pieces);
  uint32_t odd = 0;
  for (int tile = 0; tile < tiles(p.states); ++tile) {
    odd |= uint32_t(params.odd_sums[int64_t{blockIdx.x} * tiles(p.states) + tile]);
  }
  multiply_B_C(p, smem, h, odd);
  Results K_sum;
  clear(K_sum);
  for (; h.head < h.end; ++h.head) differentiate_head(params, smem, h, K_sum, odd);
  finish_group(params, smem, h, K_sum, odd);
  report(params.odd_heads, odd);
}

template <class T, int kPieces>
struct OfHeads {
  static void over(const SsdBackward& params, Stream stream) {
    launch_over(heads_kernel<T, kPieces>, blocks_of_heads(params), kThreads, sizeof(HeadsSmem<T, kPieces>),
                stream, params);
  }
};

}  // namespace

void ssd_heads_mma(const SsdBackward& params, Stream stream) { launch_by_dtype<OfHeads>(params, stream); }

}  // namespace tilewright::scan
