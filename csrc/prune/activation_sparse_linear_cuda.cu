// The activation-sparse linear layer on the GPU.
//
//   keep:     a block a token finds the k-th largest |x| * scale by digits of 11 bits, counted in shared
//   memory compact:  one block lists the inputs that any token keeps, and the tokens' values there multiply:
//   a block takes 512 bytes of outputs side by side and a share of the listed rows add:      y = bias + the
//   shares' sums
//
// How many rows are listed is known to the device alone: grids depend on shapes only, nothing waits, all of
// it can be captured in a graph. Sums are added in a fixed order.
//
// Roofline of the product: rows listed * out * itemsize bytes; a lane has four loads of 16 bytes in flight.
#include "core/tune.h"
#include "device/atomics.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/warp.h"
#include "prune/activation_sparse_linear.h"

namespace tilewright::prune {
namespace {

// Dtypes are the same for all threads, so these branches are never split.
__device__ __forceinline__ float read(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  return dtype == DType::kBFloat16 ? device::to_float(static_cast<const bf16*>(data)[index])
                                   : device::to_float(static_cast<const fp16*>(data)[index]);
}

// ---- which inputs a token keeps ----

constexpr int kListThreads = 512, kListWarps = kListThreads / device::kWarpSize;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits, kOwnBins = kBins / kListThreads;

struct KeepSmem {
  uint32_t bins[kBins];
  int32_t warps[kListWarps];
  uint32_t digit;
  int32_t count;
};

// The sum of the values of all threads before this one; `warps` is free again after the next barrier.
__device__ __forceinline__ int32_t sum_before(int32_t value, int32_t (&warps)[kListWarps]) {
  const int lane = device::lane_id(), warp = device::warp_id();
  int32_t sum = value;
#pragma unroll
  for (int distance = 1; distance < device::kWarpSize; distance *= 2) {
    const int32_t other = device::shfl_up(sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == device::kWarpSize - 1) warps[warp] = sum;
  device::sync_block();
  int32_t before = sum - value;
  for (int w = 0; w < warp; ++w) before += warps[w];
  return before;
}

// Inputs are dealt to warps in runs, so that a warp's share is one place in the order of inputs.
struct Run {
  int64_t begin, end;
};

__device__ __forceinline__ Run run_of_warp(int64_t in) {
  const int64_t size = divide_up(divide_up(in, kListWarps), device::kWarpSize) * device::kWarpSize;
  const int64_t begin = device::warp_id() * size;
  return {begin < in ? begin : in, begin + size < in ? begin + size : in};
}

struct Scores {
  const KeepInputsParams& p;
  int64_t token;

  __device__ __forceinline__ float magnitude(int64_t i) const {
    const float x = read(p.x.data, p.dtype, token * p.x.row + i * p.x.column);
    return device::bits_float(device::float_bits(x) & 0x7fffffffu);
  }
  // Ascends as the score; that of a NaN is above all.
  __device__ __forceinline__ uint32_t key(int64_t i) const {
    return device::float_bits(magnitude(i) * static_cast<const float*>(p.scale)[i]) & 0x7fffffffu;
  }
};

// Of the keys that begin as `prefix` the digit of the count-th largest; into smem, with the count among
// those.
__device__ __forceinline__ void find_digit(const Scores& scores, KeepSmem& smem, uint32_t prefix, int below,
                                           int digit_bits, int32_t count) {
  const int thread = int(threadIdx.x);
  const uint32_t mask = (1u << digit_bits) - 1u;
  for (int b = thread; b < kBins; b += kListThreads) smem.bins[b] = 0;
  device::sync_block();
  const int above = below + digit_bits;
  for (int64_t i = thread; i < scores.p.in; i += kListThreads) {
    const uint32_t key = scores.key(i);
    const bool candidate = above >= 32 || key >> above == prefix >> above;
    if (candidate) device::atomic_add(&smem.bins[key >> below & mask], 1u);
  }
  device::sync_block();
  int32_t own = 0;  // from the top: thread 0 has the highest bins
  const int top = kBins - 1 - thread * kOwnBins;
#pragma unroll
  for (int b = 0; b < kOwnBins; ++b) own += int32_t(smem.bins[top - b]);
  int32_t before = sum_before(own, smem.warps);
  if (before < count && count <= before + own) {
    int b = top;
    for (; before + int32_t(smem.bins[b]) < count; --b) before += int32_t(smem.bins[b]);
    smem.digit = uint32_t(b);
    smem.count = count - before;
  }
  device::sync_block();
}

__device__ void keep_largest(const KeepInputsParams& p, int64_t token, KeepSmem& smem) {
  const Scores scores{p, token};
  uint8_t* keep = p.keep + token * p.in;
  if (p.count <= 0 || p.count >= p.in) {
    for (int64_t i = threadIdx.x; i < p.in; i += kListThreads) keep[i] = p.count > 0;
    return;
  }
  uint32_t threshold = 0;
  int32_t count = int32_t(p.count);
  for (int below = 32; below > 0;) {
    const int digit_bits = below < kDigitBits ? below : kDigitBits;
    below -= digit_bits;
    find_digit(scores, smem, threshold, below, digit_bits, count);
    threshold |= smem.digit << below;
    count = smem.count;
    device::sync_block();
  }
  // Of the keys that equal the threshold the first `count` are kept.
  const int lane = device::lane_id();
  const Run run = run_of_warp(p.in);
  int32_t equal = 0;
  for (int64_t base = run.begin; base < run.end; base += device::kWarpSize) {
    const bool ties = base + lane < run.end && scores.key(base + lane) == threshold;
    equal += device::count_bits(device::ballot(ties));
  }
  int32_t before = device::shfl(sum_before(lane == 0 ? equal : 0, smem.warps), 0);
  for (int64_t base = run.begin; base < run.end; base += device::kWarpSize) {
    const int64_t i = base + lane;
    const uint32_t key = i < run.end ? scores.key(i) : 0;
    const bool ties = i < run.end && key == threshold;
    const uint32_t lanes = device::ballot(ties);
    const int32_t place = before + device::count_bits(lanes & ((1u << lane) - 1u));
    if (i < run.end) keep[i] = key > threshold || (ties && place < count);
    before += device::count_bits(lanes);
  }
}

__global__ void __launch_bounds__(kListThreads) keep_kernel(const __grid_constant__ KeepInputsParams p) {
  KeepSmem& smem = device::shared_memory<KeepSmem>();
  const int64_t token = blockIdx.x;
  if (p.scale != nullptr) return keep_largest(p, token, smem);
  const Scores scores{p, token};
  const float threshold = *static_cast<const float*>(p.threshold);
  for (int64_t i = threadIdx.x; i < p.in; i += kListThreads) {
    p.keep[token * p.in + i] = !(scores.magnitude(i) <= threshold);
  }
}

// ---- the product ----

constexpr int kWarps = 8, kThreads = kWarps * device::kWarpSize;
constexpr int kRows = TW_TUNED(ACTIVATION_SPARSE_ROWS, 4);      // in flight of a warp
constexpr int kBlocks = TW_TUNED(ACTIVATION_SPARSE_BLOCKS, 2);  // a multiprocessor, of the product
constexpr int kMaxTile = 256;                                   // outputs of a block

struct KernelParams {
  ActivationSparseLinearParams p;
  int32_t* count;  // of the rows that are listed
  int32_t* rows;   // [in]
  float* values;   // [in][padded tokens]: of x, 0 where a token drops the row
  float* sums;     // [splits][padded tokens][out]
  int64_t padded, tiles, splits;
  bool vectors;  // weights can be loaded 16 bytes at a time
};

struct ListSmem {
  int32_t warps[kListWarps];
};

__device__ __forceinline__ bool any_keeps(const ActivationSparseLinearParams& p, int64_t i, int64_t end) {
  bool any = false;
  if (i < end) {
    for (int64_t t = 0; t < p.tokens; ++t) any = any || p.keep[t * p.in + i] != 0;
  }
  return any;
}

__global__ void __launch_bounds__(kListThreads) compact_kernel(const __grid_constant__ KernelParams k) {
  ListSmem& smem = device::shared_memory<ListSmem>();
  const ActivationSparseLinearParams& p = k.p;
  const int lane = device::lane_id();
  const Run run = run_of_warp(p.in);
  int32_t found = 0;
  for (int64_t base = run.begin; base < run.end; base += device::kWarpSize) {
    found += device::count_bits(device::ballot(any_keeps(p, base + lane, run.end)));
  }
  int32_t before = device::shfl(sum_before(lane == 0 ? found : 0, smem.warps), 0);
  if (threadIdx.x == kListThreads - device::kWarpSize) *k.count = before + found;
  for (int64_t base = run.begin; base < run.end; base += device::kWarpSize) {
    const int64_t i = base + lane;
    const uint32_t lanes = device::ballot(any_keeps(p, i, run.end));
    const int64_t place = before + device::count_bits(lanes & ((1u << lane) - 1u));
    if (lanes >> lane & 1u) {
      k.rows[place] = int32_t(i);
      for (int64_t t = 0; t < k.padded; ++t) {
        const bool kept = t < p.tokens && p.keep[t * p.in + i] != 0;
        k.values[place * k.padded + t] = kept ? read(p.x.data, p.dtype, t * p.x.row + i * p.x.column) : 0.0f;
      }
    }
    before += device::count_bits(lanes);
  }
}

template <class W>
struct Lane {
  static constexpr int kOutputs = 16 / int(sizeof(W)), kTile = device::kWarpSize * kOutputs;
  using Vector = device::Vector<W, kOutputs>;
};

struct MultiplySmem {
  float sums[kWarps][kMaxTile];
};

// kOutputs weights of a row; zero from `count` on.
template <class W>
__device__ __forceinline__ typename Lane<W>::Vector load_weights(const W* from, bool vectors, int count) {
  using Vector = typename Lane<W>::Vector;
  if (vectors && count == Lane<W>::kOutputs) {
    return device::load_streaming(reinterpret_cast<const Vector*>(from));
  }
  Vector result{};
#pragma unroll
  for (int j = 0; j < Lane<W>::kOutputs; ++j) {
    if (j < count) result[j] = from[j];
  }
  return result;
}

template <int T, class W>
__global__ void __launch_bounds__(kThreads, 2) multiply_kernel(const __grid_constant__ KernelParams k) {
  constexpr int kOutputs = Lane<W>::kOutputs, kTile = Lane<W>::kTile;
  MultiplySmem& smem = device::shared_memory<MultiplySmem>();
  const ActivationSparseLinearParams& p = k.p;
  const int64_t tile = int64_t{blockIdx.x} % k.tiles, split = int64_t{blockIdx.x} / k.tiles;
  const int lane = device::lane_id(), warp = device::warp_id();
  const int64_t left = p.out - (tile * kTile + lane * kOutputs);
  const int outputs = int(left < 0 ? 0 : left < kOutputs ? left : kOutputs);
  const W* weights = static_cast<const W*>(p.weight) + tile * kTile + lane * kOutputs;
  const int64_t listed = *k.count, begin = split * listed / k.splits, end = (split + 1) * listed / k.splits;
  float sums[T][kOutputs] = {};
  for (int64_t r = begin + warp * kRows; r < end; r += kWarps * kRows) {
    typename Lane<W>::Vector w[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool exists = r + i < end;
      w[i] = load_weights(weights + (exists ? k.rows[r + i] * p.weight_row : 0), k.vectors,
                          exists ? outputs : 0);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (r + i >= end) break;
      const auto x = device::load(reinterpret_cast<const device::Vector<float, T>*>(k.values + (r + i) * T));
#pragma unroll
      for (int t = 0; t < T; ++t) {
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) sums[t][j] += x[t] * device::to_float(w[i][j]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) smem.sums[warp][lane * kOutputs + j] = sums[t][j];
    device::sync_block();
    const int64_t output = tile * kTile + threadIdx.x;
    if (int(threadIdx.x) < kTile && output < p.out) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += smem.sums[w][threadIdx.x];
      k.sums[(split * T + t) * p.out + output] = sum;
    }
    device::sync_block();
  }
}

template <class W>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ KernelParams k) {
  const ActivationSparseLinearParams& p = k.p;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.tokens * p.out) return;
  const int64_t token = at / p.out, output = at % p.out;
  float sum = p.bias == nullptr ? 0.0f : device::to_float(static_cast<const W*>(p.bias)[output]);
  for (int64_t s = 0; s < k.splits; ++s) sum += k.sums[(s * k.padded + token) * p.out + output];
  static_cast<W*>(p.y)[at] = device::from_float<W>(sum);
}

// ---- launches ----

int64_t splits_of(int64_t in, int64_t out, int device) {
  const int64_t wanted =
      divide_up(kBlocks * int64_t{device::multiprocessor_count(device)}, divide_up(larger(out, 1), kMaxTile));
  return larger(1, smaller(wanted, divide_up(in, kWarps * kRows)));
}

int64_t rounded(int64_t bytes) { return divide_up(bytes, 64) * 64; }

template <int T, class W>
void multiply(KernelParams k, Stream stream) {
  k.tiles = divide_up(k.p.out, Lane<W>::kTile);
  k.vectors = device::is_aligned(k.p.weight, 16) && k.p.weight_row % Lane<W>::kOutputs == 0;
  device::launch(compact_kernel, dim3(1), dim3(kListThreads), sizeof(ListSmem), stream, k);
  device::launch(multiply_kernel<T, W>, dim3(unsigned(k.tiles * k.splits)), dim3(kThreads),
                 sizeof(MultiplySmem), stream, k);
  device::launch(add_kernel<W>, dim3(unsigned(divide_up(k.p.tokens * k.p.out, kThreads))), dim3(kThreads), 0,
                 stream, k);
}

template <class W>
void multiply_tokens(const KernelParams& k, Stream stream) {
  switch (k.padded) {
    case 1:
      return multiply<1, W>(k, stream);
    case 2:
      return multiply<2, W>(k, stream);
    case 4:
      return multiply<4, W>(k, stream);
    default:
      return multiply<8, W>(k, stream);
  }
}

}  // namespace

int64_t activation_sparse_linear_workspace_cuda(int64_t tokens, int64_t in, int64_t out, int device) {
  const int64_t padded = padded_tokens(tokens);
  return 64 + rounded(in * 4) + rounded(in * padded * 4) + splits_of(in, out, device) * padded * out * 4;
}

void keep_inputs_cuda(const KeepInputsParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  device::launch(keep_kernel, dim3(unsigned(p.tokens)), dim3(kListThreads), sizeof(KeepSmem), stream, p);
}

void activation_sparse_linear_cuda(const ActivationSparseLinearParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  KernelParams k{};
  k.p = p;
  k.padded = padded_tokens(p.tokens);
  k.splits = splits_of(p.in, p.out, device);
  char* at = static_cast<char*>(p.workspace);
  k.count = reinterpret_cast<int32_t*>(at);
  k.rows = reinterpret_cast<int32_t*>(at += 64);
  k.values = reinterpret_cast<float*>(at += rounded(p.in * 4));
  k.sums = reinterpret_cast<float*>(at += rounded(p.in * k.padded * 4));
  switch (p.dtype) {
    case DType::kFloat32:
      return multiply_tokens<float>(k, stream);
    case DType::kBFloat16:
      return multiply_tokens<bf16>(k, stream);
    default:
      return multiply_tokens<fp16>(k, stream);
  }
}

}  // namespace tilewright::prune
