// The best of many, or of each row, on the GPU.
//
// The threshold is found by counting its digits, 11, 10 and 10 bits of the magnitudes' bits from the top, in
// histograms in shared memory; atomics on integers give the same counts in any order. Of many tensors, each
// digit is a pass over all of them and a small kernel that picks it; one more pass counts, chunk by chunk,
// who is equal to the threshold, the last writes the mask. Of rows, a block does all of that for its row.
//
// Roofline: five reads of each score, a byte written; a row's are in the cache after the first.
#include "device/atomics.h"
#include "device/launch.h"
#include "device/smem.h"
#include "device/warp.h"
#include "prune/element_cuda.h"
#include "prune/select.h"

namespace tilewright::prune {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * device::kWarpSize;
constexpr int kDigits = 3, kBins = 2048, kLaneBins = kBins / device::kWarpSize;
constexpr int64_t kChunk = 16384;  // elements of a unit of work

constexpr int shift_of(int digit) { return digit == 0 ? 20 : digit == 1 ? 10 : 0; }
constexpr int bits_of_digit(int digit) { return digit == 0 ? 11 : 10; }

// What is known of the threshold: its digits so far, how many of those that share them are kept, and how many
// there are.
struct State {
  uint32_t prefix, unused;
  int64_t kept, equal;
};

struct Smem {
  uint32_t bins[kBins];
  uint32_t warps[kWarps];  // equals that a warp found
  State state;
};

struct Workspace {
  State state;
  uint32_t bins[kDigits][kBins];
};

// The elements in question, by number: of a line, or of a matrix row by row.
template <class T>
struct Elements {
  const T* data;
  int64_t row, column, columns;  // columns 0: a line, `column` apart
  const float* factors;          // of a line; null: ones

  __device__ __forceinline__ uint32_t key(int64_t i) const {
    const int64_t offset = columns == 0 ? i * column : i / columns * row + i % columns * column;
    const float x = device::to_float(data[offset]);
    return key_of(factors != nullptr ? x * factors[i] : x);
  }
};

template <class T>
__device__ __forceinline__ void count_digits(const Elements<T>& elements, int64_t begin, int64_t end,
                                             int digit, uint32_t prefix, uint32_t* bins) {
  const int shift = shift_of(digit), bits = bits_of_digit(digit);
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const uint32_t key = elements.key(i) >> shift;
    if (digit == 0 || key >> bits == prefix) device::atomic_add(&bins[key & ((1u << bits) - 1u)], 1u);
  }
}

// The highest bin that all from it on, together, hold at least `state.kept`. Called by one warp.
__device__ __forceinline__ State pick_digit(const uint32_t* bins, int digit, State state) {
  const int lane = device::lane_id(), first = lane * kLaneBins;
  int64_t own = 0;
  for (int i = 0; i < kLaneBins; ++i) own += bins[first + i];
  int64_t from = own;  // counts of this lane's bins and those of the lanes above
#pragma unroll
  for (int distance = 1; distance < device::kWarpSize; distance *= 2) {
    const int64_t other = device::shfl_down(from, distance);
    if (lane + distance < device::kWarpSize) from += other;
  }
  const uint32_t enough = device::ballot(from >= state.kept);
  int owner = 0;  // the last lane from which on there are enough; lane 0 always
  for (int i = 1; i < device::kWarpSize; ++i)
    if (enough >> i & 1u) owner = i;
  if (lane == owner) {
    state.kept -= from - own;
    int bin = first + kLaneBins - 1;
    for (; bin > first && bins[bin] < state.kept; --bin) state.kept -= bins[bin];
    state.prefix = state.prefix << bits_of_digit(digit) | uint32_t(bin);
    state.equal = bins[bin];
  }
  state.prefix = device::shfl(state.prefix, owner);
  state.kept = device::shfl(state.kept, owner);
  state.equal = device::shfl(state.equal, owner);
  return state;
}

__device__ __forceinline__ bool any_infinite(const uint32_t* bins) {
  bool found = false;
  for (int bin = int(kInfinityKey >> shift_of(0)) + device::lane_id(); bin < kBins; bin += device::kWarpSize)
    found = found || bins[bin] > 0;
  return device::any(found);
}

__device__ __forceinline__ void clear(uint32_t* bins) {
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads) bins[bin] = 0;
}

// Keeps what is above the threshold and the first `left` of those equal to it. Called by the whole block.
template <class T>
__device__ __forceinline__ void keep(const Elements<T>& elements, int64_t begin, int64_t end,
                                     uint32_t threshold, int64_t left, uint8_t* mask, Smem& smem) {
  if (left <= 0 || left >= end - begin) {
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const uint32_t key = elements.key(i);
      mask[i] = key > threshold || (key == threshold && left > 0);
    }
    return;
  }
  const int lane = device::lane_id(), warp = device::warp_id();
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const uint32_t key = i < end ? elements.key(i) : 0u;
    const bool equal = i < end && key == threshold;
    const uint32_t lanes = device::ballot(equal);
    if (lane == 0) smem.warps[warp] = uint32_t(device::count_bits(lanes));
    device::sync_block();
    int64_t before = device::count_bits(lanes & ((1u << lane) - 1u)), all = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += smem.warps[w];
      all += smem.warps[w];
    }
    if (i < end) mask[i] = key > threshold || (equal && before < left);
    left -= all;
    device::sync_block();
  }
}

struct PassParams {
  SelectSource source;
  Workspace* workspace;
  int64_t* equals;  // [chunks of the source]: counted by equals_kernel; made the number before by scan_kernel
  int64_t chunks;
  int32_t digit;
};

template <class T>
__device__ __forceinline__ Elements<T> elements_of(const SelectSource& source) {
  const Matrix& m = source.scores;
  const bool flat = source.rows == 1 || m.row == source.columns * m.column;
  return {static_cast<const T*>(m.data), m.row, m.column, flat ? 0 : source.columns, nullptr};
}

template <class T>
__global__ void __launch_bounds__(kThreads) digit_kernel(const __grid_constant__ PassParams p) {
  Smem& smem = device::shared_memory<Smem>();
  clear(smem.bins);
  device::sync_block();
  const Elements<T> elements = elements_of<T>(p.source);
  const int64_t numel = p.source.rows * p.source.columns;
  for (int64_t chunk = blockIdx.x; chunk < p.chunks; chunk += gridDim.x)
    count_digits(elements, chunk * kChunk, smaller((chunk + 1) * kChunk, numel), p.digit,
                 p.workspace->state.prefix, smem.bins);
  device::sync_block();
  for (int bin = int(threadIdx.x); bin < kBins; bin += kThreads)
    if (smem.bins[bin] != 0) device::atomic_add(&p.workspace->bins[p.digit][bin], smem.bins[bin]);
}

struct PickParams {
  Workspace* workspace;
  int32_t* invalid;
  int64_t kept;
  int32_t digit;
};

__global__ void __launch_bounds__(device::kWarpSize) pick_kernel(const __grid_constant__ PickParams p) {
  const uint32_t* bins = p.workspace->bins[p.digit];
  if (p.digit == 0 && any_infinite(bins) && device::lane_id() == 0) *p.invalid = 1;
  const State state = pick_digit(bins, p.digit, p.digit == 0 ? State{0, 0, p.kept, 0} : p.workspace->state);
  device::sync_warp();
  if (device::lane_id() == 0) p.workspace->state = state;
}

template <class T>
__global__ void __launch_bounds__(kThreads) equals_kernel(const __grid_constant__ PassParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const Elements<T> elements = elements_of<T>(p.source);
  const uint32_t threshold = p.workspace->state.prefix;
  const int64_t begin = blockIdx.x * kChunk, end = smaller(begin + kChunk, p.source.rows * p.source.columns);
  uint32_t count = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) count += elements.key(i) == threshold;
  count = device::reduce_add(count);
  if (device::lane_id() == 0) smem.warps[device::warp_id()] = count;
  device::sync_block();
  if (threadIdx.x != 0) return;
  int64_t all = 0;
  for (int w = 0; w < kWarps; ++w) all += smem.warps[w];
  p.equals[blockIdx.x] = all;
}

struct ScanParams {
  int64_t* equals;
  int64_t chunks;
};

// A warp replaces counts by the sums of those before.
__global__ void __launch_bounds__(device::kWarpSize) scan_kernel(const __grid_constant__ ScanParams p) {
  const int lane = device::lane_id();
  int64_t before = 0;
  for (int64_t first = 0; first < p.chunks; first += device::kWarpSize) {
    const int64_t own = first + lane < p.chunks ? p.equals[first + lane] : 0;
    int64_t up_to = own;
#pragma unroll
    for (int distance = 1; distance < device::kWarpSize; distance *= 2) {
      const int64_t other = device::shfl_up(up_to, distance);
      if (lane >= distance) up_to += other;
    }
    if (first + lane < p.chunks) p.equals[first + lane] = before + up_to - own;
    before += device::shfl(up_to, device::kWarpSize - 1);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) keep_kernel(const __grid_constant__ PassParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const int64_t begin = blockIdx.x * kChunk, end = smaller(begin + kChunk, p.source.rows * p.source.columns);
  const State state = p.workspace->state;
  keep(elements_of<T>(p.source), begin, end, state.prefix, state.kept - p.equals[blockIdx.x], p.source.mask,
       smem);
}

template <class T>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ SelectRowsParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const int64_t row = blockIdx.x;
  const Elements<T> elements{static_cast<const T*>(p.scores.data) + row * p.scores.row, 0, p.scores.column, 0,
                             static_cast<const float*>(p.factors)};
  State state{0, 0, p.kept, 0};
  for (int digit = 0; digit < kDigits; ++digit) {
    clear(smem.bins);
    device::sync_block();
    count_digits(elements, 0, p.columns, digit, state.prefix, smem.bins);
    device::sync_block();
    if (device::warp_id() == 0) {
      if (digit == 0 && any_infinite(smem.bins) && device::lane_id() == 0) device::atomic_max(p.invalid, 1);
      const State picked = pick_digit(smem.bins, digit, state);
      if (device::lane_id() == 0) smem.state = picked;
    }
    device::sync_block();
    state = smem.state;
  }
  keep(elements, 0, p.columns, state.prefix, state.kept, p.mask + row * p.columns, smem);
}

// A thread writes four neighbours of a row.
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandParams p) {
  constexpr int kRun = 4;
  const int64_t pieces = divide_up(p.columns, kThreads * kRun);
  const int64_t row = blockIdx.x / pieces, piece = blockIdx.x % pieces;
  const uint8_t* units = p.units + row / p.group_rows * divide_up(p.columns, p.group_columns);
  uint8_t* mask = p.mask + row * p.columns;
  for (int i = 0; i < kRun; ++i) {
    const int64_t column = piece * kThreads * kRun + i * kThreads + threadIdx.x;
    if (column < p.columns) mask[column] = units[column / p.group_columns];
  }
}

template <class Params>
void run(device::Kernel<Params> kernel, int64_t blocks, int threads, Stream stream, const Params& p) {
  device::launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), sizeof(Smem), stream, p);
}

int64_t chunks_of(const SelectSource& source) { return divide_up(source.rows * source.columns, kChunk); }

int64_t all_chunks(const SelectParams& p) {
  int64_t chunks = 0;
  for (int64_t s = 0; s < p.count; ++s) chunks += chunks_of(p.sources[s]);
  return chunks;
}

}  // namespace

int64_t select_workspace_cuda(const SelectParams& p) {
  return int64_t{sizeof(Workspace)} + 8 * all_chunks(p);
}

void select_cuda(const SelectParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  auto* workspace = static_cast<Workspace*>(p.workspace);
  auto* equals = reinterpret_cast<int64_t*>(workspace + 1);
  const int64_t resident = int64_t{8} * device::multiprocessor_count(device);
  device::fill_zero(workspace, sizeof(Workspace), stream);
  // Calls body(T{}, pass) for each source.
  const auto each = [&](int digit, const auto& body) {
    int64_t first = 0;
    for (int64_t s = 0; s < p.count; ++s) {
      const PassParams pass{p.sources[s], workspace, equals + first, chunks_of(p.sources[s]), digit};
      with_type(pass.source.dtype, [&](auto type) { body(type, pass); });
      first += pass.chunks;
    }
  };
  for (int digit = 0; digit < kDigits; ++digit) {
    each(digit, [&](auto type, const PassParams& pass) {
      run(digit_kernel<decltype(type)>, smaller(pass.chunks, resident), kThreads, stream, pass);
    });
    run(pick_kernel, 1, device::kWarpSize, stream, PickParams{workspace, p.invalid, p.kept, digit});
  }
  each(0, [&](auto type, const PassParams& pass) {
    run(equals_kernel<decltype(type)>, pass.chunks, kThreads, stream, pass);
  });
  run(scan_kernel, 1, device::kWarpSize, stream, ScanParams{equals, all_chunks(p)});
  each(0, [&](auto type, const PassParams& pass) {
    run(keep_kernel<decltype(type)>, pass.chunks, kThreads, stream, pass);
  });
}

void select_rows_cuda(const SelectRowsParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  with_type(p.dtype, [&](auto type) { run(rows_kernel<decltype(type)>, p.rows, kThreads, stream, p); });
}

void expand_cuda(const ExpandParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  run(expand_kernel, p.rows * divide_up(p.columns, kThreads * 4), kThreads, stream, p);
}

}  // namespace tilewright::prune
