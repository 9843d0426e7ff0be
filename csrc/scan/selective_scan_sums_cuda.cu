// The last step of the selective scan's gradient on a GPU: the partial sums that thread blocks left are added
// up in a fixed order. Memory decides: each partial sum is read once.
#include "scan/selective_scan_plan.h"

namespace tilewright::scan {
namespace {

constexpr int kSumThreads = 256;

template <class S>
__device__ __forceinline__ void sum_parts(void* result, int64_t to, const void* parts, int64_t from,
                                          int64_t stride, int64_t count) {
  if (parts == nullptr && count != 0) return;
  S sum = {};
  for (int64_t i = 0; i < count; ++i) sum = add(sum, static_cast<const S*>(parts)[from + i * stride]);
  static_cast<S*>(result)[to] = sum;
}

template <class S>
__device__ __forceinline__ void sum_weights(const ScanLaunch& l, int64_t channel, int64_t state) {
  const SelectiveScanParams& p = l.p;
  const int64_t from = state * p.dim + channel, size = p.dim * p.states;
  if (p.dA != nullptr) sum_parts<S>(p.dA, channel * p.states + state, l.dA, from, size, l.parts);
  if (!p.variable_B && p.dB.data != nullptr)
    sum_parts<S>(p.dB.data, channel * p.dB.channel + state * p.dB.state, l.dB, from, size, l.parts);
  if (!p.variable_C && p.dC.data != nullptr)
    sum_parts<S>(p.dC.data, channel * p.dC.channel + state * p.dC.state, l.dC, from, size, l.parts);
  if (state != 0) return;
  if (p.dD != nullptr) sum_parts<float>(p.dD, channel, l.dD, channel, p.dim, l.parts);
  if (p.ddelta_bias != nullptr)
    sum_parts<float>(p.ddelta_bias, channel, l.ddelta_bias, channel, p.dim, l.parts);
}

__global__ void __launch_bounds__(kSumThreads) weights_kernel(const __grid_constant__ ScanLaunch l) {
  const int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (index >= l.p.dim * l.p.states) return;
  if (l.p.weight_dtype == DType::kComplex64) {
    sum_weights<Complex>(l, index % l.p.dim, index / l.p.dim);
  } else {
    sum_weights<float>(l, index % l.p.dim, index / l.p.dim);
  }
}

template <class T>
__device__ __forceinline__ void write_state(T* address, float value, int64_t token, int64_t stride) {
  address[token * stride] = device::from_float<T>(value);
}
template <class T>
__device__ __forceinline__ void write_state(T* address, Complex value, int64_t token, int64_t stride) {
  address[2 * token * stride] = device::from_float<T>(value.re);
  address[(2 * token + 1) * stride] = device::from_float<T>(value.im);
}

template <class S>
__device__ __forceinline__ void sum_rows(const ScanLaunch& l, const Strided& result, const void* rows,
                                         int64_t index) {
  if (rows == nullptr) return;
  const SelectiveScanParams& p = l.p;
  const int64_t state = index % p.states, token = index / p.states % p.length;
  const int64_t batch = index / p.states / p.length % p.batch, group = index / p.states / p.length / p.batch;
  const int64_t size = p.groups * p.batch * p.length * p.states;
  S sum = {};
  for (int64_t slot = 0; slot < l.slots; ++slot)
    sum = add(sum, static_cast<const S*>(rows)[slot * size + index]);
  with_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    T* to =
        static_cast<T*>(result.data) + batch * result.batch + group * result.channel + state * result.state;
    write_state(to, sum, token, result.step);
  });
}

__global__ void __launch_bounds__(kSumThreads) rows_kernel(const __grid_constant__ ScanLaunch l) {
  const int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (index >= l.p.groups * l.p.batch * l.p.length * l.p.states) return;
  if (l.p.weight_dtype == DType::kComplex64) {
    sum_rows<Complex>(l, l.p.dB, l.dB_rows, index);
    sum_rows<Complex>(l, l.p.dC, l.dC_rows, index);
  } else {
    sum_rows<float>(l, l.p.dB, l.dB_rows, index);
    sum_rows<float>(l, l.p.dC, l.dC_rows, index);
  }
}

void launch_sum(device::Kernel<ScanLaunch> kernel, const ScanLaunch& l, int64_t threads, Stream stream) {
  device::launch(kernel, dim3(unsigned(divide_up(threads, kSumThreads))), dim3(kSumThreads), 0, stream, l);
}

}  // namespace

void run_sums(const ScanLaunch& l, Stream stream) {
  const SelectiveScanParams& p = l.p;
  launch_sum(weights_kernel, l, p.dim * p.states, stream);
  if (l.dB_rows != nullptr || l.dC_rows != nullptr)
    launch_sum(rows_kernel, l, p.groups * p.batch * p.length * p.states, stream);
}

}  // namespace tilewright::scan
