// What a decode step of a Mamba layer needs besides the convolution and the scan, on the CPU: products with
// few tokens and the norm of their segments. Compiled once per instruction-set level.
//
// Roofline: the weights are read once, 2 FLOPs an element and token: memory bound. One row after the other
// makes the one ascending stream that prefetchers like best (4 rows side by side: a tenth slower); the
// tokens, and the row when there are more than kTokens of them, stay in the L1 cache.
#include "core/integers.h"
#include "core/simd.h"
#include "core/threads.h"
#include "scan/mamba_step.h"

namespace tilewright::TW_ISA {
namespace {

using namespace ::tilewright::scan;

constexpr int kTokens = 4;
constexpr int64_t kChunkElements = 32768;   // of the weights, a unit of work
constexpr int64_t kSerialElements = 65536;  // below this, waking a second thread costs more than it saves

void narrow_to(float* to, float value) { *to = value; }
void narrow_to(double* to, double value) { *to = value; }
void narrow_to(bf16* to, float value) { *to = narrow_bf16(value); }
void narrow_to(fp16* to, float value) { *to = narrow_fp16(value); }

template <class T>
struct Matrices {
  const TokenLinearParams& p;

  const T* x(int64_t token) const { return static_cast<const T*>(p.x) + token * p.x_row; }
  const T* weight(int64_t row) const { return static_cast<const T*>(p.weight) + row * p.weight_row; }

  template <class Real>
  void put(int64_t token, int64_t row, Real value) const {
    if (p.bias != nullptr) value += Real(widen(static_cast<const T*>(p.bias)[row * p.bias_row]));
    narrow_to(static_cast<T*>(p.out) + token * p.out_row + row, value);
  }
};

// A row times some tokens, summed in kParts interleaved parts a token, so that no sum waits for the last.
template <class T, int kParts, int kSomeTokens>
void multiply(const Matrices<T>& m, int64_t row, int64_t token) {
  const T *w = m.weight(row), *x[kSomeTokens];
  Float sums[kParts][kSomeTokens];
  for (int t = 0; t < kSomeTokens; ++t) x[t] = m.x(token + t);
  for (int part = 0; part < kParts; ++part)
    for (int t = 0; t < kSomeTokens; ++t) sums[part][t] = splat(0.0f);
  const int64_t columns = m.p.columns;
  int64_t k = 0;
  for (; k + kParts * kLanes <= columns; k += kParts * kLanes) {
    for (int part = 0; part < kParts; ++part) {
      const Float values = load(w + k + part * kLanes);
      for (int t = 0; t < kSomeTokens; ++t)
        sums[part][t] = fma(values, load(x[t] + k + part * kLanes), sums[part][t]);
    }
  }
  for (; k < columns; k += kLanes) {
    const int64_t count = smaller(kLanes, columns - k);
    const Float values = load_some(w + k, count);
    for (int t = 0; t < kSomeTokens; ++t) sums[0][t] = fma(values, load_some(x[t] + k, count), sums[0][t]);
  }
  for (int t = 0; t < kSomeTokens; ++t) {
    Float total = sums[0][t];
    for (int part = 1; part < kParts; ++part) total = total + sums[part][t];
    m.put(token + t, row, float(sum(total)));
  }
}

template <class T>
void multiply_row(const Matrices<T>& m, int64_t row) {
  int64_t token = 0;
  for (; token + kTokens <= m.p.tokens; token += kTokens) multiply<T, 1, kTokens>(m, row, token);
  for (; token < m.p.tokens; ++token) multiply<T, kTokens, 1>(m, row, token);
}

// Any strides of the weights, and float64: the formula.
template <class T, class Real>
void multiply_row_by_element(const Matrices<T>& m, int64_t row) {
  for (int64_t token = 0; token < m.p.tokens; ++token) {
    Real value = 0;
    for (int64_t k = 0; k < m.p.columns; ++k)
      value += Real(widen(m.weight(row)[k * m.p.weight_column])) * Real(widen(m.x(token)[k]));
    m.put(token, row, value);
  }
}

template <class T>
void linear(const TokenLinearParams& p, int threads) {
  const Matrices<T> m{p};
  const int64_t size = larger(kChunkElements / larger(p.columns, 1), 1);
  const bool small = p.rows * p.columns < kSerialElements;
  parallel_chunks(divide_up(p.rows, size), small ? 1 : threads, [&](int64_t chunk) {
    int64_t row = chunk * size;
    const int64_t end = smaller(row + size, p.rows);
    if constexpr (sizeof(T) == 8) {
      for (; row < end; ++row) multiply_row_by_element<T, double>(m, row);
    } else if (p.weight_column != 1) {
      for (; row < end; ++row) multiply_row_by_element<T, float>(m, row);
    } else {
      for (; row < end; ++row) multiply_row(m, row);
    }
  });
}

double weight_at(const SegmentNormParams::Segment& segment, int64_t i) {
  if (segment.weight == nullptr) return 1;
  switch (segment.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(segment.weight)[i * segment.stride];
    case DType::kFloat32:
      return static_cast<const float*>(segment.weight)[i * segment.stride];
    case DType::kBFloat16:
      return widen(static_cast<const bf16*>(segment.weight)[i * segment.stride]);
    default:
      return widen(static_cast<const fp16*>(segment.weight)[i * segment.stride]);
  }
}

template <class T, class Real>
void norm(const SegmentNormParams& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    T* x = static_cast<T*>(p.x) + token * p.x_row;
    for (const SegmentNormParams::Segment& segment : p.segments) {
      double squares = 0;
      for (int64_t i = 0; i < segment.size; ++i) squares += double(widen(x[i])) * double(widen(x[i]));
      const double scale = 1 / std::sqrt(squares / double(segment.size) + p.eps);
      for (int64_t i = 0; i < segment.size; ++i)
        narrow_to(x + i, Real(double(widen(x[i])) * scale * weight_at(segment, i)));
      x += segment.size;
    }
  }
}

}  // namespace

void token_linear_cpu(const TokenLinearParams& p, int threads) {
  switch (p.dtype) {
    case DType::kFloat64:
      return linear<double>(p, threads);
    case DType::kFloat32:
      return linear<float>(p, threads);
    case DType::kBFloat16:
      return linear<bf16>(p, threads);
    default:
      return linear<fp16>(p, threads);
  }
}

// A few hundred numbers: not worth a second thread.
void segment_norm_cpu(const SegmentNormParams& p, int) {
  switch (p.dtype) {
    case DType::kFloat64:
      return norm<double, double>(p);
    case DType::kFloat32:
      return norm<float, float>(p);
    case DType::kBFloat16:
      return norm<bf16, float>(p);
    default:
      return norm<fp16, float>(p);
  }
}

}  // namespace tilewright::TW_ISA
