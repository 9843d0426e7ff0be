// The decode step of a selective scan on the GPU: a group of lanes takes a channel's states, 4 a lane at a
// time.
//
// Roofline: the state is read and written once, 8 bytes an element in float32, with 5 FLOPs; an exponential a
// state for Mamba-1, one a lane where A is the same for all states of a channel. B and C are read again by
// every channel of a group, out of the caches.
#include "core/check.h"
#include "core/integers.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/warp.h"
#include "scan/decode_cuda.h"
#include "scan/selective_state_update.h"

namespace tilewright::scan {
namespace {

constexpr int kThreads = 128;
constexpr int kStates = 4;  // of a lane, side by side
constexpr float kLog2E = 1.442695041f;

struct KernelParams {
  SelectiveStateUpdateParams p;
  uint32_t blocks;  // of a sequence: with sizes of 32 bits no division is a call
  int32_t lanes;    // of a channel, a power of two up to 32
  bool vectors;     // states can be moved kStates at a time
};

__device__ __forceinline__ void write(const StepTensor& t, int64_t index, float value) {
  if (t.dtype == DType::kFloat32) {
    static_cast<float*>(t.data)[index] = value;
  } else if (t.dtype == DType::kBFloat16) {
    static_cast<bf16*>(t.data)[index] = device::from_float<bf16>(value);
  } else {
    static_cast<fp16*>(t.data)[index] = device::from_float<fp16>(value);
  }
}

__device__ __forceinline__ float read_at(const StepTensor& t, int64_t b, int64_t h, int64_t c) {
  return read(t.data, t.dtype, b * t.batch + h * t.head + c * t.channel);
}

// kStates numbers from state n on; zero from `count` on, and where there is only one, that one.
template <class T>
__device__ __forceinline__ void read_typed(float (&values)[kStates], const T* from, int64_t stride,
                                           int count) {
  using Vector = device::Vector<T, kStates>;
  if (stride == 1 && count == kStates && reinterpret_cast<uintptr_t>(from) % sizeof(Vector) == 0) {
    const Vector loaded = device::load(reinterpret_cast<const Vector*>(from));
#pragma unroll
    for (int i = 0; i < kStates; ++i) values[i] = device::to_float(loaded[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i) values[i] = i < count ? device::to_float(from[i * stride]) : 0.0f;
}

__device__ __forceinline__ void read_states(float (&values)[kStates], const StepTensor& t, int64_t offset,
                                            int64_t n, int count) {
  const int64_t at = offset + n * t.state;
  if (t.dtype == DType::kFloat32) {
    read_typed(values, static_cast<const float*>(t.data) + at, t.state, count);
  } else if (t.dtype == DType::kBFloat16) {
    read_typed(values, static_cast<const bf16*>(t.data) + at, t.state, count);
  } else {
    read_typed(values, static_cast<const fp16*>(t.data) + at, t.state, count);
  }
}

template <class T>
__device__ __forceinline__ void write_states(T* to, int64_t stride, bool vector, int count,
                                             const float (&values)[kStates]) {
  using Vector = device::Vector<T, kStates>;
  if (vector) {
    Vector stored;
#pragma unroll
    for (int i = 0; i < kStates; ++i) stored[i] = device::from_float<T>(values[i]);
    device::store(reinterpret_cast<Vector*>(to), stored);
    return;
  }
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    if (i < count) to[i * stride] = device::from_float<T>(values[i]);
  }
}

__device__ __forceinline__ int64_t slot_of(const SelectiveStateUpdateParams& p, int64_t b) {
  return p.indices == nullptr ? b : integer_at(p.indices, b * p.indices_stride, p.indices_are_64);
}

// A of what is in memory for it.
__device__ __forceinline__ float rate_of(const SelectiveStateUpdateParams& p, float x) {
  return p.A_is_log ? -device::exp(x) : x;
}

// The states of one channel, moved on by a group of lanes, and this lane's share of C state.
template <class T>
__device__ __forceinline__ float step_states(const KernelParams& k, int64_t b, int64_t slot, int64_t h,
                                             int64_t c, float dt, float x, int lane) {
  const SelectiveStateUpdateParams& p = k.p;
  const int64_t g = uint32_t(h) / (uint32_t(p.heads) / uint32_t(p.groups));
  const int64_t state_at = slot * p.state.batch + h * p.state.head + c * p.state.channel;
  const int64_t A_at = h * p.A.head + c * p.A.channel;
  const int64_t B_at = b * p.B.batch + g * p.B.head, C_at = b * p.C.batch + g * p.C.head;
  const bool one_decay = p.A.state == 0;
  const float scaled = dt * kLog2E, moved_in = dt * x;
  const float decay = one_decay && p.states > 0
                          ? device::exp2_approx(scaled * rate_of(p, read(p.A.data, p.A.dtype, A_at)))
                          : 0.0f;
  float y = 0.0f;
  for (int64_t n = int64_t{lane} * kStates; n < p.states; n += int64_t{k.lanes} * kStates) {
    const int count = int(p.states - n < kStates ? p.states - n : kStates);
    T* to = static_cast<T*>(p.state.data) + state_at + n * p.state.state;
    float state[kStates], A[kStates] = {}, B[kStates], C[kStates];
    read_typed(state, static_cast<const T*>(to), p.state.state, count);
    if (!one_decay) read_states(A, p.A, A_at, n, count);
    read_states(B, p.B, B_at, n, count);
    read_states(C, p.C, C_at, n, count);
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const float factor = one_decay ? decay : device::exp2_approx(scaled * rate_of(p, A[i]));
      state[i] = state[i] * factor + moved_in * B[i];
      if (i < count) y += state[i] * C[i];
    }
    write_states(to, p.state.state, k.vectors && count == kStates, count, state);
  }
  return y;
}

template <class T>
__global__ void __launch_bounds__(kThreads) state_update_kernel(const __grid_constant__ KernelParams k) {
  const SelectiveStateUpdateParams& p = k.p;
  const uint32_t lanes = uint32_t(k.lanes), lane = threadIdx.x % lanes;
  const uint32_t channel = blockIdx.x % k.blocks * (kThreads / lanes) + threadIdx.x / lanes;  // of a sequence
  const int64_t b = blockIdx.x / k.blocks, c = channel % uint32_t(p.dim), h = channel / uint32_t(p.dim);
  const bool exists = h < p.heads;  // lanes of channels that do not exist stay for the shuffles
  const int64_t slot = exists ? slot_of(p, b) : -1;
  const bool steps = slot >= 0 && slot < p.slots;
  float y = 0.0f, x = 0.0f;
  if (steps) {
    x = read_at(p.x, b, h, c);
    float dt = read_at(p.dt, b, h, c);
    if (p.dt_bias.data != nullptr) dt += read_at(p.dt_bias, 0, h, c);
    if (p.softplus) dt = device::softplus(dt);
    y = step_states<T>(k, b, slot, h, c, dt, x, int(lane));
  }
  for (int distance = k.lanes / 2; distance > 0; distance /= 2) y += device::shfl_xor(y, distance);
  if (!exists || lane != 0) return;
  if (steps) {
    if (p.D.data != nullptr) y += read_at(p.D, 0, h, c) * x;
    if (p.z.data != nullptr) {
      const float z = read_at(p.z, b, h, c);
      y *= z * device::rcp_approx(1.0f + device::exp2_approx(-kLog2E * z));
    }
  } else if (slot >= p.slots) {
    y = device::bits_float(0x7fc00000u);
  }
  write(p.out, b * p.out.batch + h * p.out.head + c * p.out.channel, y);
}

template <class T>
void update(const SelectiveStateUpdateParams& p, Stream stream) {
  KernelParams k{p, 1, 1, false};
  while (k.lanes < device::kWarpSize && k.lanes * kStates < p.states) k.lanes *= 2;
  k.vectors = p.state.state == 1 && p.state.channel % kStates == 0 && p.state.head % kStates == 0 &&
              p.state.batch % kStates == 0 &&
              reinterpret_cast<uintptr_t>(p.state.data) % (kStates * sizeof(T)) == 0;
  const int64_t of_sequence = divide_up(p.heads * p.dim, kThreads / k.lanes), blocks = p.batch * of_sequence;
  check_value(blocks <= INT32_MAX && p.heads * p.dim <= INT32_MAX,
              "selective_state_update: got a batch and channels for ", blocks, " thread blocks, ",
              p.heads * p.dim, " channels a sequence, allowed: ", INT32_MAX);
  k.blocks = uint32_t(of_sequence);
  device::launch(state_update_kernel<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, k);
}

}  // namespace

void selective_state_update_cuda(const SelectiveStateUpdateParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  switch (p.state.dtype) {
    case DType::kFloat32:
      return update<float>(p, stream);
    case DType::kBFloat16:
      return update<bf16>(p, stream);
    default:
      return update<fp16>(p, stream);
  }
}

}  // namespace tilewright::scan
