// Blockwise quantization on the CPU, compiled once per instruction-set level.
//
// Roofline: quantize reads 4 (or 2) bytes and writes 1 + 4/block_size per element, dequantize the reverse;
// with about 15 vector instructions per kLanes elements both are bound by memory on two cores.
#include "core/threads.h"
#include "optim/codec_simd.h"
#include "optim/quantize.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::optim;
namespace codec = ::tilewright::TW_ISA::optim;

constexpr int64_t kChunkElements = 1 << 15;
constexpr int64_t kSerialElements = 1 << 14;  // below this, waking a second thread costs more than it saves
constexpr int64_t kStreamBytes = 8 << 20;     // results larger than the caches are written around them

int64_t count_of(const QuantizeParams& p, int64_t begin) {
  return p.numel - begin < p.block_size ? p.numel - begin : p.block_size;
}

template <class T>
void quantize_block(const QuantizeParams& p, int64_t block) {
  const int64_t begin = block * p.block_size, count = count_of(p, begin);
  const int64_t padded = codec::padded_to_step(count);
  const T* values = static_cast<const T*>(p.values) + begin;
  alignas(64) float copy[kMaxBlock];
  const float* x = copy;
  if (std::is_same_v<T, float> && padded == count) {
    x = reinterpret_cast<const float*>(values);
  } else {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(copy + i, load(values + i));
    if (i < count) store(copy + i, load_some(values + i, count - i));
    for (i += i < count ? kLanes : 0; i < padded; i += kLanes) store(copy + i, splat(0.0f));
  }
  const float absmax = p.absmax[block] = codec::absmax_of(x, padded);
  if (p.is_signed) {
    codec::encode_any<true>(x, absmax, p.map, p.codes + begin, count);
  } else {
    codec::encode_any<false>(x, absmax, p.map, p.codes + begin, count);
  }
}

template <class T>
void dequantize_block(const QuantizeParams& p, int64_t block, bool around_caches) {
  const int64_t begin = block * p.block_size, count = count_of(p, begin);
  T* values = static_cast<T*>(p.values) + begin;
  alignas(64) float x[kMaxBlock];
  if (p.is_signed) {
    codec::decode_any<true>(p.codes + begin, p.absmax[block], p.map, x, count);
  } else {
    codec::decode_any<false>(p.codes + begin, p.absmax[block], p.map, x, count);
  }
  if (std::is_same_v<T, float> && around_caches && count % kLanes == 0) {
    for (int64_t i = 0; i < count; i += kLanes) stream(reinterpret_cast<float*>(values) + i, load(x + i));
    return;
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, load(x + i));
  if (i < count) store_some(values + i, load(x + i), count - i);
}

// Calls body(block) for every block, in chunks.
template <class Body>
void for_each_block(const QuantizeParams& p, int threads, const Body& body) {
  const int64_t blocks = (p.numel + p.block_size - 1) / p.block_size;
  const int64_t per_chunk = kChunkElements / p.block_size;
  const int64_t chunks = (blocks + per_chunk - 1) / per_chunk;
  parallel_chunks(chunks, p.numel < kSerialElements ? 1 : threads, [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * per_chunk < blocks ? (chunk + 1) * per_chunk : blocks;
    for (int64_t block = chunk * per_chunk; block < end; ++block) body(block);
  });
}

}  // namespace

void quantize_cpu(const QuantizeParams& p, int threads) {
  for_each_block(p, threads, [&](int64_t block) {
    with_float_type(p.dtype, [&](auto zero) { quantize_block<decltype(zero)>(p, block); });
  });
}

void dequantize_cpu(const QuantizeParams& p, int threads) {
  const bool around_caches =
      p.numel * 4 >= kStreamBytes && reinterpret_cast<uintptr_t>(p.values) % sizeof(Float) == 0;
  for_each_block(p, threads, [&](int64_t block) {
    with_float_type(p.dtype, [&](auto zero) { dequantize_block<decltype(zero)>(p, block, around_caches); });
  });
}

}  // namespace tilewright::TW_ISA
