// y and dx of the block-sparse linear layer on Hopper, for blocks of 64 and 128: the copy engine fetches
// tiles, warpgroups multiply them.
//
//   y = activation(x W^T + bias),  dx = dz W
//
// A thread block of three warpgroups stays on each multiprocessor. One thread of the first walks the lists
// and has 256 tokens' and a block's part of 64 depths copied into a ring in shared memory; the other two
// multiply, each 128 tokens by the block's width. While they write a result, the next list's tiles are on
// their way.
//
// Roofline, of a stage with blocks of 128: 4.2 MFLOP, 1024 clocks of the tensor cores; 48 KB from L2, 48
// bytes a clock, of which an H200 has about 25 to 32 for each multiprocessor: at most 55 to 65 percent of the
// tensor cores. With blocks of 64 it is 40 KB for half the work: 33 to 39 percent.
#include "core/tune.h"
#include "prune/block_sparse_linear_sm90.h"

namespace tilewright::prune::blocks {
namespace {

using device::Major;

constexpr int kSlabs = TW_TUNED(BLOCK_SPARSE_LINEAR_SM90_SLABS, 2);  // of 64 tokens, in a warpgroup
constexpr int kTokens = kGroups * kSlabs * device::kWgmmaRows;

struct Params {
  Product p;
  device::TensorMap in, values;
  uint32_t items;
};

template <int kColumns>
constexpr int kSlots = kColumns == 128 ? 4 : 5;  // what shared memory holds

template <class T, int kColumns>
struct Smem {
  alignas(1024) T in[kSlots<kColumns>][kTokens * kDepth];
  alignas(1024) T blocks[kSlots<kColumns>][kColumns * kDepth];
  alignas(128) T results[kMultiplyingWarps][16 * kColumns];
  Ring<kSlots<kColumns>> ring;
};

// Where a stage's tiles are.
struct Place {
  int32_t column, block, within;  // of `in`; the block's number; the first depth in it
};

__device__ __forceinline__ Place place_of_stage(const Product& p, const Work& work, int stage) {
  const int depth = device::min(stage, work.stages - 1) * kDepth;  // one behind the last is never used
  const int number = work.begin + (depth >> p.depth_bits), within = depth & ((1 << p.depth_bits) - 1);
  return {(p.part[number] << p.depth_bits) + within, p.block == nullptr ? number : p.block[number], within};
}

template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void load_stage(const Params& k, Smem<T, kColumns>& smem, int slot,
                                           const Place& place, int32_t first_token) {
  device::Mbarrier& full = smem.ring.full[slot];
  device::mbarrier_arrive_expect(full, int(sizeof smem.in[0] + sizeof smem.blocks[0]));
  device::tma_load(smem.in[slot], k.in, full, place.column, first_token, 0, 0);
  if constexpr (kTransposed) {
    const int32_t row = (place.block << k.p.depth_bits) + place.within;
#pragma unroll
    for (int panel = 0; panel < kColumns / kPanel; ++panel)
      device::tma_load(smem.blocks[slot] + panel * kDepth * kPanel, k.values, full, panel * kPanel, row, 0,
                       0);
  } else {
    device::tma_load(smem.blocks[slot], k.values, full, place.within, place.block << k.p.width_bits, 0, 0);
  }
}

template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void produce(const Params& k, Smem<T, kColumns>& smem) {
  device::tma_prefetch_map(k.in);
  device::tma_prefetch_map(k.values);
  Turn<kSlots<kColumns>> turn;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < k.items; item += gridDim.x) {
    const Work work = work_of(k.p, item, kColumns);
    if (work.first_token >= k.p.tokens || work.stages == 0) continue;
    Place next = place_of_stage(k.p, work, 0);
#pragma unroll 1
    for (int stage = 0; stage < work.stages; ++stage, turn.advance()) {
      const Place place = next;
      next = place_of_stage(k.p, work, stage + 1);  // read while this one waits for its slot
      device::mbarrier_wait(smem.ring.empty[turn.slot], turn.parity ^ 1);
      load_stage<T, kColumns, kTransposed>(k, smem, turn.slot, place, int32_t(work.first_token));
    }
  }
}

template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void begin_products(float (&sums)[kSlabs][kColumns / 2],
                                               const Smem<T, kColumns>& smem, int slot, int group,
                                               bool accumulate) {
  constexpr Major kMajor = kTransposed ? Major::kAcross : Major::kAlong;
  constexpr int kStep = device::kWgmmaDepth * (kTransposed ? device::kSwizzleBytes : int(sizeof(T)));
  const uint64_t b =
      device::wgmma_descriptor(smem.blocks[slot], kTransposed ? kDepth * kPanel * int(sizeof(T)) : 16);
#pragma unroll
  for (int step = 0; step < kDepth / device::kWgmmaDepth; ++step) {
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int row = (group * kSlabs + s) * device::kWgmmaRows;
      const uint64_t a = device::wgmma_descriptor(smem.in[slot] + row * kDepth);
      device::wgmma<T, kMajor, kColumns>(
          sums[s], device::wgmma_advance(a, step * device::kWgmmaDepth * int(sizeof(T))),
          device::wgmma_advance(b, step * kStep), accumulate || step != 0);
    }
  }
  device::wgmma_commit();
}

template <class T, int kColumns>
__device__ __forceinline__ void finish(const Product& p, const Work& work,
                                       const float (&found)[kSlabs][kColumns / 2], T* tile, int group) {
  const int64_t column0 = work.list << p.width_bits;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    Sums<1, kColumns / 8> sums;
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) sums[0][i / 4][i % 4] = found[s][i];
    add_bias<T, 1, kColumns / 8>(sums, p, column0);
    const int64_t row0 =
        work.first_token + (group * kSlabs + s) * device::kWgmmaRows + device::warp_id() % 4 * 16;
    store_sums<T, 1, kColumns / 8>(tile, sums, [&](int row, int column, const Vector<T, 8>& chunk) {
      if (row0 + row < p.tokens && column0 + column < p.out.columns)
        store_result(p, row0 + row, int(column0) + column, chunk);
    });
  }
}

template <class T, int kColumns, bool kTransposed>
__device__ __forceinline__ void consume(const Params& k, Smem<T, kColumns>& smem, int group) {
  T* const tile = smem.results[device::warp_id() - device::kWarpgroup / device::kWarpSize];
  Turn<kSlots<kColumns>> turn;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < k.items; item += gridDim.x) {
    const Work work = work_of(k.p, item, kColumns);
    if (work.first_token >= k.p.tokens) continue;
    float sums[kSlabs][kColumns / 2] = {};
    int before = 0;
#pragma unroll 1
    for (int stage = 0; stage < work.stages; ++stage, turn.advance()) {
      device::mbarrier_wait(smem.ring.full[turn.slot], turn.parity);
      device::wgmma_fence(sums);
      begin_products<T, kColumns, kTransposed>(sums, smem, turn.slot, group, stage != 0);
      device::wgmma_wait<1>(sums);
      if (stage != 0) release(smem.ring.empty[before]);
      before = turn.slot;
    }
    device::wgmma_wait<0>(sums);
    if (work.stages != 0) release(smem.ring.empty[before]);
    finish<T, kColumns>(k.p, work, sums, tile, group);
  }
}

template <class T, int kColumns, bool kTransposed>
__global__ void __launch_bounds__(kHopperThreads, 1) product_kernel(const __grid_constant__ Params k) {
  if constexpr (device::kHasWgmma) {
    Smem<T, kColumns>& smem = device::shared_memory<Smem<T, kColumns>>();
    make_ring(smem.ring);
    if (own_group() < 0) {
      device::give_registers<kProducerRegisters>();
      if (threadIdx.x == 0) produce<T, kColumns, kTransposed>(k, smem);
    } else {
      device::take_registers<kConsumerRegisters>();
      consume<T, kColumns, kTransposed>(k, smem, own_group());
    }
  }
}

template <class T, int kColumns, bool kTransposed>
void launch_product(const Product& p, int64_t blocks, int device, Stream stream) {
  const int64_t depth = int64_t{1} << p.depth_bits, width = int64_t{1} << p.width_bits;
  const int64_t rows = kTransposed ? depth : width, columns = kTransposed ? width : depth;  // of a block
  Params k{};
  k.p = p;
  k.in = map_of<T>(p.in.at.data, p.in.columns, p.tokens, p.in.at.row, kTokens);
  k.values = map_of<T>(p.values, columns, blocks * rows, columns, kTransposed ? kDepth : kColumns);
  k.items = thread_blocks_of(p);
  const auto kernel = product_kernel<T, kColumns, kTransposed>;
  const int64_t resident = smaller(k.items, device::multiprocessor_count(device));
  device::launch(kernel, dim3(unsigned(resident)), dim3(kHopperThreads), sizeof(Smem<T, kColumns>), stream,
                 k);
}

template <class T>
void choose_kernel(const Product& p, bool transposed, int64_t blocks, int device, Stream stream) {
  if (p.width_bits == 7) {
    transposed ? launch_product<T, 128, true>(p, blocks, device, stream)
               : launch_product<T, 128, false>(p, blocks, device, stream);
  } else {
    transposed ? launch_product<T, 64, true>(p, blocks, device, stream)
               : launch_product<T, 64, false>(p, blocks, device, stream);
  }
}

bool is_available(int device) {
  if (device::compute_capability(device) != 90) return false;
  static const bool is_built = device::is_native(product_kernel<bf16, 128, false>, 90);
  return is_built;
}

}  // namespace

// What the copy engine can address, with work for most of the multiprocessors and tokens for most of a tile.
bool block_sparse_product_sm90_fits(const Product& p, bool transposed, int64_t blocks, int device) {
  if (p.dtype == DType::kFloat32 || p.depth_bits < 6 || p.width_bits < 6) return false;
  if (blocks == 0 || p.tokens <= kTokens / 2) return false;
  constexpr int64_t kMostRows = int64_t{1} << 30;
  const int64_t rows = blocks << (transposed ? p.depth_bits : p.width_bits);
  if (!p.values_vectors || !is_addressable(p.in, p.tokens) || rows > kMostRows) return false;
  const int64_t items = divide_up(p.tokens, kTokens) * p.lists;
  return 2 * items >= device::multiprocessor_count(device) && is_available(device);
}

void block_sparse_product_sm90(const Product& given, bool transposed, int64_t blocks, int device,
                               Stream stream) {
  Product p = given;
  p.token_tile = kTokens;
  p.token_tiles = int32_t(divide_up(p.tokens, kTokens));
  p.together = tiles_together(p.token_tiles);
  p.slices = 1;
  p.dtype == DType::kFloat16 ? choose_kernel<fp16>(p, transposed, blocks, device, stream)
                             : choose_kernel<bf16>(p, transposed, blocks, device, stream);
}

}  // namespace tilewright::prune::blocks
