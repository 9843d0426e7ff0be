// Sequences in parts, for calls with too few channels to fill a GPU. The recurrence h = a h + x from a state
// c is the one from zero plus the product of all a times c, and that product is exp(A times the sum of dt).
// So
//
//   each part by itself:   S = its last state from zero, T = the sum of dt
//   along the parts:       c = exp(A T) c + S
//   each part from its c   (the kernels of the forward or backward pass)
//
// The gradient's recurrence e[t] = conj(a[t]) (e[t+1] + conj(C[t]) g[t]) goes the same way from the end.
#include "scan/selective_scan_backward_tiles.h"
#include "scan/selective_scan_forward_tiles.h"
#include "scan/selective_scan_plan.h"
#include "scan/selective_scan_staging.h"

namespace tilewright::scan {
namespace {

using CarryAny = ForwardAny;
using CarryConstant = ForwardConstant;
using CarryComplex = ForwardComplex;

constexpr int kCombineThreads = 128;

constexpr int kTensors = 3;  // delta, drive, z: a tile each

// Forward reads delta, u and B; adjoint delta, dout, z and C.
template <class TileOf>
struct Smem {
  Site site;
  alignas(16) unsigned char tiles[kTensors][TileOf::kMaxTileBytes];
  alignas(16) float dt[TileOf::kStage * TileOf::kMaxChannels];
  alignas(16) float drives[TileOf::kStage * TileOf::kMaxChannels];  // dt u; adjoint: g
  alignas(16) typename TileOf::State rows[TileOf::kStage * TileOf::kMaxStates];
};

template <class TileOf, class T>
__device__ __forceinline__ void prepare(Smem<TileOf>& smem, const ScanLaunch& l, const Strided& drive,
                                        const Geometry<TileOf>& geometry, const Part& part,
                                        const Channels& channels, const Stage& stage) {
  const auto* bias = static_cast<const float*>(l.p.delta_bias);
  const bool gated = l.adjoint && l.p.z.data != nullptr;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < geometry.items(); i += int(blockDim.x)) {
    const Item item = item_of(i, geometry);
    const bool present = item.channel < channels.count;
    ItemValues<TileOf> delta = {}, x = {}, z = {};
    float shift = 0.0f;
    if (present) {
      read_item<T>(delta, {smem.tiles[0]}, l.p.delta, item, part, geometry, stage);
      read_item<T>(x, {smem.tiles[1]}, drive, item, part, geometry, stage);
      if (gated) read_item<T>(z, {smem.tiles[2]}, l.p.z, item, part, geometry, stage);
      if (bias != nullptr) shift = bias[channels.first + item.channel];
    }
#pragma unroll
    for (int j = 0; j < TileOf::kItem; ++j) {
      const bool real = present && item.step + j < stage.steps;
      const float dt = real ? step_size(delta[j] + shift, l.p.softplus) : 0.0f;
      const float factor = !l.adjoint ? dt : gated ? z[j] * sigmoid(z[j]) : 1.0f;
      const int at = (item.step + j) * geometry.channels + item.channel;
      smem.dt[at] = dt;
      smem.drives[at] = real ? factor * x[j] : 0.0f;
    }
  }
}

template <class TileOf>
__device__ __forceinline__ void carry_stage(States<TileOf>& h, float (&elapsed)[TileOf::kChannels],
                                            typename TileOf::State (&row)[TileOf::kStates],
                                            const States<TileOf>& A, const Smem<TileOf>& smem,
                                            const ScanLaunch& l, const Geometry<TileOf>& geometry,
                                            bool variable, int steps) {
  for (int i = 0; i < steps; ++i) {
    const int step = l.adjoint ? steps - 1 - i : i;
    const int at = step * geometry.channels + geometry.first_channel();
    float dt[TileOf::kChannels], drive[TileOf::kChannels];
    load_channels<TileOf>(dt, smem.dt + at);
    load_channels<TileOf>(drive, smem.drives + at);
    if (variable) load_row<TileOf>(row, smem.rows + step * geometry.states, geometry);
#pragma unroll
    for (int k = 0; k < TileOf::kChannels; ++k) {
      elapsed[k] += dt[k];
#pragma unroll
      for (int j = 0; j < TileOf::kStates; ++j) {
        const typename TileOf::State a = decay(dt[k], A[k][j]);
        h[k][j] = l.adjoint ? conj_mul(a, from_output_add(drive[k], row[j], h[k][j]))
                            : mul_add(a, h[k][j], drive[k], row[j]);
      }
    }
    clear_absent(h, l, geometry);
  }
}

// S and T of every part.
template <class TileOf>
__global__ void __launch_bounds__(TileOf::kMaxThreads) part_kernel(const __grid_constant__ ScanLaunch l) {
  Smem<TileOf>& smem = device::shared_memory<Smem<TileOf>>();
  const Geometry<TileOf> geometry(l);
  enter_site(smem.site, l, place_of(l).slot, geometry.channels);
  const Part& part = smem.site.part;
  const Channels& channels = smem.site.channels;
  if (!part.used) return;
  const Strided& projection = l.adjoint ? l.p.C : l.p.B;
  const Strided& drive = l.adjoint ? l.p.dout : l.p.u;
  const bool variable = !TileOf::kConstant || (l.adjoint ? l.p.variable_C : l.p.variable_B);

  States<TileOf> A, h;
  float elapsed[TileOf::kChannels] = {};
  typename TileOf::State row[TileOf::kStates];
  load_rates<TileOf>(A, l, geometry, channels);
  clear<TileOf>(h);
  if constexpr (TileOf::kConstant) {
    States<TileOf> constants;
    if (!variable) load_weights<TileOf>(constants, projection, l, geometry, channels);
#pragma unroll
    for (int i = 0; i < TileOf::kStates; ++i) row[i] = constants[0][i];
  }

  const int64_t stages = (part.end - part.begin + TileOf::kStage - 1) / TileOf::kStage;
  for (int64_t i = 0; i < stages; ++i) {
    const int64_t first = part.begin + (l.adjoint ? stages - 1 - i : i) * TileOf::kStage;
    const Stage stage = {first, int(device::min(int64_t{TileOf::kStage}, part.end - first))};
    device::sync_block();
#pragma unroll 1
    for (int t = 0; t < (l.adjoint ? 3 : 2); ++t) {
      const Strided& tensor = t == 0 ? l.p.delta : t == 1 ? drive : l.p.z;
      if (tensor.data == nullptr) continue;
      load_tile({smem.tiles[t]}, tensor, l.p.dtype, part, channels, geometry, stage);
    }
    device::cp_async_commit();
    if (variable)
      load_rows<TileOf>(smem.rows, projection, l.p.dtype, l.p.states, part, channels.group, geometry, stage);
    device::cp_async_wait<0>();
    device::sync_block();
    with_dtype(l.p.dtype, [&](auto element) {
      prepare<TileOf, decltype(element)>(smem, l, drive, geometry, part, channels, stage);
    });
    device::sync_block();
    carry_stage<TileOf>(h, elapsed, row, A, smem, l, geometry, variable, stage.steps);
  }
  store_states<TileOf>(h, l.carry, part.number, l, geometry, channels);
#pragma unroll
  for (int k = 0; k < TileOf::kChannels; ++k) {
    const int channel = geometry.first_channel() + k;
    if (geometry.lane() == 0 && channel < channels.count)
      l.elapsed[part.number * l.p.dim + channels.first + channel] = elapsed[k];
  }
}

// Replaces S by c, for one channel and state of a sequence.
template <class S>
__device__ __forceinline__ void combine(const ScanLaunch& l, int64_t sequence, int64_t channel,
                                        int64_t state) {
  const SelectiveScanParams& p = l.p;
  const int64_t steps = l.part_chunks * kScanChunk;
  const bool packed = p.cu_seqlens != nullptr;
  int64_t first = sequence * l.splits, length = p.length;
  if (packed) {
    first = packed_part(l, sequence);
    length = packed_start(p, sequence + 1) - packed_start(p, sequence);
  }
  const int64_t parts = device::max(int64_t{1}, (length + steps - 1) / steps);
  const S rate = scaled_rate(static_cast<const S*>(p.A.data)[channel * p.A.channel + state * p.A.state]);
  const void* start = l.adjoint ? p.dlast_state : p.initial_state;
  S carried = {};
  if (start != nullptr)
    carried = static_cast<const S*>(start)[(sequence * p.dim + channel) * p.states + state];
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t part = first + (l.adjoint ? parts - 1 - i : i);
    S& here = static_cast<S*>(l.carry)[(part * p.states + state) * p.dim + channel];
    const S from_zero = here;
    const S a = decay(l.elapsed[part * p.dim + channel], rate);
    here = carried;
    carried = add(l.adjoint ? conj_mul(a, carried) : mul(a, carried), from_zero);
  }
}

__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const __grid_constant__ ScanLaunch l) {
  const SelectiveScanParams& p = l.p;
  const int64_t sequences = p.cu_seqlens != nullptr ? p.sequences : p.batch;
  const int64_t index = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (index >= sequences * p.states * p.dim) return;
  const int64_t channel = index % p.dim, state = index / p.dim % p.states,
                sequence = index / p.dim / p.states;
  if (p.weight_dtype == DType::kComplex64) {
    combine<Complex>(l, sequence, channel, state);
  } else {
    combine<float>(l, sequence, channel, state);
  }
}

template <class TileOf>
void launch_parts(ScanLaunch l, Stream stream) {
  plan_tiles<TileOf>(l);
  if (l.part_chunks == 0) return;
  launch_blocks(part_kernel<TileOf>, l, threads_of<TileOf>(l), sizeof(Smem<TileOf>), stream);
  const int64_t sequences = l.p.cu_seqlens != nullptr ? l.p.sequences : l.p.batch;
  const int64_t states = sequences * l.p.states * l.p.dim;
  device::launch(combine_kernel, dim3(unsigned(divide_up(states, kCombineThreads))), dim3(kCombineThreads), 0,
                 stream, l);
}

}  // namespace

void run_carry(const ScanLaunch& l, bool adjoint, Stream stream) {
  ScanLaunch launch = l;
  launch.adjoint = adjoint;
  if (l.p.weight_dtype == DType::kComplex64) {
    launch_parts<CarryComplex>(launch, stream);
  } else if (adjoint ? l.p.variable_C : l.p.variable_B) {
    launch_parts<CarryAny>(launch, stream);
  } else {
    launch_parts<CarryConstant>(launch, stream);
  }
}

int64_t selective_scan_workspace_cuda(const SelectiveScanParams& p, bool backward, int device) {
  const device::DeviceGuard guard(device);
  int64_t bytes = 0;
  const auto measure = [&](auto tile) {
    ScanLaunch l = plan<decltype(tile)>(p, backward, device);
    l.p.workspace = nullptr;
    bytes = place(l, backward);
  };
  if (backward) {
    with_backward_tile(p, measure);
  } else {
    with_forward_tile(p, measure);
  }
  return bytes;
}

}  // namespace tilewright::scan
