// Scores of groups of weights on the GPU.
//
// Narrow groups: a warp adds up the columns of a window of some groups next to each other, or a part of their
// rows; the windows of a block are then added up in shared memory, group by group. Wide groups, such as rows:
// a block each. Orders of sums do not depend on the launch.
//
// Roofline: each weight is read once, a score is written for each group.
#include "device/qualifiers.h"

#define TW_HOST_DEVICE __host__ __device__
#define TW_FEW_REGISTERS
#include "core/philox.h"
#include "device/launch.h"
#include "device/smem.h"
#include "device/warp.h"
#include "prune/element_cuda.h"
#include "prune/scores.h"

namespace tilewright::prune {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * device::kWarpSize;
constexpr int kWindow = 128, kLaneColumns = kWindow / device::kWarpSize;

struct Smem {
  float sums[kWarps][kWindow];
};

struct ScoresLaunch {
  GroupScoresParams p;
  int64_t across, parts;  // groups in a row of them; parts of a group
  int64_t width,
      windows;        // narrow: columns of a window, a multiple of the group's; windows of a row of groups
  int32_t row_warps;  // narrow: warps that share a window's rows
};

__device__ __forceinline__ float join(Score score, float a, float b) {
  if (score != Score::kLargest) return a + b;
  return device::bits_float(device::max(key_of(a), key_of(b)));
}

template <class T>
__device__ __forceinline__ float term(const GroupScoresParams& p, int64_t row, int64_t column) {
  const float w = read<T>(p.weight, row, column);
  if (p.score == Score::kProducts) return w * read<T>(p.gradient, row, column);
  const float x = p.factors != nullptr ? w * static_cast<const float*>(p.factors)[column] : w;
  if (p.score == Score::kSquares) return x * x;
  const float size = ::fabsf(x);
  return p.score == Score::kPowers ? ::powf(size, float(p.power)) : size;
}

__device__ __forceinline__ float finished(const GroupScoresParams& p, float sum) {
  if (p.score == Score::kSquares) return device::sqrt_rn(sum);
  if (p.score == Score::kPowers) return ::powf(sum, float(1 / p.power));
  return ::fabsf(sum);
}

__device__ __forceinline__ void put(const ScoresLaunch& l, int64_t part, int64_t group, float sum) {
  const GroupScoresParams& p = l.p;
  if (l.parts == 1) {
    static_cast<float*>(p.scores)[group] = finished(p, sum);
  } else {
    static_cast<float*>(p.workspace)[part * divide_up(p.rows, p.group_rows) * l.across + group] = sum;
  }
}

// Rows of a part of a row of groups.
struct Rows {
  int64_t top, bottom;
  __device__ __forceinline__ Rows(const ScoresLaunch& l, int64_t group_row, int64_t part) {
    const int64_t limit = smaller((group_row + 1) * l.p.group_rows, l.p.rows);
    top = group_row * l.p.group_rows + part * kPartRows;
    bottom = l.parts > 1 ? smaller(top + kPartRows, limit) : limit;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) narrow_kernel(const __grid_constant__ ScoresLaunch l) {
  const GroupScoresParams& p = l.p;
  Smem& smem = device::shared_memory<Smem>();
  const int lane = device::lane_id(), warp = device::warp_id();
  const int64_t side = kWarps / l.row_warps, blocks = divide_up(l.windows, side);
  const int64_t part = blockIdx.x / blocks % l.parts, group_row = blockIdx.x / blocks / l.parts;
  const int64_t first_window = blockIdx.x % blocks * side;
  const Rows rows(l, group_row, part);
  const int64_t left = (first_window + warp / l.row_warps) * l.width;
  const int64_t right = smaller(left + l.width, p.columns);
  float sums[kLaneColumns] = {};
  for (int64_t row = rows.top + warp % l.row_warps; row < rows.bottom; row += l.row_warps) {
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      const int64_t column = left + lane + i * device::kWarpSize;
      if (column < right) sums[i] = join(p.score, sums[i], term<T>(p, row, column));
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) smem.sums[warp][lane + i * device::kWarpSize] = sums[i];
  device::sync_block();
  const int groups = int(l.width / p.group_columns);  // of a window
  for (int at = int(threadIdx.x); at < groups * int(side); at += kThreads) {
    const int window = at / groups, group = at % groups;
    const int64_t number = (first_window + window) * groups + group;
    if (number >= l.across) continue;
    float sum = 0.0f;
    for (int w = 0; w < l.row_warps; ++w) {
      const float* of = smem.sums[window * l.row_warps + w] + group * p.group_columns;
      for (int i = 0; i < int(p.group_columns); ++i) sum = join(p.score, sum, of[i]);
    }
    put(l, part, group_row * l.across + number, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) wide_kernel(const __grid_constant__ ScoresLaunch l) {
  const GroupScoresParams& p = l.p;
  Smem& smem = device::shared_memory<Smem>();
  const int64_t group = blockIdx.x % l.across, part = blockIdx.x / l.across % l.parts;
  const int64_t group_row = blockIdx.x / l.across / l.parts;
  const Rows rows(l, group_row, part);
  const int64_t left = group * p.group_columns, right = smaller(left + p.group_columns, p.columns);
  float sum = 0.0f;
  for (int64_t row = rows.top; row < rows.bottom; ++row)
    for (int64_t column = left + threadIdx.x; column < right; column += kThreads)
      sum = join(p.score, sum, term<T>(p, row, column));
#pragma unroll
  for (int distance = device::kWarpSize / 2; distance > 0; distance /= 2)
    sum = join(p.score, sum, device::shfl_xor(sum, distance));
  if (device::lane_id() == 0) smem.sums[device::warp_id()][0] = sum;
  device::sync_block();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum = join(p.score, sum, smem.sums[warp][0]);
  put(l, part, group_row * l.across + group, sum);
}

// Adds up the parts.
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ ScoresLaunch l) {
  const int64_t groups = divide_up(l.p.rows, l.p.group_rows) * l.across;
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (group >= groups) return;
  const float* sums = static_cast<const float*>(l.p.workspace);
  float sum = sums[group];
  for (int64_t part = 1; part < l.parts; ++part) sum = join(l.p.score, sum, sums[part * groups + group]);
  static_cast<float*>(l.p.scores)[group] = finished(l.p, sum);
}

// A thread takes four numbers.
__global__ void __launch_bounds__(kThreads) random_kernel(const __grid_constant__ RandomScoresParams p) {
  const int64_t four = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (four * 4 >= p.count) return;
  const PhiloxWords random = philox(uint32_t(four), uint32_t(uint64_t(four) >> 32), p.stream, 0,
                                    uint32_t(p.seed), uint32_t(p.seed >> 32));
  for (int k = 0; k < 4; ++k)
    if (four * 4 + k < p.count) p.scores[four * 4 + k] = float(random.word[k] >> 8) * 0x1p-24f;
}

template <class Params>
void run(device::Kernel<Params> kernel, int64_t blocks, size_t shared_bytes, Stream stream, const Params& p) {
  device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), shared_bytes, stream, p);
}

template <class T>
void group_scores(ScoresLaunch& l, Stream stream) {
  const GroupScoresParams& p = l.p;
  const int64_t units = divide_up(p.rows, p.group_rows) * l.parts;
  if (p.group_columns > kWindow) {
    run(wide_kernel<T>, units * l.across, sizeof(Smem), stream, l);
  } else {
    l.width = kWindow / p.group_columns * p.group_columns;
    l.windows = divide_up(p.columns, l.width);
    l.row_warps = 1;
    while (l.row_warps < kWarps && l.row_warps * 2 <= smaller(p.group_rows, p.rows)) l.row_warps *= 2;
    run(narrow_kernel<T>, units * divide_up(l.windows, kWarps / l.row_warps), sizeof(Smem), stream, l);
  }
  if (l.parts > 1)
    run(finish_kernel, divide_up(divide_up(p.rows, p.group_rows) * l.across, kThreads), 0, stream, l);
}

}  // namespace

void group_scores_cuda(const GroupScoresParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  ScoresLaunch l{p, divide_up(p.columns, p.group_columns), group_parts(p), 0, 0, 0};
  with_type(p.dtype, [&](auto type) { group_scores<decltype(type)>(l, stream); });
}

void random_scores_cuda(const RandomScoresParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  run(random_kernel, divide_up(divide_up(p.count, 4), kThreads), 0, stream, p);
}

}  // namespace tilewright::prune
