// The SSD scan forward on the GPU, in the dual form (the formulas are in ssd_chunk_scan_fwd_cpu.cpp):
//
//   1. chunk_states_kernel   a block per chunk, head and 64 x 64 tile of the state: what the chunk adds to it
//   2. pass_states_kernel    a thread per element of a state, through the chunks: the state before each
//   1 and 2. run_states_kernel, where sequences and heads are enough: a block per sequence, head and tile
//   3. outputs_kernel        a block per chunk, head and 64 of head_dim: the results
//
// Products run on the FMA units in fp32; those of 16-bit dtypes on tensor cores
// (ssd_chunk_scan_fwd_mma_cuda.cu), and here what these leave. Roofline: a step of a head costs 2 * (2 P N +
// Q N + Q P) FLOPs, Q = kSsdChunk, at P 64, N 128 57 kFLOP, against 12 P bytes of x and out and 8 P N / Q of
// states: it is bound by the FMA units.
#include "core/tune.h"
#include "scan/ssd_chunk_fma_cuda.h"

namespace tilewright::scan {
namespace {

struct Smem {
  Matrix left, right, products;
  Pieces pieces;
  Steps steps;
};

// What a chunk adds to a tile of the state; its decay is in smem.steps.
template <class T>
__device__ __forceinline__ void add_chunk(const SsdChunkScanParams& p, Smem& smem, const Place& place,
                                          const TilePlace& at, Own& added) {
  const SsdChunk& chunk = place.chunk;
  prepare(p, chunk, place.head, smem);
  RowsOf<T> B(p.B, chunk, place.group, p.states), x(p.x, chunk, place.head, p.head_dim);
  B.from = x.from = smem.pieces.tail;
  fill<false>(smem.left, [&](int j, int n) { return B(j, at.n0 + n); });
  fill<false>(smem.right, [&](int j, int d) {
    return x.has(j, at.d0 + d) ? x(j, at.d0 + d) * (smem.steps.to_end[j] * smem.steps.dt[j]) : 0.0f;
  });
  device::sync_block();
  clear(added);
  multiply(added, smem.left, smem.right, chunk.length);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) chunk_states_kernel(const __grid_constant__ SsdForward f) {
  const SsdChunkScanParams& p = f.p;
  Smem& smem = device::shared_memory<Smem>();
  each_block(f.odd_states, tasks_of(p) * state_tiles(p), [&](int64_t block) {
    write_added<Own>(p, passage_of(f), smem, place_of_block(p, block, state_tiles(p)),
                     [&](const Place& place, const TilePlace& at, Own& added) {
                       add_chunk<T>(p, smem, place, at, added);
                     });
  });
}

__global__ void __launch_bounds__(kThreads) pass_states_kernel(const __grid_constant__ SsdForward f) {
  pass_element(f.p, passage_of(f));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) run_states_kernel(const __grid_constant__ SsdForward f) {
  const SsdChunkScanParams& p = f.p;
  Smem& smem = device::shared_memory<Smem>();
  each_block(f.odd_states, runs_of(p), [&](int64_t block) {
    take_through<Own>(p, passage_of(f), smem, run_of_block(p, block, state_tiles(p)),
                      [&](const Place& place, const TilePlace& at, Own& added) {
                        add_chunk<T>(p, smem, place, at, added);
                      });
  });
}

// left = C transposed, right = the state before the chunk: what it gives to each step.
template <class T>
__device__ __forceinline__ void add_state(Own& own, const SsdChunkScanParams& p, Smem& smem,
                                          const Place& place, int d0) {
  const float* state = static_cast<const float*>(p.chunk_states) + state_offset(p, place.number, place.head);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill_states<T>(smem.left, p, p.C, place.chunk, place.group, n0);
    fill<false>(smem.right, StateTile{state, p.states, p.head_dim, n0, d0});
    device::sync_block();
    multiply(own, smem.left, smem.right, p.states - n0 < kTile ? p.states - n0 : kTile);
  }
  each_own([&](int r, int c) {
    const int i = own_row() + r;
    own[r][c] = i < smem.pieces.head_end ? own[r][c] * smem.steps.from_start[i] : 0.0f;
  });
}

// products.at[j][i] = (C[i] B[j]) exp(cum[i] - cum[j]) dt[j] for j <= i of one piece.
template <class T>
__device__ __forceinline__ void decay_products(const SsdChunkScanParams& p, Smem& smem, const Place& place) {
  Own own;
  clear(own);
  for (int n0 = 0; n0 < p.states; n0 += kTile) {
    device::sync_block();
    fill_states<T>(smem.left, p, p.B, place.chunk, place.group, n0);
    fill_states<T>(smem.right, p, p.C, place.chunk, place.group, n0);
    device::sync_block();
    multiply(own, smem.left, smem.right, p.states - n0 < kTile ? p.states - n0 : kTile);
  }
  each_own([&](int r, int c) {
    const int j = own_row() + r, i = own_column() + c;
    const bool reached = j <= i && smem.pieces.begin[i] <= j;
    own[r][c] = reached ? own[r][c] * (smem.steps.decay(i, j) * smem.steps.dt[j]) : 0.0f;
  });
  store_own(smem.products, own);
}

template <class T>
__device__ __forceinline__ void finish_outputs(const SsdChunkScanParams& p, const Own& own,
                                               const Place& place, int d0) {
  const SsdChunk& chunk = place.chunk;
  each_own([&](int r, int c) {
    const int i = own_row() + r, d = d0 + own_column() + c;
    if (i >= chunk.length || d >= p.head_dim) return;
    const auto at = [&](const SsdTensor& t) {
      return row_of<T>(t, chunk.batch, chunk.start + i, place.head) + d * t.inner;
    };
    float y = own[r][c];
    if (p.D != nullptr) {
      const float D = static_cast<const float*>(p.D)[p.D_wide ? place.head * p.head_dim + d : place.head];
      y = device::fma_rn(D, device::to_float(*at(p.x)), y);
    }
    if (p.y.data != nullptr) *at(p.y) = device::from_float<T>(y);
    if (p.z.data != nullptr) {
      const float z = device::to_float(*at(p.z));
      y *= z * sigmoid(z);
    }
    *at(p.out) = device::from_float<T>(y);
  });
}

template <class T>
__device__ __forceinline__ void give_outputs(const SsdChunkScanParams& p, Smem& smem, const Place& place) {
  if (place.chunk.length == 0) return;
  const int d0 = place.tile * kTile;
  prepare(p, place.chunk, place.head, smem);
  decay_products<T>(p, smem, place);
  Own own;
  clear(own);
  if (smem.pieces.head_end > 0) add_state<T>(own, p, smem, place, d0);
  device::sync_block();
  const RowsOf<T> x(p.x, place.chunk, place.head, p.head_dim);
  fill<false>(smem.right, [&](int j, int d) { return x(j, d0 + d); });
  device::sync_block();
  multiply_triangle<false>(own, smem.products, smem.right, smem.pieces.begin);
  finish_outputs<T>(p, own, place, d0);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) outputs_kernel(const __grid_constant__ SsdForward f) {
  Smem& smem = device::shared_memory<Smem>();
  const int each = tiles(f.p.head_dim);
  each_block(f.odd_outputs, tasks_of(f.p) * each,
             [&](int64_t block) { give_outputs<T>(f.p, smem, place_of_block(f.p, block, each)); });
}

}  // namespace

bool ssd_enough_runs(const SsdChunkScanParams& p, int device) {
  constexpr int64_t kEach = TW_TUNED(SSD_CHUNK_SCAN_RUNS, 2);
  // Of packed sequences one may be nearly all.
  const int64_t runs = p.cu_seqlens == nullptr ? runs_of(p) : p.heads * state_tiles(p);
  return runs >= kEach * device::multiprocessor_count(device);
}

int64_t ssd_lay_out(SsdForward& f) {
  SsdChunkScanParams& p = f.p;
  Workspace workspace{static_cast<char*>(p.workspace)};
  workspace.take_states(p);
  workspace.take(f.decay, tasks_of(p));
  if (p.dtype != DType::kFloat32) {
    const int64_t runs = runs_of(p), chunks = tasks_of(p) * state_tiles(p);
    workspace.take(f.odd_states, chunks > runs ? chunks : runs);
    workspace.take(f.odd_outputs, tasks_of(p) * tiles(p.head_dim));
  }
  return workspace.bytes;
}

void ssd_states(const SsdForward& f, int device, Stream stream) {
  const SsdChunkScanParams& p = f.p;
  if (f.odd_states != nullptr) ssd_states_mma(f, stream);
  if (f.running) {
    const auto run = by_dtype<SsdForward>(p.dtype, run_states_kernel<float>, run_states_kernel<fp16>,
                                          run_states_kernel<bf16>);
    return launch_each(run, f.odd_states, runs_of(p), sizeof(Smem), device, stream, f);
  }
  const auto states = by_dtype<SsdForward>(p.dtype, chunk_states_kernel<float>, chunk_states_kernel<fp16>,
                                           chunk_states_kernel<bf16>);
  const int64_t elements = p.sequences * p.heads * p.states * p.head_dim;
  launch_each(states, f.odd_states, tasks_of(p) * state_tiles(p), sizeof(Smem), device, stream, f);
  launch_over<SsdForward>(pass_states_kernel, divide_up(elements, kThreads), kThreads, 0, stream, f);
}

void ssd_chunk_scan_fwd_cuda(const SsdChunkScanParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  SsdForward f{};
  f.p = p;
  ssd_lay_out(f);
  f.running = ssd_enough_runs(p, device);
  ssd_states(f, device, stream);
  const auto outputs =
      by_dtype<SsdForward>(p.dtype, outputs_kernel<float>, outputs_kernel<fp16>, outputs_kernel<bf16>);
  if (f.odd_outputs != nullptr) ssd_outputs_mma(f, stream);
  launch_each(outputs, f.odd_outputs, tasks_of(p) * tiles(p.head_dim), sizeof(Smem), device, stream, f);
}

}  // namespace tilewright::scan
