// The host's side of the selective scan on a GPU: how many blocks, what is where in the workspace.
#pragma once

#include "core/integers.h"
#include "core/tune.h"
#include "scan/selective_scan_cuda.h"

namespace tilewright::scan {

// ---- Blocks ------------------------------------------------------------------------------------

template <class TileOf>
void plan_tiles(ScanLaunch& l) {
  l.lanes = 1;
  while (l.lanes * TileOf::kStates < l.p.states) l.lanes *= 2;
  if (TileOf::kLanes != 0) l.lanes = TileOf::kLanes;
  l.channels = TileOf::channels_for(l.lanes);
  l.tile_bytes = TileOf::tile_bytes(l.channels, int(itemsize(l.p.dtype)));
  l.group_channels = l.p.dim / l.p.groups;
  l.tiles = l.slots = divide_up(l.group_channels, l.channels);
}

// Backward: the rows of dB and dC that blocks leave for the last sum stay below some 16 bytes for a channel
// and step, if need be by blocks that take several tiles.
inline void share_rows(ScanLaunch& l) {
  const int64_t numbers = l.p.weight_dtype == DType::kComplex64 ? 2 * l.p.states : l.p.states;
  l.slots = divide_up(l.tiles, divide_up(numbers, 2 * l.channels));
}

constexpr int64_t kSplitBlocks =
    TW_TUNED(SELECTIVE_SCAN_SPLIT_BLOCKS, 2);  // a multiprocessor, of split sequences

// Sequences are split where whole ones would leave half of the device's multiprocessors without a block. A
// split costs a second pass over the inputs, so that less idleness would not pay for it.
inline void plan_parts(ScanLaunch& l, int device) {
  const SelectiveScanParams& p = l.p;
  const bool packed = p.cu_seqlens != nullptr;
  const int64_t sequences = packed ? p.sequences : p.batch;
  l.parts = sequences;
  l.part_chunks = 0;
  const int64_t blocks = sequences * p.groups * l.slots;
  const int64_t multiprocessors = device::multiprocessor_count(device);
  if (blocks == 0 || 2 * blocks > multiprocessors) return;
  const int64_t chunks = chunk_count(p.batch, p.length, p.sequences, packed) / sequences;  // of a sequence
  const int64_t splits = divide_up(kSplitBlocks * multiprocessors, blocks);
  const int64_t part_chunks = chunks / splits > 0 ? chunks / splits : 1;
  if (part_chunks >= chunks) return;
  l.part_chunks = part_chunks;
  const int64_t steps = part_chunks * kScanChunk;
  l.splits = divide_up(p.length, steps);
  l.parts = packed ? p.length / steps + sequences : sequences * l.splits;
}

template <class TileOf>
unsigned threads_of(const ScanLaunch& l) {
  return unsigned(l.channels * l.lanes / TileOf::kChannels);
}

inline void launch_blocks(device::Kernel<ScanLaunch> kernel, const ScanLaunch& l, unsigned threads,
                          size_t shared_bytes, Stream stream) {
  const int64_t blocks = l.parts * l.p.groups * l.slots;
  check_value(blocks <= INT32_MAX, "selective_scan: got a batch and channels for ", blocks,
              " thread blocks, allowed: ", INT32_MAX);
  device::launch(kernel, dim3(unsigned(blocks)), dim3(threads), shared_bytes, stream, l);
}

// ---- Workspace ---------------------------------------------------------------------------------

// Hands out consecutive pieces of memory; of null it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  void take(T*& piece, int64_t bytes) {
    piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + taken_);
    taken_ += divide_up(bytes, kAlignment) * kAlignment;
  }
  int64_t taken() const { return taken_; }

 private:
  static constexpr int64_t kAlignment = 256;
  unsigned char* memory_;
  int64_t taken_ = 0;
};

// Sets the workspace's pointers and returns its size.
inline int64_t place(ScanLaunch& l, bool backward) {
  const SelectiveScanParams& p = l.p;
  const int64_t number = p.weight_dtype == DType::kComplex64 ? sizeof(Complex) : sizeof(float);
  const int64_t channels = l.parts * p.dim * int64_t{sizeof(float)},
                states = l.parts * p.dim * p.states * number;
  const int64_t rows = l.slots * p.groups * p.batch * p.length * p.states * number;
  Pieces pieces(p.workspace);
  if (l.part_chunks != 0) {
    pieces.take(l.carry, states);
    pieces.take(l.elapsed, channels);
  }
  if (backward) {
    if (p.dA != nullptr) pieces.take(l.dA, states);
    if (p.dB.data != nullptr && !p.variable_B) pieces.take(l.dB, states);
    if (p.dC.data != nullptr && !p.variable_C) pieces.take(l.dC, states);
    if (p.dD != nullptr) pieces.take(l.dD, channels);
    if (p.ddelta_bias != nullptr) pieces.take(l.ddelta_bias, channels);
    if (p.dB.data != nullptr && p.variable_B) pieces.take(l.dB_rows, rows);
    if (p.dC.data != nullptr && p.variable_C) pieces.take(l.dC_rows, rows);
  }
  return pieces.taken();
}

// The whole plan of a pass.
template <class TileOf>
ScanLaunch plan(const SelectiveScanParams& p, bool backward, int device) {
  ScanLaunch l{};
  l.p = p;
  plan_tiles<TileOf>(l);
  if (backward) share_rows(l);
  plan_parts(l, device);
  return l;
}

// Fills l.carry of a launch whose sequences are split (selective_scan_carry_cuda.cu).
void run_carry(const ScanLaunch& l, bool adjoint, Stream stream);

// Adds up the partial sums that a gradient's blocks left (selective_scan_sums_cuda.cu).
void run_sums(const ScanLaunch& l, Stream stream);

}  // namespace tilewright::scan
