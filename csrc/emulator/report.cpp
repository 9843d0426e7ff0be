// The words of the emulator's reports.
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "emulator/block.h"

namespace tilewright::emulator {

const char* name_of(BlockOp op) {
  switch (op) {
    case BlockOp::kSync:
      return "sync_block";
    case BlockOp::kOr:
      return "sync_block_or";
    case BlockOp::kAnd:
      return "sync_block_and";
    case BlockOp::kCount:
      return "sync_block_count";
  }
  return "";
}

namespace {

const char* name_of(WarpOp op) {
  switch (op) {
    case WarpOp::kSync:
      return "sync_warp";
    case WarpOp::kShuffle:
      return "shfl";
    case WarpOp::kShuffleXor:
      return "shfl_xor";
    case WarpOp::kShuffleUp:
      return "shfl_up";
    case WarpOp::kShuffleDown:
      return "shfl_down";
    case WarpOp::kBallot:
      return "ballot";
    case WarpOp::kAny:
      return "any";
    case WarpOp::kAll:
      return "all";
    case WarpOp::kReduceMax:
      return "reduce_max";
    case WarpOp::kReduceMin:
      return "reduce_min";
    case WarpOp::kReduceAdd:
      return "reduce_add";
    case WarpOp::kReduceOr:
      return "reduce_or";
    case WarpOp::kMatchAny:
      return "match_any";
    case WarpOp::kMatrixWait:
      return "wgmma_wait";
    case WarpOp::kMma:
      return "mma_m16n8k16";
    case WarpOp::kMmaSparse:
      return "mma_sparse_m16n8k32";
    case WarpOp::kLoadMatrices:
      return "load_matrices";
  }
  return "";
}

// "3, 8-15" out of the ranks of a set, in ascending order.
std::string ranges(const std::vector<unsigned>& ranks) {
  std::string text;
  for (size_t first = 0; first < ranks.size();) {
    size_t last = first;
    while (last + 1 < ranks.size() && ranks[last + 1] == ranks[last] + 1) ++last;
    if (first != 0) text += ", ";
    text += str(ranks[first]);
    if (last != first) text += str("-", ranks[last]);
    first = last + 1;
  }
  return text;
}

std::string plural(const char* noun, const std::vector<unsigned>& ranks) {
  return str(noun, ranks.size() == 1 ? " " : "s ", ranges(ranks));
}

}  // namespace

std::string describe_lanes(uint32_t mask) {
  std::vector<unsigned> lanes;
  for (; mask != 0; mask &= mask - 1) lanes.push_back(unsigned(std::countr_zero(mask)));
  return plural("lane", lanes);
}

std::string place_of(Site site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return str(slash == nullptr ? site.file_name() : slash + 1, ":", site.line());
}

std::string place_of_code(const void* code) {
  Dl_info module;
  if (code == nullptr || dladdr(code, &module) == 0) return "";
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(module.dli_fbase);
  return str(" (code at 0x", std::hex, offset, " of the module: addr2line says where)");
}

std::string Block::describe_block() const {
  return str("block (", index_.x, ", ", index_.y, ", ", index_.z, ")");
}

void Block::report(Site site, const std::string& text) const {
  fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ", thread ", current_->rank, ", ", place_of(site),
       ": ", text);
}

std::string call_of(const Lane& lane) {
  const Wait& wait = lane.wait;
  switch (wait.where) {
    case Wait::Where::kNowhere:
      return "nothing";
    case Wait::Where::kExited:
      return "exit";
    case Wait::Where::kBlockBarrier:
      return name_of(BlockOp(wait.op));
    case Wait::Where::kNamedBarrier:
      return str("barrier_sync ", wait.barrier);
    case Wait::Where::kMbarrier:
      return str("mbarrier_wait for parity ", wait.barrier);
    case Wait::Where::kWarp:
      return str(name_of(WarpOp(wait.op)), " with mask 0x", std::hex, wait.mask);
  }
  return "";
}

std::string Block::describe(const Lane& lane) const {
  const Wait& wait = lane.wait;
  if (wait.where == Wait::Where::kExited) return "exited";
  std::string text = str("in ", call_of(lane), " (", place_of(wait.site), ")");
  if (wait.where == Wait::Where::kNamedBarrier) {
    const Barrier& barrier = barriers_[wait.barrier];
    text += str(", to which ", barrier.warp_threads, " of ", barrier.expected, " threads have come");
  }
  if (wait.where == Wait::Where::kMbarrier) {
    for (const Mbarrier& barrier : mbarriers_) {
      if (barrier.offset == wait.mask) text += str(", ", describe_mbarrier(barrier));
    }
  }
  return text;
}

std::string Block::describe_threads() const {
  std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
  for (unsigned rank = 0; rank < threads_; ++rank) {
    const std::string where = describe(lanes_[rank]);
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == where; });
    if (group == groups.end()) group = groups.insert(groups.end(), {where, {}});
    group->second.push_back(rank);
  }
  std::string text;
  for (const auto& [where, ranks] : groups) {
    text += str(text.empty() ? "" : "; ", plural("thread", ranks), " ", where);
  }
  return text;
}

}  // namespace tilewright::emulator
