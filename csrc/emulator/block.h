// One thread block: its threads as fibres, its shared memory, and the places where threads meet. A
// meeting is a rendezvous: all but the last to arrive are suspended, the last computes everyone's
// result and makes them ready again. The next to run is drawn at random from the ready.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "emulator/fibre.h"
#include "emulator/matrix.h"
#include "emulator/mbarrier.h"
#include "emulator/races.h"
#include "emulator/runtime.h"

namespace tilewright::emulator {

inline constexpr unsigned kWarpLanes = 32;
inline constexpr unsigned kMaxThreads = 1024;
inline constexpr unsigned kMaxWarps = kMaxThreads / kWarpLanes;
inline constexpr int kBarriers = 16;
inline constexpr int kBlockBarrier = 0;

// SplitMix64: a small state and any seed will do.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  size_t below(size_t bound) { return size_t((next() >> 32) * bound >> 32); }  // bound < 2^32

 private:
  uint64_t state_;
};

// Where a thread waits, for the reports.
struct Wait {
  enum class Where : uint8_t { kNowhere, kBlockBarrier, kNamedBarrier, kWarp, kMbarrier, kExited };
  Site site;
  uint32_t mask = 0;  // of a warp collective; of an mbarrier its offset
  Where where = Where::kNowhere;
  uint8_t op = 0;        // BlockOp or WarpOp
  uint16_t barrier = 0;  // id, or an mbarrier's parity; 16 bits, since padding would have the struct copied
                         // in overlapping halves
};

// The copies a thread has begun and that have not landed, in order; committed ones are in groups.
class AsyncCopies {
 public:
  void add(void* destination, const void* source, size_t bytes, bool valid);
  void commit();
  template <class Land>
  void land_all_but(size_t groups, const Land& land);
  void forget();

 private:
  struct Copy {
    void* destination;
    const void* source;  // null: zeros
    size_t bytes;
  };
  std::vector<Copy> copies_;
  std::vector<size_t> groups_;  // number of copies in each
  size_t uncommitted_ = 0;
};

struct alignas(64) Lane {
  Fibre fibre;
  uint3 index;  // threadIdx
  unsigned rank;
  uint64_t value;     // operand of a warp collective, then its result
  uint32_t argument;  // lane, mask or distance of a shuffle
  Wait wait;
  AsyncCopies copies;
  TensorStores stores;
  MatrixWork matrix;

  unsigned warp() const { return rank / kWarpLanes; }
  uint32_t bit() const { return 1u << rank % kWarpLanes; }
};

// The threads that may run, always in uniformly random order: each newcomer changes places with a random
// one. (So the order is known ahead of the switches; to draw at each switch took twice the time.)
class ReadyLanes {
 public:
  bool empty() const { return count_ == 0; }
  void clear() { count_ = 0; }
  void add(Lane& lane, Random& random) {
    Lane*& place = lanes_[random.below(count_ + 1)];
    lanes_[count_++] = place;
    place = &lane;
  }
  Lane& take() {
    Lane& next = *lanes_[--count_];
    // A block's fibres fill the first-level cache: fetch those that come soon.
    if (count_ >= 4) {
      lanes_[count_ - 2]->fibre.prefetch();
      __builtin_prefetch(lanes_[count_ - 4]);
    }
    return next;
  }

 private:
  unsigned count_ = 0;
  std::array<Lane*, kMaxThreads> lanes_;
};

// Words for the reports.
const char* name_of(BlockOp op);
std::string place_of(Site site);
std::string describe_lanes(uint32_t mask);
std::string call_of(const Lane& lane);
std::string place_of_code(const void* code);

class Block {
 public:
  // Runs the block to its end; throws what a thread of it threw, or the report of a misuse.
  void run(const Grid& grid, uint3 index, uint64_t seed);

  // The block that runs on this OS thread.
  static Block& running();
  static bool is_running();

  int thread_rank() const { return int(current_->rank); }
  void* shared_memory(size_t bytes) const;
  int sync_block(BlockOp op, bool predicate, Site site);
  void named_barrier(int id, int threads, bool waits, Site site);
  uint64_t warp_collective(WarpOp op, uint64_t value, uint32_t argument, uint32_t mask, Site site);
  void load_matrices(uint32_t (&registers)[4], uint32_t row, bool transposed, Site site);
  void cp_async(void* destination, const void* source, size_t bytes, bool valid, Site site);
  void cp_async_commit() { current_->copies.commit(); }
  void cp_async_wait(int groups);
  void note_access(const void* address, size_t bytes, bool writes, const void* code = nullptr) {
    races_.access(current_->rank, address, bytes, writes, code);
  }

  void mbarrier_init(uint64_t* word, int arrivals, Site site);
  void mbarriers_fence();
  void fence_async_proxy() { races_.fence(current_->rank); }
  void mbarrier_arrive(uint64_t* word, int64_t bytes, Site site);
  void mbarrier_wait(uint64_t* word, uint32_t parity, Site site);
  void tensor_load(void* destination, const TensorMap& map, const TensorIndex& at, uint64_t* word, Site site);
  void tensor_store(const TensorMap& map, const void* source, const TensorIndex& at, Site site);
  void tensor_stores_commit();
  void tensor_stores_wait(size_t groups);

  void matrix_fence() { current_->matrix.fenced = true; }
  void matrix_issue(const MatrixOp& op, float* accumulators, const uint32_t* a, Site site);
  void matrix_commit() { current_->matrix.groups.push_back(current_->matrix.issued); }
  void matrix_wait(size_t groups, Site site);

  // Throws: this thread, at `site`, has done what `text` says.
  [[noreturn]] void report(Site site, const std::string& text) const;

 private:
  // Threads of one warp come to a barrier by one call; the warp counts once all that live have come.
  struct WarpArrival {
    uint32_t lanes = 0;    // that have come
    uint32_t waiting = 0;  // of these, those to wake
    Site site;
  };

  struct Barrier {
    BlockOp op = BlockOp::kSync;
    unsigned expected = 0;      // threads; of a named barrier
    unsigned warp_threads = 0;  // 32 for each warp that has come completely
    unsigned threads = 0;
    unsigned votes = 0;
    int result = 0;
    std::array<WarpArrival, kMaxWarps> warps;
    Clock clock;  // of those that have come

    void reset();
  };

  struct Rendezvous {
    WarpOp op;
    uint32_t mask;
    uint32_t arrived;
  };

  struct Warp {
    uint32_t existing = 0;
    uint32_t alive = 0;
    unsigned meetings = 0;
    std::array<Rendezvous, kWarpLanes> meeting;  // in each, a lane waits
  };

  struct Memory {
    char* start = nullptr;
    size_t size = 0;

    Memory() = default;
    Memory(const Memory&) = delete;
    ~Memory() { release(); }
    void reserve(size_t bytes);
    void release();
  };

  void set_up(const Grid& grid, uint3 index, uint64_t seed);
  void set_up_threads();
  void set_up_shared_memory(size_t bytes);
  void check_guards() const;
  void check_races() const;
  void order_warp(uint32_t mask, unsigned warp);
  void check_shared(const void* start, size_t bytes, const char* what, Site site) const;

  static void fibre_main();
  void run_lane();
  void leave(Lane& lane);
  Lane& next_ready();
  void make_running(Lane& lane);
  void suspend();
  [[noreturn]] void report_deadlock() const;

  void wake(uint32_t mask, unsigned warp);

  void arrive(Barrier& barrier, BlockOp op, bool predicate, unsigned expected, bool waits);
  bool has_come(const Barrier& barrier, const Lane& lane) const;
  void complete_if_all_came(Barrier& barrier);
  void complete(Barrier& barrier);
  void leave_barriers(const Lane& lane);

  [[noreturn]] void report_arrival(const Barrier& barrier, const WarpArrival& arrival, BlockOp op,
                                   unsigned expected) const;

  Rendezvous& join(Warp& warp, const Lane& lane, WarpOp op, uint32_t mask);
  void check_meeting(const Warp& warp, const Lane& lane, uint32_t mask) const;
  void exchange(WarpOp op, uint32_t mask, Lane* lanes) const;
  uint64_t shuffled(WarpOp op, uint32_t mask, const uint64_t* values, const Lane& lane) const;
  void check_same_variant(const Lane* lanes) const;

  Mbarrier& mbarrier_at(const uint64_t* word, Site site);
  void complete_if_due(Mbarrier& barrier, Site site);
  void check_mbarriers() const;
  void check_stores_end(const Lane& lane) const;

  void check_matrix_op(MatrixGroup& group, const MatrixOp& op, Site site);
  void note_operands(MatrixGroup& group, const MatrixOp& op, Site site);
  void run_matrix_op(unsigned warp, uint64_t number);
  void check_matrix_end(const Lane& lane) const;
  void check_matrix_groups() const;

  std::string describe_block() const;
  std::string describe(const Lane& lane) const;
  std::string describe_threads() const;

  const Grid* grid_ = nullptr;
  uint3 index_{};
  Random random_{0};
  unsigned threads_ = 0;
  unsigned alive_ = 0;
  Lane* current_ = nullptr;
  Fibre scheduler_;
  std::exception_ptr error_;

  std::vector<Stack> stacks_;
  std::vector<Lane> lanes_;
  ReadyLanes ready_;
  std::array<Warp, kMaxWarps> warps_;
  std::array<Barrier, kBarriers> barriers_;
  bool named_barriers_used_ = false;
  std::vector<Mbarrier> mbarriers_;  // by the order of their initialisation
  std::array<MatrixGroup, kMaxWarps / kMatrixWarps> matrix_groups_;

  Races races_;
  Memory memory_;  // guard, shared memory, guard
  char* shared_ = nullptr;
};

// What a warp's matrix instructions do, once all lanes have come; `values` are the lanes' operands.
void multiply_fragments(const uint64_t* values, bool brain_floats);
void multiply_sparse_fragments(const uint64_t* values, uint32_t variant);
void spread_matrices(const uint64_t* values, bool transposed);

// ---- The path of every wait --------------------------------------------------------------------

extern TILEWRIGHT_EMULATOR_LOCAL Block* running_block;
[[noreturn]] void report_outside_kernel();

inline bool Block::is_running() { return running_block != nullptr; }

inline Block& Block::running() {
  if (running_block == nullptr) [[unlikely]]
    report_outside_kernel();
  return *running_block;
}

inline Lane& Block::next_ready() {
  if (ready_.empty()) [[unlikely]]
    report_deadlock();
  return ready_.take();
}

inline void Block::make_running(Lane& lane) {
  current_ = &lane;
  threadIdx = lane.index;
}

inline void Block::suspend() {
  Lane& self = *current_;
  Lane& next = next_ready();
  if (&next == &self) return;
  make_running(next);
  self.fibre.switch_to(next.fibre);
}

template <class Do>
void for_each_lane(uint32_t mask, Do something) {
  for (; mask != 0; mask &= mask - 1) something(unsigned(std::countr_zero(mask)));
}

inline void Block::wake(uint32_t mask, unsigned warp) {
  Lane* lanes = &lanes_[warp * kWarpLanes];
  for_each_lane(mask, [&](unsigned i) { ready_.add(lanes[i], random_); });
}

}  // namespace tilewright::emulator
