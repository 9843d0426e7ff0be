// The selective scan on a GPU, forward (selective_scan.h has the formula).
//
// Roofline for every channel and step, 16-bit tensors, N states, with z: 8 bytes; N + 4 special functions,
// which a multiprocessor does 16 of in a cycle, and about 5.5 N instructions: N = 16 is bound by the special
// functions, small N by memory.
#include "scan/selective_scan_forward_tiles.h"
#include "scan/selective_scan_plan.h"
#include "scan/selective_scan_staging.h"

namespace tilewright::scan {
namespace {

constexpr int kTensors = 3;  // u, delta, z: a tile each for the stage that is worked on and for the next

template <class TileOf>
struct Smem {
  Site site;
  alignas(16) float dt[TileOf::kStage * TileOf::kMaxChannels];
  alignas(16) float drive[TileOf::kStage * TileOf::kMaxChannels];  // dt u, then y
  alignas(16) typename TileOf::State B[TileOf::kStage * TileOf::kMaxStates];
  alignas(16) typename TileOf::State C[TileOf::kStage * TileOf::kMaxStates];
};

// A block's way through its part.
template <class TileOf>
struct Block {
  const ScanLaunch& l;
  Smem<TileOf>& smem;
  const Geometry<TileOf> geometry;
  const Part& part;
  const Channels& channels;

  // Tiles lie behind smem, as large as the dtype needs them: shared memory decides how many blocks are
  // resident.
  __device__ __forceinline__ RawTile tile(int buffer, int tensor) const {
    static_assert(sizeof(Smem<TileOf>) % 16 == 0);
    return {reinterpret_cast<unsigned char*>(&smem + 1) + (buffer * kTensors + tensor) * l.tile_bytes};
  }

  __device__ __forceinline__ Stage stage_at(int64_t first) const {
    return {first, int(device::min(int64_t{TileOf::kStage}, part.end - first))};
  }

  __device__ __forceinline__ void start_loads(const Stage& stage, int buffer) const {
    if (stage.steps > 0) {
#pragma unroll 1
      for (int i = 0; i < kTensors; ++i) {
        const Strided& tensor = i == 0 ? l.p.u : i == 1 ? l.p.delta : l.p.z;
        if (tensor.data == nullptr) continue;
        load_tile(tile(buffer, i), tensor, l.p.dtype, part, channels, geometry, stage);
      }
    }
    device::cp_async_commit();
  }

  // dt and dt u of the stage.
  __device__ __forceinline__ void prepare(const Stage& stage, int buffer) const {
    with_dtype(l.p.dtype, [&](auto element) {
      using T = decltype(element);
      const auto* bias = static_cast<const float*>(l.p.delta_bias);
#pragma unroll 1
      for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
        const Item item = item_of(i, geometry);
        const bool present = item.channel < channels.count;
        ItemValues<TileOf> u = {}, delta = {};
        float shift = 0.0f;
        if (present) {
          read_item<T>(u, tile(buffer, 0), l.p.u, item, part, geometry, stage);
          read_item<T>(delta, tile(buffer, 1), l.p.delta, item, part, geometry, stage);
          if (bias != nullptr) shift = bias[channels.first + item.channel];
        }
#pragma unroll
        for (int j = 0; j < TileOf::kItem; ++j) {
          const bool real = present && item.step + j < stage.steps;
          const float dt = real ? step_size(delta[j] + shift, l.p.softplus) : 0.0f;
          const int at = (item.step + j) * geometry.channels + item.channel;
          smem.dt[at] = dt;
          smem.drive[at] = real ? dt * u[j] : 0.0f;
        }
      }
    });
  }

  __device__ __forceinline__ void load_projections(const Stage& stage) const {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      if (TileOf::kConstant && !(i == 0 ? l.p.variable_B : l.p.variable_C)) continue;
      load_rows<TileOf>(i == 0 ? smem.B : smem.C, i == 0 ? l.p.B : l.p.C, l.p.dtype, l.p.states, part,
                        channels.group, geometry, stage);
    }
  }

  // out of the stage, from y.
  __device__ __forceinline__ void finish(const Stage& stage, int buffer) const {
    with_dtype(l.p.dtype, [&](auto element) {
      using T = decltype(element);
      const auto* D = static_cast<const float*>(l.p.D);
#pragma unroll 1
      for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
        const Item item = item_of(i, geometry);
        if (item.channel >= channels.count) continue;
        ItemValues<TileOf> u, z = {}, out;
        read_item<T>(u, tile(buffer, 0), l.p.u, item, part, geometry, stage);
        if (l.p.z.data != nullptr) read_item<T>(z, tile(buffer, 2), l.p.z, item, part, geometry, stage);
        const float skip = D != nullptr ? D[channels.first + item.channel] : 0.0f;
#pragma unroll
        for (int j = 0; j < TileOf::kItem; ++j) {
          const float y = smem.drive[(item.step + j) * geometry.channels + item.channel];
          out[j] = D != nullptr ? device::fma_rn(skip, u[j], y) : y;
          if (l.p.z.data != nullptr) out[j] *= z[j] * sigmoid(z[j]);
        }
        write_item<T, TileOf>(out, l.p.out, item, part, channels, stage);
      }
    });
  }
};

// What a step needs from shared memory.
template <class TileOf>
struct StepInputs {
  float dt[TileOf::kChannels], drive[TileOf::kChannels];
  typename TileOf::State B[TileOf::kStates], C[TileOf::kStates];

  __device__ __forceinline__ void load(const Block<TileOf>& block, int step) {
    const Smem<TileOf>& smem = block.smem;
    const int at = step * block.geometry.channels + block.geometry.first_channel();
    load_channels<TileOf>(dt, smem.dt + at);
    load_channels<TileOf>(drive, smem.drive + at);
    const int row = step * block.geometry.states;
    if (!TileOf::kConstant || block.l.p.variable_B) load_row<TileOf>(B, smem.B + row, block.geometry);
    if (!TileOf::kConstant || block.l.p.variable_C) load_row<TileOf>(C, smem.C + row, block.geometry);
  }
};

// Takes the states through the stage and leaves y where dt u was. The inputs of the next step are read ahead
// of the write of y, which the compiler could not move them across.
template <class TileOf>
__device__ __forceinline__ void scan_stage(States<TileOf>& h, const States<TileOf>& A, StepInputs<TileOf> now,
                                           const Block<TileOf>& block, int steps) {
  constexpr int kChannels = TileOf::kChannels, kStates = TileOf::kStates;
  now.load(block, 0);
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    StepInputs<TileOf> next = now;
    next.load(block, device::min(step + 1, TileOf::kStage - 1));
    float y[kChannels] = {};
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        h[k][i] = mul_add(decay_of<TileOf>(i, now.dt[k], A[k][i]), h[k][i], now.drive[k], now.B[i]);
    }
    clear_absent(h, block.l, block.geometry);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) y[k] = output_add(now.C[i], h[k][i], y[k]);
    }
    const Kept kept = scatter_sum<kChannels>(y, 1, block.geometry.lanes);
    float* row = block.smem.drive + step * block.geometry.channels + block.geometry.first_channel();
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (j < kept.count && kept.owner) row[kept.first + j] = y[j];
    }
    now = next;
  }
}

template <class TileOf>
__global__ void __launch_bounds__(TileOf::kMaxThreads, TileOf::kBlocks)
    scan_kernel(const __grid_constant__ ScanLaunch l) {
  const Geometry<TileOf> geometry(l);
  Smem<TileOf>& smem = device::shared_memory<Smem<TileOf>>();
  enter_site(smem.site, l, place_of(l).slot, geometry.channels);
  const Part& part = smem.site.part;
  const Channels& channels = smem.site.channels;
  const Block<TileOf> block{l, smem, geometry, part, channels};
  if (!part.used) return;

  States<TileOf> A, h;
  load_rates<TileOf>(A, l, geometry, channels);
  if (l.carry != nullptr) {
    load_states<TileOf>(h, l.carry, part.number, l, geometry, channels);
  } else {
    load_sequence_states<TileOf>(h, l.p.initial_state, part.sequence, l, geometry, channels);
  }
  StepInputs<TileOf> inputs;
  if constexpr (TileOf::kConstant) {
    States<TileOf> constants;
    if (!l.p.variable_B) {
      load_weights<TileOf>(constants, l.p.B, l, geometry, channels);
#pragma unroll
      for (int i = 0; i < TileOf::kStates; ++i) inputs.B[i] = constants[0][i];
    }
    if (!l.p.variable_C) {
      load_weights<TileOf>(constants, l.p.C, l, geometry, channels);
#pragma unroll
      for (int i = 0; i < TileOf::kStates; ++i) inputs.C[i] = constants[0][i];
    }
  }

  // Each round starts the next stage's loads and works on the one before; the first has none.
  Stage stage = {part.begin, 0};
  for (int buffer = 1;; buffer = 1 - buffer) {
    device::cp_async_wait<0>();
    device::sync_block();  // the stage's tiles are here, and nobody is in the stage before
    const Stage next = block.stage_at(stage.first + stage.steps);
    block.start_loads(next, 1 - buffer);
    if (stage.steps > 0) {
      if (stage.first % kScanChunk == 0) {
        store_states<TileOf>(h, l.p.chunk_states, part.first_chunk + (stage.first - part.begin) / kScanChunk,
                             l, geometry, channels);
      }
      block.load_projections(stage);
      block.prepare(stage, buffer);
      device::sync_block();
      scan_stage<TileOf>(h, A, inputs, block, stage.steps);
      device::sync_block();
      block.finish(stage, buffer);
    }
    if (next.steps == 0) break;
    stage = next;
  }
  if (part.ends_sequence())
    store_sequence_states<TileOf>(h, l.p.last_state, part.sequence, l, geometry, channels);
}

}  // namespace

void selective_scan_fwd_cuda(const SelectiveScanParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  with_forward_tile(p, [&](auto tile) {
    using TileOf = decltype(tile);
    ScanLaunch l = plan<TileOf>(p, false, device);
    place(l, false);
    run_carry(l, false, stream);
    launch_blocks(scan_kernel<TileOf>, l, threads_of<TileOf>(l),
                  sizeof(Smem<TileOf>) + 2 * kTensors * size_t(l.tile_bytes), stream);
  });
}

}  // namespace tilewright::scan
