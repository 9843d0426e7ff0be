// wgmma: products of a warpgroup, from descriptors, done when they are waited for.
#include "emulator/matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/half.h"
#include "emulator/block.h"

namespace tilewright::emulator {

namespace {

constexpr int kRows = 16;   // of a warp
constexpr int kDepth = 16;  // of one product
constexpr int kMaxColumns = 256;
constexpr uint32_t kInFlight = 0xffffffffu;

bool is_in_flight(float value) { return bits_of(value) == kInFlight; }

// ---- Operands in shared memory -----------------------------------------------------------------

// PTX ISA, "matrix descriptor": addresses and offsets in units of 16 bytes.
struct Descriptor {
  explicit Descriptor(uint64_t bits)
      : start(unsigned(bits & 0x3fff) * 16),
        leading(unsigned(bits >> 16 & 0x3fff) * 16),
        stride(unsigned(bits >> 32 & 0x3fff) * 16),
        base_offset(unsigned(bits >> 49 & 7)),
        swizzle(unsigned(bits >> 62)) {}
  unsigned start, leading, stride, base_offset, swizzle;
};

constexpr unsigned kSwizzle128 = 1;

// Byte of element (line, depth): lines are rows of A, columns of B. Along memory run depths, in rows of 64,
// or
// ("across") lines. The swizzle is a function of the address.
unsigned address_of(const Descriptor& d, bool across, unsigned line, unsigned depth) {
  const unsigned plain =
      across ? d.start + line / 64 * d.leading + depth / 8 * d.stride + depth % 8 * 128 + line % 64 * 2
             : d.start + line / 8 * d.stride + line % 8 * 128 + depth * 2;
  return plain ^ (plain >> 7 & 7) << 4;
}

float widened(uint16_t bits, bool is_bf16) { return is_bf16 ? widen(bf16{bits}) : widen(fp16{bits}); }

struct Operands {
  float a[kRows][kDepth];
  float b[kDepth][kMaxColumns];
};

}  // namespace

// ---- Begin -------------------------------------------------------------------------------------

void Block::check_matrix_op(MatrixGroup& group, const MatrixOp& op, Site site) {
  const uint64_t number = current_->matrix.issued;
  if (number == group.first + group.ops.size()) group.ops.push_back(op);
  if (group.ops[number - group.first] != op) {
    report(site, "wgmma: other threads of the warpgroup issue another product in its place");
  }
  for (const uint64_t bits : {op.a, op.b}) {
    if (op.a_in_registers && bits == op.a) continue;
    const Descriptor d(bits);
    if (d.swizzle != kSwizzle128 || d.base_offset != 0) {
      report(site, "wgmma: the descriptor is not one of 128-byte swizzle with base offset 0");
    }
  }
}

void Block::matrix_issue(const MatrixOp& op, float* accumulators, const uint32_t* a, Site site) {
  Lane& lane = *current_;
  MatrixWork& work = lane.matrix;
  const unsigned group = lane.warp() / kMatrixWarps;
  if ((group + 1) * kMatrixWarps * kWarpLanes > threads_) report(site, "wgmma: the warpgroup lacks threads");
  if (!work.fenced) report(site, "wgmma: no wgmma_fence since the registers could last be written");
  check_matrix_op(matrix_groups_[group], op, site);
  const size_t count = size_t(op.columns) / 2;
  auto found =
      std::find_if(work.accumulators.begin(), work.accumulators.end(), [&](const Accumulators& other) {
        return accumulators < other.registers + other.values.size() && other.registers < accumulators + count;
      });
  if (found == work.accumulators.end()) {
    work.accumulators.push_back({accumulators, {accumulators, accumulators + count}, 0});
    found = work.accumulators.end() - 1;
    std::memset(static_cast<void*>(accumulators), 0xff, count * sizeof(float));
  } else if (found->registers != accumulators || found->values.size() != count) {
    report(site, "wgmma: its accumulators are a part of those of a product under way");
  }
  if (lane.rank % kWarpLanes == 0) note_operands(matrix_groups_[group], op, site);
  found->last = work.issued++;
  work.targets.push_back(accumulators);
  work.a.push_back(a == nullptr ? std::array<uint32_t, 4>{} : std::array{a[0], a[1], a[2], a[3]});
}

// A warp reads its operands from the begin of a product until it has waited for it. What its first lane has
// seen stands for all of it.
void Block::note_operands(MatrixGroup& group, const MatrixOp& op, Site site) {
  const unsigned warp = current_->warp();
  unsigned& agent = group.agents[warp % kMatrixWarps];
  if (agent == 0) agent = races_.add_agent("a product of warp", warp);
  // Eight depths, or eight lines, are a piece.
  const auto note = [&](const Descriptor& d, bool across, unsigned first, unsigned count) {
    for (unsigned line = first; line < first + count; line += across ? 8 : 1) {
      for (unsigned depth = 0; depth < kDepth; depth += across ? 1 : 8) {
        races_.begin_read(current_->rank, agent, current_->matrix.issued, address_of(d, across, line, depth),
                          Races::kPiece, site);
      }
    }
  };
  if (!op.a_in_registers) note(Descriptor(op.a), false, warp % kMatrixWarps * kRows, kRows);
  note(Descriptor(op.b), op.b_across, 0, unsigned(op.columns));
}

// ---- End ---------------------------------------------------------------------------------------

// One product, for the rows of one warp.
void Block::run_matrix_op(unsigned warp, uint64_t number) {
  const MatrixGroup& group = matrix_groups_[warp / kMatrixWarps];
  const MatrixOp& op = group.ops[number - group.first];
  Lane* lanes = &lanes_[warp * kWarpLanes];
  const auto element = [&](const Descriptor& d, bool across, unsigned line, unsigned depth) {
    const unsigned address = address_of(d, across, line, depth);
    if (address + 2 > grid_->shared_bytes) {
      report(lanes[0].wait.site, str("wgmma: an operand reaches byte ", address + 1,
                                     " of shared memory, which has ", grid_->shared_bytes));
    }
    uint16_t bits;
    std::memcpy(&bits, shared_ + address, sizeof bits);
    return widened(bits, op.is_bf16);
  };
  Operands x;
  const Descriptor b(op.b);
  for (unsigned k = 0; k < kDepth; ++k) {
    for (unsigned column = 0; column < unsigned(op.columns); ++column) {
      x.b[k][column] = element(b, op.b_across, column, k);
    }
  }
  if (op.a_in_registers) {
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      for (unsigned i = 0; i < 8; ++i) {
        const uint32_t word = lanes[lane].matrix.a.front()[i / 2];
        x.a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] =
            widened(uint16_t(word >> i % 2 * 16), op.is_bf16);
      }
    }
  } else {
    const Descriptor a(op.a);
    for (unsigned row = 0; row < kRows; ++row) {
      for (unsigned k = 0; k < kDepth; ++k) x.a[row][k] = element(a, false, warp % 4 * 16 + row, k);
    }
  }
  for (unsigned row = 0; row < kRows; ++row) {
    float sums[kMaxColumns] = {};
    for (unsigned k = 0; k < kDepth; ++k) {
      for (int column = 0; column < op.columns; ++column) sums[column] += x.a[row][k] * x.b[k][column];
    }
    for (unsigned quarter = 0; quarter < 4; ++quarter) {
      MatrixWork& work = lanes[row % 8 * 4 + quarter].matrix;
      auto found = std::find_if(work.accumulators.begin(), work.accumulators.end(),
                                [&](const Accumulators& a) { return a.registers == work.targets.front(); });
      for (size_t j = 0; j < size_t(op.columns) / 8; ++j) {
        for (size_t c = 0; c < 2; ++c) {
          float& value = found->values[4 * j + row / 8 * 2 + c];
          value = (op.accumulates ? value : 0.0f) + sums[8 * j + quarter * 2 + c];
        }
      }
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    lanes[lane].matrix.a.pop_front();
    lanes[lane].matrix.targets.pop_front();
  }
}

void Block::matrix_wait(size_t groups, Site site) {
  Lane& lane = *current_;
  MatrixWork& work = lane.matrix;
  const unsigned warp = lane.warp();
  warp_collective(WarpOp::kMatrixWait, 0, 0, 0xffffffffu, site);
  const uint64_t end = work.groups.size() > groups ? work.groups[work.groups.size() - 1 - groups] : work.done;
  const Lane& first = lanes_[warp * kWarpLanes];
  if (&lane == &first) {
    for (uint64_t number = work.done; number < end; ++number) run_matrix_op(warp, number);
    MatrixGroup& group = matrix_groups_[warp / kMatrixWarps];
    group.done[warp % kMatrixWarps] = end;
    const uint64_t everywhere = *std::min_element(group.done.begin(), group.done.end());
    for (; group.first < everywhere; ++group.first) group.ops.pop_front();
  } else if (work.issued != first.matrix.issued || work.groups.size() < first.matrix.groups.size()) {
    report(site, "wgmma_wait: lanes of the warp have issued different numbers of products");
  }
  warp_collective(WarpOp::kMatrixWait, 1, 0, 0xffffffffu, site);
  work.fenced = false;
  work.done = end;
  if (end != 0)
    races_.finish(lane.rank, matrix_groups_[warp / kMatrixWarps].agents[warp % kMatrixWarps], end);
  if (work.groups.size() > groups)
    work.groups.erase(work.groups.begin(), work.groups.end() - ptrdiff_t(groups));
  const auto landed = std::partition(work.accumulators.begin(), work.accumulators.end(),
                                     [&](const Accumulators& a) { return a.last >= end; });
  for (auto a = landed; a != work.accumulators.end(); ++a) {
    if (!std::all_of(a->registers, a->registers + a->values.size(), is_in_flight)) {
      report(site, "wgmma: its accumulators were written while it was under way");
    }
    std::copy(a->values.begin(), a->values.end(), a->registers);
  }
  work.accumulators.erase(landed, work.accumulators.end());
}

void Block::check_matrix_end(const Lane& lane) const {
  const MatrixWork& work = lane.matrix;
  if (work.issued != work.done) {
    fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ", thread ", lane.rank,
         ": exits before products that it began have been waited for");
  }
}

void Block::check_matrix_groups() const {
  for (size_t group = 0; group < matrix_groups_.size(); ++group) {
    if (matrix_groups_[group].ops.empty()) continue;
    fail(ErrorKind::kRuntime, "emulator: ", describe_block(), ": the warps of warpgroup ", group,
         " have issued different numbers of products");
  }
}

// ---- Calls from within a kernel ----------------------------------------------------------------

void matrix_fence() { Block::running().matrix_fence(); }

void matrix_issue(const MatrixOp& op, float* accumulators, const uint32_t* a, Site site) {
  Block::running().matrix_issue(op, accumulators, a, site);
}

void matrix_commit() { Block::running().matrix_commit(); }

void matrix_wait(int groups_left_pending, Site site) {
  Block::running().matrix_wait(size_t(groups_left_pending), site);
}

void check_register_count(int registers, Site site) {
  if (registers >= 24 && registers <= 256 && registers % 8 == 0) return;
  Block::running().report(site,
                          str("setmaxnreg: got ", registers, ", allowed: multiples of 8 from 24 to 256"));
}

}  // namespace tilewright::emulator
