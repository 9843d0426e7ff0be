// n of m neighbours on the GPU.
//
// A warp takes as many whole groups as fit into its lanes. An element's rank is the number of those in its
// group that beat it, which it meets by m - 1 shuffles; it is kept if that is below n.
//
// Roofline: each weight is read once, a byte is written for it.
#include "device/atomics.h"
#include "device/launch.h"
#include "device/warp.h"
#include "prune/element_cuda.h"
#include "prune/select.h"

namespace tilewright::prune {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * device::kWarpSize;
constexpr int kSpans = 4;  // a warp at a time, so that several loads are under way

__device__ __forceinline__ bool is_kept(uint32_t key, int lane, int n, int m) {
  const int place = lane % m;
  int rank = 0;
  for (int turn = 1, other = place; turn < m; ++turn) {
    other = other + 1 == m ? 0 : other + 1;
    const uint32_t met = device::shfl(key, lane - place + other);
    rank += met > key || (met == key && other < place);
  }
  return rank < n;
}

template <class T>
__global__ void __launch_bounds__(kThreads) groups_kernel(const __grid_constant__ SelectGroupsParams p) {
  const int lane = device::lane_id(), span = device::kWarpSize / p.m * p.m;
  const int64_t spans = divide_up(p.columns, span);
  const int64_t first = (int64_t{blockIdx.x} * kWarps + device::warp_id()) * kSpans;
  int64_t row = first / spans, at = first % spans;
  uint32_t keys[kSpans];
  int64_t places[kSpans];  // in the mask; -1: none
#pragma unroll
  for (int i = 0; i < kSpans; ++i) {
    const int64_t column = at * span + lane;
    const bool inside = lane < span && column < p.columns && row < p.rows;
    float x = inside ? read<T>(p.weight, row, column) : 0.0f;
    if (inside && p.factors != nullptr) x *= static_cast<const float*>(p.factors)[column];
    keys[i] = key_of(x);
    places[i] = inside ? row * p.columns + column : -1;
    if (++at == spans) at = 0, ++row;
  }
  bool invalid = false;
#pragma unroll
  for (int i = 0; i < kSpans; ++i) {
    const bool kept = is_kept(keys[i], lane, p.n, p.m);
    invalid = invalid || keys[i] >= kInfinityKey;
    if (places[i] >= 0) p.mask[places[i]] = kept;
  }
  if (invalid) device::atomic_max(p.invalid, 1);
}

}  // namespace

void select_groups_cuda(const SelectGroupsParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  const int64_t span = device::kWarpSize / p.m * p.m;
  const int64_t blocks = divide_up(p.rows * divide_up(p.columns, span), kWarps * kSpans);
  with_type(p.dtype, [&](auto type) {
    constexpr auto kernel = groups_kernel<decltype(type)>;
    device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace tilewright::prune
