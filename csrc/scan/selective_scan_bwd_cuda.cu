// The gradient of the selective scan on a GPU. For every channel, from the last step to the first, and with
// g = dout silu(z):
//
//   lam[t] = conj(C[t]) g[t] + e[t+1]        e[t] = conj(a[t]) lam[t]        a[t] = exp(dt[t] A)
//   dC[t] = g conj(h[t])   dB[t] = dt u lam[t]   (sums over the channels of a group)
//   dA = sum_t dt conj(h[t-1]) e[t]          dh[0] = e[0]
//   du = D g + dt s1       ddt = u s1 + s2   s1 = sum_n Re conj(B) lam   s2 = sum_n Re conj(A h[t-1]) e
//
// (complex: C g and g h twice). The states come again from those that the forward pass kept before each
// chunk: a first sweep over the chunk leaves the state before each of its stages in shared memory, then each
// stage, last to first, is recomputed with its states in registers and walked back. Nothing is summed by
// atomics: blocks leave partial sums of the weights' gradients and of dB and dC, which run_sums adds up in
// order.
//
// Roofline for every channel and step, 16-bit tensors, N states, with z: 14 bytes and 8 N / 128 of partial
// sums; 3 N + 9 special functions and about 25 N instructions: N = 16 is bound by both.
#include "scan/selective_scan_backward_tiles.h"
#include "scan/selective_scan_plan.h"
#include "scan/selective_scan_staging.h"

namespace tilewright::scan {
namespace {

constexpr int kTensors =
    4;  // u, delta, z, dout: a tile each for the stage that is worked on and for the next

template <class TileOf>
struct Smem {
  using State = typename TileOf::State;
  static constexpr int kSteps = TileOf::kStage * TileOf::kMaxChannels;
  static constexpr int kStages =
      kScanChunk / TileOf::kStage - 2;  // neither the first of a chunk nor the last
  // Complex states are more than the registers hold: those before each step of a stage wait here for the way
  // back.
  static constexpr bool kStatesWait = sizeof(State) > sizeof(float);
  static constexpr int kKept = kStages + (kStatesWait ? TileOf::kStage : 0);
  static constexpr int kVectors = TileOf::kChannels * TileOf::kStates / TileOf::kVector;

  Site site;
  alignas(16) unsigned char tiles[2][kTensors][TileOf::kMaxTileBytes];
  typename TileOf::StateVector kept[kKept][kVectors][TileOf::kMaxThreads];
  alignas(16) float dt[kSteps];
  alignas(16) float drive[kSteps];  // dt u, then s1
  alignas(16) float g[kSteps];      // then s2
  alignas(16) float y[kSteps];
  alignas(16) State B[TileOf::kStage * TileOf::kMaxStates];
  alignas(16) State C[TileOf::kStage * TileOf::kMaxStates];
  State dB[TileOf::kMaxWarps][TileOf::kStage * TileOf::kMaxStates];  // sums over a warp's channels
  State dC[TileOf::kMaxWarps][TileOf::kStage * TileOf::kMaxStates];
  float dD[TileOf::kItems], ddelta_bias[TileOf::kItems];  // each written by one thread
};

// A chunk's stages are visited forward all but the last, then backward all of them.
struct Visit {
  int chunk;  // of the part; negative: no visit
  int stage;
  bool gradient;
};

// What a thread has in registers throughout.
template <class TileOf>
struct Registers {
  States<TileOf> A, h, e, dA;
  // Constant B and C and their gradients; variable ones: the row of the step.
  typename TileOf::State B[TileOf::kStates], C[TileOf::kStates];
  typename TileOf::State dB[TileOf::kStates], dC[TileOf::kStates];
};

template <class TileOf>
struct Block {
  using State = typename TileOf::State;
  static constexpr int kChannels = TileOf::kChannels, kStates = TileOf::kStates, kStage = TileOf::kStage;

  const ScanLaunch& l;
  Smem<TileOf>& smem;
  const Geometry<TileOf> geometry;
  const Part& part;
  const Channels& channels;

  // ---- The order of visits ----

  __device__ __forceinline__ int64_t first_step(int chunk) const {
    return part.begin + int64_t{chunk} * kScanChunk;
  }
  __device__ __forceinline__ int stages_of(int chunk) const {
    return (int(device::min(int64_t{kScanChunk}, part.end - first_step(chunk))) + kStage - 1) / kStage;
  }
  __device__ __forceinline__ bool is_visit(const Visit& visit) const { return visit.chunk >= 0; }
  __device__ __forceinline__ Visit enter(int chunk) const {
    return {chunk, 0, chunk >= 0 && stages_of(chunk) == 1};
  }
  __device__ __forceinline__ Visit first_visit() const {
    return enter(int((part.end - part.begin + kScanChunk - 1) / kScanChunk) - 1);
  }
  __device__ __forceinline__ Visit after(const Visit& visit) const {
    if (visit.gradient) {
      if (visit.stage == 0) return enter(visit.chunk - 1);
      return {visit.chunk, visit.stage - 1, true};
    }
    const int last = stages_of(visit.chunk) - 1;
    return {visit.chunk, visit.stage + 1, visit.stage + 1 == last};
  }
  __device__ __forceinline__ Stage stage_of(const Visit& visit) const {
    const int64_t first = first_step(visit.chunk) + visit.stage * kStage;
    return {first, int(device::min(int64_t{kStage}, part.end - first))};
  }

  // ---- Into shared memory ----

  __device__ __forceinline__ RawTile tile(int buffer, int tensor) const {
    return {smem.tiles[buffer][tensor]};
  }

  __device__ __forceinline__ void start_loads(const Visit& visit, int buffer) const {
    const Stage stage = stage_of(visit);
    if (is_visit(visit)) {
      const SelectiveScanParams& p = l.p;
#pragma unroll 1
      for (int i = 0; i < (visit.gradient ? kTensors : 2); ++i) {
        const Strided& tensor = i == 0 ? p.u : i == 1 ? p.delta : i == 2 ? p.z : p.dout;
        if (tensor.data == nullptr) continue;
        load_tile(tile(buffer, i), tensor, p.dtype, part, channels, geometry, stage);
      }
    }
    device::cp_async_commit();
  }

  __device__ __forceinline__ void load_projections(const Stage& stage, bool gradient) const {
    const SelectiveScanParams& p = l.p;
#pragma unroll 1
    for (int i = 0; i < (gradient ? 2 : 1); ++i) {
      if (TileOf::kConstant && !(i == 0 ? p.variable_B : p.variable_C)) continue;
      load_rows<TileOf>(i == 0 ? smem.B : smem.C, i == 0 ? p.B : p.C, p.dtype, p.states, part, channels.group,
                        geometry, stage);
    }
  }

  // dt, dt u and, for a gradient, g. Steps and channels that do not exist have zeros: they change no state.
  __device__ __forceinline__ void prepare(const Stage& stage, int buffer, bool gradient) const {
    with_dtype(l.p.dtype, [&](auto element) {
      using T = decltype(element);
      const auto* bias = static_cast<const float*>(l.p.delta_bias);
      const bool gated = gradient && l.p.z.data != nullptr;
#pragma unroll 1
      for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
        const Item item = item_of(i, geometry);
        const bool present = item.channel < channels.count;
        ItemValues<TileOf> u = {}, delta = {}, z = {}, dout = {};
        float shift = 0.0f;
        if (present) {
          read_item<T>(u, tile(buffer, 0), l.p.u, item, part, geometry, stage);
          read_item<T>(delta, tile(buffer, 1), l.p.delta, item, part, geometry, stage);
          if (gated) read_item<T>(z, tile(buffer, 2), l.p.z, item, part, geometry, stage);
          if (gradient) read_item<T>(dout, tile(buffer, 3), l.p.dout, item, part, geometry, stage);
          if (bias != nullptr) shift = bias[channels.first + item.channel];
        }
#pragma unroll
        for (int j = 0; j < TileOf::kItem; ++j) {
          const bool real = present && item.step + j < stage.steps;
          const float dt = real ? step_size(delta[j] + shift, l.p.softplus) : 0.0f;
          const int at = (item.step + j) * geometry.channels + item.channel;
          smem.dt[at] = dt;
          smem.drive[at] = real ? dt * u[j] : 0.0f;
          if (gradient) smem.g[at] = gated && real ? dout[j] * (z[j] * sigmoid(z[j])) : dout[j];
        }
      }
    });
  }

  // ---- One step ----

  __device__ __forceinline__ int first_of(int step) const {
    return step * geometry.channels + geometry.first_channel();
  }
  __device__ __forceinline__ void load_B(Registers<TileOf>& r, int step) const {
    if (!TileOf::kConstant || l.p.variable_B)
      load_row<TileOf>(r.B, smem.B + step * geometry.states, geometry);
  }
  __device__ __forceinline__ void load_C(Registers<TileOf>& r, int step) const {
    if (!TileOf::kConstant || l.p.variable_C)
      load_row<TileOf>(r.C, smem.C + step * geometry.states, geometry);
  }

  __device__ __forceinline__ void advance(Registers<TileOf>& r, const float (&dt)[kChannels],
                                          const float (&drive)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k)
        r.h[k][i] = mul_add(decay_of<TileOf>(i, dt[k], r.A[k][i]), r.h[k][i], drive[k], r.B[i]);
    }
    clear_absent(r.h, l, geometry);
  }

  __device__ __forceinline__ void forward_step(Registers<TileOf>& r, int step) const {
    float dt[kChannels], drive[kChannels];
    load_channels<TileOf>(dt, smem.dt + first_of(step));
    load_channels<TileOf>(drive, smem.drive + first_of(step));
    load_B(r, step);
    advance(r, dt, drive);
  }

  // The sum of a step's dB or dC over the channels: in registers if it is constant, else over the warp.
  __device__ __forceinline__ void sum_channels(State (&x)[kStates], State (&constant)[kStates], bool variable,
                                               State (*rows)[kStage * TileOf::kMaxStates], int step) const {
    if (TileOf::kConstant && !variable) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) constant[i] = add(constant[i], x[i]);
      return;
    }
    const Kept kept = scatter_sum<kStates>(x, geometry.lanes, device::kWarpSize);
    State* row = rows[device::warp_id()] + step * geometry.states;
#pragma unroll
    for (int j = 0; j < kStates; ++j) {
      if (j < kept.count && kept.owner) row[geometry.state(kept.first + j)] = x[j];
    }
  }

  // On the way forward through a stage: y, dC.
  __device__ __forceinline__ void output_step(Registers<TileOf>& r, int step) const {
    float g[kChannels], y[kChannels] = {};
    State dC[kStates] = {};
    load_channels<TileOf>(g, smem.g + first_of(step));
    load_C(r, step);
    forward_step(r, step);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        y[k] = output_add(r.C[i], r.h[k][i], y[k]);
        dC[i] = from_output_add(g[k], r.h[k][i], dC[i]);
      }
    }
    const Kept kept = scatter_sum<kChannels>(y, 1, geometry.lanes);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) {
      if (j < kept.count && kept.owner) smem.y[first_of(step) + kept.first + j] = y[j];
    }
    sum_channels(dC, r.dC, l.p.variable_C, smem.dC, step);
  }

  // On the way back: e, dA, dB, and s1 and s2 in the places of dt u and g. `before`: the states before it.
  __device__ __forceinline__ void adjoint_step(Registers<TileOf>& r, const States<TileOf>& before,
                                               int step) const {
    float dt[kChannels], drive[kChannels], g[kChannels], s[2 * kChannels] = {};
    State dB[kStates] = {};
    load_channels<TileOf>(dt, smem.dt + first_of(step));
    load_channels<TileOf>(drive, smem.drive + first_of(step));
    load_channels<TileOf>(g, smem.g + first_of(step));
    load_B(r, step);
    load_C(r, step);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) r.e[k][i] = from_output_add(g[k], r.C[i], r.e[k][i]);  // lam
    }
    clear_absent(r.e, l, geometry);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        const State lam = r.e[k][i], e = conj_mul(decay_of<TileOf>(i, dt[k], r.A[k][i]), lam);
        const State rate_gradient = conj_mul(before[k][i], e);
        s[2 * k] = dot_add(r.B[i], lam, s[2 * k]);
        s[2 * k + 1] = rate_dot_add(r.A[k][i], rate_gradient, s[2 * k + 1]);
        dB[i] = scale_add(drive[k], lam, dB[i]);
        r.dA[k][i] = scale_add(dt[k], rate_gradient, r.dA[k][i]);
        r.e[k][i] = e;
      }
    }
    const Kept kept = scatter_sum<2 * kChannels>(s, 1, geometry.lanes);
#pragma unroll
    for (int j = 0; j < 2 * kChannels; ++j) {
      const int index = kept.first + j;
      float* place = index % 2 == 0 ? smem.drive : smem.g;
      if (j < kept.count && kept.owner) place[first_of(step) + index / 2] = s[j];
    }
    sum_channels(dB, r.dB, l.p.variable_B, smem.dB, step);
  }

  // ---- A stage ----

  __device__ __forceinline__ void keep(const States<TileOf>& states, int place) const {
#pragma unroll
    for (int v = 0; v < Smem<TileOf>::kVectors; ++v) {
      typename TileOf::StateVector vector;
#pragma unroll
      for (int j = 0; j < TileOf::kVector; ++j) {
        const int i = v * TileOf::kVector + j;
        vector[j] = states[i / kStates][i % kStates];
      }
      device::store(&smem.kept[place][v][threadIdx.x], vector);
    }
  }

  __device__ __forceinline__ void recall(States<TileOf>& states, int place) const {
#pragma unroll
    for (int v = 0; v < Smem<TileOf>::kVectors; ++v) {
      const auto vector = device::load(&smem.kept[place][v][threadIdx.x]);
#pragma unroll
      for (int j = 0; j < TileOf::kVector; ++j) {
        const int i = v * TileOf::kVector + j;
        states[i / kStates][i % kStates] = vector[j];
      }
    }
  }

  // The states before the stage. Those before the last one are what the way forward ended with.
  __device__ __forceinline__ void load_start(Registers<TileOf>& r, const Visit& visit) const {
    if (visit.stage == 0) {
      load_states<TileOf>(r.h, l.p.chunk_states, part.first_chunk + visit.chunk, l, geometry, channels);
    } else if (!visit.gradient) {
      keep(r.h, visit.stage - 1);
    } else if (visit.stage + 1 < stages_of(visit.chunk)) {
      recall(r.h, visit.stage - 1);
    }
  }

  __device__ __forceinline__ void gradient_stage(Registers<TileOf>& r) const {
    constexpr bool kWait = Smem<TileOf>::kStatesWait;
    constexpr int kPlace = Smem<TileOf>::kStages;
    States<TileOf> before[kStage];
#pragma unroll
    for (int step = 0; step < kStage; ++step) {
      if constexpr (kWait) {
        keep(r.h, kPlace + step);
      } else {
#pragma unroll
        for (int k = 0; k < kChannels; ++k) {
#pragma unroll
          for (int i = 0; i < kStates; ++i) before[step][k][i] = r.h[k][i];
        }
      }
      output_step(r, step);
    }
#pragma unroll
    for (int step = kStage - 1; step >= 0; --step) {
      if constexpr (kWait) recall(before[step], kPlace + step);
      adjoint_step(r, before[step], step);
    }
  }

  // ---- Out of shared memory ----

  __device__ __forceinline__ void finish(const Stage& stage, int buffer) const {
    const SelectiveScanParams& p = l.p;
    with_dtype(p.dtype, [&](auto element) {
      using T = decltype(element);
      const auto* D = static_cast<const float*>(p.D);
      const auto* bias = static_cast<const float*>(p.delta_bias);
#pragma unroll 1
      for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
        const Item item = item_of(i, geometry);
        if (item.channel >= channels.count) continue;
        ItemValues<TileOf> u, delta, z = {}, dout, du, ddelta, dz;
        read_item<T>(u, tile(buffer, 0), p.u, item, part, geometry, stage);
        read_item<T>(delta, tile(buffer, 1), p.delta, item, part, geometry, stage);
        read_item<T>(dout, tile(buffer, 3), p.dout, item, part, geometry, stage);
        const bool gated = p.z.data != nullptr;
        if (gated) read_item<T>(z, tile(buffer, 2), p.z, item, part, geometry, stage);
        const float skip = D != nullptr ? D[channels.first + item.channel] : 0.0f;
        const float shift = bias != nullptr ? bias[channels.first + item.channel] : 0.0f;
        float dD = smem.dD[i], ddelta_bias = smem.ddelta_bias[i];
#pragma unroll
        for (int j = 0; j < TileOf::kItem; ++j) {
          const int at = (item.step + j) * geometry.channels + item.channel;
          const float gate = gated ? sigmoid(z[j]) : 1.0f;
          const float g = gated ? dout[j] * (z[j] * gate) : dout[j];
          const float y = D != nullptr ? device::fma_rn(skip, u[j], smem.y[at]) : smem.y[at];
          const float s1 = smem.drive[at], s2 = smem.g[at], raw = delta[j] + shift;
          dz[j] = dout[j] * y * gate * (1.0f + z[j] * (1.0f - gate));
          du[j] = D != nullptr ? device::fma_rn(skip, g, smem.dt[at] * s1) : smem.dt[at] * s1;
          ddelta[j] = device::fma_rn(u[j], s1, s2 * kLn2);
          if (p.softplus && !(raw > 20.0f)) ddelta[j] *= sigmoid(raw);
          if (item.step + j < stage.steps) {
            dD = device::fma_rn(g, u[j], dD);
            ddelta_bias += ddelta[j];
          }
        }
        smem.dD[i] = dD;
        smem.ddelta_bias[i] = ddelta_bias;
        write_item<T, TileOf>(du, p.du, item, part, channels, stage);
        write_item<T, TileOf>(ddelta, p.ddelta, item, part, channels, stage);
        write_item<T, TileOf>(dz, p.dz, item, part, channels, stage);
      }
    });
  }

  // A stage's rows of dB or dC join the block's in the workspace.
  __device__ __forceinline__ void finish_rows(void* workspace,
                                              const State (*rows)[kStage * TileOf::kMaxStates],
                                              const Stage& stage) const {
    if (workspace == nullptr) return;
    const SelectiveScanParams& p = l.p;
    const int warps = int(blockDim.x) / device::kWarpSize;
    State* group_rows =
        static_cast<State*>(workspace) +
        ((smem.site.slot * p.groups + channels.group) * p.batch + part.batch) * p.length * p.states;
#pragma unroll 1
    for (int i = int(threadIdx.x); i < stage.steps * geometry.states; i += int(blockDim.x)) {
      const int step = i / geometry.states, state = i % geometry.states;
      if (state >= p.states) continue;
      State sum = rows[0][i];
      for (int warp = 1; warp < warps; ++warp) sum = add(sum, rows[warp][i]);
      State& to = group_rows[part.walk.token(stage.first + step) * p.states + state];
      to = smem.site.first_tile ? sum : add(to, sum);
    }
  }

  __device__ __forceinline__ void clear_totals() const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
      smem.dD[i] = 0.0f;
      smem.ddelta_bias[i] = 0.0f;
    }
  }

  __device__ __forceinline__ void finish_totals(float* workspace, const float* totals) const {
    if (workspace == nullptr) return;
    for (int channel = int(threadIdx.x); channel < channels.count; channel += int(blockDim.x)) {
      float sum = 0.0f;
      for (int i = channel; i < geometry.items(); i += geometry.channels) sum += totals[i];
      workspace[part.number * l.p.dim + channels.first + channel] = sum;
    }
  }

  // ---- The whole part ----

  __device__ __forceinline__ void load_constants(State (&x)[kStates], const Strided& weights) const {
    States<TileOf> all;
    load_weights<TileOf>(all, weights, l, geometry, channels);
#pragma unroll
    for (int i = 0; i < kStates; ++i) x[i] = all[0][i];
  }

  __device__ __forceinline__ void store_constants(const State (&x)[kStates], void* workspace) const {
    States<TileOf> all;
#pragma unroll
    for (int i = 0; i < kStates; ++i) all[0][i] = x[i];
    store_states<TileOf>(all, workspace, part.number, l, geometry, channels);
  }

  __device__ __forceinline__ void begin(Registers<TileOf>& r) const {
    load_rates<TileOf>(r.A, l, geometry, channels);
    clear<TileOf>(r.h);
    clear<TileOf>(r.dA);
    if (l.carry != nullptr) {
      load_states<TileOf>(r.e, l.carry, part.number, l, geometry, channels);
    } else {
      load_sequence_states<TileOf>(r.e, l.p.dlast_state, part.sequence, l, geometry, channels);
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) r.B[i] = r.C[i] = r.dB[i] = r.dC[i] = {};
    if constexpr (TileOf::kConstant) {
      if (!l.p.variable_B) load_constants(r.B, l.p.B);
      if (!l.p.variable_C) load_constants(r.C, l.p.C);
    }
    clear_totals();
  }

  __device__ __forceinline__ void end(const Registers<TileOf>& r) const {
    store_states<TileOf>(r.dA, l.dA, part.number, l, geometry, channels);
    if constexpr (TileOf::kConstant) {
      if (!l.p.variable_B) store_constants(r.dB, l.dB);
      if (!l.p.variable_C) store_constants(r.dC, l.dC);
    }
    if (part.begins_sequence())
      store_sequence_states<TileOf>(r.e, l.p.dinitial_state, part.sequence, l, geometry, channels);
    device::sync_block();
    finish_totals(l.dD, smem.dD);
    finish_totals(l.ddelta_bias, smem.ddelta_bias);
    device::sync_block();
  }

  __device__ __forceinline__ void make(const Visit& visit, int buffer, Registers<TileOf>& r) const {
    const Stage stage = stage_of(visit);
    load_start(r, visit);
    load_projections(stage, visit.gradient);
    prepare(stage, buffer, visit.gradient);
    device::sync_block();
    if (!visit.gradient) {
#pragma unroll 2
      for (int step = 0; step < kStage; ++step) forward_step(r, step);
      return;
    }
    gradient_stage(r);
    device::sync_block();
    finish(stage, buffer);
    finish_rows(l.dB_rows, smem.dB, stage);
    finish_rows(l.dC_rows, smem.dC, stage);
  }

  __device__ __forceinline__ void run() const {
    Registers<TileOf> r;
    begin(r);
    // Each round starts the next visit's loads and makes the one before; the first has none.
    Visit visit = {-1, 0, false};
    Visit next = first_visit();
    for (int buffer = 1;; buffer = 1 - buffer) {
      device::cp_async_wait<0>();
      device::sync_block();  // the stage's tiles are here, and nobody is in the visit before
      start_loads(next, 1 - buffer);
      if (is_visit(visit)) make(visit, buffer, r);
      if (!is_visit(next)) break;
      visit = next;
      next = after(visit);
    }
    end(r);
  }
};

template <class TileOf>
__global__ void __launch_bounds__(TileOf::kMaxThreads, TileOf::kBlocks)
    gradient_kernel(const __grid_constant__ ScanLaunch l) {
  const Geometry<TileOf> geometry(l);
  Smem<TileOf>& smem = device::shared_memory<Smem<TileOf>>();
  const Block<TileOf> block{l, smem, geometry, smem.site.part, smem.site.channels};
  for (uint32_t tile = place_of(l).slot; tile < uint32_t(l.tiles); tile += uint32_t(l.slots)) {
    enter_site(smem.site, l, tile, geometry.channels);
    block.run();
  }
}

}  // namespace

void selective_scan_bwd_cuda(const SelectiveScanParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  with_backward_tile(p, [&](auto tile) {
    using TileOf = decltype(tile);
    ScanLaunch l = plan<TileOf>(p, true, device);
    place(l, true);
    run_carry(l, true, stream);
    launch_blocks(gradient_kernel<TileOf>, l, threads_of<TileOf>(l), sizeof(Smem<TileOf>), stream);
    run_sums(l, stream);
  });
}

}  // namespace tilewright::scan
