// Self-tests of the race detector on what works beside the threads: copies of tiles, their stores, products
// of a warpgroup. Each is an order of accesses to shared memory, whole or lacking one thing.
#include <map>

#include "core/check.h"
#include "device/launch.h"
#include "device/mbarrier.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/tma.h"
#include "device/wgmma.h"
#include "emulator/selftest.h"

namespace tilewright::selftest {

using namespace tilewright::device;

namespace {

constexpr int kSide = 64;  // rows and columns of a tile
constexpr int kTileBytes = kSide * kSide * 2;
constexpr unsigned kCopier = kWarpgroup;  // the first thread behind the warpgroup that multiplies

struct OrderShared {
  alignas(1024) uint16_t tile[2][kSide][kSide];
  Mbarrier full[2], empty;
};

struct OrderParams;
using Body = void (*)(const OrderParams&, OrderShared&, unsigned thread);

struct OrderParams {
  TensorMap map;
  uint16_t* out;  // [kWarpgroup]
  Body body;
  bool lacks;
};

void load(const OrderParams& p, OrderShared& s, int tile) {
  mbarrier_arrive_expect(s.full[tile], kTileBytes);
  tma_load(s.tile[tile], p.map, s.full[tile], 0, 0, 0, 0);
}

void begin_product(float (&d)[kSide / 2], const OrderShared& s, int tile) {
  const uint64_t operand = wgmma_descriptor(s.tile[tile]);
  wgmma_fence(d);
  wgmma<bf16, Major::kAlong, kSide>(d, operand, operand, false);
  wgmma_commit();
}

uint16_t& own_element(OrderShared& s, int tile, unsigned thread) {
  return s.tile[tile][thread % kSide][thread / kSide];
}

void sync_warpgroup() { barrier_sync(1, kWarpgroup); }

void begin_store(const OrderParams& p, OrderShared& s, int tile) {
  tma_store(p.map, s.tile[tile], 0, 0, 0, 0);
  tma_store_commit();
}

// What the warpgroup writes is an operand, or is stored.
template <class Use>
void write_and_use(OrderShared& s, unsigned thread, bool fence, bool barrier, const Use& use) {
  if (thread >= kWarpgroup) return;
  own_element(s, 0, thread) = 0;
  if (fence) fence_async_proxy();
  if (barrier) sync_warpgroup();
  use();
}

void multiply_written(OrderShared& s, unsigned thread, bool fence, bool barrier) {
  write_and_use(s, thread, fence, barrier, [&] {
    float d[kSide / 2];
    begin_product(d, s, 0);
    wgmma_wait<0>(d);
  });
}

void store_written(const OrderParams& p, OrderShared& s, unsigned thread, bool fence, bool barrier) {
  write_and_use(s, thread, fence, barrier, [&] {
    if (thread != 0) return;
    begin_store(p, s, 0);
    tma_store_wait<0>();
  });
}

// A second copy over what `use` reads of the first: it calls `give_back` once it has read.
template <class Use>
void reuse(const OrderParams& p, OrderShared& s, unsigned thread, const Use& use) {
  if (thread == kCopier) {
    load(p, s, 0);
    mbarrier_wait(s.empty, 0);
    load(p, s, 0);
  }
  if (thread < kWarpgroup) {
    mbarrier_wait(s.full[0], 0);
    use([&] { mbarrier_arrive(s.empty); });
    mbarrier_wait(s.full[0], 1);
  }
}

const std::map<std::string, Body>& orders() {
  static const std::map<std::string, Body> all = {
      {"threads read a copy: the wait for its mbarrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread == kCopier) load(p, s, 0);
         if (!p.lacks) mbarrier_wait(s.full[0], 0);
         if (thread < kWarpgroup) p.out[thread] = own_element(s, 0, thread);
         mbarrier_wait(s.full[0], 0);
       }},
      {"threads read one of two copies: the wait for the other's mbarrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread == kCopier) load(p, s, 0), load(p, s, 1);
         mbarrier_wait(s.full[0], 0);
         if (!p.lacks) mbarrier_wait(s.full[1], 0);
         if (thread < kWarpgroup) p.out[thread] = own_element(s, 1, thread);
         mbarrier_wait(s.full[1], 0);
       }},
      {"a product reads a copy: the wait for its mbarrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread == kCopier) load(p, s, 0);
         if (!p.lacks) mbarrier_wait(s.full[0], 0);
         float d[kSide / 2];
         if (thread < kWarpgroup) begin_product(d, s, 0), wgmma_wait<0>(d);
         mbarrier_wait(s.full[0], 0);
       }},
      {"a copy over what threads read: the read before the arrival",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         reuse(p, s, thread, [&](const auto& give_back) {
           if (p.lacks) give_back();
           p.out[thread] = own_element(s, 0, thread);
           if (!p.lacks) give_back();
         });
       }},
      {"a copy over what a product reads: its wait before the arrival",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         reuse(p, s, thread, [&](const auto& give_back) {
           float d[kSide / 2];
           begin_product(d, s, 0);
           if (p.lacks) give_back();
           wgmma_wait<0>(d);
           if (!p.lacks) give_back();
         });
       }},
      {"a copy over what threads wrote: the fence",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         own_element(s, 0, thread) = 0;
         if (!p.lacks) fence_async_proxy();
         sync_block();
         if (thread == kCopier) load(p, s, 0);
         mbarrier_wait(s.full[0], 0);
       }},
      {"threads write what their product reads: its wait",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         float d[kSide / 2];
         if (thread >= kWarpgroup) return;
         begin_product(d, s, 0);
         if (!p.lacks) wgmma_wait<0>(d);
         sync_warpgroup();
         own_element(s, 0, thread) = 0;
         wgmma_wait<0>(d);
       }},
      {"threads write what the younger of two products reads: its wait",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         float d[2][kSide / 2];
         if (thread >= kWarpgroup) return;
         begin_product(d[0], s, 0);
         begin_product(d[1], s, 1);
         p.lacks ? wgmma_wait<1>(d[0]) : wgmma_wait<0>(d[0]);
         sync_warpgroup();
         own_element(s, 0, thread) = own_element(s, 1, thread) = 0;
         wgmma_wait<0>(d[1]);
       }},
      {"threads write what the product of other warps reads: a barrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         float d[kSide / 2];
         if (thread >= kWarpgroup) return;
         begin_product(d, s, 0);
         wgmma_wait<0>(d);
         if (!p.lacks) sync_warpgroup();
         own_element(s, 0, thread) = 0;
       }},
      {"a product reads what threads wrote: the fence",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         multiply_written(s, thread, !p.lacks, true);
       }},
      {"a product reads what threads wrote: the barrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         multiply_written(s, thread, true, !p.lacks);
       }},
      {"a store reads what threads wrote: the fence",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         store_written(p, s, thread, !p.lacks, true);
       }},
      {"a store reads what threads wrote: the barrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         store_written(p, s, thread, true, !p.lacks);
       }},
      {"a thread writes what its store reads: its wait",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread != 0) return;
         begin_store(p, s, 0);
         if (!p.lacks) tma_store_wait<0>();
         own_element(s, 0, thread) = 0;
         tma_store_wait<0>();
       }},
      {"a thread writes what the younger of two stores reads: its wait",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread != 0) return;
         begin_store(p, s, 0);
         begin_store(p, s, 1);
         p.lacks ? tma_store_wait<1>() : tma_store_wait<0>();
         own_element(s, 0, thread) = own_element(s, 1, thread) = 0;
         tma_store_wait<0>();
       }},
      {"a thread writes what another's store reads: its wait before the barrier",
       [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread == 0) begin_store(p, s, 0);
         if (thread == 0 && !p.lacks) tma_store_wait<0>();
         sync_block();
         if (thread == 1) own_element(s, 0, thread) = 0;
         if (thread == 0) tma_store_wait<0>();
       }},
      {"a copy over what a store reads: its wait", [](const OrderParams& p, OrderShared& s, unsigned thread) {
         if (thread == kCopier) {
           begin_store(p, s, 0);
           if (!p.lacks) tma_store_wait<0>();
           load(p, s, 0);
           tma_store_wait<0>();
         }
         mbarrier_wait(s.full[0], 0);
       }}};
  return all;
}

__global__ void order_kernel(const __grid_constant__ OrderParams p) {
  OrderShared& s = shared_memory<OrderShared>();
  if (threadIdx.x == 0) {
    for (Mbarrier& full : s.full) mbarrier_init(full, 1);
    mbarrier_init(s.empty, kWarpgroup);
    fence_mbarrier_init();
  }
  sync_block();
  p.body(p, s, threadIdx.x);
}

}  // namespace

void hopper_order(const std::string& what, bool lacks) {
  const auto body = orders().find(what);
  check_value(body != orders().end(), "selftest: no order \"", what, "\"");
  Halves memory(kSide * kSide), out(kWarpgroup);
  OrderParams params{};
  params.map = tensor_map<bf16>(memory.data(),
                                {{kSide, 1, kSide}, {kSide, kSide, kSide}, {1, kSide, 1}, {1, kSide, 1}});
  params.out = out.data();
  params.body = body->second;
  params.lacks = lacks;
  launch(order_kernel, 1, 2 * kWarpgroup, sizeof(OrderShared), nullptr, params);
}

std::vector<std::string> hopper_orders() {
  std::vector<std::string> names;
  for (const auto& [name, body] : orders()) names.push_back(name);
  return names;
}

}  // namespace tilewright::selftest
