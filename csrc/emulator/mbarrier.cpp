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
  complete_if_due(barrier, site);
}

void Block::mbarrier_wait(uint64_t* word, uint32_t parity, Site site) {
  Mbarrier& barrier = mbarrier_at(word, site);
  if (parity > 1) report(site, str("mbarrier_wait: got parity ", parity, ", allowed: 0, 1"));
  if ((barrier.phase & 1) != parity) return;
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

void land_row(const TensorCopy& copy, const char* shared, size_t row) {
  const TensorMap& map = copy.map;
  const char* source = map.data;
  bool inside = true;
  size_t left = row;
  for (int axis = 1; axis < map.axes; ++axis) {
    const int64_t at = int64_t{copy.at[size_t(axis)]} + int64_t(left % size_t(map.box[axis]));
    left /= size_t(map.box[axis]);
    inside = inside && at >= 0 && at <= int64_t{map.sizes[axis]};
    source += at * map.strides[axis];
  }
  const size_t start = size_t(copy.destination - shared) + row * row_bytes(map);
  for (int i = 0; i < map.box[0]; ++i) {
    const int64_t at = int64_t{copy.at[0]} + i;
    char* place = const_cast<char*>(shared) + swizzled(start + size_t(i * map.item_bytes));
    if (inside && at >= 0 && at <= int64_t{map.sizes[0]}) {
      std::memcpy(place, source + at * map.item_bytes, size_t(map.item_bytes));
    } else {
      std::memset(place, 0, size_t(map.item_bytes));
    }
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
  for (const TensorCopy& copy : barrier.copies) {
    for (size_t row = 0; row < box_rows(copy.map); ++row) land_row(copy, shared_, row);
  }
  barrier.copies.clear();
  barrier.missing = barrier.count;
  ++barrier.phase;
  for (Lane* lane : barrier.waiting) ready_.add(*lane, random_);
  barrier.waiting.clear();
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
    const bool fits =
        axis == 0 ? stride == item_bytes : stride > 0 && stride % 16 == 0 && stride < kMaxStride;
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

}  // namespace tilewright::emulator
