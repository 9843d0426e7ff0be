// A weight between its dense and its semi-structured form, on the GPU: a thread takes the groups that share
// bytes of the positions.
//
// Roofline: memory. The forms are converted once in a weight's life, so this is plain code.
#include "prune/semi_structured_cuda.h"

namespace tilewright::prune {
namespace semi {
namespace {

constexpr int kThreads = 128;

struct FormatParams {
  SemiStructuredFormatParams p;
  int64_t columns, units;  // of a thread; such in a row
};

struct UnitPlace {
  int64_t row, begin, end;
  bool exists;
};

__device__ __forceinline__ UnitPlace unit_of_thread(const FormatParams& f) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = index / f.units, begin = index % f.units * f.columns;
  return {row, begin, smaller(begin + f.columns, f.p.weight.in), row < f.p.weight.out};
}

template <class T>
__device__ __forceinline__ uint32_t kept_columns(const SemiStructuredFormatParams& p, int64_t row,
                                                 int64_t begin, const T* dense) {
  const SemiStructuredWeight& w = p.weight;
  const auto* mask = static_cast<const uint8_t*>(p.mask.data);
  uint32_t kept = 0;
  int count = 0;
  for (int i = 0; i < w.m && count < w.n; ++i) {
    const int64_t column = begin + i;
    const bool keeps = mask != nullptr ? mask[row * p.mask.row + column * p.mask.column] != 0
                                       : device::to_float(dense[column * p.dense.column]) != 0.0f;
    if (keeps) kept |= 1u << i, ++count;
  }
  for (int i = 0; count < w.n; ++i) {
    if ((kept >> i & 1u) == 0) kept |= 1u << i, ++count;
  }
  return kept;
}

template <class T>
__global__ void __launch_bounds__(kThreads) compress_kernel(const __grid_constant__ FormatParams f) {
  const UnitPlace unit = unit_of_thread(f);
  if (!unit.exists) return;
  const SemiStructuredWeight& w = f.p.weight;
  const T* dense = static_cast<const T*>(f.p.dense.data) + unit.row * f.p.dense.row;
  T* values = static_cast<T*>(w.values) + unit.row * w.kept() + unit.begin / w.m * w.n;
  uint8_t* positions = w.positions + unit.row * position_bytes(w.in);
  for (int64_t byte = unit.begin / 8; byte * 8 < unit.end; ++byte) positions[byte] = 0;
  for (int64_t begin = unit.begin; begin < unit.end; begin += w.m) {
    const uint32_t kept = kept_columns(f.p, unit.row, begin, dense);
    uint32_t nibble = 0;
    int slot = 0;
    for (int i = 0; i < w.m; ++i) {
      if ((kept >> i & 1u) == 0) continue;
      const int64_t column = begin + i;
      *values++ = dense[column * f.p.dense.column];
      if (w.two_of_four())
        nibble |= uint32_t(i) << 2 * slot++;
      else
        positions[column / 8] = uint8_t(positions[column / 8] | 1u << column % 8);
    }
    if (w.two_of_four()) positions[begin / 8] = uint8_t(positions[begin / 8] | nibble << begin % 8);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) decompress_kernel(const __grid_constant__ FormatParams f) {
  const UnitPlace unit = unit_of_thread(f);
  if (!unit.exists) return;
  T* dense = static_cast<T*>(f.p.dense.data) + unit.row * f.p.dense.row;
  const T* values = values_of<T>(f.p.weight, unit.row);
  for (int64_t column = unit.begin; column < unit.end; ++column) {
    const int64_t place = place_of(f.p.weight, unit.row, column);
    dense[column * f.p.dense.column] = place < 0 ? T{} : values[place];
  }
}

template <class T>
void run(const SemiStructuredFormatParams& p, bool compress, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  const int64_t columns = columns_together(p.weight.m), units = divide_up(p.weight.in, columns);
  const int64_t blocks = divide_up(p.weight.out * units, kThreads);
  check_value(blocks <= 0x7fffffff, "dense: too large for one launch");
  const device::Kernel<FormatParams> kernel = compress ? compress_kernel<T> : decompress_kernel<T>;
  device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, {p, columns, units});
}

void convert(const SemiStructuredFormatParams& p, bool compress, int device, Stream stream) {
  if (p.dtype == DType::kFloat32) return run<float>(p, compress, device, stream);
  if (p.dtype == DType::kFloat16) return run<fp16>(p, compress, device, stream);
  if (p.dtype == DType::kBFloat16) return run<bf16>(p, compress, device, stream);
  fail(ErrorKind::kNotImplemented, "values: float64 runs on the CPU only");
}

}  // namespace
}  // namespace semi

void semi_structured_compress_cuda(const SemiStructuredFormatParams& p, int device, Stream stream) {
  semi::convert(p, true, device, stream);
}

void semi_structured_decompress_cuda(const SemiStructuredFormatParams& p, int device, Stream stream) {
  semi::convert(p, false, device, stream);
}

}  // namespace tilewright::prune
