// dW of the block-sparse linear layer on Hopper, for blocks of 64 and 128: dz^T x at the blocks that are
// there.
//
// A thread block of three warpgroups stays on each multiprocessor. One thread of the first has a block row's
// part of 64 tokens' dz, and the parts of x for up to 256 columns of neighbouring blocks, copied into a ring
// in shared memory. The other two multiply: of a block row of 128 each takes 64 rows, of one of 64 each 128
// columns. dz^T comes to the products in registers, since the tokens, which are their depth, run downwards.
//
// Roofline, of a stage with blocks of 128: 4.2 MFLOP, 1024 clocks of the tensor cores; 48 KB from L2. With
// blocks of 64: half of it, and 40 KB.
#include "core/tune.h"
#include "prune/block_sparse_linear_sm90.h"

namespace tilewright::prune::blocks {
namespace {

using device::Major;

constexpr int kColumns = TW_TUNED(BLOCK_SPARSE_LINEAR_SM90_COLUMNS, 256);  // of x, in a tile
constexpr int kPanels = kColumns / kPanel;
constexpr int kHalf = 128;  // columns of a product
constexpr int kSteps = kDepth / device::kWgmmaDepth;
constexpr int kSlots = 4;
constexpr int kPanelBytes = kDepth * kPanel * 2;

struct Params {
  WeightProduct p;
  device::TensorMap dz, x;
  uint32_t items;
};

template <class T, int kRows>
struct Smem {
  alignas(1024) T x[kSlots][kPanels][kDepth * kPanel];
  alignas(1024) T dz[kSlots][kRows / kPanel][kDepth * kPanel];
  alignas(128) T results[kMultiplyingWarps][16 * kHalf];
  Ring<kSlots> ring;
};

// ---- the producer ----

template <class T, int kRows>
__device__ __forceinline__ void load_group(const Params& k, Smem<T, kRows>& smem, Turn<kSlots>& turn,
                                           const BlockGroup& group) {
  const WeightProduct& p = k.p;
  const int panels = group.count << p.column_bits >> 6;
  int32_t columns[kPanels];
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const int place = i * kPanel >> p.column_bits, within = i * kPanel & ((1 << p.column_bits) - 1);
    columns[i] = i < panels ? (p.column[group.begin + place] << p.column_bits) + within : 0;
  }
#pragma unroll 1
  for (int64_t token = 0; token < p.tokens; token += kDepth, turn.advance()) {
    device::mbarrier_wait(smem.ring.empty[turn.slot], turn.parity ^ 1);
    device::Mbarrier& full = smem.ring.full[turn.slot];
    device::mbarrier_arrive_expect(full, (kRows / kPanel + panels) * kPanelBytes);
#pragma unroll
    for (int i = 0; i < kRows / kPanel; ++i)
      device::tma_load(smem.dz[turn.slot][i], k.dz, full, group.row * kRows + i * kPanel, int32_t(token), 0,
                       0);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      if (i < panels) device::tma_load(smem.x[turn.slot][i], k.x, full, columns[i], int32_t(token), 0, 0);
    }
  }
}

template <class T, int kRows>
__device__ __forceinline__ void produce(const Params& k, Smem<T, kRows>& smem) {
  device::tma_prefetch_map(k.dz);
  device::tma_prefetch_map(k.x);
  Turn<kSlots> turn;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < k.items; item += gridDim.x) {
    const BlockGroup group = group_of(k.p, item);
    if (group.count != 0) load_group(k, smem, turn, group);
  }
}

// ---- the consumers ----

// What a warpgroup multiplies: 64 rows, and columns from this panel on.
struct Share {
  int rows, panel;
};

template <class T, int kRows, int kHalves>
__device__ __forceinline__ void multiply(float (&sums)[kHalves][kHalf / 2], const Smem<T, kRows>& smem,
                                         int slot, const Share& share) {
  const MatrixReader<false> dz(smem.dz[slot][share.rows], kPanel, 0, device::warp_id() % 4 * 16);
  uint32_t rows[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) device::load_matrices_transposed(rows[step], dz.at(step, 0));
  device::wgmma_fence(sums, rows);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint64_t x =
          device::wgmma_descriptor(smem.x[slot][share.panel + half * (kHalf / kPanel)], kPanelBytes);
      device::wgmma<T, Major::kAcross, kHalf>(
          sums[half], rows[step],
          device::wgmma_advance(x, step * device::kWgmmaDepth * device::kSwizzleBytes), true);
    }
  }
  device::wgmma_commit();
  device::wgmma_wait<0>(sums);
}

// kHalves 0: only gives the slots back.
template <class T, int kRows, int kHalves>
__device__ __forceinline__ void consume_group(const Params& k, Smem<T, kRows>& smem, Turn<kSlots>& turn,
                                              const BlockGroup& group, const Share& share) {
  float sums[kHalves == 0 ? 1 : kHalves][kHalf / 2] = {};
#pragma unroll 1
  for (int64_t token = 0; token < k.p.tokens; token += kDepth, turn.advance()) {
    device::mbarrier_wait(smem.ring.full[turn.slot], turn.parity);
    if constexpr (kHalves != 0) multiply<T, kRows, kHalves>(sums, smem, turn.slot, share);
    release(smem.ring.empty[turn.slot]);
  }
  const int warp = device::warp_id() % (device::kWarpgroup / device::kWarpSize);
  T* const tile = smem.results[device::warp_id() - device::kWarpgroup / device::kWarpSize];
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    Sums<1, kHalf / 8> found;
#pragma unroll
    for (int i = 0; i < kHalf / 2; ++i) found[0][i / 4][i % 4] = sums[half][i];
    store_sums<T, 1, kHalf / 8>(tile, found, [&](int row, int column, const Vector<T, 8>& chunk) {
      store_gradient(k.p, group, share.rows * kPanel + warp * 16 + row,
                     share.panel * kPanel + half * kHalf + column, chunk);
    });
  }
}

template <class T, int kRows>
__device__ __forceinline__ void consume(const Params& k, Smem<T, kRows>& smem, int warpgroup) {
  const Share share = kRows == 128 ? Share{warpgroup, 0} : Share{0, warpgroup * (kHalf / kPanel)};
  Turn<kSlots> turn;
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < k.items; item += gridDim.x) {
    const BlockGroup group = group_of(k.p, item);
    if (group.count == 0) continue;
    const int columns = (group.count << k.p.column_bits) - share.panel * kPanel;
    if (columns <= 0)
      consume_group<T, kRows, 0>(k, smem, turn, group, share);
    else if (kRows == 64 || columns <= kHalf)
      consume_group<T, kRows, 1>(k, smem, turn, group, share);
    else
      consume_group<T, kRows, kRows == 128 ? 2 : 1>(k, smem, turn, group, share);
  }
}

template <class T, int kRows>
__global__ void __launch_bounds__(kHopperThreads, 1) weight_kernel(const __grid_constant__ Params k) {
  if constexpr (device::kHasWgmma) {
    Smem<T, kRows>& smem = device::shared_memory<Smem<T, kRows>>();
    make_ring(smem.ring);
    if (own_group() < 0) {
      device::give_registers<kProducerRegisters>();
      if (threadIdx.x == 0) produce(k, smem);
    } else {
      device::take_registers<kConsumerRegisters>();
      consume(k, smem, own_group());
    }
  }
}

template <class T, int kRows>
void launch_weight(const WeightProduct& p, int device, Stream stream) {
  Params k{};
  k.p = p;
  k.dz = map_of<T>(p.dz.at.data, p.dz.columns, p.tokens, p.dz.at.row, kDepth);
  k.x = map_of<T>(p.x.at.data, p.x.columns, p.tokens, p.x.at.row, kDepth);
  k.items = uint32_t(groups_of(p));
  const auto kernel = weight_kernel<T, kRows>;
  const int64_t resident = smaller(k.items, device::multiprocessor_count(device));
  device::launch(kernel, dim3(unsigned(resident)), dim3(kHopperThreads), sizeof(Smem<T, kRows>), stream, k);
}

template <class T>
void choose_rows(const WeightProduct& p, int device, Stream stream) {
  p.row_bits == 7 ? launch_weight<T, 128>(p, device, stream) : launch_weight<T, 64>(p, device, stream);
}

bool is_available(int device) {
  if (device::compute_capability(device) != 90) return false;
  static const bool is_built = device::is_native(weight_kernel<bf16, 128>, 90);
  return is_built;
}

}  // namespace

// What the copy engine can address, and enough of it for most of the multiprocessors.
bool block_sparse_weight_sm90_fits(const WeightProduct& p, int device) {
  constexpr int64_t kMostBlocks = int64_t{1} << 30;
  if (p.row_bits < 6 || p.column_bits < 6 || p.tokens == 0 || p.blocks + p.rows > kMostBlocks) return false;
  if (!is_addressable(p.dz, p.tokens) || !is_addressable(p.x, p.tokens)) return false;
  return 2 * (p.blocks << p.column_bits) >= kColumns * int64_t{device::multiprocessor_count(device)} &&
         is_available(device);
}

void block_sparse_weight_sm90(const WeightProduct& given, int device, Stream stream) {
  WeightProduct p = given;
  p.together_bits = log2_of(kColumns) - p.column_bits;
  p.dtype == DType::kFloat16 ? choose_rows<fp16>(p, device, stream) : choose_rows<bf16>(p, device, stream);
}

}  // namespace tilewright::prune::blocks
