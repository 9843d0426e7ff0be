// Blockwise quantization on the GPU: a warp takes a quantization block, 256 elements at a time.
//
// Roofline: 5.016 bytes per fp32 element at block size 256 either way, 3.016 per 16-bit element.
#include "core/tune.h"
#include "device/launch.h"
#include "device/smem.h"
#include "optim/codec_cuda.h"
#include "optim/quantize.h"

namespace tilewright::optim {
namespace {

constexpr int kEncodeBlocks = TW_TUNED(QUANTIZE_BLOCKS, 4);  // a multiprocessor
constexpr int kDecodeBlocks = TW_TUNED(DEQUANTIZE_BLOCKS, 1);

struct Smem {
  CodecTables tables;
};

// The largest of `value` among the lanes that share a block.
__device__ __forceinline__ uint32_t reduce_block_lanes(uint32_t value, int lanes_per_block) {
  if (lanes_per_block == 32) return device::reduce_max(value);
  for (int distance = 1; distance < lanes_per_block; distance *= 2) {
    value = device::max(value, device::shfl_xor(value, distance));
  }
  return value;
}

// Largest magnitude of a lane, as bits: orders NaN above infinity above every number.
__device__ __forceinline__ uint32_t largest_bits(const float (&x)[kLaneElements]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    largest = device::max(largest, device::float_bits(x[i]) & 0x7fffffffu);
  return largest;
}

template <class T>
__device__ void quantize_chunks(const QuantizeParams& p, const CodecTables& tables) {
  const T* values = static_cast<const T*>(p.values);
  const bool aligned = device::is_aligned(values, 16) && device::is_aligned(p.codes, 8);
  // A warp's portion: one block, or as many small ones as fill a chunk.
  const int64_t portion = p.block_size > kWarpElements ? p.block_size : kWarpElements;
  const int lanes_per_block = p.block_size < kWarpElements ? p.block_size / kLaneElements : 32;
  const int64_t warps = int64_t{gridDim.x} * kWarps, warp = int64_t{blockIdx.x} * kWarps + device::warp_id();
  for (int64_t begin = warp * portion; begin < p.numel; begin += warps * portion) {
    const int64_t end = begin + portion < p.numel ? begin + portion : p.numel;
    uint32_t largest = 0;
    float x[kLaneElements];
    for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
      const Lane lane = lane_of(chunk, end);
      load_lane(x, values + lane.offset, lane.count, aligned);
      largest = device::max(largest, largest_bits(x));
    }
    largest = reduce_block_lanes(largest, lanes_per_block);
    const float absmax = device::bits_float(largest > kInfinityBits ? kNanBits : largest);
    // Codes of a block with infinity or NaN do not matter: it decodes to NaN throughout.
    const bool finite = largest < kInfinityBits;
    for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
      const Lane lane = lane_of(chunk, end);
      if (p.block_size > kWarpElements) load_lane(x, values + lane.offset, lane.count, aligned);
      for (int i = 0; i < kLaneElements; ++i) x[i] = finite ? x[i] : 0.0f;
      const float scale = finite ? absmax : 0.0f;
      const LaneCodes codes = p.is_signed ? encode_lane_any<true>(x, scale, tables, p.map)
                                          : encode_lane_any<false>(x, scale, tables, p.map);
      if (aligned && lane.count == kLaneElements) {
        store_codes<true>(p.codes + lane.offset, codes, lane.count);
      } else {
        store_codes<false>(p.codes + lane.offset, codes, lane.count);
      }
    }
    const int64_t first =
        begin + (device::lane_id() / lanes_per_block) * int64_t{lanes_per_block} * kLaneElements;
    if (device::lane_id() % lanes_per_block == 0 && first < end) p.absmax[first / p.block_size] = absmax;
  }
}

template <bool kWhole, class T>
__device__ __forceinline__ void dequantize_lane(T* values, const uint8_t* codes, const CodecTables& tables,
                                                const float* map, float absmax, int count) {
  float x[kLaneElements];
  T rounded[kLaneElements];
  decode_lane_any(x, load_codes<kWhole>(codes, count), tables, map, absmax);
  round_lane(rounded, x);
  store_lane<kWhole>(values, rounded, count);
}

template <class T>
__device__ void dequantize_chunks(const QuantizeParams& p, const CodecTables& tables) {
  const bool aligned = device::is_aligned(p.values, 16) && device::is_aligned(p.codes, 8);
  const int64_t warps = int64_t{gridDim.x} * kWarps, warp = int64_t{blockIdx.x} * kWarps + device::warp_id();
  for (int64_t begin = warp * kWarpElements; begin < p.numel; begin += warps * kWarpElements) {
    const auto [offset, count] = lane_of(begin, p.numel);
    if (count == 0) continue;
    const float absmax = p.absmax[offset / p.block_size];
    T* values = static_cast<T*>(p.values) + offset;
    if (aligned && count == kLaneElements) {
      dequantize_lane<true>(values, p.codes + offset, tables, p.map, absmax, count);
    } else {
      dequantize_lane<false>(values, p.codes + offset, tables, p.map, absmax, count);
    }
  }
}

template <bool kEncode>
__global__ void __launch_bounds__(kThreads, kEncode ? kEncodeBlocks : kDecodeBlocks)
    codec_kernel(const __grid_constant__ QuantizeParams p) {
  Smem& smem = device::shared_memory<Smem>();
  load_tables(smem.tables, p.is_signed ? kDeviceSigned : kDeviceUnsigned);
  device::sync_block();
  with_float_type(p.dtype, [&](auto zero) {
    if constexpr (kEncode) {
      quantize_chunks<decltype(zero)>(p, smem.tables);
    } else {
      dequantize_chunks<decltype(zero)>(p, smem.tables);
    }
  });
}

void launch_over_blocks(device::Kernel<QuantizeParams> kernel, const QuantizeParams& p, int device,
                        Stream stream) {
  const device::DeviceGuard guard(device);
  const int64_t portion = int64_t{kWarps} * (p.block_size > kWarpElements ? p.block_size : kWarpElements);
  const int64_t needed = (p.numel + portion - 1) / portion;
  const int64_t resident =
      int64_t{device::multiprocessor_count(device)} * device::resident_blocks(kernel, kThreads, sizeof(Smem));
  device::launch(kernel, dim3(unsigned(needed < resident ? needed : resident)), dim3(kThreads), sizeof(Smem),
                 stream, p);
}

}  // namespace

void quantize_cuda(const QuantizeParams& p, int device, Stream stream) {
  launch_over_blocks(codec_kernel<true>, p, device, stream);
}

void dequantize_cuda(const QuantizeParams& p, int device, Stream stream) {
  launch_over_blocks(codec_kernel<false>, p, device, stream);
}

}  // namespace tilewright::optim
