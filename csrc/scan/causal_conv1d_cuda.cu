// The causal depthwise convolution on the GPU, forward.
//
// Roofline: x is read and out written once, 4 bytes an element in 16-bit types, 8 in float32; width FMAs and,
// with silu, two MUFU operations an element. At 4.8 TB/s and 2-byte elements that is 5.3 elements a clock and
// multiprocessor: 21 of 128 FMAs, 11 of 16 MUFUs. So memory decides, if accesses are whole vectors.
#include "scan/causal_conv1d_cuda.h"

namespace tilewright::scan {
namespace conv {
namespace {

// ---- Packed sequences ----------------------------------------------------------------------------

__device__ __forceinline__ int64_t sequence_at(const CausalConv1dParams& p, int64_t b, int64_t t) {
  const int64_t at = b * p.seq_batch + (t < 0 ? 0 : t) * p.seq_step;
  return p.seq_is_64 ? static_cast<const int64_t*>(p.seq_idx)[at]
                     : static_cast<const int32_t*>(p.seq_idx)[at];
}

__global__ void __launch_bounds__(kThreads) reach_kernel(const __grid_constant__ CausalConv1dParams p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.batch * p.length) return;
  const int64_t b = index / p.length, t = index % p.length, own = sequence_at(p, b, t);
  uint32_t reach = 0;
  for (int lag = 0; lag < p.width && own >= 0; ++lag) {
    if (sequence_at(p, b, t - lag) == own) reach |= 1u << lag;
  }
  static_cast<uint8_t*>(p.workspace)[index] = uint8_t(reach);
}

// ---- Forward -------------------------------------------------------------------------------------

template <class T, bool kPacked>
__device__ __forceinline__ void store_final(const CausalConv1dParams& p, int64_t b, int64_t c, int slot) {
  const int64_t t = p.length - (p.width - 1) + slot;
  const float value = is_kept<kPacked>(p, b, t) ? value_at<T>(p, b, c, t) : 0.0f;
  *address<T>(p.final, b, c, slot) = device::from_float<T>(value);
}

template <class T, int kTaps, bool kPacked>
__global__ void __launch_bounds__(kThreads) forward_rows(const __grid_constant__ CausalConv1dParams p) {
  const int64_t tiles = (p.length + kRun + kForwardTile - 1) / kForwardTile;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + device::warp_id();
  const int64_t row = warp / tiles, tile = warp % tiles, b = row / p.dim, c = row % p.dim;
  if (b >= p.batch) return;
  const T* x_row = address<const T>(p.x, b, c, 0);
  const int64_t t = tile * kForwardTile + device::lane_id() * kRun - misalignment(x_row);
  float run[kRun], before[kTaps - 1], weight[kTaps];
  load_run(run, x_row, p.x.step, t, p.length, [&](int64_t at) { return value_at<T>(p, b, c, at); });
  load_before<T, kTaps>(before, p, b, c, t, run);
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) weight[lag] = weight_at(p, c, lag);
  const float bias = bias_at(p, c);
  float out[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const uint32_t reach = kPacked ? reach_at<kPacked>(p, b, t + i) : 0xffu;
    float sum = bias;
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      if (sees<kPacked>(p, reach, lag)) sum += weight[lag] * lagged<kTaps>(run, before, i, lag);
    }
    if (p.silu) sum *= sigmoid(sum);
    out[i] = kPacked && (reach & 1u) == 0 ? 0.0f : sum;
  }
  store_run(address<T>(p.out, b, c, 0), p.out.step, t, p.length, out);
  const bool ends = p.final.data != nullptr && tile == 0 && device::lane_id() < p.width - 1;
  if (ends) store_final<T, kPacked>(p, b, c, device::lane_id());
}

template <class T, int kChannels, int kTaps, bool kPacked>
__global__ void __launch_bounds__(kThreads) forward_columns(const __grid_constant__ CausalConv1dParams p) {
  constexpr int kBatch =
      kPacked ? 2 : 4;  // steps loaded before the first of them is used; registers limit it
  const Column at = column_of(p, kChannels);
  if (at.b >= p.batch) return;
  float weight[kTaps][kChannels], bias[kChannels];
  float window[kTaps - 1 + kBatch][kChannels];  // the steps before the batch, and those of it
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) weight[lag][k] = weight_at(p, at.c + k, lag);
    bias[k] = bias_at(p, at.c + k);
#pragma unroll
    for (int lag = 1; lag < kTaps; ++lag)
      window[kTaps - 1 - lag][k] = lag < p.width ? value_at<T>(p, at.b, at.c + k, at.begin - lag) : 0.0f;
  }
  const T* x = address<const T>(p.x, at.b, at.c, at.begin);
  T* out = address<T>(p.out, at.b, at.c, at.begin);
#pragma unroll 1
  for (int64_t t = at.begin; t < at.end; t += kBatch) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i, x += p.x.step) {
      if (t + i < at.end) load_channels<T>(window[kTaps - 1 + i], x);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i, out += p.out.step) {
      if (t + i >= at.end) break;
      const uint32_t reach = kPacked ? reach_at<kPacked>(p, at.b, t + i) : 0xffu;
      float y[kChannels];
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        y[k] = bias[k];
#pragma unroll
        for (int lag = 0; lag < kTaps; ++lag) {
          if (sees<kPacked>(p, reach, lag)) y[k] += weight[lag][k] * window[kTaps - 1 + i - lag][k];
        }
        if (p.silu) y[k] *= sigmoid(y[k]);
        if (kPacked && (reach & 1u) == 0) y[k] = 0.0f;
      }
      store_channels(out, y);
    }
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) {
#pragma unroll
      for (int k = 0; k < kChannels; ++k) window[i][k] = window[i + kBatch][k];
    }
  }
  if (p.final.data == nullptr || at.chunk != 0) return;
#pragma unroll 1
  for (int k = 0; k < kChannels; ++k) {
    for (int slot = 0; slot < p.width - 1; ++slot) store_final<T, kPacked>(p, at.b, at.c + k, slot);
  }
}

template <class T, int kTaps, bool kPacked>
void launch_rows(const CausalConv1dParams& p, Stream stream) {
  const auto kernel = forward_rows<T, kTaps, kPacked>;
  const int64_t warps = p.batch * p.dim * ((p.length + kRun + kForwardTile - 1) / kForwardTile);
  device::launch<CausalConv1dParams>(kernel, dim3(unsigned((warps + kWarps - 1) / kWarps)), dim3(kThreads), 0,
                                     stream, p);
}

template <class T, int kChannels, int kTaps, bool kPacked>
void launch_columns(const CausalConv1dParams& p, Stream stream) {
  const auto kernel = forward_columns<T, kChannels, kTaps, kPacked>;
  device::launch<CausalConv1dParams>(kernel, column_blocks(p, kChannels), dim3(kThreads), 0, stream, p);
}

template <class T>
void forward(const CausalConv1dParams& p, Stream stream) {
  constexpr int kChannels = 16 / int(sizeof(T));
  const bool packed = p.seq_idx != nullptr, wide = p.width > 4;
  if (in_rows(p)) {
    if (wide) return launch_rows<T, 8, true>(p, stream);
    return packed ? launch_rows<T, 4, true>(p, stream) : launch_rows<T, 4, false>(p, stream);
  }
  if (wide) return launch_columns<T, 1, 8, true>(p, stream);
  if (!moves_vectors(p, p.x, kChannels, sizeof(T)) || !moves_vectors(p, p.out, kChannels, sizeof(T)))
    return launch_columns<T, 1, 4, true>(p, stream);
  return packed ? launch_columns<T, kChannels, 4, true>(p, stream)
                : launch_columns<T, kChannels, 4, false>(p, stream);
}

}  // namespace

void prepare_reach(const CausalConv1dParams& p, Stream stream) {
  if (p.seq_idx == nullptr) return;
  const int64_t blocks = (p.batch * p.length + kThreads - 1) / kThreads;
  device::launch(reach_kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p);
}

}  // namespace conv

int64_t causal_conv1d_workspace_cuda(const CausalConv1dParams& p, bool backward, int) {
  const int64_t sums = p.batch * conv::backward_parts(p) * (p.width + 1) * p.dim * int64_t{sizeof(float)};
  return conv::reach_bytes(p) + (backward ? sums : 0);
}

void causal_conv1d_fwd_cuda(const CausalConv1dParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  conv::prepare_reach(p, stream);
  switch (p.dtype) {
    case DType::kFloat32:
      return conv::forward<float>(p, stream);
    case DType::kBFloat16:
      return conv::forward<bf16>(p, stream);
    default:
      return conv::forward<fp16>(p, stream);
  }
}

}  // namespace tilewright::scan
