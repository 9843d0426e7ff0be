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

constexpr int64_t kChunkElements = 1 << 15;
constexpr int64_t kSerialElements = 1 << 14;  // below this, waking a second thread costs more than it saves
constexpr int64_t kStreamBytes = 8 << 20;     // results larger than the caches are written around them
constexpr int kMaxBlock = 4096;

void encode_any(const QuantizeParams& p, const float* x, float absmax, uint8_t* codes, int64_t padded) {
  if (p.map != nullptr) {
    TW_ISA::optim::encode_block_foreign(x, absmax, p.map, codes, padded);
  } else if (p.is_signed) {
    TW_ISA::optim::encode_block<true>(x, absmax, codes, padded);
  } else {
    TW_ISA::optim::encode_block<false>(x, absmax, codes, padded);
  }
}

void decode_any(const QuantizeParams& p, const uint8_t* codes, float absmax, float* out, int64_t padded) {
  if (p.map != nullptr) {
    TW_ISA::optim::decode_block_foreign(codes, p.map, absmax, out, padded);
  } else {
    TW_ISA::optim::decode_block(codes, p.is_signed ? kSignedCodebook : kUnsignedCodebook, absmax, out,
                                padded);
  }
}

int64_t padded_to_step(int64_t count) {
  return (count + TW_ISA::optim::kStep - 1) / TW_ISA::optim::kStep * TW_ISA::optim::kStep;
}

template <class T>
void quantize_block(const QuantizeParams& p, int64_t block) {
  const int64_t begin = block * p.block_size;
  const int64_t count = p.numel - begin < p.block_size ? p.numel - begin : p.block_size;
  const T* values = static_cast<const T*>(p.values) + begin;
  const bool whole = count % TW_ISA::optim::kStep == 0;
  if (whole && sizeof(T) == sizeof(float)) {
    const float* x = reinterpret_cast<const float*>(values);
    p.absmax[block] = TW_ISA::optim::absmax_of(x, count);
    encode_any(p, x, p.absmax[block], p.codes + begin, count);
    return;
  }
  alignas(64) float x[kMaxBlock];
  alignas(64) uint8_t codes[kMaxBlock];
  const int64_t padded = padded_to_step(count);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, load(values + i));
  if (i < count) store(x + i, load_some(values + i, count - i));
  for (i += i < count ? kLanes : 0; i < padded; i += kLanes) store(x + i, splat(0.0f));
  p.absmax[block] = TW_ISA::optim::absmax_of(x, padded);
  encode_any(p, x, p.absmax[block], whole ? p.codes + begin : codes, padded);
  if (!whole) std::memcpy(p.codes + begin, codes, size_t(count));
}

template <class T>
void dequantize_block(const QuantizeParams& p, int64_t block, bool around_caches) {
  const int64_t begin = block * p.block_size;
  const int64_t count = p.numel - begin < p.block_size ? p.numel - begin : p.block_size;
  T* values = static_cast<T*>(p.values) + begin;
  alignas(64) float x[kMaxBlock];
  if (count % TW_ISA::optim::kStep == 0) {
    decode_any(p, p.codes + begin, p.absmax[block], x, count);
  } else {
    alignas(64) uint8_t codes[kMaxBlock] = {};
    std::memcpy(codes, p.codes + begin, size_t(count));
    decode_any(p, codes, p.absmax[block], x, padded_to_step(count));
  }
  if (sizeof(T) == sizeof(float) && around_caches && count % kLanes == 0) {
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
    if (p.dtype == DType::kFloat32) {
      quantize_block<float>(p, block);
    } else if (p.dtype == DType::kBFloat16) {
      quantize_block<bf16>(p, block);
    } else {
      quantize_block<fp16>(p, block);
    }
  });
}

void dequantize_cpu(const QuantizeParams& p, int threads) {
  const bool around_caches =
      p.numel * 4 >= kStreamBytes && reinterpret_cast<uintptr_t>(p.values) % sizeof(Float) == 0;
  for_each_block(p, threads, [&](int64_t block) {
    if (p.dtype == DType::kFloat32) {
      dequantize_block<float>(p, block, around_caches);
    } else if (p.dtype == DType::kBFloat16) {
      dequantize_block<bf16>(p, block, around_caches);
    } else {
      dequantize_block<fp16>(p, block, around_caches);
    }
  });
}

}  // namespace tilewright::TW_ISA
