// The decode step of the causal convolution on the GPU: a thread takes a channel of a sequence.
//
// Roofline: state_length elements read and written a channel, the weights read; a step of a large model is a
// few microseconds of launch and latency, so one launch does all of it.
#include "core/check.h"
#include "core/integers.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "scan/causal_conv1d_update.h"
#include "scan/decode_cuda.h"

namespace tilewright::scan {
namespace {

constexpr int kThreads = 128;

template <class T>
__device__ __forceinline__ T* address(const ConvTensor& x, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + c * x.channel + t * x.step;
}

// Without a division of 64 bits, which would be a call.
__device__ __forceinline__ uint32_t remainder_of(uint64_t value, uint32_t divisor) {
  const uint32_t high = uint32_t(value >> 32), low = uint32_t(value);
  if (high == 0) return low % divisor;
  uint32_t rest = high % divisor;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {
    rest = rest << 1 | (low >> bit & 1u);
    if (rest >= divisor) rest -= divisor;
  }
  return rest;
}

// The position of step number `step`, which may be negative, in a ring.
__device__ __forceinline__ int64_t position_in_ring(int64_t step, uint32_t length) {
  if (step >= 0) return remainder_of(uint64_t(step), length);
  return int64_t{length} - 1 - remainder_of(uint64_t(-(step + 1)), length);
}

template <class T>
__device__ __forceinline__ void fill_out(const CausalConv1dUpdateParams& p, int64_t b, int64_t c,
                                         float value) {
  for (int64_t t = 0; t < p.conv.length; ++t) *address<T>(p.conv.out, b, c, t) = device::from_float<T>(value);
}

// x moves into the state; with a ring the step that comes first goes to position `turn`.
template <class T>
__device__ __forceinline__ void advance_state(const CausalConv1dUpdateParams& p, T* state, const T* x,
                                              int64_t turn) {
  const int64_t steps = p.conv.length, length = p.state_length, taken = steps < length ? steps : length;
  if (length == 0) return;
  int64_t first = 0;  // with a ring, later steps overwrite those that do not fit
  if (p.cache_seqlens == nullptr) {
    for (int64_t i = 0; i + taken < length; ++i) state[i * p.state.step] = state[(i + taken) * p.state.step];
    turn = length - taken;
    first = steps - taken;
  }
  for (int64_t s = first; s < steps; ++s) {
    state[turn * p.state.step] = x[s * p.conv.x.step];
    turn = turn + 1 == length ? 0 : turn + 1;
  }
}

struct KernelParams {
  CausalConv1dUpdateParams p;
  uint32_t blocks;  // of a sequence: a division of 64 bits would be a call
};

// With the registers of 8 blocks ptxas need not spill for the sake of more.
template <class T>
__global__ void __launch_bounds__(kThreads, 8)
    causal_conv1d_update_kernel(const __grid_constant__ KernelParams k) {
  const CausalConv1dUpdateParams& p = k.p;
  const CausalConv1dParams& conv = p.conv;
  const int64_t b = blockIdx.x / k.blocks, c = int64_t{blockIdx.x % k.blocks} * kThreads + threadIdx.x;
  if (c >= conv.dim) return;
  const int64_t slot =
      p.indices == nullptr ? b : integer_at(p.indices, b * p.indices_stride, p.indices_are_64);
  if (slot < 0) return fill_out<T>(p, b, c, 0.0f);
  if (slot >= p.slots) return fill_out<T>(p, b, c, device::bits_float(0x7fc00000u));
  int64_t turn = 0;
  if (p.cache_seqlens != nullptr && p.state_length > 0) {
    const int64_t step = integer_at(p.cache_seqlens, b * p.cache_stride, p.cache_is_64);
    turn = position_in_ring(step, uint32_t(p.state_length));
  }
  T* state = address<T>(p.state, slot, c, 0);
  const T* x = address<const T>(conv.x, b, c, 0);
  float weight[kMaxConvWidth], window[kMaxConvWidth];  // by lag
#pragma unroll
  for (int lag = 0; lag < kMaxConvWidth; ++lag) {
    const bool used = lag < conv.width;
    const int64_t tap = c * conv.weight_channel + (conv.width - 1 - lag) * conv.weight_tap;
    weight[lag] = used ? read(conv.weight, conv.weight_dtype, tap) : 0.0f;
    if (lag == kMaxConvWidth - 1) continue;
    const int64_t at = turn - 1 - lag < 0 ? turn - 1 - lag + p.state_length : turn - 1 - lag;
    window[lag] = lag + 1 < conv.width ? device::to_float(state[at * p.state.step]) : 0.0f;
  }
  const float bias = conv.bias == nullptr ? 0.0f : read(conv.bias, conv.weight_dtype, c * conv.bias_channel);
#pragma unroll 1  // usually there is one step
  for (int64_t t = 0; t < conv.length; ++t) {
#pragma unroll
    for (int lag = kMaxConvWidth - 1; lag > 0; --lag) window[lag] = window[lag - 1];
    window[0] = device::to_float(x[t * conv.x.step]);
    float sum = bias;
#pragma unroll
    for (int lag = 0; lag < kMaxConvWidth; ++lag) {
      if (lag < conv.width) sum += weight[lag] * window[lag];
    }
    if (conv.silu) sum *= device::rcp_approx(1.0f + device::exp2_approx(-1.442695041f * sum));
    *address<T>(conv.out, b, c, t) = device::from_float<T>(sum);
  }
  advance_state(p, state, x, turn);
}

template <class T>
void update(const CausalConv1dUpdateParams& p, Stream stream) {
  const int64_t of_sequence = divide_up(p.conv.dim, kThreads), blocks = p.conv.batch * of_sequence;
  check_value(blocks <= INT32_MAX && p.state_length <= INT32_MAX,
              "causal_conv1d_update: got a batch and channels for ", blocks, " thread blocks, a state of ",
              p.state_length, " steps, allowed: ", INT32_MAX);
  device::launch(causal_conv1d_update_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream,
                 {p, uint32_t(of_sequence)});
}

}  // namespace

void causal_conv1d_update_cuda(const CausalConv1dUpdateParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  switch (p.conv.dtype) {
    case DType::kFloat32:
      return update<float>(p, stream);
    case DType::kBFloat16:
      return update<bf16>(p, stream);
    default:
      return update<fp16>(p, stream);
  }
}

}  // namespace tilewright::scan
