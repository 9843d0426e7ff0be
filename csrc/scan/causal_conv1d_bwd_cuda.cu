// The gradient of the causal depthwise convolution on the GPU: one pass that computes pre again, and a sum
// over the parts of dweight and dbias in a fixed order.
//
//   g[t] = dout[t] * d out / d pre        dx[t] = sum_j weight[width - 1 - j] g[t + j] (+ dfinal)
//   dweight[width - 1 - j] = sum_t g[t] x[t - j]        dbias = sum_t g[t]
//
// Roofline: x and dout are read and dx written once, 6 bytes an element in 16-bit types; 6 * width FLOPs and,
// with silu, two MUFU operations an element. The parts add (width + 1) floats for every 1984 steps of a row,
// and for every 8 to 64 steps of a column.
#include "device/smem.h"
#include "device/sync.h"
#include "scan/causal_conv1d_cuda.h"

namespace tilewright::scan {
namespace conv {
namespace {

constexpr int kReduceChannels = 32, kReduceSlices = 8;

// The derivative of the activation at pre.
__device__ __forceinline__ float activation_slope(const CausalConv1dParams& p, float pre) {
  if (!p.silu) return 1.0f;
  const float s = sigmoid(pre);
  return s * (1.0f + pre * (1.0f - s));
}

__device__ __forceinline__ float* sums_of(const CausalConv1dParams& p, int64_t part, int k) {
  float* sums = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + reach_bytes(p));
  return sums + (part * (p.width + 1) + k) * p.dim;
}

// What reaches step t through the final state.
template <class T, bool kPacked>
__device__ __forceinline__ float dfinal_at(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  if (p.dfinal.data == nullptr || !is_kept<kPacked>(p, b, t)) return 0.0f;
  return device::to_float(*address<const T>(p.dfinal, b, c, t - (p.length - (p.width - 1))));
}

template <class T>
__device__ __forceinline__ void store_dinitial(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t,
                                               float value) {
  const int64_t slot = t + p.width - 1;
  if (p.dinitial.data != nullptr && t < 0 && slot >= 0)
    *address<T>(p.dinitial, b, c, slot) = device::from_float<T>(value);
}

// ---- Rows ----------------------------------------------------------------------------------------

template <int kTaps>
struct RowSums {
  float weight[kTaps], bias;
};

// The gradients of a lane's run from t on; a lane that does not own its run only serves its left neighbour.
template <class T, int kTaps, bool kPacked>
__device__ __forceinline__ void backward_run(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t,
                                             const float (&weight)[kTaps], float bias, bool owned,
                                             RowSums<kTaps>& sums) {
  float run[kRun], before[kTaps - 1], g[kRun], after[kTaps - 1];
  uint32_t reach[kRun], reach_after[kTaps - 1];
  load_run(run, address<const T>(p.x, b, c, 0), p.x.step, t, p.length,
           [&](int64_t at) { return value_at<T>(p, b, c, at); });
  load_run(g, address<const T>(p.dout, b, c, 0), p.dout.step, t, p.length, [](int64_t) { return 0.0f; });
  load_before<T, kTaps>(before, p, b, c, t, run);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    reach[i] = reach_at<kPacked>(p, b, t + i);
    float pre = bias;
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      if (sees<kPacked>(p, reach[i], lag)) pre += weight[lag] * lagged<kTaps>(run, before, i, lag);
    }
    g[i] = (reach[i] & 1u) != 0 ? g[i] * activation_slope(p, pre) : 0.0f;
    if (!owned || (reach[i] & 1u) == 0) continue;
    sums.bias += g[i];
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      if (sees<kPacked>(p, reach[i], lag)) sums.weight[lag] += g[i] * lagged<kTaps>(run, before, i, lag);
    }
  }
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    after[i] = device::shfl_down(g[i], 1);
    reach_after[i] = kPacked ? device::shfl_down(reach[i], 1) : 0xffu;
  }
  if (!owned) return;
  float dx[kRun];
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      const float later = i + lag < kRun ? g[(i + lag) % kRun] : after[(i + lag) % kRun % (kTaps - 1)];
      const uint32_t from =
          i + lag < kRun ? reach[(i + lag) % kRun] : reach_after[(i + lag) % kRun % (kTaps - 1)];
      if (sees<kPacked>(p, from, lag)) sum += weight[lag] * later;
    }
    dx[i] = sum;
  }
  if (p.dfinal.data != nullptr && t + kRun > p.length - (p.width - 1)) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (t + i < p.length) dx[i] += dfinal_at<T, kPacked>(p, b, c, t + i);
    }
  }
  store_run(address<T>(p.dx, b, c, 0), p.dx.step, t, p.length, dx);
  if (t >= 0) return;
#pragma unroll
  for (int i = 0; i < kRun; ++i) store_dinitial<T>(p, b, c, t + i, dx[i]);
}

template <class T, int kTaps, bool kPacked>
__global__ void __launch_bounds__(kThreads) backward_rows(const __grid_constant__ CausalConv1dParams p) {
  const int64_t segments = row_segments(p);
  const int64_t warp = int64_t{blockIdx.x} * kWarps + device::warp_id();
  const int64_t row = warp / segments, segment = warp % segments, b = row / p.dim, c = row % p.dim;
  if (b >= p.batch) return;
  float weight[kTaps];
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) weight[lag] = weight_at(p, c, lag);
  const float bias = bias_at(p, c);
  const bool owned = device::lane_id() < device::kWarpSize - 1;
  const int64_t first = -kRun - misalignment(address<const T>(p.x, b, c, 0));
  RowSums<kTaps> sums{};
  for (int tile = 0; tile < kBackwardTiles; ++tile) {
    const int64_t begin = (segment * kBackwardTiles + tile) * kBackwardTile + first;
    if (begin >= p.length) break;
    backward_run<T, kTaps, kPacked>(p, b, c, begin + device::lane_id() * kRun, weight, bias, owned, sums);
  }
  const int64_t part = b * segments + segment;
#pragma unroll
  for (int lag = 0; lag < kTaps; ++lag) {
    const float sum = device::add_lanes(sums.weight[lag]);
    if (lag < p.width && device::lane_id() == 0) sums_of(p, part, p.width - 1 - lag)[c] = sum;
  }
  const float sum = device::add_lanes(sums.bias);
  if (device::lane_id() == 0) sums_of(p, part, p.width)[c] = sum;
}

// ---- Columns -------------------------------------------------------------------------------------

// Stores dx of a step that all of g has reached, with what comes through the final state.
template <class T, int kChannels, bool kPacked>
__device__ __forceinline__ void store_dx(const CausalConv1dParams& p, const Column& at, int64_t t,
                                         float (&dx)[kChannels]) {
  if (p.dfinal.data != nullptr && t >= p.length - (p.width - 1)) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) dx[k] += dfinal_at<T, kPacked>(p, at.b, at.c + k, t);
  }
  if (t >= 0) return store_channels(address<T>(p.dx, at.b, at.c, t), dx);
#pragma unroll
  for (int k = 0; k < kChannels; ++k) store_dinitial<T>(p, at.b, at.c + k, t, dx[k]);
}

template <class T, int kChannels, int kTaps, bool kPacked>
__global__ void __launch_bounds__(kThreads) backward_columns(const __grid_constant__ CausalConv1dParams p) {
  const Column at = column_of(p, kChannels);
  if (at.b >= p.batch) return;
  float weight[kTaps][kChannels], bias[kChannels], x[kTaps][kChannels];  // x by lag
  float dx[kTaps][kChannels] = {};                                       // of the step `lag` before this one
  float dweight[kTaps][kChannels] = {}, dbias[kChannels] = {};
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) weight[lag][k] = weight_at(p, at.c + k, lag);
    bias[k] = bias_at(p, at.c + k);
#pragma unroll
    for (int lag = 0; lag < kTaps - 1; ++lag)
      x[lag][k] = lag + 1 < p.width ? value_at<T>(p, at.b, at.c + k, at.begin - 1 - lag) : 0.0f;
  }
  const T* x_next = address<const T>(p.x, at.b, at.c, at.begin);
  const T* dout = address<const T>(p.dout, at.b, at.c, at.begin);
#pragma unroll 1
  for (int64_t t = at.begin; t < at.end + kTaps - 1; ++t, x_next += p.x.step, dout += p.dout.step) {
#pragma unroll
    for (int k = 0; k < kChannels; ++k) {
#pragma unroll
      for (int lag = kTaps - 1; lag > 0; --lag) {
        x[lag][k] = x[lag - 1][k];
        dx[lag][k] = dx[lag - 1][k];
      }
      dx[0][k] = 0.0f;
    }
    if (t < p.length) {
      const uint32_t reach = reach_at<kPacked>(p, at.b, t);
      const bool owned = t < at.end;  // else the next chunk's, computed here for its share of dx
      float g[kChannels];
      load_channels<T>(x[0], x_next);
      load_channels<T>(g, dout);
#pragma unroll
      for (int k = 0; k < kChannels; ++k) {
        float pre = bias[k];
#pragma unroll
        for (int lag = 0; lag < kTaps; ++lag) {
          if (sees<kPacked>(p, reach, lag)) pre += weight[lag][k] * x[lag][k];
        }
        g[k] = (reach & 1u) != 0 ? g[k] * activation_slope(p, pre) : 0.0f;
        if (owned) dbias[k] += g[k];
#pragma unroll
        for (int lag = 0; lag < kTaps; ++lag) {
          if (!sees<kPacked>(p, reach, lag)) continue;
          dx[lag][k] += weight[lag][k] * g[k];
          if (owned) dweight[lag][k] += g[k] * x[lag][k];
        }
      }
    }
    const int64_t done = t - (kTaps - 1);
    if (done >= at.begin || at.chunk == 0) store_dx<T, kChannels, kPacked>(p, at, done, dx[kTaps - 1]);
  }
  const int64_t part = at.b * backward_parts(p) + at.chunk;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) {
#pragma unroll
    for (int lag = 0; lag < kTaps; ++lag) {
      if (lag < p.width) sums_of(p, part, p.width - 1 - lag)[at.c + k] = dweight[lag][k];
    }
    sums_of(p, part, p.width)[at.c + k] = dbias[k];
  }
}

// ---- The sums over the parts -----------------------------------------------------------------------

struct Smem {
  float slices[kReduceSlices][kReduceChannels];
};

// A warp takes every kReduceSlices-th part of 32 channels; the slices are added in their order.
__global__ void __launch_bounds__(kReduceSlices* kReduceChannels)
    reduce_kernel(const __grid_constant__ CausalConv1dParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const int lane = device::lane_id(), slice = device::warp_id(), k = int(blockIdx.y);
  const int64_t c = int64_t{blockIdx.x} * kReduceChannels + lane, parts = p.batch * backward_parts(p);
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t part = slice; part < parts && c < p.dim; part += kReduceSlices) sum += sums_of(p, part, k)[c];
  smem.slices[slice][lane] = sum;
  device::sync_block();
  void* to = k < p.width ? p.dweight : p.dbias;
  if (slice != 0 || c >= p.dim || to == nullptr) return;
  for (int other = 1; other < kReduceSlices; ++other) sum += smem.slices[other][lane];
  const int64_t at = k < p.width ? c * p.width + k : c;
  if (p.weight_dtype == DType::kFloat32) {
    static_cast<float*>(to)[at] = sum;
  } else if (p.weight_dtype == DType::kBFloat16) {
    static_cast<bf16*>(to)[at] = device::from_float<bf16>(sum);
  } else {
    static_cast<fp16*>(to)[at] = device::from_float<fp16>(sum);
  }
}

template <class T, int kTaps, bool kPacked>
void launch_rows(const CausalConv1dParams& p, Stream stream) {
  const auto kernel = backward_rows<T, kTaps, kPacked>;
  const int64_t warps = p.batch * p.dim * row_segments(p);
  device::launch<CausalConv1dParams>(kernel, dim3(unsigned((warps + kWarps - 1) / kWarps)), dim3(kThreads), 0,
                                     stream, p);
}

template <class T, int kChannels, int kTaps, bool kPacked>
void launch_columns(const CausalConv1dParams& p, Stream stream) {
  const auto kernel = backward_columns<T, kChannels, kTaps, kPacked>;
  device::launch<CausalConv1dParams>(kernel, column_blocks(p, kChannels), dim3(kThreads), 0, stream, p);
}

template <class T>
void backward(const CausalConv1dParams& p, Stream stream) {
  constexpr int kChannels = 4;  // what the registers hold: 17 numbers a channel
  const bool packed = p.seq_idx != nullptr, wide = p.width > 4;
  if (in_rows(p)) {
    if (wide) return launch_rows<T, 8, true>(p, stream);
    return packed ? launch_rows<T, 4, true>(p, stream) : launch_rows<T, 4, false>(p, stream);
  }
  if (wide) return launch_columns<T, 1, 8, true>(p, stream);
  bool vectors = true;
  for (const ConvTensor* tensor : {&p.x, &p.dout, &p.dx})
    vectors = vectors && moves_vectors(p, *tensor, kChannels, sizeof(T));
  if (!vectors) return launch_columns<T, 1, 4, true>(p, stream);
  return packed ? launch_columns<T, kChannels, 4, true>(p, stream)
                : launch_columns<T, kChannels, 4, false>(p, stream);
}

}  // namespace
}  // namespace conv

void causal_conv1d_bwd_cuda(const CausalConv1dParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  conv::prepare_reach(p, stream);
  switch (p.dtype) {
    case DType::kFloat32:
      conv::backward<float>(p, stream);
      break;
    case DType::kBFloat16:
      conv::backward<bf16>(p, stream);
      break;
    default:
      conv::backward<fp16>(p, stream);
  }
  const int64_t blocks = (p.dim + conv::kReduceChannels - 1) / conv::kReduceChannels;
  device::launch(conv::reduce_kernel, dim3(unsigned(blocks), unsigned(p.width + 1)),
                 dim3(conv::kReduceSlices * conv::kReduceChannels), sizeof(conv::Smem), stream, p);
}

}  // namespace tilewright::scan
