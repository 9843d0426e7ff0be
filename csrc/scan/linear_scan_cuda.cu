// Linear scans on the GPU.
//
// Roofline: 12 bytes and 2 FLOPs a float32 step forward, 20 and 4 backward: memory decides, and what matters
// is that enough bytes are on their way. Three kernels:
//
// Across: a thread owns 8 bytes of neighbours along inner and walks through time; loads run 16 steps
// or more ahead of the arithmetic.
// Along: warps share a row, 16 bytes a lane; a lane's steps are composed into one map s -> a s + b, the maps
// of a warp by shuffles, those of the warps through shared memory.
// Carry: where rows are too few to fill the GPU, sequences are split into chunks. The first two kernels then
// run twice, to compose every chunk and to sweep it, and this one walks over the chunks in between. That
// costs a second read of the inputs.
//
// Composed decays can overflow where the recurrence itself does not (0 * inf). A state that comes out not
// finite is therefore computed again, step by step, unless it was NaN already.
#include "scan/linear_scan_cuda.h"

#include "device/launch.h"
#include "device/smem.h"
#include "device/sync.h"

namespace tilewright::scan {
namespace {

constexpr int kAcrossThreads = 64, kAlongThreads = kMaxWarps * device::kWarpSize, kCarryThreads = 64;
constexpr int kRowsOfOneWarp = 4;  // rows of a block where each has one warp
constexpr int64_t kMaxGrid = int64_t{1} << 30;

// ---- across: a thread is a few channels ----

template <bool kBackward, class T>
struct Across {
  using Scalar = typename Numbers<T>::Scalar;
  static constexpr int kWidth = across_width(sizeof(T));
  static constexpr int kGroups =
      kBackward ? TW_TUNED(LINEAR_SCAN_ACROSS_GROUPS_BACKWARD, 4) : TW_TUNED(LINEAR_SCAN_ACROSS_GROUPS, 5);
  using Cell = device::Vector<T, kWidth>;
  using Raw = device::Vector<uint32_t, sizeof(Cell) / 4>;  // a cell on its way: 16-bit numbers would take a
                                                           // register each
  static_assert(sizeof(Cell) == sizeof(Raw));
  struct Loaded {
    Raw a, x, h;
  };

  template <bool kWhole>
  static __device__ __forceinline__ Raw read(const Walk<const T>& from, int64_t s, int count) {
    const T* address = from.at(s);
    if constexpr (kWhole) {
      return device::load_streaming(reinterpret_cast<const Raw*>(address));
    } else {
      Cell cell{};
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < count) cell[i] = address[i * from.inner];
      }
      Raw raw;
      memcpy(&raw, &cell, sizeof raw);
      return raw;
    }
  }

  static __device__ __forceinline__ Cell cell_of(const Raw& raw) {
    Cell cell;
    memcpy(&cell, &raw, sizeof cell);
    return cell;
  }

  template <bool kWhole>
  static __device__ __forceinline__ void write(const Walk<T>& to, int64_t s, int count, const Cell& cell) {
    T* address = to.at(s);
    if constexpr (kWhole) {
      device::store_streaming(reinterpret_cast<Cell*>(address), cell);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        if (i < count) address[i * to.inner] = cell[i];
      }
    }
  }

  // A row of cells can be read and written 8 bytes at a time.
  template <class U>
  static __device__ __forceinline__ bool is_whole(const Walk<U>& stream) {
    return stream.data == nullptr ||
           (stream.inner == 1 && device::is_aligned(stream.data, kWidth * sizeof(U)) &&
            stream.step % kWidth == 0);
  }

  template <bool kWhole>
  static __device__ __forceinline__ void fetch(Loaded& loaded, const Row<T>& row, const Segment& segment,
                                               int64_t s, int count) {
    if (s >= segment.end) return;
    loaded.a = read<kWhole>(row.a, s, count);
    loaded.x = read<kWhole>(row.x, s, count);
    if constexpr (kBackward) {  // the sweep visits next what came before
      if (row.h.data != nullptr && s + 1 < segment.steps) loaded.h = read<kWhole>(row.h, s + 1, count);
    }
  }

  template <bool kWhole>
  static __device__ __forceinline__ void advance(const Params& q, const Loaded& loaded, const Row<T>& row,
                                                 const Segment& segment, int64_t s, int count,
                                                 Map<Scalar> (&total)[kWidth]) {
    const Cell a = cell_of(loaded.a), x = cell_of(loaded.x), h = cell_of(loaded.h);
    Cell y, da;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Scalar decay = to_scalar(a[i]);
      Scalar before{};
      if constexpr (kBackward) {
        before = to_scalar(h[i]);
        if (s + 1 == segment.steps) before = i < count ? initial_state(row, i * q.p.h0.inner) : Scalar{};
      }
      const Step<Scalar> step = take_step<kBackward>(decay, to_scalar(x[i]), before, total[i].b);
      total[i] = {times(kBackward ? conjugate(decay) : decay, total[i].a), step.after};
      y[i] = from_scalar<T>(step.y);
      da[i] = from_scalar<T>(step.da);
    }
    if (q.composing) return;
    write<kWhole>(row.y, s, count, y);
    if (kBackward && row.da.data != nullptr) write<kWhole>(row.da, s, count, da);
  }

  // Loads run up to kGroups groups of steps ahead of the arithmetic. They are issued and awaited by the
  // group, because a warp can tell only six outstanding sets of loads apart.
  template <bool kWhole, int kGroups>
  static __device__ __forceinline__ void walk(const Params& q, const Row<T>& row, const Segment& segment,
                                              int count, Map<Scalar> (&total)[kWidth]) {
    constexpr int kGroup = 4, kSteps = kGroups * kGroup;
    Loaded ring[kSteps] = {};
#pragma unroll
    for (int u = 0; u < kSteps; ++u) fetch<kWhole>(ring[u], row, segment, segment.begin + u, count);
    for (int64_t s = segment.begin; s < segment.end; s += kSteps) {
#pragma unroll
      for (int group = 0; group < kSteps; group += kGroup) {
#pragma unroll
        for (int u = group; u < group + kGroup; ++u) {
          if (s + u < segment.end) advance<kWhole>(q, ring[u], row, segment, s + u, count, total);
        }
#pragma unroll
        for (int u = group; u < group + kGroup; ++u) {
          fetch<kWhole>(ring[u], row, segment, s + u + kSteps, count);
        }
      }
    }
  }

  static __device__ void run(const Params& q, int64_t work) {
    const int64_t inner = work % q.groups * kWidth, outer = work / q.groups % q.rows;
    const int64_t slot = work / q.groups / q.rows;
    const Segment segment = segment_of(q, slot);
    if (q.chunk != 0 && segment.begin >= segment.end) return;
    const Row<T> row = row_of<T>(q, outer, inner, segment);
    const int count = q.p.inner - inner < kWidth ? int(q.p.inner - inner) : kWidth;
    Map<Scalar> total[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      total[i] = identity<Scalar>();
      if (i < count) total[i].b = entering<kBackward>(q, row, slot, i, i * q.p.h0.inner);
    }
    const bool whole = count == kWidth && is_whole(row.a) && is_whole(row.x) && is_whole(row.h) &&
                       is_whole(row.y) && is_whole(row.da);
    if (whole) {
      walk<true, kGroups>(q, row, segment, count, total);
    } else {
      walk<false, 1>(q, row, segment, count, total);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) leave(q, row, segment, slot, i, i * q.p.dh0.inner, total[i]);
    }
  }
};

template <bool kBackward, class T>
__global__ void __launch_bounds__(kAcrossThreads) across_kernel(const __grid_constant__ Params q) {
  const int64_t threads = int64_t{gridDim.x} * kAcrossThreads, works = q.slots * q.rows * q.groups;
  for (int64_t work = int64_t{blockIdx.x} * kAcrossThreads + threadIdx.x; work < works; work += threads) {
    Across<kBackward, T>::run(q, work);
  }
}

// ---- along: warps share a row ----

// Tiles on their way; registers limit them.
constexpr int kTilesAhead = 2, kTilesAheadBackward = TW_TUNED(LINEAR_SCAN_ALONG_AHEAD_BACKWARD, 1);
constexpr int kTurns = 2;  // what one tile's warps still read, the next one's do not write
static_assert(kTurns % kTilesAhead == 0 && kTurns % kTilesAheadBackward == 0);

template <class Scalar>
struct Smem {
  Map<Scalar> totals[kTurns][kMaxWarps];  // of warps, for even and for odd tiles
  Scalar state;                           // where states are computed again, on its way to the next warp
};

template <bool kBackward, class T>
struct Along {
  using Scalar = typename Numbers<T>::Scalar;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kTiles = kBackward ? kTilesAheadBackward : kTilesAhead;
  using Cell = device::Vector<T, kWidth>;
  using Words = device::Vector<uint32_t, 4>;  // a cell on its way: 16-bit numbers would take a register each
  static_assert(sizeof(Cell) == sizeof(Words));

  // The lane's steps of a tile; beyond the end they change nothing.
  struct Piece {
    Scalar a[kWidth], x[kWidth], before[kBackward ? kWidth : 1];
    int64_t s;
    int count;
  };

  // kWidth steps lie side by side, either way round, at a multiple of 16 bytes.
  template <class U>
  static __device__ __forceinline__ bool is_whole(const Walk<U>& stream, int64_t s, int count) {
    if (count != kWidth || (stream.step != 1 && stream.step != -1)) return false;
    return device::is_aligned(stream.step == 1 ? stream.at(s) : stream.at(s + kWidth - 1),
                              kWidth * sizeof(U));
  }

  // Steps as they lie in memory: where the sweep descends, the first one comes last.
  static __device__ __forceinline__ Words read(const Walk<const T>& from, int64_t s, int count,
                                               bool descending) {
    if (is_whole(from, s, count)) {
      const T* low = descending ? from.at(s + kWidth - 1) : from.at(s);
      return device::load_streaming(reinterpret_cast<const Words*>(low));
    }
    Cell cell{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int step = descending ? kWidth - 1 - i : i;
      if (step < count) cell[i] = *from.at(s + step);
    }
    Words words;
    memcpy(&words, &cell, sizeof words);
    return words;
  }

  static __device__ __forceinline__ Cell in_order(const Words& words, bool descending) {
    Cell cell, turned;
    memcpy(&cell, &words, sizeof cell);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) turned[i] = descending ? cell[kWidth - 1 - i] : cell[i];
    return turned;
  }

  static __device__ __forceinline__ void write(const Walk<T>& to, int64_t s, int count, const Cell& cell) {
    if (is_whole(to, s, count)) {
      const bool ascending = to.step == 1;
      Cell turned;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) turned[i] = ascending ? cell[i] : cell[kWidth - 1 - i];
      T* low = ascending ? to.at(s) : to.at(s + kWidth - 1);
      return device::store_streaming(reinterpret_cast<Cell*>(low), turned);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (i < count) *to.at(s + i) = cell[i];
    }
  }

  struct Loaded {
    Words a, x, h;
    int64_t s;
    int count;
  };

  static __device__ __forceinline__ Loaded fetch(const Row<T>& row, const Segment& segment, int64_t s,
                                                 bool descending) {
    const int64_t left = segment.end - s;
    Loaded loaded{};
    loaded.s = s;
    loaded.count = left <= 0 ? 0 : left < kWidth ? int(left) : kWidth;
    if (loaded.count == 0) return loaded;
    loaded.a = read(row.a, s, loaded.count, descending);
    loaded.x = read(row.x, s, loaded.count, descending);
    if (kBackward && row.h.data != nullptr) loaded.h = read(row.h, s, loaded.count, descending);
    return loaded;
  }

  // The states before the lane's steps: h of the step the sweep visits next, which the next lane may hold.
  static __device__ __forceinline__ void find_states_before(Piece& piece, const Cell& h, const Row<T>& row,
                                                            const Segment& segment) {
    const Scalar next = device::shfl_down(to_scalar(h[0]), 1);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      piece.before[i] = i + 1 < kWidth ? to_scalar(h[i + 1 < kWidth ? i + 1 : 0]) : next;
      if (i >= piece.count) continue;
      const int64_t visited_next = piece.s + i + 1;
      if (visited_next == segment.steps) {
        piece.before[i] = initial_state(row, 0);
      } else if (visited_next == segment.end || (i + 1 == kWidth && device::lane_id() == 31)) {
        piece.before[i] = to_scalar(*row.h.at(visited_next));
      }
    }
  }

  static __device__ __forceinline__ Piece piece_of(const Loaded& loaded, bool descending, const Row<T>& row,
                                                   const Segment& segment) {
    const Cell a = in_order(loaded.a, descending), x = in_order(loaded.x, descending);
    Piece piece;
    piece.s = loaded.s;
    piece.count = loaded.count;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      piece.a[i] = to_scalar(a[i]);
      piece.x[i] = to_scalar(x[i]);
      if (i >= loaded.count) {
        set_one(piece.a[i]);
        piece.x[i] = Scalar{};
      }
    }
    if constexpr (kBackward) {
      if (row.da.data != nullptr) {
        find_states_before(piece, in_order(loaded.h, descending), row, segment);
      }
    }
    return piece;
  }

  static __device__ __forceinline__ Map<Scalar> compose(const Piece& piece) {
    Map<Scalar> map = map_of<kBackward>(piece.a[0], piece.x[0]);
#pragma unroll
    for (int i = 1; i < kWidth; ++i) map = then(map, map_of<kBackward>(piece.a[i], piece.x[i]));
    return map;
  }

  static __device__ __forceinline__ Map<Scalar> shuffle_up(Map<Scalar> map, int by) {
    return {device::shfl_up(map.a, by), device::shfl_up(map.b, by)};
  }

  // The maps of the warp's lanes before this one; `total` becomes that of all lanes.
  static __device__ __forceinline__ Map<Scalar> compose_warp(Map<Scalar> own, Map<Scalar>& total) {
    const int lane = device::lane_id();
#pragma unroll
    for (int by = 1; by < device::kWarpSize; by *= 2) {
      const Map<Scalar> earlier = shuffle_up(own, by);
      if (lane >= by) own = then(earlier, own);
    }
    total = {device::shfl(own.a, 31), device::shfl(own.b, 31)};
    const Map<Scalar> before = shuffle_up(own, 1);
    return lane == 0 ? identity<Scalar>() : before;
  }

  // The state that enters this lane, step by step from the one that enters the tile, which is moved behind
  // it.
  static __device__ Scalar walk(Smem<Scalar>& smem, const Piece& piece, int warps, int warp, Scalar& state) {
    Scalar mine{};
    for (int w = 0; w < warps; ++w) {
      if (w == warp) {
        for (int lane = 0; lane < device::kWarpSize; ++lane) {
          Scalar after = state;
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const Scalar next = take_step<kBackward>(piece.a[i], piece.x[i], Scalar{}, after).after;
            if (i < piece.count) after = next;
          }
          if (lane == device::lane_id()) mine = state;
          state = device::shfl(after, lane);
        }
        if (warps > 1 && device::lane_id() == 0) smem.state = state;
      }
      if (warps == 1) break;
      device::sync_block();
      state = smem.state;
      device::sync_block();
    }
    return mine;
  }

  static __device__ __forceinline__ void put(const Piece& piece, const Row<T>& row, Scalar state) {
    Cell y{}, da{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const Scalar before = kBackward && row.da.data != nullptr ? piece.before[kBackward ? i : 0] : Scalar{};
      const Step<Scalar> step = take_step<kBackward>(piece.a[i], piece.x[i], before, state);
      y[i] = from_scalar<T>(step.y);
      da[i] = from_scalar<T>(step.da);
      state = step.after;
    }
    write(row.y, piece.s, piece.count, y);
    if (kBackward && row.da.data != nullptr) write(row.da, piece.s, piece.count, da);
  }

  // One tile: what is loaded is composed, and the tile kTiles on is called for.
  static __device__ __forceinline__ void visit(const Params& q, const Row<T>& row, const Segment& segment,
                                               int warp, Smem<Scalar>& smem, int turn, Loaded& loaded,
                                               Map<Scalar>& carry) {
    const int64_t tile = int64_t{q.warps} * device::kWarpSize * kWidth;
    const Piece piece = piece_of(loaded, q.p.descending, row, segment);
    loaded = fetch(row, segment, loaded.s + kTiles * tile, q.p.descending);
    Map<Scalar> total;
    const Map<Scalar> before = compose_warp(compose(piece), total);
    Map<Scalar> entered = carry, left = then(carry, total);
    if (q.warps > 1) {
      if (device::lane_id() == 0) smem.totals[turn][warp] = total;
      device::sync_block();
      left = carry;
      for (int w = 0; w < q.warps; ++w) {
        if (w == warp) entered = left;
        left = then(left, smem.totals[turn][w]);
      }
    }
    if (q.composing) {
      carry = left;
      return;
    }
    Scalar state = times_plus(before.a, entered.b, before.b);
    // What is not finite anywhere in the tile is not finite at its end, and all threads see the same end.
    if (!is_finite(left.b) && !is_nan(carry.b)) {
      state = walk(smem, piece, q.warps, warp, carry.b);
    } else {
      carry = left;
    }
    put(piece, row, state);
  }

  // The warps of a row visit one segment of it; this thread belongs to the one numbered `warp`.
  static __device__ void run(const Params& q, int64_t work, int warp, Smem<Scalar>& smem) {
    const int64_t index = work % q.rows, slot = work / q.rows;
    const Segment segment = segment_of(q, slot);
    if (q.chunk != 0 && segment.begin >= segment.end) return;
    const Row<T> row = row_of<T>(q, index / q.p.inner, index % q.p.inner, segment);
    const int64_t tile = int64_t{q.warps} * device::kWarpSize * kWidth;
    const int64_t first = segment.begin + (warp * device::kWarpSize + device::lane_id()) * kWidth;
    Map<Scalar> carry = identity<Scalar>();
    carry.b = entering<kBackward>(q, row, slot, 0, 0);
    Loaded loaded[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) loaded[i] = fetch(row, segment, first + i * tile, q.p.descending);
    for (int64_t done = segment.begin; done < segment.end; done += kTurns * tile) {
#pragma unroll
      for (int i = 0; i < kTurns; ++i) {
        if (done + i * tile < segment.end) visit(q, row, segment, warp, smem, i, loaded[i % kTiles], carry);
      }
    }
    if (warp == 0 && device::lane_id() == 0) leave(q, row, segment, slot, 0, 0, carry);
  }
};

template <bool kBackward, class T>
__global__ void __launch_bounds__(kAlongThreads) along_kernel(const __grid_constant__ Params q) {
  auto& smem = device::shared_memory<Smem<typename Numbers<T>::Scalar>>();
  const int64_t works = q.slots * q.rows;
  if (q.warps == 1) {
    const int64_t warps = int64_t{gridDim.x} * kRowsOfOneWarp;
    for (int64_t work = int64_t{blockIdx.x} * kRowsOfOneWarp + device::warp_id(); work < works;
         work += warps) {
      Along<kBackward, T>::run(q, work, 0, smem);
    }
    return;
  }
  for (int64_t work = blockIdx.x; work < works; work += gridDim.x) {
    Along<kBackward, T>::run(q, work, device::warp_id(), smem);
    device::sync_block();  // the next row writes the totals that this one reads
  }
}

// ---- carry: a thread walks over the chunks of a channel ----

template <bool kBackward, class T>
__device__ typename Numbers<T>::Scalar walk_chunk(const Row<T>& row, int64_t begin, int64_t end,
                                                  typename Numbers<T>::Scalar state) {
  using Scalar = typename Numbers<T>::Scalar;
  for (int64_t s = begin; s < end; ++s) {
    state = take_step<kBackward>(to_scalar(*row.a.at(s)), to_scalar(*row.x.at(s)), Scalar{}, state).after;
  }
  return state;
}

template <bool kBackward, class T>
__device__ void carry_over_chunks(const Params& q, int64_t sequence_index, int64_t channel) {
  using Scalar = typename Numbers<T>::Scalar;
  constexpr int kAhead = 8;
  const Sequence sequence = sequence_of(q.p, sequence_index);
  const Segment whole{sequence_index, sequence.start, sequence.steps, 0, sequence.steps};
  const Row<T> row = row_of<T>(q, channel / q.p.inner, channel % q.p.inner, whole);
  const int64_t base = q.p.seqlens == nullptr ? 0 : first_slot(q, sequence_index, sequence.start);
  const int64_t chunks = (sequence.steps + q.chunk - 1) / q.chunk;
  const Scalar* map_a = static_cast<const Scalar*>(q.map_a) + base * q.channels + channel;
  Scalar* map_b = static_cast<Scalar*>(q.map_b) + base * q.channels + channel;
  Scalar state = kBackward ? Scalar{} : initial_state(row, 0);
  for (int64_t chunk = 0; chunk < chunks; chunk += kAhead) {
    Map<Scalar> maps[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i < chunks) maps[i] = {map_a[(chunk + i) * q.channels], map_b[(chunk + i) * q.channels]};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (chunk + i >= chunks) continue;
      map_b[(chunk + i) * q.channels] = state;
      Scalar after = times_plus(maps[i].a, state, maps[i].b);
      if (!is_finite(after) && !is_nan(state)) {
        const int64_t begin = (chunk + i) * q.chunk, end = begin + q.chunk;
        after = walk_chunk<kBackward>(row, begin, end < sequence.steps ? end : sequence.steps, state);
      }
      state = after;
    }
  }
}

template <bool kBackward, class T>
__global__ void __launch_bounds__(kCarryThreads) carry_kernel(const __grid_constant__ Params q) {
  const int64_t threads = int64_t{gridDim.x} * kCarryThreads, works = q.p.sequences * q.channels;
  for (int64_t work = int64_t{blockIdx.x} * kCarryThreads + threadIdx.x; work < works; work += threads) {
    carry_over_chunks<kBackward, T>(q, work / q.channels, work % q.channels);
  }
}

// ---- launch ----

unsigned grid_of(int64_t blocks) { return unsigned(blocks < kMaxGrid ? blocks : kMaxGrid); }

template <bool kBackward, class T>
void launch_visit(const Params& q, Stream stream) {
  if (q.across) {
    const int64_t blocks = divide_up(q.slots * q.rows * q.groups, kAcrossThreads);
    device::launch(across_kernel<kBackward, T>, dim3(grid_of(blocks)), dim3(kAcrossThreads), 0, stream, q);
    return;
  }
  const bool alone = q.warps == 1;
  const int64_t blocks = divide_up(q.slots * q.rows, alone ? kRowsOfOneWarp : 1);
  const int threads = device::kWarpSize * (alone ? kRowsOfOneWarp : q.warps);
  device::launch(along_kernel<kBackward, T>, dim3(grid_of(blocks)), dim3(threads),
                 sizeof(Smem<typename Numbers<T>::Scalar>), stream, q);
}

template <bool kBackward, class T>
void launch_scan(Params q, Stream stream) {
  if (q.chunk != 0) {
    q.map_a = q.p.workspace;
    q.map_b = static_cast<char*>(q.p.workspace) + map_bytes(q);
    q.composing = true;
    launch_visit<kBackward, T>(q, stream);
    q.composing = false;
    const int64_t blocks = divide_up(q.p.sequences * q.channels, kCarryThreads);
    device::launch(carry_kernel<kBackward, T>, dim3(grid_of(blocks)), dim3(kCarryThreads), 0, stream, q);
  }
  launch_visit<kBackward, T>(q, stream);
}

template <class T>
void run_as(const Params& q, Stream stream) {
  if (q.p.backward) {
    launch_scan<true, T>(q, stream);
  } else {
    launch_scan<false, T>(q, stream);
  }
}

}  // namespace

int64_t linear_scan_workspace_cuda(const LinearScanParams& p) { return 2 * map_bytes(plan_of(p)); }

void linear_scan_cuda(const LinearScanParams& p, int device, Stream stream) {
  const Params q = plan_of(p);
  if (q.channels == 0 || p.sequences == 0) return;
  const device::DeviceGuard guard(device);
  switch (p.dtype) {
    case DType::kFloat32:
      return run_as<float>(q, stream);
    case DType::kBFloat16:
      return run_as<bf16>(q, stream);
    case DType::kFloat16:
      return run_as<fp16>(q, stream);
    default:
      return run_as<Complex>(q, stream);
  }
}

}  // namespace tilewright::scan
