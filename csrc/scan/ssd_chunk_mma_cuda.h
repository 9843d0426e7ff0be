// 64 x 64 tiles of 16-bit elements in shared memory, and their products on tensor cores.
//
// Tensor cores multiply bf16, sums are fp32. A factor that is no bf16 is the sum of several: what rounding to
// bf16 leaves of it is rounded again. Three keep all of fp32, and its range; two keep 16 bits, enough where
// the result is rounded to fewer. Tensors of bf16 are one piece, those of fp16 two, exactly. Products of
// pieces so small that fp32 would not see them are left out.
//
// Zeros mask what a triangle leaves out, and an infinity is a piece and NaNs, so all this holds for finite
// numbers alone. Threads note others, in pieces and in results (`odd`); that block's work is done again on
// FMA units.
//
// A block has 128 threads; of a 64 x 64 result a warp owns 16 rows, spread over lanes as by mma
// (device/mma.h).
#pragma once

#include "device/math.h"
#include "device/mma.h"
#include "scan/ssd_chunk_cuda.h"

namespace tilewright::scan {
namespace {

using device::Vector;

constexpr int kThreads = 128, kChunk = 8, kChunks = kTile / kChunk, kSquares = kTile / 16;
static_assert(kThreads / device::kWarpSize == kSquares);

using Results = float[kChunks][4];

constexpr size_t kMostShared = 99 * 1024;  // of a block, on devices that have the least

template <class T>
constexpr int kPiecesOf = std::is_same_v<T, bf16> ? 1 : 2;

template <int kPieces>
struct alignas(128) Tile {
  bf16 piece[kPieces][kTile * kTile];
};

// Chunks of 16 bytes change places by the row, so that neither the eight rows of a matrix nor a row's chunks
// meet in a bank.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kTile + ((chunk ^ (row & 7)) << 3);
}

// ---- into tiles ----

__device__ __forceinline__ void note_odd(uint32_t& odd, uint32_t pair) {
  odd |= ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u;  // exponents of ones carry into the sign's place
}

template <int kPieces>
__device__ __forceinline__ void split(uint32_t (&pair)[kPieces], float low, float high, uint32_t& odd) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    pair[piece] = device::pack<bf16>(low, high);
    low -= device::bits_float(pair[piece] << 16);
    high -= device::bits_float(pair[piece] & 0xffff0000u);
  }
  note_odd(odd, pair[0]);
}

__device__ __forceinline__ void note_odd(uint32_t& odd, float value) {
  odd |= ((device::float_bits(value) & 0x7f800000u) + 0x00800000u) & 0x80000000u;
}

using Words = Vector<uint32_t, kChunk / 2>;

__device__ __forceinline__ void put_words(bf16* piece, int row, int chunk, const Words& words) {
  device::store(reinterpret_cast<Words*>(piece + place_of(row, chunk)), words);
}

template <int kPieces, class T>
__device__ __forceinline__ void put(Tile<kPieces>& tile, int row, int chunk, const Vector<T, kChunk>& values,
                                    uint32_t& odd) {
  Words words[kPieces];
  if constexpr (kPieces == 1 && std::is_same_v<T, bf16>) {
    memcpy(&words[0], &values, sizeof values);
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) note_odd(odd, words[0][i]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      uint32_t pair[kPieces];
      split(pair, device::to_float(values[2 * i]), device::to_float(values[2 * i + 1]), odd);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) words[piece][i] = pair[piece];
    }
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) put_words(tile.piece[piece], row, chunk, words[piece]);
}

// tile(row, column) = values(row, column)[0], and so on; 64 bytes of a thread are under way at once.
template <int kPieces, class Values>
__device__ __forceinline__ void fill(Tile<kPieces>& tile, uint32_t& odd, const Values& values) {
  using Held = decltype(values(0, 0));
  constexpr int kTogether = 64 / sizeof(Held);
#pragma unroll 1
  for (int first = int(threadIdx.x); first < kTile * kChunks; first += kTogether * kThreads) {
    Held held[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = first + i * kThreads;
      held[i] = values(at / kChunks, at % kChunks * kChunk);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int at = first + i * kThreads;
      put(tile, at / kChunks, at % kChunks, held[i], odd);
    }
  }
}

// ---- eight columns at a time ----

template <class T>
struct ChunksOf : RowsOf<T> {
  bool vectors;

  __device__ __forceinline__ ChunksOf(const SsdTensor& t, const SsdChunk& chunk, int64_t head, int columns)
      : RowsOf<T>(t, chunk, head, columns),
        vectors(t.inner == 1 && t.step % kChunk == 0 && device::is_aligned(this->data, 16)) {}

  __device__ __forceinline__ Vector<T, kChunk> operator()(int row, int column) const {
    const T* from = this->data + row * this->step + column * this->inner;
    if (vectors && this->has(row, column + kChunk - 1)) {
      return device::load(reinterpret_cast<const Vector<T, kChunk>*>(from));
    }
    Vector<T, kChunk> values;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = this->has(row, column + i) ? from[i * this->inner] : T{};
    return values;
  }

  __device__ __forceinline__ void store(int row, int column, const Vector<float, kChunk>& values) const {
    T* to = const_cast<T*>(this->data) + row * this->step + column * this->inner;
    Vector<T, kChunk> narrow;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) narrow[i] = device::from_float<T>(values[i]);
    if (vectors && this->has(row, column + kChunk - 1)) {
      device::store(reinterpret_cast<Vector<T, kChunk>*>(to), narrow);
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (this->has(row, column + i)) to[i * this->inner] = narrow[i];
    }
  }
};

template <class T>
__device__ __forceinline__ Vector<float, kChunk> to_floats(const Vector<T, kChunk>& values) {
  Vector<float, kChunk> wide;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) wide[i] = device::to_float(values[i]);
  return wide;
}

// Rows of fp32: a state [states][head_dim], or partial sums.
struct FloatChunks {
  float* data;
  int64_t step;
  int rows, width;
  bool vectors;

  __device__ __forceinline__ FloatChunks(float* first, int64_t stride, int count, int columns)
      : data(first),
        step(stride),
        rows(count),
        width(columns),
        vectors(stride % 4 == 0 && columns % kChunk == 0 && device::is_aligned(first, 16)) {}

  __device__ __forceinline__ Vector<float, kChunk> operator()(int row, int column) const {
    const float* from = data + row * step + column;
    Vector<float, kChunk> values;
    if (vectors && row < rows && column < width) {
      using Half = Vector<float, kChunk / 2>;
      const Half low = device::load(reinterpret_cast<const Half*>(from));
      const Half high = device::load(reinterpret_cast<const Half*>(from) + 1);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = i < kChunk / 2 ? low[i] : high[i - kChunk / 2];
      return values;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) values[i] = row < rows && column + i < width ? from[i] : 0.0f;
    return values;
  }

  __device__ __forceinline__ void store(int row, int column, const Vector<float, kChunk>& values) const {
    if (row >= rows) return;
    float* to = data + row * step + column;
    if (vectors && column < width) {
      using Half = Vector<float, kChunk / 2>;
      device::store(reinterpret_cast<Half*>(to), {values[0], values[1], values[2], values[3]});
      device::store(reinterpret_cast<Half*>(to) + 1, {values[4], values[5], values[6], values[7]});
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (column + i < width) to[i] = values[i];
    }
  }
};

__device__ __forceinline__ FloatChunks state_chunks(const SsdChunkScanParams& p, void* of_all, int64_t chunk,
                                                    int64_t head) {
  return {static_cast<float*>(of_all) + state_offset(p, chunk, head), p.head_dim, p.states, p.head_dim};
}

// ---- products ----

// Which axis of a factor's tile is summed over.
enum class Summed { kRows, kColumns };

// Squares of 16 x 16, a row or a column of them.
struct Range {
  int begin, end;
  __device__ __forceinline__ bool has(int square) const { return square >= begin && square < end; }
};

__device__ __forceinline__ Range all_squares() { return {0, kSquares}; }
__device__ __forceinline__ Range squares_of(int extent, int from) {
  return {0, extent - from < kTile ? (extent - from + 15) / 16 : kSquares};
}
// Up to the warp's own rows, and from them on.
__device__ __forceinline__ Range lower_squares() { return {0, device::warp_id() + 1}; }
__device__ __forceinline__ Range upper_squares() { return {device::warp_id(), kSquares}; }

// The matrices 1 and 2 of a square lie below and to the right of matrix 0 (kDown), or the other way round.
template <bool kDown, bool kTransposed>
__device__ __forceinline__ void load_square(uint32_t (&square)[4], const bf16* piece, int down, int right) {
  const int matrix = device::lane_id() / 8, row = device::lane_id() % 8;
  const int below = kDown ? matrix % 2 : matrix / 2, beside = kDown ? matrix / 2 : matrix % 2;
  const int place = place_of(down * 16 + below * 8 + row, right * 2 + beside);
  const device::SharedAddress address = device::shared_address(piece) + unsigned(place) * 2;
  if constexpr (kTransposed) {
    device::load_matrices_transposed(square, address);
  } else {
    device::load_matrices(square, address);
  }
}

constexpr int kSmallest = 3;  // pieces whose numbers add up to it: 2^-24 of the product, or less

// Columns 16 n on of c += a times the rows 16 k on of the right factor.
template <Summed kRight, int kA, int kB>
__device__ __forceinline__ void multiply_square(Results& c, int n, const uint32_t (&a)[kA][4],
                                                const Tile<kB>& right, int k) {
#pragma unroll
  for (int j = 0; j < kB; ++j) {
    uint32_t b[4];
    if constexpr (kRight == Summed::kRows) {
      load_square<true, true>(b, right.piece[j], k, n);
    } else {
      load_square<false, false>(b, right.piece[j], n, k);
    }
#pragma unroll
    for (int i = 0; i < kA && i + j < kSmallest; ++i) {
      device::mma_m16n8k16<bf16>(c[2 * n], a[i], b[0], b[1]);
      device::mma_m16n8k16<bf16>(c[2 * n + 1], a[i], b[2], b[3]);
    }
  }
}

template <Summed kLeft, Summed kRight, int kA, int kB>
__device__ __forceinline__ void multiply(Results& c, const Tile<kA>& left, const Tile<kB>& right,
                                         Range summed, Range columns = all_squares()) {
  const int warp = device::warp_id();
#pragma unroll
  for (int k = 0; k < kSquares; ++k) {
    if (!summed.has(k)) continue;
    uint32_t a[kA][4];
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      if constexpr (kLeft == Summed::kRows) {
        load_square<false, true>(a[i], left.piece[i], k, warp);
      } else {
        load_square<true, false>(a[i], left.piece[i], warp, k);
      }
    }
#pragma unroll
    for (int n = 0; n < kSquares; ++n) {
      if (columns.has(n)) multiply_square<kRight>(c, n, a, right, k);
    }
  }
}

// The left factor being results, in so many pieces: where a lane has them is where the product needs them.
template <int kA, int kB>
__device__ __forceinline__ void multiply_results(Results& c, const Results& left, const Tile<kB>& right,
                                                 Range summed, uint32_t& odd) {
#pragma unroll
  for (int k = 0; k < kSquares; ++k) {
    if (!summed.has(k)) continue;
    uint32_t a[kA][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&four)[4] = left[2 * k + i / 2];
      uint32_t pair[kA];
      split(pair, four[i % 2 * 2], four[i % 2 * 2 + 1], odd);
#pragma unroll
      for (int piece = 0; piece < kA; ++piece) a[piece][i] = pair[piece];
    }
#pragma unroll
    for (int n = 0; n < kSquares; ++n) multiply_square<Summed::kRows>(c, n, a, right, k);
  }
}

// ---- results ----

__device__ __forceinline__ void clear(Results& c) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

__device__ __forceinline__ void note_odd(uint32_t& odd, const Results& c) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) note_odd(odd, c[n][i]);
  }
}

// Of the first (half 0) or second eight rows of a warp this lane's.
__device__ __forceinline__ int own_row(int half) {
  return device::warp_id() * 16 + half * 8 + device::lane_id() / 4;
}
__device__ __forceinline__ int own_column(int n) { return n * kChunk + device::lane_id() % 4 * 2; }

template <class Body>
__device__ __forceinline__ void each_result(Results& c, const Body& body) {
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) body(own_row(i / 2), own_column(n) + i % 2, c[n][i]);
  }
}

// The sum over the lanes that share a row, for all of them.
__device__ __forceinline__ float sum_row(float value) {
  value += device::shfl_xor(value, 1);
  return value + device::shfl_xor(value, 2);
}

// Results on their way to rows of eight columns; each warp has its own rows in it.
struct alignas(128) Stage {
  float at[kTile * kTile];
};

template <class Body>
__device__ __forceinline__ void each_chunk(Stage& stage, const Results& c, const Body& body) {
  using Pair = Vector<float, 2>;
  using Values = Vector<float, kChunk>;
  const int lane = device::lane_id();
  device::sync_warp();
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* pair = stage.at + place_of(own_row(half), n) + lane % 4 * 2;
      device::store(reinterpret_cast<Pair*>(pair), {c[n][2 * half], c[n][2 * half + 1]});
    }
  }
  device::sync_warp();
#pragma unroll 1
  for (int i = 0; i < 16 * kChunks / device::kWarpSize; ++i) {
    const int row = device::warp_id() * 16 + i * 4 + lane / kChunks, chunk = lane % kChunks;
    const auto values = device::load(reinterpret_cast<const Values*>(stage.at + place_of(row, chunk)));
    body(row, chunk * kChunk, values);
  }
}

template <class Body>
__device__ __forceinline__ void each_element(const SsdChunkScanParams&, const TilePlace& at, Results& c,
                                             const Body& body) {
  each_result(c, [&](int row, int column, float& value) { body(at.n0 + row, at.d0 + column, value); });
}

template <class Smem>
__device__ __forceinline__ void store_tile(const SsdChunkScanParams& p, float* state, const TilePlace& at,
                                           Smem& smem, const Results& c) {
  const FloatChunks to{state, p.head_dim, p.states, p.head_dim};
  each_chunk(smem.stage, c, [&](int n, int d, const Vector<float, kChunk>& values) {
    to.store(at.n0 + n, at.d0 + d, values);
  });
}

// Says whether this block's work has to be done again; the barrier at its end.
__device__ __forceinline__ void report(int32_t* odd_blocks, uint32_t odd) {
  const bool any = device::sync_block_or(odd != 0);
  if (threadIdx.x == 0) odd_blocks[blockIdx.x] = any;
}

}  // namespace
}  // namespace tilewright::scan
