#include "emulator/block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <utility>

#include "core/check.h"

TILEWRIGHT_EMULATOR_LOCAL uint3 threadIdx{};
TILEWRIGHT_EMULATOR_LOCAL uint3 blockIdx{};
TILEWRIGHT_EMULATOR_LOCAL dim3 blockDim{};
TILEWRIGHT_EMULATOR_LOCAL dim3 gridDim{};

namespace tilewright::emulator {

TILEWRIGHT_EMULATOR_LOCAL Block* running_block = nullptr;

void report_outside_kernel() {
  fail(ErrorKind::kRuntime, "emulator: device function called outside a kernel");
}

namespace {

// Stack tops at equal distances of a power of two would all fall into the same few sets of the caches.
size_t stack_offset(unsigned rank) { return rank % 32 * 256; }

}  // namespace

// ---- Running -----------------------------------------------------------------------------------

void Block::run(const Grid& grid, uint3 index, uint64_t seed) {
  set_up(grid, index, seed);
  running_block = this;
  Lane& first = next_ready();
  make_running(first);
  scheduler_.switch_to(first.fibre);
  running_block = nullptr;
  // Threads that a failure left suspended are abandoned: nothing of a kernel's needs a destructor.
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  check_mbarriers();
  check_matrix_groups();
  check_guards();
  check_races();
}

void Block::set_up(const Grid& grid, uint3 index, uint64_t seed) {
  grid_ = &grid;
  index_ = index;
  random_ = Random(seed);
  blockIdx = index;
  blockDim = grid.threads;
  gridDim = grid.blocks;
  set_up_shared_memory(grid.shared_bytes);
  set_up_threads();
  races_.begin(threads_, shared_, grid.shared_bytes);
}

void Block::set_up_threads() {
  threads_ = alive_ = blockDim.x * blockDim.y * blockDim.z;
  while (stacks_.size() < threads_) stacks_.emplace_back();
  if (lanes_.size() < threads_) lanes_.resize(threads_);
  ready_.clear();
  for (Warp& warp : warps_) {
    warp.alive = 0;
    warp.meetings = 0;
  }
  uint3 thread{0, 0, 0};
  for (unsigned rank = 0; rank < threads_; ++rank) {
    Lane& lane = lanes_[rank];
    lane.fibre.prepare(stacks_[rank], stack_offset(rank), fibre_main);
    lane.index = thread;
    lane.rank = rank;
    lane.wait = {};
    lane.copies.forget();
    lane.matrix.forget();
    lane.stores = {};
    ready_.add(lane, random_);
    warps_[lane.warp()].alive |= lane.bit();
    if (++thread.x == blockDim.x) thread.x = 0, ++thread.y;
    if (thread.y == blockDim.y) thread.y = 0, ++thread.z;
  }
  for (Warp& warp : warps_) warp.existing = warp.alive;
  mbarriers_.clear();
  for (MatrixGroup& group : matrix_groups_) group.forget();
  barriers_[kBlockBarrier].reset();
  if (std::exchange(named_barriers_used_, false)) {
    for (Barrier& barrier : barriers_) barrier.reset();
  }
}

// The first thing on every fibre's stack.
void Block::fibre_main() {
  Block& block = *running_block;
  block.current_->fibre.entered();
  block.run_lane();
}

void Block::run_lane() {
  Lane& lane = *current_;
  Lane* next = nullptr;
  try {
    grid_->run_thread(*grid_);
    leave(lane);
    if (alive_ != 0) next = &next_ready();
  } catch (...) {
    error_ = std::current_exception();
  }
  if (next != nullptr) make_running(*next);
  lane.fibre.switch_to(next != nullptr ? next->fibre : scheduler_, /*ended=*/true);
}

void Block::leave(Lane& lane) {
  Warp& warp = warps_[lane.warp()];
  for (unsigned i = 0; i < warp.meetings; ++i) {
    const Rendezvous& meeting = warp.meeting[i];
    if ((meeting.mask & lane.bit()) == 0) continue;
    const Lane& waiting = lanes_[lane.warp() * kWarpLanes + unsigned(std::countr_zero(meeting.arrived))];
    report(waiting.wait.site,
           str("the thread exits, but thread ", waiting.rank, " waits for it ", describe(waiting)));
  }
  check_matrix_end(lane);
  check_stores_end(lane);
  lane.wait.where = Wait::Where::kExited;
  warp.alive &= ~lane.bit();
  --alive_;
  leave_barriers(lane);
}

void Block::report_deadlock() const {
  fail(ErrorKind::kRuntime, "emulator: ", describe_block(),
       ": deadlock, no thread can go on: ", describe_threads());
}

// ---- Shared memory -----------------------------------------------------------------------------

namespace {

constexpr size_t kSharedAlignment = 1024;  // as device/smem.h promises
constexpr ptrdiff_t kHeadBytes = kSharedAlignment;
constexpr size_t kTailBytes = 4096;
constexpr unsigned char kPoison = 0xff;
// A NaN as fp16, bf16, fp32 and fp64, and unlike the poison.
constexpr uint16_t kGuard = 0xffc5;

constexpr std::array<uint16_t, kTailBytes / 2> guard_pattern() {
  std::array<uint16_t, kTailBytes / 2> pattern{};
  pattern.fill(kGuard);
  return pattern;
}

constexpr auto kGuardPattern = guard_pattern();

void fill_guard(char* guard, size_t bytes) {
  std::memcpy(guard, kGuardPattern.data(), bytes);
  forbid_access(guard, bytes);
}

// The offset of the first byte that is no longer the guard's, or `bytes`.
size_t first_change(const char* guard, size_t bytes) {
  const char* pattern = reinterpret_cast<const char*>(kGuardPattern.data());
  if (std::memcmp(guard, pattern, bytes) == 0) return bytes;
  return size_t(std::mismatch(guard, guard + bytes, pattern).first - guard);
}

}  // namespace

void Block::Memory::reserve(size_t bytes) {
  if (bytes <= size) return;
  release();
  start = static_cast<char*>(::operator new(bytes, std::align_val_t(kSharedAlignment)));
  size = bytes;
}

void Block::Memory::release() {
  if (start == nullptr) return;
  allow_access(start, size);
  ::operator delete(start, std::align_val_t(kSharedAlignment));
  start = nullptr;
  size = 0;
}

void Block::set_up_shared_memory(size_t bytes) {
  memory_.reserve(kHeadBytes + bytes + kTailBytes);
  allow_access(memory_.start, memory_.size);
  shared_ = memory_.start + kHeadBytes;
  std::memset(shared_, kPoison, bytes);
  fill_guard(memory_.start, kHeadBytes);
  fill_guard(shared_ + bytes, kTailBytes);
}

void Block::check_guards() const {
  if (kAddressSanitizer) return;  // it saw the write itself
  const size_t head = first_change(memory_.start, kHeadBytes);
  const size_t tail = first_change(shared_ + grid_->shared_bytes, kTailBytes);
  if (head == kHeadBytes && tail == kTailBytes) return;
  const ptrdiff_t byte =
      head == kHeadBytes ? ptrdiff_t(grid_->shared_bytes + tail) : ptrdiff_t(head) - kHeadBytes;
  fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ": a thread wrote out of bounds: byte ", byte,
       " of shared memory, which has ", grid_->shared_bytes, " bytes");
}

void Block::check_races() const {
  const Race* race = races_.first();
  if (race == nullptr) return;
  const auto describe_side = [&](unsigned thread) {
    const Agent* agent = races_.agent(thread);
    if (agent != nullptr)
      return str(agent->what, " ", agent->number, " (begun last at ", place_of(agent->site), ")");
    const Wait& wait = lanes_[thread].wait;
    if (wait.site.line() == 0) return str("thread ", thread, ", which never waits,");
    return str("thread ", thread, " (which waits last at ", place_of(wait.site), ")");
  };
  const bool threads_alone = races_.agent(race->thread) == nullptr && races_.agent(race->other) == nullptr;
  const char* lacking = race->unfenced ? "fence_async_proxy" : threads_alone ? "barrier" : "barrier or wait";
  fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ": a race on byte ", race->offset,
       " of shared memory: ", describe_side(race->thread), race->writes ? " writes" : " reads", " what ",
       describe_side(race->other), race->other_wrote ? " wrote" : " read", ", and no ", lacking,
       " is between them", place_of_code(race->code));
}

void* Block::shared_memory(size_t bytes) const {
  if (bytes > grid_->shared_bytes) {
    fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ": the kernel's shared memory struct has ",
         bytes, " bytes, the launch provides ", grid_->shared_bytes);
  }
  return shared_;
}

void Block::check_shared(const void* start, size_t bytes, const char* what, Site site) const {
  const char* first = static_cast<const char*>(start);
  if (std::less<>()(first, shared_) || std::less<>()(shared_ + grid_->shared_bytes, first + bytes)) {
    report(site, str(what, " is not in shared memory"));
  }
}

// ---- Asynchronous copies -----------------------------------------------------------------------

void Block::cp_async(void* destination, const void* source, size_t bytes, bool valid, Site site) {
  check_aligned(destination, bytes, site);
  check_aligned(source, bytes, site);
  check_shared(destination, bytes, "cp_async: the destination", site);
  current_->copies.add(destination, source, bytes, valid);
}

namespace {

void land(void* destination, const void* source, size_t bytes) {
  if (source != nullptr) {
    std::memcpy(destination, source, bytes);
  } else {
    std::memset(destination, 0, bytes);
  }
}

}  // namespace

void AsyncCopies::add(void* destination, const void* source, size_t bytes, bool valid) {
  copies_.push_back({destination, valid ? source : nullptr, bytes});
  ++uncommitted_;
}

void AsyncCopies::commit() { groups_.push_back(std::exchange(uncommitted_, 0)); }

template <class Land>
void AsyncCopies::land_all_but(size_t groups, const Land& land) {
  if (groups_.size() <= groups) return;
  const auto first_pending = groups_.end() - ptrdiff_t(groups);
  const size_t landing = std::accumulate(groups_.begin(), first_pending, size_t{0});
  for (size_t i = 0; i < landing; ++i) land(copies_[i].destination, copies_[i].source, copies_[i].bytes);
  copies_.erase(copies_.begin(), copies_.begin() + ptrdiff_t(landing));
  groups_.erase(groups_.begin(), first_pending);
}

void Block::cp_async_wait(int groups) {
  current_->copies.land_all_but(size_t(groups), [&](void* destination, const void* source, size_t bytes) {
    note_access(destination, bytes, true);
    land(destination, source, bytes);
  });
}

void AsyncCopies::forget() {
  copies_.clear();
  groups_.clear();
  uncommitted_ = 0;
}

// ---- Calls from within a kernel ----------------------------------------------------------------

int thread_rank() { return Block::running().thread_rank(); }

void* shared_memory(size_t bytes) { return Block::running().shared_memory(bytes); }

void cp_async(void* shared_destination, const void* source, int bytes, bool valid, Site site) {
  Block::running().cp_async(shared_destination, source, size_t(bytes), valid, site);
}

void cp_async_commit() { Block::running().cp_async_commit(); }

void cp_async_wait(int groups_left_pending) { Block::running().cp_async_wait(groups_left_pending); }

void report_misaligned(const void* address, size_t alignment, Site site) {
  Block::running().report(site,
                          str("misaligned access: address ", address, " is no multiple of ", alignment));
}

}  // namespace tilewright::emulator
