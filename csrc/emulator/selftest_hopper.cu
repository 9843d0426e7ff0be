// Self-tests of what Hopper adds: barriers that count bytes, tiles by the copy engine, products of a
// warpgroup.
#include <map>

#include "core/check.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/memory.h"
#include "device/sync.h"
#include "device/tma.h"
#include "device/warp.h"
#include "device/wgmma.h"
#include "emulator/selftest.h"

namespace tilewright::selftest {

using namespace tilewright::device;

namespace {

constexpr int kPanel = 64;  // elements of a row of a tile

// ---- Barriers ----------------------------------------------------------------------------------

constexpr unsigned kSlots = 2, kSlotLength = 64;

struct RingParams {
  const float* values;  // [rounds, kSlotLength]
  float* out;           // likewise
  unsigned rounds;
  bool with_waits;
};

struct RingShared {
  float slots[kSlots][kSlotLength];
  Mbarrier full[kSlots], empty[kSlots];
};

__global__ void mbarrier_ring_kernel(const __grid_constant__ RingParams params) {
  RingShared& shared = shared_memory<RingShared>();
  if (threadIdx.x == 0) {
    for (unsigned slot = 0; slot < kSlots; ++slot) {
      mbarrier_init(shared.full[slot], kSlotLength);
      mbarrier_init(shared.empty[slot], kSlotLength);
    }
    fence_mbarrier_init();
  }
  sync_block();
  const unsigned i = threadIdx.x % kSlotLength;
  for (unsigned round = 0; round < params.rounds; ++round) {
    const unsigned slot = round % kSlots, turn = round / kSlots % 2;
    if (threadIdx.x < kSlotLength) {
      mbarrier_wait(shared.empty[slot], turn ^ 1);
      shared.slots[slot][i] = params.values[round * kSlotLength + i];
      mbarrier_arrive(shared.full[slot]);
    } else {
      if (params.with_waits) mbarrier_wait(shared.full[slot], turn);
      params.out[round * kSlotLength + i] = shared.slots[slot][kSlotLength - 1 - i];
      mbarrier_arrive(shared.empty[slot]);
    }
  }
}

// ---- Tiles -------------------------------------------------------------------------------------

constexpr int kMaxTileRows = 256;

struct TileParams {
  TensorMap map;
  uint16_t* out;  // [rows][kPanel], as they lie in shared memory; of a store: what is stored
  int32_t at[4];
  int rows;
  bool waits;
};

struct TileShared {
  alignas(1024) uint16_t tile[kMaxTileRows][kPanel];
  Mbarrier barrier;
};

__global__ void tile_kernel(const __grid_constant__ TileParams params) {
  TileShared& shared = shared_memory<TileShared>();
  if (threadIdx.x == 0) {
    tma_prefetch_map(params.map);
    mbarrier_init(shared.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.barrier, params.rows * kSwizzleBytes);
    tma_load(shared.tile, params.map, shared.barrier, params.at[0], params.at[1], params.at[2], params.at[3]);
  }
  sync_block();
  if (params.waits) mbarrier_wait(shared.barrier, 0);
  for (int i = int(threadIdx.x); i < params.rows * kPanel; i += int(blockDim.x)) {
    params.out[i] = shared.tile[i / kPanel][i % kPanel];
  }
  sync_block();
  mbarrier_wait(shared.barrier, 0);
}

__global__ void store_kernel(const __grid_constant__ TileParams params) {
  TileShared& shared = shared_memory<TileShared>();
  for (int i = int(threadIdx.x); i < params.rows * kPanel; i += int(blockDim.x)) {
    shared.tile[i / kPanel][i % kPanel] = params.out[i];
  }
  fence_async_proxy();
  sync_block();
  if (threadIdx.x != 0) return;
  tma_store(params.map, shared.tile, params.at[0], params.at[1], params.at[2], params.at[3]);
  tma_store_commit();
  tma_store_wait<0>();
}

// ---- Products ----------------------------------------------------------------------------------

struct ProductParams {
  TensorMap a, b;
  const uint16_t* a_data;  // [64][depth]
  float* out;              // [64][N]
  int depth;               // 64 or 128
  int fault;
};

struct ProductShared {
  alignas(1024) uint16_t a[2][64][kPanel];
  alignas(1024) uint16_t b[2][128][kPanel];
  Mbarrier barrier;
};

enum Fault : int { kNone, kReadEarly, kOverwriteOperand, kWriteAccumulators, kHalfAtATime };

template <class T, int N, Major kMajor, bool kInRegisters>
__global__ void product_kernel(const __grid_constant__ ProductParams params) {
  ProductShared& shared = shared_memory<ProductShared>();
  const int panels = params.depth / kPanel;
  if (threadIdx.x == 0) {
    mbarrier_init(shared.barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(shared.barrier, (64 + N) * params.depth * int(sizeof(T)));
    for (int panel = 0; panel < panels; ++panel)
      tma_load(shared.a[panel], params.a, shared.barrier, panel * kPanel, 0, 0, 0);
    if (kMajor == Major::kAlong) {
      for (int panel = 0; panel < panels; ++panel)
        tma_load(shared.b[panel], params.b, shared.barrier, panel * kPanel, 0, 0, 0);
    } else {
      for (int panel = 0; panel < N / kPanel; ++panel)
        tma_load(shared.b[panel], params.b, shared.barrier, panel * kPanel, 0, 0, 0);
    }
  }
  sync_block();
  mbarrier_wait(shared.barrier, 0);
  const int lane = lane_id(), row = warp_id() * 16 + lane / 4, column = lane % 4 * 2;
  float d[N / 2];
  for (float& x : d) x = 1.0f;  // what the first product does not read
  wgmma_fence(d);
  for (int k = 0; k < params.depth / kWgmmaDepth; ++k) {
    const int panel = k / 4, within = k % 4 * 2 * kWgmmaDepth;
    const uint64_t b =
        kMajor == Major::kAlong
            ? wgmma_advance(wgmma_descriptor(shared.b[panel]), within)
            : wgmma_advance(wgmma_descriptor(shared.b[0], sizeof shared.b[0]), k * 16 * kSwizzleBytes);
    if constexpr (kInRegisters) {
      uint32_t a[4];
      for (int i = 0; i < 4; ++i) {
        const uint16_t* pair = params.a_data + (row + i % 2 * 8) * params.depth + k * 16 + i / 2 * 8 + column;
        a[i] = uint32_t{pair[1]} << 16 | pair[0];
      }
      wgmma<T, kMajor, N>(d, a, b, k > 0);
    } else {
      wgmma<T, kMajor, N>(d, wgmma_advance(wgmma_descriptor(shared.a[panel]), within), b, k > 0);
    }
    if (params.fault == kHalfAtATime) wgmma_commit();
  }
  wgmma_commit();
  if (params.fault == kOverwriteOperand) shared.b[0][threadIdx.x % 8][threadIdx.x / 8] = 0;
  if (params.fault == kWriteAccumulators) d[3] = 0.0f;
  if (params.fault == kHalfAtATime) wgmma_wait<2>(d);
  if (params.fault != kReadEarly) wgmma_wait<0>(d);
  for (int j = 0; j < N / 2; ++j) {
    params.out[(row + j / 2 % 2 * 8) * N + j / 4 * 8 + column + j % 2] = d[j];
  }
  if (params.fault == kReadEarly) wgmma_wait<0>(d);
}

template <class T, int N, Major kMajor>
void run_product(const ProductParams& params, bool in_registers) {
  const auto kernel = in_registers ? product_kernel<T, N, kMajor, true> : product_kernel<T, N, kMajor, false>;
  launch(kernel, 1, kWarpgroup, sizeof(ProductShared), nullptr, params);
}

template <class T, int N>
void run_product(const ProductParams& params, bool across, bool in_registers) {
  across ? run_product<T, N, Major::kAcross>(params, in_registers)
         : run_product<T, N, Major::kAlong>(params, in_registers);
}

template <class T>
void run_product(ProductParams params, const uint16_t* a, const uint16_t* b, int columns, bool across,
                 bool in_registers) {
  const int64_t depth = params.depth;
  const int64_t rows = across ? depth : columns, length = across ? columns : depth;
  params.a = tensor_map<T>(a, {{depth, 1, kPanel}, {64, depth, 64}, {1, depth, 1}, {1, depth, 1}});
  params.b =
      tensor_map<T>(b, {{length, 1, kPanel}, {rows, length, int32_t(rows)}, {1, length, 1}, {1, length, 1}});
  columns == 64 ? run_product<T, 64>(params, across, in_registers)
                : run_product<T, 128>(params, across, in_registers);
}

}  // namespace

Floats mbarrier_ring(const Floats& values, bool with_waits) {
  Floats out(values.size());
  launch(mbarrier_ring_kernel, 1, 2 * kSlotLength, sizeof(RingShared), nullptr,
         {values.data(), out.data(), unsigned(values.size() / kSlotLength), with_waits});
  return out;
}

namespace {

TileParams tile_params(const Halves& tensor, const std::array<int64_t, 4>& sizes,
                       const std::array<int64_t, 4>& strides, const std::array<int32_t, 4>& box,
                       const std::array<int32_t, 4>& at) {
  TileParams params{};
  TensorAxis axes[4];
  for (size_t i = 0; i < 4; ++i) axes[i] = {sizes[i], strides[i], box[i]};
  params.map = tensor_map<bf16>(tensor.data(), axes);
  params.rows = box[1] * box[2] * box[3];
  check_value(params.rows <= kMaxTileRows, "box: too many rows");
  for (size_t i = 0; i < 4; ++i) params.at[i] = at[i];
  return params;
}

}  // namespace

Halves tma_stored(const Halves& tile, const std::array<int64_t, 4>& sizes,
                  const std::array<int64_t, 4>& strides, const std::array<int32_t, 4>& box,
                  const std::array<int32_t, 4>& at) {
  Halves stored(size_t(sizes[0] * sizes[1] * sizes[2] * sizes[3])), from = tile;
  TileParams params = tile_params(stored, sizes, strides, box, at);
  check_value(tile.size() == size_t(params.rows) * kPanel, "tile: wrong size");
  params.out = from.data();
  launch(store_kernel, 1, 64, sizeof(TileShared), nullptr, params);
  return stored;
}

Halves tma_tile(const Halves& values, const std::array<int64_t, 4>& sizes,
                const std::array<int64_t, 4>& strides, const std::array<int32_t, 4>& box,
                const std::array<int32_t, 4>& at, bool waits) {
  TileParams params = tile_params(values, sizes, strides, box, at);
  params.waits = waits;
  Halves out(size_t(params.rows) * kPanel);
  params.out = out.data();
  launch(tile_kernel, 1, 64, sizeof(TileShared), nullptr, params);
  return out;
}

Floats wgmma_product(const std::string& type, const Halves& a, const Halves& b, int columns, bool across,
                     bool in_registers, int fault) {
  check_value(a.size() % 64 == 0 && (columns == 64 || columns == 128), "a: 64 rows; columns: 64, 128");
  check_value(a.size() <= 64 * 128 && b.size() == a.size() / 64 * size_t(columns), "b: wrong size");
  Floats out(64 * size_t(columns));
  ProductParams params{};
  params.a_data = a.data();
  params.out = out.data();
  params.depth = int(a.size() / 64);
  params.fault = fault;
  type == "bf16" ? run_product<bf16>(params, a.data(), b.data(), columns, across, in_registers)
                 : run_product<fp16>(params, a.data(), b.data(), columns, across, in_registers);
  return out;
}

// ---- Misuse ------------------------------------------------------------------------------------

namespace {

struct MisuseShared {
  alignas(1024) uint16_t tile[8][kPanel];
  Mbarrier barrier, other;
};

struct MisuseParams;
using Body = void (*)(const MisuseParams&, MisuseShared&, unsigned thread);

struct MisuseParams {
  TensorMap map;  // a box is 8 rows, 1024 bytes
  Body body;
  uint16_t* memory;
};

constexpr int kBoxBytes = 1024;

__global__ void misuse_kernel(const __grid_constant__ MisuseParams params) {
  params.body(params, shared_memory<MisuseShared>(), threadIdx.x);
}

// The first thread makes the barrier known to all.
void make_barrier(MisuseShared& shared, unsigned thread, int arrivals) {
  if (thread == 0) {
    mbarrier_init(shared.barrier, arrivals);
    fence_mbarrier_init();
  }
  sync_block();
}

void load(const MisuseParams& params, MisuseShared& shared) {
  tma_load(shared.tile, params.map, shared.barrier, 0, 0, 0, 0);
}

void begin_product(float (&d)[32], uint64_t descriptor) {
  wgmma<bf16, Major::kAlong, 64>(d, descriptor, descriptor, false);
}

const std::map<std::string, Body>& bodies() {
  static const std::map<std::string, Body> all = {
      {"mbarrier that nobody initialised",
       [](const MisuseParams&, MisuseShared& shared, unsigned) { mbarrier_wait(shared.barrier, 0); }},
      {"mbarrier initialised twice",
       [](const MisuseParams&, MisuseShared& shared, unsigned) { mbarrier_init(shared.barrier, 1); }},
      {"mbarrier for no arrivals",
       [](const MisuseParams&, MisuseShared& shared, unsigned) { mbarrier_init(shared.barrier, 0); }},
      {"mbarrier written over",
       [](const MisuseParams&, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread == 0) shared.barrier.state = 0;
         sync_block();
         mbarrier_wait(shared.barrier, 0);
       }},
      {"mbarrier that lacks an arrival",
       [](const MisuseParams&, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 2);
         if (thread == 0) mbarrier_arrive(shared.barrier);
         mbarrier_wait(shared.barrier, 0);
       }},
      {"copy of less than was announced",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread == 0) {
           mbarrier_arrive_expect(shared.barrier, 2 * kBoxBytes);
           load(params, shared);
         }
         mbarrier_wait(shared.barrier, 0);
       }},
      {"copy of more than was announced",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread != 0) return;
         mbarrier_arrive_expect(shared.barrier, kBoxBytes / 2);
         load(params, shared);
       }},
      {"copy before the barrier is fenced",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         if (thread != 0) return;
         mbarrier_init(shared.barrier, 1);
         load(params, shared);
       }},
      {"copy to global memory",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread == 0) tma_load(params.memory, params.map, shared.barrier, 0, 0, 0, 0);
       }},
      {"copy by what is no map",
       [](const MisuseParams&, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         const TensorMap map{};
         if (thread == 0) tma_load(shared.tile, map, shared.barrier, 0, 0, 0, 0);
       }},
      {"arrival while copies are under way",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread != 0) return;
         mbarrier_arrive_expect(shared.barrier, kBoxBytes);
         load(params, shared);
         mbarrier_arrive(shared.barrier);
       }},
      {"end while copies are under way",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         make_barrier(shared, thread, 1);
         if (thread != 0) return;
         mbarrier_arrive_expect(shared.barrier, kBoxBytes);
         load(params, shared);
       }},
      {"store from global memory",
       [](const MisuseParams& params, MisuseShared&, unsigned thread) {
         if (thread == 0) tma_store(params.map, params.memory, 0, 0, 0, 0);
       }},
      {"store that is not waited for",
       [](const MisuseParams& params, MisuseShared& shared, unsigned thread) {
         if (thread == 0) tma_store(params.map, shared.tile, 0, 0, 0, 0), tma_store_commit();
       }},
      {"product without a fence",
       [](const MisuseParams&, MisuseShared& shared, unsigned) {
         float d[32];
         begin_product(d, wgmma_descriptor(shared.tile));
       }},
      {"product that is not waited for",
       [](const MisuseParams&, MisuseShared& shared, unsigned) {
         float d[32];
         wgmma_fence(d);
         begin_product(d, wgmma_descriptor(shared.tile));
         wgmma_commit();
       }},
      {"products that differ",
       [](const MisuseParams&, MisuseShared& shared, unsigned thread) {
         float d[32];
         wgmma_fence(d);
         begin_product(d, wgmma_descriptor(shared.tile[thread / 64 * 8 % 16]));
         wgmma_commit();
         wgmma_wait<0>(d);
       }},
      {"products of one warp alone",
       [](const MisuseParams&, MisuseShared& shared, unsigned thread) {
         float d[32];
         if (thread >= 32) return;
         wgmma_fence(d);
         wgmma_commit();
         wgmma_wait<0>(d);
         wgmma_fence(d);
         begin_product(d, wgmma_descriptor(shared.tile));
         wgmma_commit();
         wgmma_wait<0>(d);
       }},
      {"product beyond shared memory",
       [](const MisuseParams&, MisuseShared& shared, unsigned) {
         float d[32];
         wgmma_fence(d);
         begin_product(d, wgmma_descriptor(shared.tile));
         wgmma_commit();
         wgmma_wait<0>(d);
       }},
      {"product of tiles without swizzle",
       [](const MisuseParams&, MisuseShared& shared, unsigned) {
         float d[32];
         wgmma_fence(d);
         begin_product(d, wgmma_descriptor(shared.tile) << 2 >> 2);
       }},
      {"more registers than there are",
       [](const MisuseParams&, MisuseShared&, unsigned) { take_registers<264>(); }}};
  return all;
}

}  // namespace

void hopper_misuse(const std::string& what) {
  Halves memory(16 * kPanel);
  const auto body = bodies().find(what);
  check_value(body != bodies().end(), "selftest: no misuse \"", what, "\"");
  MisuseParams params{};
  params.map =
      tensor_map<bf16>(memory.data(), {{kPanel, 1, kPanel}, {16, kPanel, 8}, {1, kPanel, 1}, {1, kPanel, 1}});
  params.body = body->second;
  params.memory = memory.data();
  launch(misuse_kernel, 1, kWarpgroup, sizeof(MisuseShared), nullptr, params);
}

std::vector<std::string> hopper_misuses() {
  std::vector<std::string> names;
  for (const auto& [name, body] : bodies()) names.push_back(name);
  return names;
}

}  // namespace tilewright::selftest
