// The gated RMS norm on the GPU: a block takes a group of a row, or (backward) of one row after another.
//
// Roofline: forward reads x and z and writes out, 6 bytes an element in 16-bit types; backward reads x, z and
// dout and writes dx and dz, 10. The gate costs two MUFU operations an element: at the rate of an H200's
// memory forward, which keeps what it made of x and z in registers, uses 7 of a multiprocessor's 16 a cycle,
// and backward, which reads its rows again out of the caches and computes the gate twice, 8.
//
// dweight: a block adds up the rows of its part in registers (the first kSlots vectors of a thread; what lies
// beyond, in its own piece of the workspace), and a last kernel adds the parts in their order.
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "scan/gated_rms_norm.h"

namespace tilewright::scan {
namespace {

constexpr int kMaxWarps = 16;
// Vectors of a group that a thread keeps in registers.
template <int kVector>
constexpr int kSlots = kVector == 8 ? 2 : 4;
constexpr int64_t kMaxBlocks = int64_t{1} << 30;
constexpr int kReduceChannels = 32, kReduceSlices = 8;

struct Smem {
  float sums[2][kMaxWarps];
};

// The sum over the block. Sums that follow each other have rounds that do too: their memory alternates, so
// that one barrier is enough.
__device__ __forceinline__ float add_block(float value, int64_t round) {
  const int warps = int(blockDim.x) / device::kWarpSize;
  value = device::add_lanes(value);
  if (warps == 1) return value;
  float* sums = device::shared_memory<Smem>().sums[round & 1];
  if (device::lane_id() == 0) sums[device::warp_id()] = value;
  device::sync_block();
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += sums[warp];
  return total;
}

template <class T>
__device__ __forceinline__ T* row_of(const NormRows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

template <class T, int kVector>
__device__ __forceinline__ void load(float (&to)[kVector], const T* from) {
  const auto values = device::load(reinterpret_cast<const device::Vector<T, kVector>*>(from));
#pragma unroll
  for (int k = 0; k < kVector; ++k) to[k] = device::to_float(values[k]);
}

template <class T, int kVector>
__device__ __forceinline__ void store(T* to, const float (&from)[kVector]) {
  device::Vector<T, kVector> values;
#pragma unroll
  for (int k = 0; k < kVector; ++k) values[k] = device::from_float<T>(from[k]);
  device::store(reinterpret_cast<device::Vector<T, kVector>*>(to), values);
}

template <class T, int kVector>
__device__ __forceinline__ void load_weight(float (&to)[kVector], const GatedRmsNormParams& p, int64_t c) {
  if (p.weight_dtype == DType::kFloat32) return load<float>(to, static_cast<const float*>(p.weight) + c);
  load<T>(to, static_cast<const T*>(p.weight) + c);
}

__device__ __forceinline__ float sigmoid(float x) {
  constexpr float kLog2E = 1.442695041f;
  return device::rcp_approx(1.0f + device::exp2_approx(-x * kLog2E));
}

// ---- Forward ---------------------------------------------------------------------------------------

// What is normed of the channels from c on.
template <class T, int kVector>
__device__ __forceinline__ void load_normed(float (&v)[kVector], const GatedRmsNormParams& p, const T* x,
                                            const T* z, int64_t c) {
  load<T>(v, x + c);
  if (p.gate != NormGate::kBefore) return;
  float gate[kVector];
  load<T>(gate, z + c);
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] *= gate[k] * sigmoid(gate[k]);
}

template <int kVector>
__device__ __forceinline__ float squares_of(const float (&v)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kVector; ++k) sum += v[k] * v[k];
  return sum;
}

// v r weight, gated after it if asked, to `out`; `channel` is c in the whole row.
template <class T, int kVector>
__device__ __forceinline__ void store_out(const GatedRmsNormParams& p, float (&v)[kVector], float r,
                                          const T* z, T* out, int64_t c, int64_t channel) {
  float weight[kVector];
  load_weight<T>(weight, p, channel);
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] *= r * weight[k];
  if (p.gate == NormGate::kAfter) {
    float gate[kVector];
    load<T>(gate, z + c);
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] *= gate[k] * sigmoid(gate[k]);
  }
  store<T>(out + c, v);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kMaxWarps* device::kWarpSize)
    forward_kernel(const __grid_constant__ GatedRmsNormParams p) {
  const int64_t groups = p.dim / p.group, step = int64_t{blockDim.x} * kVector;
  const int64_t own = int64_t{threadIdx.x} * kVector;
  int64_t round = 0;
  for (int64_t unit = blockIdx.x; unit < p.rows * groups; unit += gridDim.x, ++round) {
    const int64_t row = unit / groups, base = unit % groups * p.group;
    const T* x = row_of<const T>(p.x, row) + base;
    const T* z = row_of<const T>(p.z, row) + base;
    T* out = row_of<T>(p.out, row) + base;
    float kept[kSlots<kVector>][kVector], squares = 0.0f;
#pragma unroll
    for (int slot = 0; slot < kSlots<kVector>; ++slot) {
      const int64_t c = slot * step + own;
      if (c >= p.group) continue;
      load_normed<T>(kept[slot], p, x, z, c);
      squares += squares_of(kept[slot]);
    }
    for (int64_t c = kSlots<kVector> * step + own; c < p.group; c += step) {
      float v[kVector];
      load_normed<T>(v, p, x, z, c);
      squares += squares_of(v);
    }
    const float mean = add_block(squares, round) / float(p.group);
    const float r = device::div_rn(1.0f, device::sqrt_rn(mean + float(p.eps)));
    if (threadIdx.x == 0) static_cast<float*>(p.rstd)[unit] = r;
#pragma unroll
    for (int slot = 0; slot < kSlots<kVector>; ++slot) {
      const int64_t c = slot * step + own;
      if (c < p.group) store_out<T>(p, kept[slot], r, z, out, c, base + c);
    }
    for (int64_t c = kSlots<kVector> * step + own; c < p.group; c += step) {
      float v[kVector];
      load_normed<T>(v, p, x, z, c);
      store_out<T>(p, v, r, z, out, c, base + c);
    }
  }
}

// ---- Backward --------------------------------------------------------------------------------------

// A vector of a group: what is read, the gate s(z) and its slope, n and g as in the header.
template <int kVector>
struct Terms {
  float x[kVector], dout[kVector], weight[kVector], gate[kVector], slope[kVector], n[kVector], g[kVector];
};

template <class T, int kVector>
__device__ __forceinline__ void load_terms(Terms<kVector>& at, const GatedRmsNormParams& p, int64_t row,
                                           int64_t channel, float r) {
  load<T>(at.x, row_of<const T>(p.x, row) + channel);
  load<T>(at.dout, row_of<const T>(p.dout, row) + channel);
  load_weight<T>(at.weight, p, channel);
  float z[kVector] = {};
  if (p.gate != NormGate::kNone) load<T>(z, row_of<const T>(p.z, row) + channel);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float s = sigmoid(z[k]);
    at.gate[k] = z[k] * s;
    at.slope[k] = s * (1.0f + z[k] * (1.0f - s));
    at.n[k] = at.x[k] * r * (p.gate == NormGate::kBefore ? at.gate[k] : 1.0f);
    at.g[k] = at.dout[k] * (p.gate == NormGate::kAfter ? at.gate[k] : 1.0f);
  }
}

// Adds to the sums of dweight, and returns this vector's share of the mean's.
template <int kVector>
__device__ __forceinline__ float add_products(const Terms<kVector>& at, float (&dweight)[kVector]) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    dweight[k] += at.g[k] * at.n[k];
    sum += at.g[k] * at.n[k] * at.weight[k];
  }
  return sum;
}

template <class T, int kVector>
__device__ __forceinline__ void store_gradients(const Terms<kVector>& at, const GatedRmsNormParams& p,
                                                int64_t row, int64_t channel, float r, float mean) {
  float dx[kVector], dz[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    const float dv = r * (at.g[k] * at.weight[k] - at.n[k] * mean);
    dx[k] = p.gate == NormGate::kBefore ? dv * at.gate[k] : dv;
    if (p.gate == NormGate::kBefore) dz[k] = dv * at.x[k] * at.slope[k];
    if (p.gate == NormGate::kAfter) dz[k] = at.dout[k] * at.weight[k] * at.n[k] * at.slope[k];
  }
  store<T>(row_of<T>(p.dx, row) + channel, dx);
  if (p.gate != NormGate::kNone) store<T>(row_of<T>(p.dz, row) + channel, dz);
}

template <class T, int kVector>
__global__ void __launch_bounds__(kMaxWarps* device::kWarpSize)
    backward_kernel(const __grid_constant__ GatedRmsNormParams p) {
  const int64_t groups = p.dim / p.group, step = int64_t{blockDim.x} * kVector;
  const int64_t own = int64_t{threadIdx.x} * kVector, part_rows = norm_part_rows_cuda(p);
  int64_t round = 0;
  for (int64_t unit = blockIdx.x; unit < norm_parts_cuda(p) * groups; unit += gridDim.x) {
    const int64_t part = unit / groups, group = unit % groups, base = group * p.group;
    float* workspace = static_cast<float*>(p.workspace) + part * p.dim + base;
    float dweight[kSlots<kVector>][kVector] = {};
    const int64_t first = part * part_rows, end = smaller(p.rows, first + part_rows);
    for (int64_t row = first; row < end; ++row, ++round) {
      const float r = static_cast<const float*>(p.rstd)[row * groups + group];
      Terms<kVector> at;
      float products = 0.0f;
#pragma unroll
      for (int slot = 0; slot < kSlots<kVector>; ++slot) {
        const int64_t c = slot * step + own;
        if (c >= p.group) continue;
        load_terms<T>(at, p, row, base + c, r);
        products += add_products(at, dweight[slot]);
      }
      for (int64_t c = kSlots<kVector> * step + own; c < p.group; c += step) {
        float sums[kVector] = {};
        if (row != first) load<float>(sums, workspace + c);
        load_terms<T>(at, p, row, base + c, r);
        products += add_products(at, sums);
        store<float>(workspace + c, sums);
      }
      const float mean = add_block(products, round) / float(p.group);
      for (int64_t c = own; c < p.group; c += step) {
        load_terms<T>(at, p, row, base + c, r);
        store_gradients<T>(at, p, row, base + c, r, mean);
      }
    }
#pragma unroll
    for (int slot = 0; slot < kSlots<kVector>; ++slot) {
      const int64_t c = slot * step + own;
      if (c < p.group) store<float>(workspace + c, dweight[slot]);
    }
  }
}

struct ReduceSmem {
  float slices[kReduceSlices][kReduceChannels];
};

// A warp takes every kReduceSlices-th part of 32 channels; the slices are added in their order.
__global__ void __launch_bounds__(kReduceSlices* kReduceChannels)
    reduce_kernel(const __grid_constant__ GatedRmsNormParams p) {
  ReduceSmem& smem = device::shared_memory<ReduceSmem>();
  const int lane = device::lane_id(), slice = device::warp_id();
  const int64_t c = int64_t{blockIdx.x} * kReduceChannels + lane, parts = norm_parts_cuda(p);
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t part = slice; part < parts && c < p.dim; part += kReduceSlices)
    sum += static_cast<const float*>(p.workspace)[part * p.dim + c];
  smem.slices[slice][lane] = sum;
  device::sync_block();
  if (slice != 0 || c >= p.dim) return;
  for (int other = 1; other < kReduceSlices; ++other) sum += smem.slices[other][lane];
  if (p.weight_dtype == DType::kFloat32) {
    static_cast<float*>(p.dweight)[c] = sum;
  } else if (p.weight_dtype == DType::kBFloat16) {
    static_cast<bf16*>(p.dweight)[c] = device::from_float<bf16>(sum);
  } else {
    static_cast<fp16*>(p.dweight)[c] = device::from_float<fp16>(sum);
  }
}

// ---- Launch ----------------------------------------------------------------------------------------

// Whether every vector of `vector` channels is aligned, in each tensor that is there.
bool moves_vectors(const GatedRmsNormParams& p, int vector) {
  if (p.group % vector != 0) return false;
  const size_t bytes = size_t(vector) * size_t(itemsize(p.dtype));
  for (const NormRows* rows : {&p.x, &p.z, &p.out, &p.dout, &p.dx, &p.dz}) {
    if (!device::is_aligned(rows->data, bytes) || (rows->data != nullptr && rows->stride % vector != 0))
      return false;
  }
  return device::is_aligned(p.weight, size_t(vector) * size_t(itemsize(p.weight_dtype)));
}

template <class T, int kVector>
void launch(const GatedRmsNormParams& p, bool backward, Stream stream) {
  const int64_t warps = smaller(kMaxWarps, divide_up(p.group, kVector * device::kWarpSize));
  const int64_t units = (backward ? norm_parts_cuda(p) : p.rows) * (p.dim / p.group);
  const dim3 grid(unsigned(smaller(units, kMaxBlocks))), block(unsigned(warps * device::kWarpSize));
  const auto kernel = backward ? backward_kernel<T, kVector> : forward_kernel<T, kVector>;
  device::launch<GatedRmsNormParams>(kernel, grid, block, sizeof(Smem), stream, p);
}

template <class T>
void launch(const GatedRmsNormParams& p, bool backward, Stream stream) {
  constexpr int kVector = 16 / int(sizeof(T));
  if (moves_vectors(p, kVector)) return launch<T, kVector>(p, backward, stream);
  launch<T, 1>(p, backward, stream);
}

void launch(const GatedRmsNormParams& p, bool backward, Stream stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return launch<float>(p, backward, stream);
    case DType::kBFloat16:
      return launch<bf16>(p, backward, stream);
    default:
      return launch<fp16>(p, backward, stream);
  }
}

}  // namespace

void gated_rms_norm_fwd_cuda(const GatedRmsNormParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  launch(p, false, stream);
}

void gated_rms_norm_bwd_cuda(const GatedRmsNormParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  launch(p, true, stream);
  const dim3 grid(unsigned(divide_up(p.dim, kReduceChannels)));
  device::launch(reduce_kernel, grid, dim3(kReduceSlices * kReduceChannels), sizeof(ReduceSmem), stream, p);
}

}  // namespace tilewright::scan
