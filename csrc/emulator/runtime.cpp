#include "emulator/runtime.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <numeric>
#include <thread>
#include <vector>

#include "core/check.h"
#include "emulator/block.h"

namespace tilewright::emulator {

// ---- Options -----------------------------------------------------------------------------------

namespace {

std::atomic<uint64_t> chosen_seed{0};
std::atomic<int> chosen_threads{0};
std::atomic<int> chosen_multiprocessors{2};
std::atomic<int> chosen_capability{80};

}  // namespace

void set_seed(uint64_t seed) { chosen_seed = seed; }

void set_threads(int threads) {
  check_value(threads >= 0, "threads: got ", threads, ", allowed: 0 (all cores) or more");
  chosen_threads = threads;
}

void set_multiprocessors(int count) {
  check_value(count >= 1, "count: got ", count, ", allowed: 1 or more");
  chosen_multiprocessors = count;
}

int multiprocessors() { return chosen_multiprocessors; }

void set_compute_capability(int number) {
  check_value(number == 80 || number == 90, "number: got ", number, ", allowed: 80 or 90");
  chosen_capability = number;
}

int compute_capability() { return chosen_capability; }

// ---- Launch ------------------------------------------------------------------------------------

namespace {

// The order of a grid's blocks: a seeded affine permutation of 0..count-1.
class BlockOrder {
 public:
  BlockOrder(uint64_t count, uint64_t seed) : count_(count) {
    Random random(seed);
    offset_ = random.next() % count;
    do step_ = random.next() % count + 1;
    while (std::gcd(step_, count) != 1);
  }
  uint64_t operator[](uint64_t position) const {
    __extension__ using Wide = unsigned __int128;
    return uint64_t((Wide{step_} * position + offset_) % count_);
  }

 private:
  uint64_t count_;
  uint64_t offset_;
  uint64_t step_;
};

// Blocks between launches: their stacks are costly to make, and cost nothing to keep.
class IdleBlocks {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

IdleBlocks& idle_blocks() {
  static IdleBlocks blocks;
  return blocks;
}

class Launch {
 public:
  Launch(const Grid& grid, uint64_t count, uint64_t seed)
      : grid_(grid), count_(count), seed_(seed), order_(count, seed) {}

  // Takes blocks until there are none left, or one that has to come before them has failed.
  void work() {
    std::unique_ptr<Block> block = idle_blocks().take();
    for (uint64_t position; (position = next_++) < failed_;) {
      const uint64_t number = order_[position];
      try {
        block->run(grid_, index(number), Random(seed_ + Random(number).next()).next());
      } catch (...) {
        note_failure(position);
      }
    }
    idle_blocks().give_back(std::move(block));
  }

  void rethrow_failure() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  uint3 index(uint64_t number) const {
    const uint64_t rows = number / grid_.blocks.x;
    return {unsigned(number % grid_.blocks.x), unsigned(rows % grid_.blocks.y),
            unsigned(rows / grid_.blocks.y)};
  }

  // Of several failures the first in the order counts, so that the report depends on the seed alone.
  void note_failure(uint64_t position) {
    const std::lock_guard lock(mutex_);
    if (position >= failed_) return;
    failed_ = position;
    error_ = std::current_exception();
  }

  const Grid& grid_;
  const uint64_t count_;
  const uint64_t seed_;
  const BlockOrder order_;
  std::atomic<uint64_t> next_{0};
  std::atomic<uint64_t> failed_{count_};  // positions from here on need not run
  std::mutex mutex_;
  std::exception_ptr error_;
};

// What cudaLaunchKernel refuses.
void check_configuration(const Grid& grid) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (threads == 0 || threads > kMaxThreads || grid.threads.z > 64 || grid.blocks.x > 0x7fffffffu ||
      grid.blocks.y > 65535 || grid.blocks.z > 65535 || grid.shared_bytes > kMaxSharedBytes) {
    fail(ErrorKind::kRuntime, "kernel launch: invalid configuration: grid (", grid.blocks.x, ", ",
         grid.blocks.y, ", ", grid.blocks.z, "), block (", grid.threads.x, ", ", grid.threads.y, ", ",
         grid.threads.z, "), shared memory ", grid.shared_bytes, " bytes");
  }
}

int worker_count(uint64_t blocks) {
  const int chosen = chosen_threads;
  const unsigned wanted = chosen > 0 ? unsigned(chosen) : std::max(1u, std::thread::hardware_concurrency());
  return int(std::min<uint64_t>(wanted, blocks));
}

}  // namespace

void run(const Grid& grid) {
  const uint64_t count = uint64_t{grid.blocks.x} * grid.blocks.y * grid.blocks.z;
  if (count == 0) return;
  check_configuration(grid);
  if (Block::is_running()) fail(ErrorKind::kRuntime, "kernel launch: called from within a kernel");
  Launch launch(grid, count, chosen_seed);
  {
    std::vector<std::jthread> helpers;
    for (int i = 1; i < worker_count(count); ++i) helpers.emplace_back([&launch] { launch.work(); });
    launch.work();
  }
  launch.rethrow_failure();
}

}  // namespace tilewright::emulator
