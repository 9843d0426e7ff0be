// The optimal brain surgeon's step on the GPU: a warp takes a row, which lies in shared memory meanwhile, and
// its lanes the columns to the right of the one that is removed.
//
// Roofline: the panel is read and written once; the factor's rows come from the L2 cache, for all warps the
// same.
#include "device/launch.h"
#include "device/smem.h"
#include "device/warp.h"
#include "prune/obs.h"

namespace tilewright::prune {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;

struct Smem {
  float rows[kWarps][kWidestPanel];
};

// Whether this lane's column of a group is kept. Lanes from m on have none.
__device__ __forceinline__ bool is_chosen(const ObsParams& p, const float* w, int first) {
  const int lane = device::lane_id(), i = first + lane;
  float worth = -1.0f;
  if (lane < p.m) {
    const float error = w[i] / static_cast<const float*>(p.factor)[i * p.factor_row + i];
    worth = error * error;
  }
  int rank = 0;
  for (int j = 0; j < p.m; ++j) {
    const float other = device::shfl(worth, j);
    rank += other > worth || (other == worth && j < lane);
  }
  return lane < p.m && rank < p.n;
}

__global__ void __launch_bounds__(kThreads) panel_kernel(const __grid_constant__ ObsParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const int lane = device::lane_id();
  const int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (row >= p.rows) return;
  float* w = smem.rows[device::warp_id()];
  float* weight = static_cast<float*>(p.weight) + row * p.weight_row;
  float* errors = static_cast<float*>(p.errors) + row * p.errors_row;
  uint8_t* mask = p.mask + row * p.mask_row;
  for (int i = lane; i < p.columns; i += device::kWarpSize) w[i] = weight[i];
  device::sync_warp();
  uint32_t chosen = 0;  // the columns of the group under way that are kept
  for (int i = 0; i < p.columns; ++i) {
    if (p.m > 0 && i % p.m == 0) chosen = device::ballot(is_chosen(p, w, i));
    const bool kept = p.m > 0 ? (chosen >> i % p.m & 1u) != 0 : mask[i] != 0;
    const float* u = static_cast<const float*>(p.factor) + i * p.factor_row;
    const float error = kept ? 0.0f : w[i] / u[i];
    device::sync_warp();
    if (lane == 0) {
      errors[i] = error;
      if (p.m > 0) mask[i] = kept;
      if (!kept) w[i] = 0.0f;
    }
    if (!kept)
      for (int j = i + 1 + lane; j < p.columns; j += device::kWarpSize) w[j] -= error * u[j];
    device::sync_warp();
  }
  for (int i = lane; i < p.columns; i += device::kWarpSize) weight[i] = w[i];
}

}  // namespace

void obs_panel_cuda(const ObsParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  device::launch(panel_kernel, dim3(unsigned((p.rows + kWarps - 1) / kWarps)), dim3(kThreads), sizeof(Smem),
                 stream, p);
}

}  // namespace tilewright::prune
