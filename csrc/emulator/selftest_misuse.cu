// What a kernel or its launch must not do, done on purpose: each of these the emulator has to report.
#include <array>
#include <map>
#include <stdexcept>

#include "core/check.h"
#include "device/async_copy.h"
#include "device/atomics.h"
#include "device/launch.h"
#include "device/memory.h"
#include "device/mma.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"
#include "emulator/runtime.h"
#include "emulator/selftest.h"

namespace tilewright::selftest {

using namespace tilewright::device;

namespace {

struct Params {
  char* memory;  // 64 bytes, 16-byte aligned
};

struct Shared {
  alignas(16) char bytes[64];
};

using Body = void (*)(const Params&, unsigned thread);

struct BodyParams {
  Body body;
  Params params;
};

__global__ void body_kernel(const __grid_constant__ BodyParams params) {
  params.body(params.params, threadIdx.x);
}

const std::map<std::string, Body>& bodies() {
  static const std::map<std::string, Body> all = {
      {"barrier under a condition that splits a warp",
       [](const Params&, unsigned thread) {
         if (thread % 2 == 0) sync_block();
         sync_block();
       }},
      {"barrier that some threads never reach",
       [](const Params&, unsigned thread) {
         if (thread < 32) {
           sync_block();
         } else {
           barrier_sync(1, 64);
         }
       }},
      {"block votes of different kinds",
       [](const Params&, unsigned thread) {
         if (thread < 32) {
           sync_block_or(true);
         } else {
           sync_block_and(true);
         }
       }},
      {"named barrier without its partner", [](const Params&, unsigned) { barrier_sync(3, 96); }},
      {"named barrier that its partner leaves out",
       [](const Params&, unsigned thread) {
         if (thread < 32) barrier_sync(3, 64);
       }},
      {"named barrier with two counts",
       [](const Params&, unsigned thread) { barrier_sync(1, thread < 32 ? 64 : 32); }},
      {"named barrier reached twice",
       [](const Params&, unsigned thread) {
         if (thread >= 32) return;
         for (int i = 0; i < 2; ++i) barrier_arrive(1, 64);
       }},
      {"named barrier for part of a warp", [](const Params&, unsigned) { barrier_sync(1, 40); }},
      {"barrier id out of range", [](const Params&, unsigned) { barrier_sync(16, 64); }},
      {"shuffle with a lane that exited",
       [](const Params&, unsigned thread) {
         if (thread == 5) return;
         shfl_xor(thread, 1);
       }},
      {"exit of a lane that a shuffle waits for",
       [](const Params&, unsigned thread) {
         if (thread >= 32) return;
         if (thread < 16) shfl(thread, 20);
         if (thread >= 16) shfl(thread, 20, 0xffff0000u);
       }},
      {"shuffle masks that differ",
       [](const Params&, unsigned thread) { shfl(thread, 0, thread % 32 < 16 ? kFullWarp : 0xffff8000u); }},
      {"shuffle and ballot",
       [](const Params&, unsigned thread) {
         if (thread % 2 == 0) {
           shfl(thread, 0);
         } else {
           ballot(true);
         }
       }},
      {"mask without the caller", [](const Params&, unsigned) { sync_warp(1u); }},
      {"shuffle from a lane outside the mask",
       [](const Params&, unsigned thread) {
         if (thread < 4) shfl(thread, 9, 0xfu);
       }},
      {"misaligned load",
       [](const Params& params, unsigned) {
         load(reinterpret_cast<const Vector<float, 4>*>(params.memory + 4));
       }},
      {"misaligned streaming store",
       [](const Params& params, unsigned) {
         store_streaming(reinterpret_cast<Vector<uint16_t, 4>*>(params.memory + 2), Vector<uint16_t, 4>{});
       }},
      {"misaligned atomic",
       [](const Params& params, unsigned) { atomic_add(reinterpret_cast<uint64_t*>(params.memory + 4), 1); }},
      {"misaligned cp_async",
       [](const Params& params, unsigned) {
         cp_async<16>(shared_memory<Shared>().bytes, params.memory + 8);
       }},
      {"cp_async to global memory",
       [](const Params& params, unsigned) { cp_async<4>(params.memory, params.memory + 4); }},
      {"matrix row that is not aligned",
       [](const Params&, unsigned thread) {
         uint32_t registers[4];
         load_matrices(registers, thread % 32 == 7 ? 8 : 0);
       }},
      {"matrix row beyond shared memory",
       [](const Params&, unsigned) {
         uint32_t registers[4];
         load_matrices_transposed(registers, sizeof(Shared));
       }},
      {"matrix product by half of a warp",
       [](const Params&, unsigned thread) {
         float c[4] = {};
         if (thread % 32 < 16) mma_m16n8k16<bf16>(c, {}, 0, 0);
       }},
      {"matrix product of two types",
       [](const Params&, unsigned thread) {
         float c[4] = {};
         if (thread % 2 == 0) {
           mma_m16n8k16<bf16>(c, {}, 0, 0);
         } else {
           mma_m16n8k16<fp16>(c, {}, 0, 0);
         }
       }},
      {"shared memory beyond the launch's",
       [](const Params&, unsigned) { shared_memory<std::array<Shared, 2>>(); }},
      {"launch within a kernel",
       [](const Params& params, unsigned) {
         launch(body_kernel, 1, 1, 0, nullptr, {[](const Params&, unsigned) {}, params});
       }},
      {"exception of a kernel", [](const Params&, unsigned) { throw std::out_of_range("index 7 of 5"); }}};
  return all;
}

void run_body(Body body, unsigned threads) {
  alignas(16) char memory[64] = {};
  launch(body_kernel, 1, threads, sizeof(Shared), nullptr, {body, {memory}});
}

const std::map<std::string, void (*)()>& launch_misuses() {
  static const std::map<std::string, void (*)()> all = {
      {"mask with lanes that do not exist",
       [] { run_body([](const Params&, unsigned) { ballot(true); }, 40); }},
      {"device function outside a kernel", [] { sync_block(); }},
      {"block of 1025 threads", [] { run_body([](const Params&, unsigned) {}, 1025); }},
      {"block of no threads", [] { run_body([](const Params&, unsigned) {}, 0); }},
      {"shared memory of 228 KiB",
       [] { launch(body_kernel, 1, 1, 228 * 1024, nullptr, {[](const Params&, unsigned) {}, {}}); }},
      {"negative number of OS threads", [] { emulator::set_threads(-1); }}};
  return all;
}

// ---- What is allowed at the limits -------------------------------------------------------------

struct LargestParams {
  uint32_t words[kMaxParamsBytes / 4 - 4];
  uint64_t* out;  // [threads]
};

__global__ void largest_params_kernel(const __grid_constant__ LargestParams params) {
  uint64_t sum = 0;
  for (const uint32_t word : params.words) sum += word;
  sync_block();
  params.out[threadIdx.x] = sum;
}

}  // namespace

void misuse(const std::string& what) {
  if (const auto launched = launch_misuses().find(what); launched != launch_misuses().end())
    return launched->second();
  const auto body = bodies().find(what);
  check_value(body != bodies().end(), "selftest: no misuse \"", what, "\"");
  run_body(body->second, 64);
}

std::vector<std::string> misuses() {
  std::vector<std::string> names;
  for (const auto& [name, body] : bodies()) names.push_back(name);
  for (const auto& [name, call] : launch_misuses()) names.push_back(name);
  return names;
}

void fail_in_odd_blocks(unsigned blocks) {
  const Body body = [](const Params&, unsigned) {
    if (blockIdx.x % 2 == 0) return;
    const unsigned delay = blockIdx.x % 4 == 1 ? 200000 : 40000;
    for (unsigned i = 0; i < delay; ++i) sync_warp(1u);
    fail(ErrorKind::kRuntime, "block ", blockIdx.x);
  };
  launch(body_kernel, blocks, 1, 0, nullptr, {body, {}});
}

Longs largest_params() {
  constexpr unsigned kSummers = 64;
  LargestParams params{};
  for (uint32_t i = 0; uint32_t& word : params.words) word = i++;
  Longs out(kSummers);
  params.out = out.data();
  launch(largest_params_kernel, 1, kSummers, 0, nullptr, params);
  return out;
}

Bytes copy_and_fill(const Bytes& values) {
  const DeviceGuard guard(0);
  Bytes out(values.size());
  copy_to_device(out.data(), values.data(), values.size(), nullptr);
  fill_zero(out.data() + values.size() / 2, values.size() - values.size() / 2, nullptr);
  return out;
}

std::vector<int> device_properties() {
  return {multiprocessor_count(0), resident_blocks(body_kernel, 128, sizeof(Shared))};
}

}  // namespace tilewright::selftest
