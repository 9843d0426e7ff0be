// Block lists on the GPU. Nothing is sorted: an entry's place is the number of entries before it.
//
// Lists that run along memory take a warp each, 32 codes a vote. Of those that run across it, a block of
// threads takes 32 neighbours, a lane a list, and each warp 32 entries of all of them; the warps' counts add
// up in shared memory. Either way the codes are read by whole sectors.
//
// Roofline: a byte (or four) a code for each direction, four (or eight) bytes an entry. At 256 x 256 blocks a
// head both passes read 128 KB a head; what they take is the latency of a few dependent loads.
#include "attention/block_mask.h"
#include "core/tune.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/smem.h"
#include "device/warp.h"

namespace tilewright::attention {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * device::kWarpSize;
constexpr int kLoads = TW_TUNED(BLOCK_LISTS_LOADS, 4);  // votes whose codes are loaded together
constexpr int kAcrossWarps = TW_TUNED(BLOCK_LISTS_ACROSS_WARPS, 8);
constexpr int kAcrossThreads = kAcrossWarps * device::kWarpSize;

// The lists of all heads, seen as lists of entries.
struct ListsKernelParams {
  const void* codes;
  int64_t batch_stride, head_stride, list_stride, entry_stride;
  int64_t heads, all_heads, lists, entries;  // all_heads: batch times heads
  NewLists to;
};

struct Smem {
  int32_t counts[kAcrossWarps][device::kWarpSize];
};

template <class Code>
__device__ __forceinline__ const Code* head_codes(const ListsKernelParams& p, int64_t head) {
  return static_cast<const Code*>(p.codes) + head / p.heads * p.batch_stride + head % p.heads * p.head_stride;
}

__device__ __forceinline__ void write_entry(const NewLists& to, int64_t list, int64_t place, int64_t entry,
                                            int32_t code) {
  if (place >= to.capacity) return;
  to.indices[list * to.capacity + place] = int32_t(entry);
  if (to.bits != nullptr) to.bits[list * to.capacity + place] = code - 2;
}

__device__ __forceinline__ void write_count(const NewLists& to, int64_t list, int64_t count) {
  to.counts[list] = int32_t(to.indices != nullptr && count > to.capacity ? to.capacity : count);
}

template <class Code>
__global__ void __launch_bounds__(kThreads) lists_along_kernel(const __grid_constant__ ListsKernelParams p) {
  const int64_t number = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (number >= p.all_heads * p.lists) return;
  const Code* codes = head_codes<Code>(p, number / p.lists) + number % p.lists * p.list_stride;
  const int lane = device::lane_id();
  const uint32_t before = (1u << lane) - 1u;
  int64_t count = 0;
  for (int64_t base = 0; base < p.entries; base += kLoads * device::kWarpSize) {
    int32_t code[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t entry = base + i * device::kWarpSize + lane;
      code[i] = entry < p.entries ? int32_t(codes[entry * p.entry_stride]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint32_t present = device::ballot(code[i] != 0);
      const int64_t entry = base + i * device::kWarpSize + lane;
      if (code[i] != 0 && p.to.indices != nullptr) {
        write_entry(p.to, number, count + device::count_bits(present & before), entry, code[i]);
      }
      count += device::count_bits(present);
    }
  }
  if (lane == 0) write_count(p.to, number, count);
}

template <class Code>
__global__ void __launch_bounds__(kAcrossThreads)
    lists_across_kernel(const __grid_constant__ ListsKernelParams p) {
  Smem& smem = device::shared_memory<Smem>();
  const int64_t groups = (p.lists + device::kWarpSize - 1) / device::kWarpSize;
  const int64_t head = int64_t{blockIdx.x} / groups;
  const int warp = device::warp_id(), lane = device::lane_id();
  const int64_t list = int64_t{blockIdx.x} % groups * device::kWarpSize + lane;
  const int64_t number = head * p.lists + list;
  const bool exists = list < p.lists;
  const Code* codes = head_codes<Code>(p, head) + list * p.list_stride;
  int64_t count = 0;
  for (int64_t base = 0; base < p.entries; base += kAcrossThreads) {
    const int64_t first = base + warp * device::kWarpSize;
    uint32_t present = 0;
#pragma unroll
    for (int i = 0; i < device::kWarpSize; ++i) {
      const bool inside = exists && first + i < p.entries;
      present |= uint32_t{inside && codes[(first + i) * p.entry_stride] != 0} << i;
    }
    smem.counts[warp][lane] = device::count_bits(present);
    device::sync_block();
    int64_t place = count;
    for (int w = 0; w < kAcrossWarps; ++w) {
      if (w < warp) place += smem.counts[w][lane];
      count += smem.counts[w][lane];
    }
    if (p.to.indices != nullptr) {
      for (int64_t entry = first; present != 0; present >>= 1, ++entry) {
        if ((present & 1u) == 0) continue;
        write_entry(p.to, number, place++, entry, int32_t(codes[entry * p.entry_stride]));
      }
    }
    device::sync_block();
  }
  if (exists && warp == 0) write_count(p.to, number, count);
}

template <class Code>
void write_lists(const ListsKernelParams& p, Stream stream) {
  const int64_t lists = p.all_heads * p.lists;
  if (lists == 0) return;
  if (p.list_stride == 1 && p.entry_stride != 1) {
    const int64_t groups = p.all_heads * ((p.lists + device::kWarpSize - 1) / device::kWarpSize);
    device::launch(lists_across_kernel<Code>, dim3(unsigned(groups)), dim3(kAcrossThreads), sizeof(Smem),
                   stream, p);
  } else {
    device::launch(lists_along_kernel<Code>, dim3(unsigned((lists + kWarps - 1) / kWarps)), dim3(kThreads), 0,
                   stream, p);
  }
}

// ---- codes from lists ----

// A warp takes a list, 32 entries at a time, each lane one of them. The codes were zero before.
template <class Code>
__global__ void __launch_bounds__(kThreads) codes_kernel(const __grid_constant__ BlockCodesParams p) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (row >= p.rows) return;
  const int lane = device::lane_id();
  Code* codes = static_cast<Code*>(p.codes) + row * p.blocks;
  const int64_t named = p.counts[row];
  const int64_t count = named < 0 ? 0 : named > p.capacity ? p.capacity : named;
  int32_t flags = count == named ? 0 : kBadCount;
  for (int64_t base = 0; base < count; base += device::kWarpSize) {
    const int64_t i = row * p.capacity + base + lane;
    const bool inside = base + lane < count;
    const int32_t block = inside ? p.indices[i] : -1;
    const int32_t table = inside && p.bits != nullptr ? p.bits[i] : -1;
    const bool is_block = block >= 0 && block < p.blocks, is_table = table >= -1 && table < p.tables;
    const bool fits = is_block && is_table;
    // Of the lanes that name the same block the lowest has it; the others' keys are numbers of no block.
    const uint32_t same = device::match_any(fits ? block : -1 - lane);
    const bool repeated = fits && ((same & ((1u << lane) - 1u)) != 0 || codes[block] != 0);
    if (inside && !is_block) flags |= kBadIndex;
    if (inside && is_block && !is_table) flags |= kBadTable;
    if (repeated) flags |= kRepeated;
    device::sync_warp();
    if (fits && !repeated) codes[block] = Code(table + 2);
    device::sync_warp();
  }
  flags = int32_t(device::reduce_or(uint32_t(flags)));
  if (lane == 0) p.flags[row] = flags;
}

template <class Code>
void write_codes(const BlockCodesParams& p, Stream stream) {
  device::fill_zero(p.codes, size_t(p.rows * p.blocks) * sizeof(Code), stream);
  device::launch(codes_kernel<Code>, dim3(unsigned((p.rows + kWarps - 1) / kWarps)), dim3(kThreads), 0,
                 stream, p);
}

}  // namespace

void block_lists_cuda(const BlockListsParams& p, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  const ListsKernelParams q2k{p.codes, p.batch_stride,    p.head_stride, p.q_stride,  p.kv_stride,
                              p.heads, p.batch * p.heads, p.q_blocks,    p.kv_blocks, p.q2k};
  const ListsKernelParams k2q{p.codes, p.batch_stride,    p.head_stride, p.kv_stride, p.q_stride,
                              p.heads, p.batch * p.heads, p.kv_blocks,   p.q_blocks,  p.k2q};
  if (p.wide) {
    write_lists<int32_t>(q2k, stream);
    write_lists<int32_t>(k2q, stream);
  } else {
    write_lists<uint8_t>(q2k, stream);
    write_lists<uint8_t>(k2q, stream);
  }
}

void block_codes_cuda(const BlockCodesParams& p, int device, Stream stream) {
  if (p.rows == 0) return;
  const device::DeviceGuard guard(device);
  p.wide ? write_codes<int32_t>(p, stream) : write_codes<uint8_t>(p, stream);
}

}  // namespace tilewright::attention
