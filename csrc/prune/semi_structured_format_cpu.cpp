// A weight between its dense and its semi-structured form, on the CPU; compiled once per instruction-set
// level.
//
// Roofline: memory. The forms are converted once in a weight's life, so this is plain code.
#include <type_traits>

#include "core/half.h"
#include "core/threads.h"
#include "prune/semi_structured_linear.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::prune;

template <class T>
bool is_kept(const SemiStructuredFormatParams& p, int64_t row, int64_t column, T element) {
  if (p.mask.data == nullptr) return widen(element) != 0;
  return static_cast<const uint8_t*>(p.mask.data)[row * p.mask.row + column * p.mask.column] != 0;
}

// The columns of a group that are kept, those that fill it up among them.
template <class T>
uint32_t kept_columns(const SemiStructuredFormatParams& p, int64_t row, int64_t begin, const T* dense) {
  const SemiStructuredWeight& w = p.weight;
  uint32_t kept = 0;
  int32_t count = 0;
  for (int32_t i = 0; i < w.m && count < w.n; ++i) {
    if (is_kept(p, row, begin + i, dense[(begin + i) * p.dense.column])) kept |= 1u << i, ++count;
  }
  for (int32_t i = 0; count < w.n; ++i) {
    if ((kept >> i & 1u) == 0) kept |= 1u << i, ++count;
  }
  return kept;
}

template <class T>
void compress_row(const SemiStructuredFormatParams& p, int64_t row) {
  const SemiStructuredWeight& w = p.weight;
  const T* dense = static_cast<const T*>(p.dense.data) + row * p.dense.row;
  T* values = static_cast<T*>(w.values) + row * w.kept();
  uint8_t* positions = w.positions + row * position_bytes(w.in);
  for (int64_t i = 0; i < position_bytes(w.in); ++i) positions[i] = 0;
  for (int64_t begin = 0; begin < w.in; begin += w.m) {
    uint32_t kept = kept_columns(p, row, begin, dense), nibble = 0;
    for (int32_t slot = 0; kept != 0; kept &= kept - 1, ++slot) {
      const int64_t column = begin + __builtin_ctz(kept);
      *values++ = dense[column * p.dense.column];
      nibble |= uint32_t(column - begin) << 2 * (slot & 1);
      if (!w.two_of_four()) positions[column / 8] |= uint8_t(1u << column % 8);
    }
    if (w.two_of_four()) positions[begin / 8] |= uint8_t(nibble << begin % 8);
  }
}

template <class T>
void decompress_row(const SemiStructuredFormatParams& p, int64_t row) {
  const SemiStructuredWeight& w = p.weight;
  T* dense = static_cast<T*>(p.dense.data) + row * p.dense.row;
  const T* values = static_cast<const T*>(w.values) + row * w.kept();
  const T* last = values + w.kept();
  const uint8_t* positions = w.positions + row * position_bytes(w.in);
  for (int64_t c = 0; c < w.in; ++c) {
    const int nibble = positions[c / 8] >> c / 4 % 2 * 4 & 15, at = int(c % 4);
    const bool kept =
        w.two_of_four() ? at == (nibble & 3) || at == nibble >> 2 : (positions[c / 8] >> c % 8 & 1) != 0;
    dense[c * p.dense.column] = kept && values != last ? *values++ : T{};
  }
}

template <class T>
void compress(const SemiStructuredFormatParams& p, int threads) {
  parallel_chunks(p.weight.out, threads, [&](int64_t row) { compress_row<T>(p, row); });
}

template <class T>
void decompress(const SemiStructuredFormatParams& p, int threads) {
  parallel_chunks(p.weight.out, threads, [&](int64_t row) { decompress_row<T>(p, row); });
}

}  // namespace

void semi_structured_compress_cpu(const SemiStructuredFormatParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return compress<double>(p, threads);
    case DType::kFloat16:
      return compress<fp16>(p, threads);
    case DType::kBFloat16:
      return compress<bf16>(p, threads);
    default:
      return compress<float>(p, threads);
  }
}

void semi_structured_decompress_cpu(const SemiStructuredFormatParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return decompress<double>(p, threads);
    case DType::kFloat16:
      return decompress<fp16>(p, threads);
    case DType::kBFloat16:
      return decompress<bf16>(p, threads);
    default:
      return decompress<float>(p, threads);
  }
}

}  // namespace tilewright::TW_ISA
