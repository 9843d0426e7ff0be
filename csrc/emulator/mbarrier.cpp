// Barriers in shared memory and the copy engine. A phase completes when all have arrived and as many bytes
// as were announced have been asked for; if copies are among them, only once a thread waits for it. So the
// data comes as late as a kernel may find it, and its place holds NaN until then.
#include "emulator/mbarrier.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "emulator/block.h"

namespace tilewright::emulator {

namespace {

constexpr int kMaxArrivals = (1 << 20) - 1;
constexpr uint64_t kMapMark = 0x70616d20726f736eu;
constexpr unsigned char kInFlight = 0xff;
constexpr size_t kTileAlignment = 128;

// What shared memory holds where a barrier lives: who writes over it is found out.
uint64_t word_of(size_t offset) {
  return 0x7265697272616250u ^ uint64_t { offset } * 0x9e3779b97f4a7c15u;
}

}  // namespace

// ---- Barriers ----------------------------------------------------------------------------------

std::string describe_mbarrier(const Mbarrier& barrier) {
  std::string text = str("an mbarrier at byte ", barrier.offset, " in phase ", barrier.phase, " that lacks ",
                         barrier.missing, " of ", barrier.count, " arrivals");
  if (barrier.bytes > 0) text += str(" and copies of ", barrier.bytes, " bytes");
  if (barrier.bytes < 0) text += str(" and has ", -barrier.bytes, " bytes more than announced");
  return text;
}

void Block::mbarrier_init(uint64_t* word, int arrivals, Site site) {
  check_aligned(word, sizeof *word, site);
  check_shared(word, sizeof *word, "mbarrier_init: the barrier", site);
  if (arrivals < 1 || arrivals > kMaxArrivals) {
    report(site, str("mbarrier_init: got ", arrivals, " arrivals, allowed: 1 to ", kMaxArrivals));
  }
  const size_t offset = size_t(reinterpret_cast<char*>(word) - shared_);
  for (const Mbarrier& barrier : mbarriers_) {
    if (barrier.offset == offset) report(site, "mbarrier_init: the barrier is initialised already");
  }
  *word = word_of(offset);
  mbarriers_.push_back({offset, unsigned(arrivals), unsigned(arrivals)});
}

void Block::mbarriers_fence() {
  for (Mbarrier& barrier : mbarriers_) barrier.fenced = true;
}

Mbarrier& Block::mbarrier_at(const uint64_t* word, Site site) {
  check_shared(word, sizeof *word, "the mbarrier", site);
  const size_t offset = size_t(reinterpret_cast<const char*>(word) - shared_);
  const auto found = std::find_if(mbarriers_.begin(), mbarriers_.end(),
                                  [&](const Mbarrier& barrier) { return barrier.offset == offset; });
  if (found == mbarriers_.end()) report(site, "the mbarrier has not been initialised");
  if (*word != word_of(offset)) report(site, "the mbarrier has been written over");
  return *found;
}

void Block::mbarrier_arrive(uint64_t* word, int64_t bytes, Site site) {
  Mbarrier& barrier = mbarrier_at(word, site);
  if (barrier.missing == 0) {
    report(site,
           str("arrival at ", describe_mbarrier(barrier), ": no thread has seen the phase before complete"));
  }
  barrier.bytes += bytes;
  --barrier.missing;
  races_.release(current_->rank, barrier.arrived);
  complete_if_due(barrier, site);
}

void Block::mbarrier_wait(uint64_t* word, uint32_t parity, Site site) {
  Mbarrier& barrier = mbarrier_at(word, site);
  if (parity > 1) report(site, str("mbarrier_wait: got parity ", parity, ", allowed: 0, 1"));
  if ((barrier.phase & 1) != parity) return races_.acquire(current_->rank, barrier.passed);
  Lane& lane = *current_;
  barrier.waiting.push_back(&lane);
  lane.wait = {site, uint32_t(barrier.offset), Wait::Where::kMbarrier, 0, uint16_t(parity)};
  complete_if_due(barrier, site);
  suspend();
}

// ---- Tiles -------------------------------------------------------------------------------------

namespace {

size_t box_rows(const TensorMap& map) {
  size_t rows = 1;
  for (int axis = 1; axis < map.axes; ++axis) rows *= size_t(map.box[axis]);
  return rows;
}

size_t row_bytes(const TensorMap& map) { return size_t(map.box[0]) * size_t(map.item_bytes); }

// Where the copy engine and the matrix units expect a byte of a tile: of eight rows of 128 bytes, row r has
// its pieces of 16 bytes in the order of their number xor r.
size_t swizzled(size_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls move_item(place in shared memory, place in the tensor or null) for each element of the row.
template <class MoveItem>
void move_row(const TensorCopy& copy, char* shared, size_t row, const MoveItem& move_item) {
  const TensorMap& map = copy.map;
  const char* row_start = map.data;
  bool inside = true;
  size_t left = row;
  for (int axis = 1; axis < map.axes; ++axis) {
    const int64_t at = int64_t{copy.at[size_t(axis)]} + int64_t(left % size_t(map.box[axis]));
    left /= size_t(map.box[axis]);
    inside = inside && at >= 0 && at <= int64_t{map.sizes[axis]};
    row_start += at * map.strides[axis];
  }
  const size_t start = size_t(copy.tile - shared) + row * row_bytes(map);
  for (int i = 0; i < map.box[0]; ++i) {
    const int64_t at = int64_t{copy.at[0]} + i;
    const bool exists = inside && at >= 0 && at <= int64_t{map.sizes[0]};
    move_item(shared + swizzled(start + size_t(i * map.item_bytes)),
              exists ? const_cast<char*>(row_start) + at * map.item_bytes : nullptr);
  }
}

void load_tile(const TensorCopy& copy, char* shared) {
  const size_t bytes = size_t(copy.map.item_bytes);
  for (size_t row = 0; row < box_rows(copy.map); ++row) {
    move_row(copy, shared, row, [&](char* place, const char* item) {
      item != nullptr ? std::memcpy(place, item, bytes) : std::memset(place, 0, bytes);
    });
  }
}

void store_tile(const TensorCopy& copy, char* shared) {
  for (size_t row = 0; row < box_rows(copy.map); ++row) {
    move_row(copy, shared, row, [&](const char* place, char* item) {
      if (item != nullptr) std::memcpy(item, place, size_t(copy.map.item_bytes));
    });
  }
}

}  // namespace

void check_tensor_map(const TensorMap& map, Site site) {
  check_aligned(&map, alignof(TensorMap), site);
  if (map.mark != kMapMark) Block::running().report(site, "this is no tensor map");
}

void Block::tensor_load(void* destination, const TensorMap& map, const TensorIndex& at, uint64_t* word,
                        Site site) {
  check_tensor_map(map, site);
  Mbarrier& barrier = mbarrier_at(word, site);
  if (!barrier.fenced) report(site, "tma_load: no fence_mbarrier_init since the barrier was initialised");
  const size_t bytes = box_rows(map) * row_bytes(map);
  check_aligned(destination, kTileAlignment, site);
  check_shared(destination, bytes, "tma_load: the destination", site);
  if (barrier.agent == 0) barrier.agent = races_.add_agent("a copy to the mbarrier at byte", barrier.offset);
  races_.begin_write(current_->rank, barrier.agent, barrier.phase,
                     size_t(static_cast<char*>(destination) - shared_), bytes, site);
  std::memset(destination, kInFlight, bytes);
  barrier.copies.push_back({map, at, static_cast<char*>(destination)});
  barrier.bytes -= int64_t(bytes);
  complete_if_due(barrier, site);
}

void Block::complete_if_due(Mbarrier& barrier, Site site) {
  if (barrier.missing != 0) return;
  if (barrier.bytes < 0) report(site, str("too many bytes: ", describe_mbarrier(barrier)));
  const bool seen = barrier.copies.empty() || !barrier.waiting.empty();
  if (barrier.bytes != 0 || !seen) return;
  for (const TensorCopy& copy : barrier.copies) load_tile(copy, shared_);
  barrier.copies.clear();
  barrier.missing = barrier.count;
  ++barrier.phase;
  barrier.passed = barrier.arrived;
  if (barrier.agent != 0) races_.finish(barrier.passed, barrier.agent, barrier.phase);
  for (Lane* lane : barrier.waiting) {
    races_.acquire(lane->rank, barrier.passed);
    ready_.add(*lane, random_);
  }
  barrier.waiting.clear();
}

void Block::tensor_store(const TensorMap& map, const void* source, const TensorIndex& at, Site site) {
  check_tensor_map(map, site);
  const size_t bytes = box_rows(map) * row_bytes(map);
  check_aligned(source, kTileAlignment, site);
  check_shared(source, bytes, "tma_store: the source", site);
  TensorStores& stores = current_->stores;
  if (stores.agent == 0) stores.agent = races_.add_agent("a store of thread", current_->rank);
  char* tile = const_cast<char*>(static_cast<const char*>(source));
  races_.begin_read(current_->rank, stores.agent, stores.begun++, size_t(tile - shared_), bytes, site);
  stores.copies.push_back({map, at, tile});
}

void Block::tensor_stores_commit() { current_->stores.groups.push_back(current_->stores.begun); }

void Block::tensor_stores_wait(size_t groups) {
  TensorStores& stores = current_->stores;
  if (stores.groups.size() <= groups) return;
  const auto pending = stores.groups.end() - ptrdiff_t(groups);
  for (const uint64_t end = pending[-1]; stores.done < end; ++stores.done) {
    store_tile(stores.copies.front(), shared_);
    stores.copies.pop_front();
  }
  if (stores.done != 0) races_.finish(current_->rank, stores.agent, stores.done);
  stores.groups.erase(stores.groups.begin(), pending);
}

void Block::check_stores_end(const Lane& lane) const {
  if (lane.stores.copies.empty()) return;
  fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ", thread ", lane.rank,
       ": exits before stores that it began have been waited for");
}

void Block::check_mbarriers() const {
  for (const Mbarrier& barrier : mbarriers_) {
    if (barrier.copies.empty()) continue;
    fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ": it ends while copies are under way to ",
         describe_mbarrier(barrier));
  }
}

TensorMap encode_tensor_map(const void* data, int item_bytes, int axes, const int64_t* sizes,
                            const int64_t* strides, const int32_t* box) {
  const auto refuse = [](const auto&... what) { fail(ErrorKind::kRuntime, "tensor map: ", what...); };
  constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStride = int64_t{1} << 40;
  if (axes < 1 || axes > kMaxTensorAxes) refuse(axes, " axes");
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) refuse("the address is no multiple of 16");
  TensorMap map{};
  map.data = static_cast<const char*>(data);
  map.axes = axes;
  map.item_bytes = item_bytes;
  for (int axis = 0; axis < axes; ++axis) {
    if (sizes[axis] < 1 || sizes[axis] > kMaxSize) refuse("axis ", axis, " has size ", sizes[axis]);
    if (box[axis] < 1 || box[axis] > 256) refuse("axis ", axis, " has a box of ", box[axis]);
    const int64_t stride = strides[axis] * item_bytes;
    const bool fits = axis == 0 ? stride == item_bytes
                                : stride >= sizes[0] * item_bytes && stride % 16 == 0 && stride < kMaxStride;
    if (!fits) refuse("axis ", axis, " has a stride of ", stride, " bytes");
    map.sizes[axis] = uint32_t(sizes[axis] - 1);
    map.strides[axis] = stride;
    map.box[axis] = box[axis];
  }
  // Shorter rows are legal, but how they lie in shared memory no kernel has asked yet.
  if (row_bytes(map) != kSwizzleBytes)
    refuse("rows of ", row_bytes(map), " bytes in the box, not ", kSwizzleBytes);
  map.mark = kMapMark;
  return map;
}

// ---- Calls from within a kernel ----------------------------------------------------------------

void mbarrier_init(uint64_t* word, int arrivals, Site site) {
  Block::running().mbarrier_init(word, arrivals, site);
}

void mbarriers_fence() { Block::running().mbarriers_fence(); }

void mbarrier_arrive(uint64_t* word, int64_t bytes, Site site) {
  Block::running().mbarrier_arrive(word, bytes, site);
}

void mbarrier_wait(uint64_t* word, uint32_t parity, Site site) {
  Block::running().mbarrier_wait(word, parity, site);
}

void tensor_load(void* shared_destination, const TensorMap& map, const TensorIndex& at, uint64_t* mbarrier,
                 Site site) {
  Block::running().tensor_load(shared_destination, map, at, mbarrier, site);
}

void tensor_store(const TensorMap& map, const void* shared_source, const TensorIndex& at, Site site) {
  Block::running().tensor_store(map, shared_source, at, site);
}

void tensor_stores_commit() { Block::running().tensor_stores_commit(); }

void tensor_stores_wait(int groups_left_pending) {
  Block::running().tensor_stores_wait(size_t(groups_left_pending));
}

void fence_async_proxy() { Block::running().fence_async_proxy(); }

}  // namespace tilewright::emulator
