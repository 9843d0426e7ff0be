// Small kernels that show what the emulator promises, run on plain vectors. tests/emulator holds the
// results against what each device function means.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace pybind11 {
class module_;
}

namespace tilewright::emulator {

// Adds the emulator's options to the module, and these kernels as its submodule.
void bind_selftest(pybind11::module_& module);

}  // namespace tilewright::emulator

namespace tilewright::selftest {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Words = std::vector<uint32_t>;
using Longs = std::vector<uint64_t>;
using Ints = std::vector<int32_t>;
using Halves = std::vector<uint16_t>;
using Bytes = std::vector<uint8_t>;
using Extent = std::array<unsigned, 3>;

// ---- Threads and warps -------------------------------------------------------------------------

// Per thread, in memory order: blockIdx, threadIdx (x, y, z each), lane_id, warp_id.
Words indices(Extent grid, Extent block);

// A warp collective by name, in one block of values.size() threads; lanes outside the mask do not call it
// and keep `untouched`.
inline constexpr uint32_t kUntouched = 0xabcdef01u;
Words warp_words(const std::string& op, const Words& values, int argument, uint32_t mask);
Doubles warp_doubles(const std::string& op, const Doubles& values, int argument);

// sync_block_or, _and and _count, for each thread. Threads whose predicate is above 1 exit before: they
// hold nobody up, and keep zeros.
Words block_votes(const Words& predicates);

// ---- Order and barriers ------------------------------------------------------------------------

// For each thread of each block, when it ran among its block's threads; then for each block, when it
// began among the blocks.
Words running_order(unsigned blocks, unsigned threads);

// Sum of a power of two of values by a tree in shared memory, by one block; without barriers it is wrong.
float block_sum(const Floats& values, bool with_barriers);

// Every thread's value, passed to its neighbour in the warp through shared memory.
Floats pass_in_warp(const Floats& values, bool with_barriers);

// Two warps fill a ring of shared memory for two others to read, by named barriers.
Floats pass_by_named_barriers(const Floats& values);

// Sum over the grid in one launch: the block that comes last adds up what the others have left.
float grid_sum(const Floats& values, unsigned blocks);

// ---- Memory ------------------------------------------------------------------------------------

// Shared memory as a block finds it, after another block has written all of it.
Floats uninitialised(unsigned count);

// Writes one byte at this offset of a shared memory of `bytes` bytes.
void write_shared(unsigned bytes, int offset);

// Copies by vectors of so many bytes, from `shift` bytes beyond an aligned address.
Bytes copy_vectors(const Bytes& values, int vector_bytes, bool streaming, int shift);

// Three groups of one tile each are copied, and a fourth tile is not committed; what shared memory holds
// after cp_async_wait<pending> (pending < 0: after no wait). Elements from `valid` on are zero-filled.
Floats async_tiles(const Floats& values, int bytes, int pending, int valid);

struct Atomics {
  Doubles sums;   // float, double, int32, uint32, uint64, and of a shared float
  Ints extremes;  // max and min as int32
  Words unsigned_extremes;
  Words exchanged;  // what exchange found, then what it left
  Longs exchanged_long;
  Longs counted;  // by compare-and-swap, uint32 and uint64
};
Atomics atomics(unsigned blocks, unsigned threads);

// ---- Arithmetic --------------------------------------------------------------------------------

Floats float_math(const std::string& name, const Floats& a, const Floats& b, const Floats& c);
Words word_math(const std::string& name, const Words& a, const Words& b, const Words& selector);

// By from_float, then once more by from_float2; and back.
Halves narrow(const std::string& type, const Floats& values);
Floats widen(const std::string& type, const Halves& bits);

// c + a b of bits, 16 x 16 by 16 x 8, row by row; transposed: as the memory holds that operand.
Floats matrix_product(const std::string& type, const Halves& a, const Halves& b, const Floats& c,
                      bool a_transposed, bool b_transposed);

// c + a b of bits, where a (16 x 32) keeps 16 of the elements of a row, at these places.
Floats sparse_matrix_product(const std::string& type, const Halves& a, const Bytes& places, const Halves& b,
                             const Floats& c, int selector);

// ---- The host side, and misuse -----------------------------------------------------------------

// A launch with parameters of the largest size; the sum of them all, as each of 64 threads saw it.
Longs largest_params();

// copy_to_device, then fill_zero of the second half, under a DeviceGuard.
Bytes copy_and_fill(const Bytes& values);

std::vector<int> device_properties();  // multiprocessor_count, resident_blocks

// Does the named wrong thing, and returns if it goes unnoticed.
void misuse(const std::string& what);
std::vector<std::string> misuses();

// ---- Hopper ------------------------------------------------------------------------------------

// Two warps fill a ring of two slots for two others to read, by mbarriers; each slot comes out reversed.
Floats mbarrier_ring(const Floats& values, bool with_waits);

// The box at these coordinates of a tensor of values, as it lies in shared memory when it is read, with or
// without a wait. Innermost axis first; sizes, strides, box in elements.
Halves tma_tile(const Halves& values, const std::array<int64_t, 4>& sizes,
                const std::array<int64_t, 4>& strides, const std::array<int32_t, 4>& box,
                const std::array<int32_t, 4>& at, bool waits);

// a (64 x depth) b, with b stored as depth x columns (across) or columns x depth. Faults: 1 reads the result
// before the wait, 2 changes b after the products began, 3 writes the accumulators then, 4 (none) waits
// twice.
Floats wgmma_product(const std::string& type, const Halves& a, const Halves& b, int columns, bool across,
                     bool in_registers, int fault);

// A tile of values, as it lies in shared memory, stored to these coordinates of a tensor of zeros, which is
// returned. Otherwise as above.
Halves tma_stored(const Halves& tile, const std::array<int64_t, 4>& sizes,
                  const std::array<int64_t, 4>& strides, const std::array<int32_t, 4>& box,
                  const std::array<int32_t, 4>& at);

// The named order of accesses to shared memory, which may lack what its name says behind the colon.
void hopper_order(const std::string& what, bool lacks);
std::vector<std::string> hopper_orders();

void hopper_misuse(const std::string& what);
std::vector<std::string> hopper_misuses();

// A launch whose odd blocks throw their number, some sooner than others.
void fail_in_odd_blocks(unsigned blocks);

}  // namespace tilewright::selftest
