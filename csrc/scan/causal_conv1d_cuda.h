// What the GPU kernels of the causal convolution share: who works on what, and how elements are read.
//
// Rows (steps side by side): a warp takes a run of 8 steps a lane of one channel, and the steps before a run
// come from the lane to the left. Columns (channels side by side, or neither): a thread takes a few channels
// and marches along the steps, what it has seen in registers. Neither uses shared memory.
#pragma once

#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/warp.h"
#include "scan/causal_conv1d.h"

namespace tilewright::scan::conv {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / device::kWarpSize;
constexpr int kRun = 8;                                 // steps of a lane
constexpr int kForwardTile = device::kWarpSize * kRun;  // steps of a warp
// Backward, the last lane only computes what its neighbour needs of the steps behind.
constexpr int kBackwardTile = (device::kWarpSize - 1) * kRun;
constexpr int kBackwardTiles = 8;  // of a warp, whose sums go into one part

// Which of the taps a step sees, a bit a lag, is in the workspace for packed sequences: [batch][length].
constexpr int64_t reach_bytes(const CausalConv1dParams& p) {
  return p.seq_idx == nullptr ? 0 : (p.batch * p.length + 255) / 256 * 256;
}

__host__ __device__ inline bool in_rows(const CausalConv1dParams& p) { return p.x.step == 1 && p.length > 1; }

// Steps that a thread marches in columns: fewer where there are too few threads to fill a GPU.
__host__ __device__ inline int64_t column_steps(const CausalConv1dParams& p) {
  const int64_t columns = p.batch * ((p.dim + 3) / 4);
  int64_t steps = 64;
  while (steps > 8 && columns * ((p.length + steps - 1) / steps) < 65536) steps /= 2;
  return steps;
}

__host__ __device__ inline int64_t row_segments(const CausalConv1dParams& p) {
  // A run before the first step, for dinitial, and another for what comes before an aligned address.
  constexpr int64_t kSegment = kBackwardTile * kBackwardTiles;
  return (p.length + 2 * kRun + kSegment - 1) / kSegment;
}

// Parts that the steps of a sequence are in, each with sums of its own: [batch * parts][width + 1][dim].
__host__ __device__ inline int64_t backward_parts(const CausalConv1dParams& p) {
  if (in_rows(p)) return row_segments(p);
  const int64_t steps = column_steps(p);
  return (p.length + steps - 1) / steps;
}

template <class T>
__device__ __forceinline__ T* address(const ConvTensor& x, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch + c * x.channel + t * x.step;
}

// x at any step: before the first the initial state, behind the last zero.
template <class T>
__device__ __forceinline__ float value_at(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t t) {
  if (t >= p.length) return 0.0f;
  if (t >= 0) return device::to_float(*address<const T>(p.x, b, c, t));
  const int64_t slot = t + p.width - 1;
  if (p.initial.data == nullptr || slot < 0) return 0.0f;
  return device::to_float(*address<const T>(p.initial, b, c, slot));
}

template <class T>
__device__ __forceinline__ float weight_of(const CausalConv1dParams& p, int64_t c, int lag) {
  const int64_t at = c * p.weight_channel + (p.width - 1 - lag) * p.weight_tap;
  return device::to_float(static_cast<const T*>(p.weight)[at]);
}

// The weight of a lag, zero for lags beyond the width.
__device__ __forceinline__ float weight_at(const CausalConv1dParams& p, int64_t c, int lag) {
  if (lag >= p.width) return 0.0f;
  if (p.weight_dtype == DType::kFloat32) return weight_of<float>(p, c, lag);
  return p.weight_dtype == DType::kBFloat16 ? weight_of<bf16>(p, c, lag) : weight_of<fp16>(p, c, lag);
}

__device__ __forceinline__ float bias_at(const CausalConv1dParams& p, int64_t c) {
  const int64_t at = c * p.bias_channel;
  if (p.bias == nullptr) return 0.0f;
  if (p.weight_dtype == DType::kFloat32) return static_cast<const float*>(p.bias)[at];
  return p.weight_dtype == DType::kBFloat16 ? device::to_float(static_cast<const bf16*>(p.bias)[at])
                                            : device::to_float(static_cast<const fp16*>(p.bias)[at]);
}

// What step t of a sequence sees; nothing outside of it.
template <bool kPacked>
__device__ __forceinline__ uint32_t reach_at(const CausalConv1dParams& p, int64_t b, int64_t t) {
  if (t < 0 || t >= p.length) return 0;
  return kPacked && p.seq_idx != nullptr ? static_cast<const uint8_t*>(p.workspace)[b * p.length + t] : 0xffu;
}

// Whether the final state takes step t, which may lie before the first one.
template <bool kPacked>
__device__ __forceinline__ bool is_kept(const CausalConv1dParams& p, int64_t b, int64_t t) {
  const int64_t lag = p.length - 1 - t;
  return lag < p.width - 1 && (!kPacked || (reach_at<kPacked>(p, b, p.length - 1) >> lag & 1u) != 0);
}

// Whether a lag of a step counts. Without packing only the width decides, the same for all threads. (The rare
// kernels of 8 taps are compiled as packed ones alone.)
template <bool kPacked>
__device__ __forceinline__ bool sees(const CausalConv1dParams& p, uint32_t reach, int lag) {
  return lag < p.width && (!kPacked || (reach >> lag & 1u) != 0);
}

__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.442695041f;
  return device::rcp_approx(1.0f + device::exp2_approx(-x * kLog2E));
}

// A lane's 8 steps from t on, where `other(t)` stands for those that are not in the sequence.
template <class T, class Other>
__device__ __forceinline__ void load_run(float (&run)[kRun], const T* row, int64_t step, int64_t t,
                                         int64_t length, const Other& other) {
  constexpr int kVector = 16 / int(sizeof(T));
  using Vector = device::Vector<T, kVector>;
  if (step == 1 && t >= 0 && t + kRun <= length && device::is_aligned(row + t, 16)) {
#pragma unroll
    for (int i = 0; i < kRun; i += kVector) {
      const Vector values = device::load(reinterpret_cast<const Vector*>(row + t + i));
#pragma unroll
      for (int k = 0; k < kVector; ++k) run[i + k] = device::to_float(values[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const bool inside = t + i >= 0 && t + i < length;
    run[i] = inside ? device::to_float(row[(t + i) * step]) : other(t + i);
  }
}

template <class T>
__device__ __forceinline__ void store_run(T* row, int64_t step, int64_t t, int64_t length,
                                          const float (&run)[kRun]) {
  constexpr int kVector = 16 / int(sizeof(T));
  using Vector = device::Vector<T, kVector>;
  if (step == 1 && t >= 0 && t + kRun <= length && device::is_aligned(row + t, 16)) {
#pragma unroll
    for (int i = 0; i < kRun; i += kVector) {
      Vector values;
#pragma unroll
      for (int k = 0; k < kVector; ++k) values[k] = device::from_float<T>(run[i + k]);
      device::store(reinterpret_cast<Vector*>(row + t + i), values);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (t + i >= 0 && t + i < length) row[(t + i) * step] = device::from_float<T>(run[i]);
  }
}

// How far a row's first step is behind an address whose 16 bytes can be loaded at once, in steps.
template <class T>
__device__ __forceinline__ int misalignment(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) / sizeof(T) % (16 / sizeof(T)));
}

// Of a lane's run of x the steps before it: the left lane's last ones, or of lane 0 loaded.
template <class T, int kTaps>
__device__ __forceinline__ void load_before(float (&before)[kTaps - 1], const CausalConv1dParams& p,
                                            int64_t b, int64_t c, int64_t t, const float (&run)[kRun]) {
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) before[i] = device::shfl_up(run[kRun - (kTaps - 1) + i], 1);
  if (device::lane_id() != 0) return;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    const int lag = kTaps - 1 - i;
    before[i] = lag < p.width ? value_at<T>(p, b, c, t - lag) : 0.0f;
  }
}

// A run and what is before it as one: lag j of step i.
template <int kTaps>
__device__ __forceinline__ float lagged(const float (&run)[kRun], const float (&before)[kTaps - 1], int i,
                                        int lag) {
  return i >= lag ? run[i - lag] : before[kTaps - 1 + i - lag];
}

// kChannels elements side by side in memory.
template <class T, int kChannels>
__device__ __forceinline__ void load_channels(float (&values)[kChannels], const T* from) {
  const auto loaded = device::load(reinterpret_cast<const device::Vector<T, kChannels>*>(from));
#pragma unroll
  for (int k = 0; k < kChannels; ++k) values[k] = device::to_float(loaded[k]);
}

template <class T, int kChannels>
__device__ __forceinline__ void store_channels(T* to, const float (&values)[kChannels]) {
  device::Vector<T, kChannels> stored;
#pragma unroll
  for (int k = 0; k < kChannels; ++k) stored[k] = device::from_float<T>(values[k]);
  device::store(reinterpret_cast<device::Vector<T, kChannels>*>(to), stored);
}

// Whether the channels can be moved as whole vectors. If not, a thread takes one channel of any strides.
inline bool moves_vectors(const CausalConv1dParams& p, const ConvTensor& x, int channels, int bytes) {
  const bool aligned =
      device::is_aligned(x.data, channels * bytes) && x.step % channels == 0 && x.batch % channels == 0;
  return aligned && x.channel == 1 && p.dim % channels == 0;
}

// A thread's place in columns: its channels from c on, and its steps [begin, end).
struct Column {
  int64_t b, c, chunk, begin, end;
};

__device__ __forceinline__ Column column_of(const CausalConv1dParams& p, int channels) {
  const int64_t steps = column_steps(p), groups = p.dim / channels, chunks = (p.length + steps - 1) / steps;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  Column column;
  column.c = index % groups * channels;
  column.chunk = index / groups % chunks;
  column.b = index / groups / chunks;
  column.begin = column.chunk * steps;
  column.end = column.begin + steps < p.length ? column.begin + steps : p.length;
  return column;
}

inline dim3 column_blocks(const CausalConv1dParams& p, int channels) {
  const int64_t steps = column_steps(p);
  const int64_t columns = p.batch * (p.dim / channels) * ((p.length + steps - 1) / steps);
  return dim3(unsigned((columns + kThreads - 1) / kThreads));
}

// Which steps see which, for packed sequences; before any other kernel.
void prepare_reach(const CausalConv1dParams&, Stream);

}  // namespace tilewright::scan::conv
