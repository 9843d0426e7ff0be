// Where the threads of a block meet: barriers, and the collectives of a warp.
#include <bit>
#include <cstring>

#include "core/check.h"
#include "emulator/block.h"

namespace tilewright::emulator {

namespace {

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

// ---- Barriers ----------------------------------------------------------------------------------

int Block::sync_block(BlockOp op, bool predicate, Site site) {
  Barrier& barrier = barriers_[kBlockBarrier];
  current_->wait = {site, 0, Wait::Where::kBlockBarrier, uint8_t(op), kBlockBarrier};
  arrive(barrier, op, predicate, 0, /*waits=*/true);
  suspend();
  return barrier.result;
}

void Block::named_barrier(int id, int threads, bool waits, Site site) {
  if (id <= kBlockBarrier || id >= kBarriers) report(site, str("barrier id: got ", id, ", allowed: 1..15"));
  if (threads <= 0 || unsigned(threads) > kMaxThreads || unsigned(threads) % kWarpLanes != 0) {
    report(site, str("threads of a named barrier: got ", threads, ", allowed: multiples of 32 up to 1024"));
  }
  named_barriers_used_ = true;
  current_->wait = {site, 0, Wait::Where::kNamedBarrier, uint8_t(BlockOp::kSync), uint16_t(id)};
  arrive(barriers_[size_t(id)], BlockOp::kSync, false, unsigned(threads), waits);
  if (waits) suspend();
}

void Block::arrive(Barrier& barrier, BlockOp op, bool predicate, unsigned expected, bool waits) {
  const Lane& lane = *current_;
  if (barrier.threads == 0) {
    barrier.op = op;
    barrier.expected = expected;
  }
  WarpArrival& arrival = barrier.warps[lane.warp()];
  if (arrival.lanes == 0) arrival.site = lane.wait.site;
  if (barrier.op != op || barrier.expected != expected || !same_place(arrival.site, lane.wait.site) ||
      (arrival.lanes & lane.bit()) != 0) [[unlikely]] {
    report_arrival(barrier, arrival, op, expected);
  }
  arrival.lanes |= lane.bit();
  if (waits) arrival.waiting |= lane.bit();
  ++barrier.threads;
  races_.release(lane.rank, barrier.clock);
  barrier.votes += predicate;
  if (has_come(barrier, lane)) barrier.warp_threads += kWarpLanes;
  complete_if_all_came(barrier);
}

void Block::report_arrival(const Barrier& barrier, const WarpArrival& arrival, BlockOp op,
                           unsigned expected) const {
  Site site = current_->wait.site;
  if (barrier.op != op) report(site, str(name_of(op), ", but others came by ", name_of(barrier.op)));
  if (barrier.expected != expected) {
    report(site,
           str("barrier_sync for ", expected, " threads, but others that came gave ", barrier.expected));
  }
  if ((arrival.lanes & current_->bit()) != 0) {
    report(site, "the thread comes to a named barrier again before the others have come once");
  }
  report(site, str("divergent barrier: threads of warp ", current_->warp(), " come to it from ",
                   place_of(site), " and from ", place_of(arrival.site)));
}

// Whether all threads of the lane's warp have come. The hardware counts warps, so threads that have
// exited hold nobody up.
bool Block::has_come(const Barrier& barrier, const Lane& lane) const {
  return (warps_[lane.warp()].alive & ~barrier.warps[lane.warp()].lanes) == 0;
}

inline void Block::complete_if_all_came(Barrier& barrier) {
  if (barrier.threads == 0) return;
  const bool of_block = &barrier == &barriers_[kBlockBarrier];
  if (of_block ? barrier.threads == alive_ : barrier.warp_threads == barrier.expected) complete(barrier);
}

void Block::complete(Barrier& barrier) {
  switch (barrier.op) {
    case BlockOp::kSync:
      break;
    case BlockOp::kOr:
      barrier.result = barrier.votes != 0;
      break;
    case BlockOp::kAnd:
      barrier.result = barrier.votes == barrier.threads;
      break;
    case BlockOp::kCount:
      barrier.result = barrier.votes;
      break;
  }
  for (unsigned warp = 0; warp * kWarpLanes < threads_; ++warp) {
    for_each_lane(barrier.warps[warp].waiting,
                  [&](unsigned i) { races_.acquire(warp * kWarpLanes + i, barrier.clock); });
    wake(barrier.warps[warp].waiting, warp);
  }
  barrier.reset();
}

void Block::Barrier::reset() {
  warp_threads = threads = votes = 0;
  for (WarpArrival& arrival : warps) arrival.lanes = arrival.waiting = 0;
  clock.clear();
}

void Block::leave_barriers(const Lane& lane) {
  complete_if_all_came(barriers_[kBlockBarrier]);
  if (!named_barriers_used_) return;
  for (size_t id = kBlockBarrier + 1; id < kBarriers; ++id) {
    Barrier& barrier = barriers_[id];
    const uint32_t came = barrier.warps[lane.warp()].lanes;
    if (came == 0 || (came & lane.bit()) != 0 || !has_come(barrier, lane)) continue;
    barrier.warp_threads += kWarpLanes;
    complete_if_all_came(barrier);
  }
}

// ---- Warp collectives --------------------------------------------------------------------------

uint64_t Block::warp_collective(WarpOp op, uint64_t value, uint32_t argument, uint32_t mask, Site site) {
  Lane& lane = *current_;
  Warp& warp = warps_[lane.warp()];
  lane.wait = {site, mask, Wait::Where::kWarp, uint8_t(op), 0};
  lane.value = value;
  lane.argument = argument;
  Rendezvous& meeting = join(warp, lane, op, mask);
  meeting.arrived |= lane.bit();
  if (meeting.arrived == mask) {
    meeting = warp.meeting[--warp.meetings];
    exchange(op, mask, &lanes_[lane.warp() * kWarpLanes]);
    op == WarpOp::kSync ? order_warp(mask, lane.warp()) : races_.meet(mask, lane.warp());
    wake(mask, lane.warp());
  }
  suspend();
  return lane.value;
}

// Of a warp's meetings sync_warp alone orders what its lanes do to memory.
void Block::order_warp(uint32_t mask, unsigned warp) {
  Clock clock;
  for_each_lane(mask, [&](unsigned i) { races_.release(warp * kWarpLanes + i, clock); });
  for_each_lane(mask, [&](unsigned i) { races_.acquire(warp * kWarpLanes + i, clock); });
}

Block::Rendezvous& Block::join(Warp& warp, const Lane& lane, WarpOp op, uint32_t mask) {
  for (unsigned i = 0; i < warp.meetings; ++i) {
    Rendezvous& meeting = warp.meeting[i];
    if (meeting.op == op && meeting.mask == mask && (mask & lane.bit()) != 0) return meeting;
  }
  check_meeting(warp, lane, mask);
  return warp.meeting[warp.meetings++] = {op, mask, 0};
}

void Block::check_meeting(const Warp& warp, const Lane& lane, uint32_t mask) const {
  Site site = lane.wait.site;
  if ((mask & lane.bit()) == 0) report(site, str(call_of(lane), ": the mask lacks the calling lane"));
  if ((mask & ~warp.existing) != 0) {
    report(site, str(call_of(lane), ": the mask names ", describe_lanes(mask & ~warp.existing),
                     ", which the block does not have"));
  }
  if ((mask & ~warp.alive) != 0) {
    report(site, str(call_of(lane), ": the mask names ", describe_lanes(mask & ~warp.alive),
                     ", which exited before"));
  }
  for (unsigned i = 0; i < warp.meetings; ++i) {
    const Rendezvous& meeting = warp.meeting[i];
    // Two lanes that wait for each other in different collectives.
    if ((meeting.mask & lane.bit()) != 0 && (meeting.arrived & mask) != 0) {
      const Lane& other =
          lanes_[lane.warp() * kWarpLanes + unsigned(std::countr_zero(meeting.arrived & mask))];
      report(site, str("mismatch in warp ", lane.warp(), ": the thread is in ", call_of(lane), ", thread ",
                       other.rank, " of the same warp ", describe(other)));
    }
  }
}

namespace {

// Everyone's result, where all get the same.
uint64_t combined(WarpOp op, uint32_t mask, const uint64_t* values) {
  uint32_t result = op == WarpOp::kReduceMin ? ~0u : 0u;
  for_each_lane(mask, [&](unsigned lane) {
    const uint32_t value = uint32_t(values[lane]);
    if (op == WarpOp::kBallot) result |= value << lane;
    if (op == WarpOp::kAny || op == WarpOp::kReduceOr) result |= value;
    if (op == WarpOp::kAll || op == WarpOp::kReduceAdd) result += value;
    if (op == WarpOp::kReduceMax) result = value > result ? value : result;
    if (op == WarpOp::kReduceMin) result = value < result ? value : result;
  });
  return op == WarpOp::kAll ? result == uint32_t(std::popcount(mask)) : result;
}

uint32_t matching(uint32_t mask, const uint64_t* values, uint64_t value) {
  uint32_t result = 0;
  for_each_lane(mask, [&](unsigned lane) { result |= uint32_t{values[lane] == value} << lane; });
  return result;
}

bool is_shuffle(WarpOp op) { return op >= WarpOp::kShuffle && op <= WarpOp::kShuffleDown; }

}  // namespace

void Block::exchange(WarpOp op, uint32_t mask, Lane* lanes) const {
  if (op == WarpOp::kSync || op == WarpOp::kMatrixWait) return;
  uint64_t values[kWarpLanes];
  for_each_lane(mask, [&](unsigned i) { values[i] = lanes[i].value; });
  if (is_shuffle(op)) {
    for_each_lane(mask, [&](unsigned i) { lanes[i].value = shuffled(op, mask, values, lanes[i]); });
  } else if (op == WarpOp::kMma || op == WarpOp::kMmaSparse || op == WarpOp::kLoadMatrices) {
    check_same_variant(lanes);
    if (op == WarpOp::kMmaSparse) return multiply_sparse_fragments(values, lanes->argument);
    op == WarpOp::kMma ? multiply_fragments(values, lanes->argument != 0)
                       : spread_matrices(values, lanes->argument != 0);
  } else if (op == WarpOp::kMatchAny) {
    for_each_lane(mask, [&](unsigned i) { lanes[i].value = matching(mask, values, values[i]); });
  } else {
    const uint64_t result = combined(op, mask, values);
    for_each_lane(mask, [&](unsigned i) { lanes[i].value = result; });
  }
}

// Lanes may come from different calls, but to one and the same instruction.
void Block::check_same_variant(const Lane* lanes) const {
  for (unsigned i = 1; i < kWarpLanes; ++i) {
    if (lanes[i].argument == lanes->argument) continue;
    report(lanes[i].wait.site, str(call_of(lanes[i]), ": lanes 0 and ", i, " want different variants of it"));
  }
}

uint64_t Block::shuffled(WarpOp op, uint32_t mask, const uint64_t* values, const Lane& lane) const {
  const unsigned self = lane.rank % kWarpLanes;
  const unsigned argument = lane.argument % kWarpLanes;
  unsigned source = argument;
  if (op == WarpOp::kShuffleXor) source = self ^ argument;
  if (op == WarpOp::kShuffleUp) source = self < argument ? self : self - argument;
  if (op == WarpOp::kShuffleDown) source = self + argument < kWarpLanes ? self + argument : self;
  if ((mask >> source & 1u) == 0) [[unlikely]] {
    report(lane.wait.site, str(call_of(lane), ": thread ", lane.rank, " reads lane ", source,
                               ", which the mask does not name"));
  }
  return values[source];
}

// ---- Calls from within a kernel ----------------------------------------------------------------

int sync_block(BlockOp op, bool predicate, Site site) {
  return Block::running().sync_block(op, predicate, site);
}

void barrier_sync(int id, int threads, Site site) {
  Block::running().named_barrier(id, threads, /*waits=*/true, site);
}

void barrier_arrive(int id, int threads, Site site) {
  Block::running().named_barrier(id, threads, /*waits=*/false, site);
}

uint64_t warp_collective(WarpOp op, uint64_t value, uint32_t argument, uint32_t mask, Site site) {
  return Block::running().warp_collective(op, value, argument, mask, site);
}

}  // namespace tilewright::emulator
