// What a decode step of a Mamba layer needs besides the convolution and the scan, on the GPU: products with
// few tokens and the norm of their segments.
//
// Roofline: the weights are read once for every kTokens tokens, 2 kTokens FLOPs an element: memory bound. A
// warp takes a row, its lanes 16 bytes at a time; the tokens come out of the caches.
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/warp.h"
#include "scan/decode_cuda.h"
#include "scan/mamba_step.h"

namespace tilewright::scan {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;
constexpr int kTokens = 4;
constexpr int kSegments = 3;

struct LinearParams {
  TokenLinearParams p;
  bool vectors;  // rows of weights and tokens are whole, aligned vectors
};

template <class T>
__device__ __forceinline__ void add_vectors(const TokenLinearParams& p, const T* weight, const T* x,
                                            int tokens, int lane, float (&sums)[kTokens]) {
  constexpr int kCount = 16 / int(sizeof(T));
  using Vector = device::Vector<T, kCount>;
  for (int64_t k = int64_t{lane} * kCount; k < p.columns; k += device::kWarpSize * kCount) {
    const Vector values = device::load(reinterpret_cast<const Vector*>(weight + k));
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) break;
      const Vector of_token = device::load(reinterpret_cast<const Vector*>(x + t * p.x_row + k));
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[t] += device::to_float(values[i]) * device::to_float(of_token[i]);
    }
  }
}

template <class T>
__device__ __forceinline__ void add_elements(const TokenLinearParams& p, const T* weight, const T* x,
                                             int tokens, int lane, float (&sums)[kTokens]) {
  for (int64_t k = lane; k < p.columns; k += device::kWarpSize) {
    const float value = device::to_float(weight[k * p.weight_column]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < tokens) sums[t] += value * device::to_float(x[t * p.x_row + k]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) token_linear_kernel(const __grid_constant__ LinearParams k) {
  const TokenLinearParams& p = k.p;
  const int lane = device::lane_id();
  const int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (row >= p.rows) return;
  const T* weight = static_cast<const T*>(p.weight) + row * p.weight_row;
  const float bias =
      p.bias == nullptr ? 0.0f : device::to_float(static_cast<const T*>(p.bias)[row * p.bias_row]);
  for (int64_t first = 0; first < p.tokens; first += kTokens) {
    const int tokens = int(p.tokens - first < kTokens ? p.tokens - first : kTokens);
    const T* x = static_cast<const T*>(p.x) + first * p.x_row;
    float sums[kTokens] = {};
    if (k.vectors) {
      add_vectors(p, weight, x, tokens, lane, sums);
    } else {
      add_elements(p, weight, x, tokens, lane, sums);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= tokens) break;
      const float sum = device::add_lanes(sums[t]) + bias;
      if (lane == 0) static_cast<T*>(p.out)[(first + t) * p.out_row + row] = device::from_float<T>(sum);
    }
  }
}

template <class T>
void linear(const TokenLinearParams& p, Stream stream) {
  if (p.tokens == 0 || p.rows == 0) return;
  constexpr int kCount = 16 / int(sizeof(T));
  const bool vectors = p.weight_column == 1 && p.columns % kCount == 0 && p.weight_row % kCount == 0 &&
                       p.x_row % kCount == 0 && device::is_aligned(p.weight, 16) &&
                       device::is_aligned(p.x, 16);
  device::launch(token_linear_kernel<T>, dim3(unsigned((p.rows + kWarps - 1) / kWarps)), dim3(kThreads), 0,
                 stream, LinearParams{p, vectors});
}

__device__ __forceinline__ float weight_at(const SegmentNormParams::Segment& segment, int64_t i) {
  return segment.weight == nullptr ? 1.0f : read(segment.weight, segment.dtype, i * segment.stride);
}

// A block is a token, a warp a segment of it.
template <class T>
__global__ void __launch_bounds__(kSegments* device::kWarpSize)
    segment_norm_kernel(const __grid_constant__ SegmentNormParams p) {
  const int number = device::warp_id(), lane = device::lane_id();
  T* x = static_cast<T*>(p.x) + int64_t{blockIdx.x} * p.x_row;
  for (int i = 0; i < number; ++i) x += p.segments[i].size;
  const SegmentNormParams::Segment& segment = p.segments[number];
  float squares = 0.0f;
  for (int64_t i = lane; i < segment.size; i += device::kWarpSize) {
    const float value = device::to_float(x[i]);
    squares += value * value;
  }
  const float mean = device::add_lanes(squares) / float(segment.size);
  const float scale = 1.0f / device::sqrt_rn(mean + float(p.eps));
  for (int64_t i = lane; i < segment.size; i += device::kWarpSize)
    x[i] = device::from_float<T>(device::to_float(x[i]) * scale * weight_at(segment, i));
}

template <class T>
void norm(const SegmentNormParams& p, Stream stream) {
  if (p.tokens == 0) return;
  device::launch(segment_norm_kernel<T>, dim3(unsigned(p.tokens)), dim3(kSegments * device::kWarpSize), 0,
                 stream, p);
}

}  // namespace

void token_linear_cuda(const TokenLinearParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  switch (p.dtype) {
    case DType::kFloat32:
      return linear<float>(p, stream);
    case DType::kBFloat16:
      return linear<bf16>(p, stream);
    default:
      return linear<fp16>(p, stream);
  }
}

void segment_norm_cuda(const SegmentNormParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  switch (p.dtype) {
    case DType::kFloat32:
      return norm<float>(p, stream);
    case DType::kBFloat16:
      return norm<bf16>(p, stream);
    default:
      return norm<fp16>(p, stream);
  }
}

}  // namespace tilewright::scan
