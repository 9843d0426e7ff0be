// The SSD scan forward on tensor cores: of the kernels of ssd_chunk_scan_fwd_cuda.cu those that multiply.
//
//   states    (w B)' x, w B in three pieces, for states are fp32 that users see
//   outputs   C B', C S with S in two pieces, and the triangle times x, which stays in registers for that
//
// Roofline: a step of a head costs 2 (5 P N + Q N / 2 + Q P) FLOPs in bf16, Q = kSsdChunk: at P 64, N 128 98
// kFLOP, 0.17 ns at the 60% of sm_90's 989 TFLOP/s that mma.sync reaches. Its bytes, 6 P of x (twice) and out
// and twice 4 P N / Q of states (four times, if they go from kernel to kernel), are 1.4 KB, 0.29 ns of 4.8
// TB/s: it is bound by the memory that states take.
#include "scan/ssd_chunk_mma_cuda.h"

namespace tilewright::scan {
namespace {

template <class T>
struct StatesSmem {
  union {
    Tile<3> weighted;
    Stage stage;
  };
  Tile<kPiecesOf<T>> x;
  Pieces pieces;
  Steps steps;
};
static_assert(sizeof(StatesSmem<fp16>) <= kMostShared);

// What a chunk adds to a tile of the state; its decay is in smem.steps.
template <class T>
__device__ __forceinline__ void add_chunk(const SsdChunkScanParams& p, StatesSmem<T>& smem,
                                          const Place& place, const TilePlace& at, Results& added,
                                          uint32_t& odd) {
  const SsdChunk& chunk = place.chunk;
  prepare(p, chunk, place.head, smem);
  ChunksOf<T> B(p.B, chunk, place.group, p.states), x(p.x, chunk, place.head, p.head_dim);
  B.from = x.from = smem.pieces.tail;
  fill(smem.weighted, odd, [&](int j, int n) {
    Vector<float, kChunk> values = to_floats(B(j, at.n0 + n));
    const float weight = j >= B.from && j < B.to ? smem.steps.to_end[j] * smem.steps.dt[j] : 0.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] *= weight;
    return values;
  });
  fill(smem.x, odd, [&](int j, int d) { return x(j, at.d0 + d); });
  device::sync_block();
  clear(added);
  multiply<Summed::kRows, Summed::kRows>(added, smem.weighted, smem.x, squares_of(chunk.length, 0));
  note_odd(odd, added);
  device::sync_block();
}

template <class T>
__global__ void __launch_bounds__(kThreads) chunk_states_kernel(const __grid_constant__ SsdForward f) {
  const SsdChunkScanParams& p = f.p;
  auto& smem = device::shared_memory<StatesSmem<T>>();
  uint32_t odd = 0;
  write_added<Results>(p, passage_of(f), smem, place_of_block(p, blockIdx.x, state_tiles(p)),
                       [&](const Place& place, const TilePlace& at, Results& added) {
                         add_chunk(p, smem, place, at, added, odd);
                       });
  report(f.odd_states, odd);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kPiecesOf<T> == 1 ? 4 : 3)
    run_states_kernel(const __grid_constant__ SsdForward f) {
  const SsdChunkScanParams& p = f.p;
  auto& smem = device::shared_memory<StatesSmem<T>>();
  uint32_t odd = 0;
  take_through<Results>(p, passage_of(f), smem, run_of_block(p, blockIdx.x, state_tiles(p)),
                        [&](const Place& place, const TilePlace& at, Results& added) {
                          add_chunk(p, smem, place, at, added, odd);
                        });
  report(f.odd_states, odd);
}

template <class T>
struct OutputsSmem {
  Tile<kPiecesOf<T>> C, B;  // B, at last x
  union {
    Tile<2> state;
    Stage stage;
  };
  Pieces pieces;
  Steps steps;
};
static_assert(sizeof(OutputsSmem<fp16>) <= kMostShared);

// C B' up to the diagonal, and what the state before the chunk gives to each step.
template <class T>
__device__ __forceinline__ void multiply_C(const SsdChunkScanParams& p, OutputsSmem<T>& smem,
                                           const Place& place, int d0, Results& products, Results& out,
                                           uint32_t& odd) {
  const ChunksOf<T> C(p.C, place.chunk, place.group, p.states), B(p.B, place.chunk, place.group, p.states);
  const FloatChunks state = state_chunks(p, p.chunk_states, place.number, place.head);
  const bool continued = smem.pieces.head_end > 0;
  clear(products);
  clear(out);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill(smem.C, odd, [&](int i, int n) { return C(i, n0 + n); });
    fill(smem.B, odd, [&](int j, int n) { return B(j, n0 + n); });
    if (continued) fill(smem.state, odd, [&](int n, int d) { return state(n0 + n, d0 + d); });
    device::sync_block();
    const Range depth = squares_of(p.states, n0);
    multiply<Summed::kColumns, Summed::kColumns>(products, smem.C, smem.B, depth, lower_squares());
    if (continued) multiply<Summed::kColumns, Summed::kRows>(out, smem.C, smem.state, depth);
  }
  note_odd(odd, out);
  each_result(out, [&](int i, int, float& value) {
    value = i < smem.pieces.head_end ? value * smem.steps.from_start[i] : 0.0f;
  });
}

template <class T>
__device__ __forceinline__ void finish_outputs(const SsdChunkScanParams& p, Stage& stage, const Place& place,
                                               int d0, const Results& out) {
  const ChunksOf<T> x(p.x, place.chunk, place.head, p.head_dim), z(p.z, place.chunk, place.head, p.head_dim);
  const ChunksOf<T> y(p.y, place.chunk, place.head, p.head_dim);
  const ChunksOf<T> to(p.out, place.chunk, place.head, p.head_dim);
  each_chunk(stage, out, [&](int i, int column, Vector<float, kChunk> values) {
    const int d = d0 + column;
    if (i >= place.chunk.length || d >= p.head_dim) return;
    if (p.D != nullptr) {
      const auto skipped = x(i, d);
      const float* D = static_cast<const float*>(p.D) + (p.D_wide ? place.head * p.head_dim + d : place.head);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const float weight = !p.D_wide ? *D : d + c < p.head_dim ? D[c] : 0.0f;
        values[c] = device::fma_rn(weight, device::to_float(skipped[c]), values[c]);
      }
    }
    if (p.y.data != nullptr) y.store(i, d, values);
    if (p.z.data != nullptr) {
      const auto gate = z(i, d);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        const float by = device::to_float(gate[c]);
        values[c] *= by * sigmoid(by);
      }
    }
    to.store(i, d, values);
  });
}

// Four blocks of a multiprocessor; without the bound ptxas takes registers for three.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) outputs_kernel(const __grid_constant__ SsdForward f) {
  const SsdChunkScanParams& p = f.p;
  auto& smem = device::shared_memory<OutputsSmem<T>>();
  const Place place = place_of_block(p, blockIdx.x, tiles(p.head_dim));
  if (place.chunk.length == 0) return report(f.odd_outputs, 0);
  const int d0 = place.tile * kTile;
  prepare(p, place.chunk, place.head, smem);
  Results products, out;
  uint32_t odd = 0;
  multiply_C(p, smem, place, d0, products, out, odd);
  each_result(products, [&](int i, int j, float& value) {
    const bool reached = j <= i && smem.pieces.begin[i] <= j;
    value = reached ? value * (smem.steps.decay(i, j) * smem.steps.dt[j]) : 0.0f;
  });
  device::sync_block();
  const ChunksOf<T> x(p.x, place.chunk, place.head, p.head_dim);
  fill(smem.B, odd, [&](int j, int d) { return x(j, d0 + d); });
  device::sync_block();
  multiply_results<2>(out, products, smem.B, lower_squares(), odd);
  note_odd(odd, out);
  finish_outputs<T>(p, smem.stage, place, d0, out);
  report(f.odd_outputs, odd);
}

}  // namespace

void ssd_states_mma(const SsdForward& f, Stream stream) {
  const bool half = f.p.dtype == DType::kFloat16;
  const auto run = half ? run_states_kernel<fp16> : run_states_kernel<bf16>;
  const auto states = half ? chunk_states_kernel<fp16> : chunk_states_kernel<bf16>;
  launch_over(f.running ? run : states, f.running ? runs_of(f.p) : tasks_of(f.p) * state_tiles(f.p), kThreads,
              half ? sizeof(StatesSmem<fp16>) : sizeof(StatesSmem<bf16>), stream, f);
}

void ssd_outputs_mma(const SsdForward& f, Stream stream) {
  const bool half = f.p.dtype == DType::kFloat16;
  launch_over(half ? outputs_kernel<fp16> : outputs_kernel<bf16>, tasks_of(f.p) * tiles(f.p.head_dim),
              kThreads, half ? sizeof(OutputsSmem<fp16>) : sizeof(OutputsSmem<bf16>), stream, f);
}

}  // namespace tilewright::scan
