// How a stage of the selective scan comes into shared memory and leaves it, and sums over lanes.
#pragma once

#include "scan/selective_scan_cuda.h"

namespace tilewright::scan {

// ---- Tiles of u, delta, z, dout ----------------------------------------------------------------

// A tile keeps the tensor's bits and its direction: [channel][step] (of the smaller stride along steps,
// mirrored where the walk is, so that rows stay contiguous) or [step][channel]. What lies beyond the
// channels or the steps is undefined.
struct RawTile {
  unsigned char* bytes;
};

__device__ __forceinline__ bool runs_along_steps(const Strided& tensor) {
  const int64_t step = tensor.step < 0 ? -tensor.step : tensor.step;
  const int64_t channel = tensor.channel < 0 ? -tensor.channel : tensor.channel;
  return step < channel;
}

// Elements between rows along steps. Rows of 64 bytes and more are kept apart, so that eight lanes that read
// 16 bytes of a row each do not meet in a bank.
template <class TileOf>
__device__ __forceinline__ constexpr int tile_pitch(int bytes) {
  return TileOf::kStage * bytes < 64 ? TileOf::kStage : TileOf::kStage + 16 / bytes;
}

// Where an element of a tile is, counted in elements.
template <class TileOf>
__device__ __forceinline__ int tile_place(const Strided& tensor, int channel, int step, int bytes,
                                          const Part& part, const Geometry<TileOf>& geometry,
                                          const Stage& stage) {
  if (!runs_along_steps(tensor)) return step * geometry.channels + channel;
  return channel * tile_pitch<TileOf>(bytes) + (part.walk.reverse ? stage.steps - 1 - step : step);
}

__device__ __forceinline__ void copy_element(unsigned char* to, const unsigned char* from, int bytes) {
  if (bytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
  } else {
    *reinterpret_cast<uint16_t*>(to) = *reinterpret_cast<const uint16_t*>(from);
  }
}

// Starts copies of 16 bytes where strides and addresses allow it, else copies by elements. Follow it by
// cp_async_commit, cp_async_wait and a barrier.
template <class TileOf>
__device__ __forceinline__ void load_tile(RawTile tile, const Strided& tensor, DType dtype, const Part& part,
                                          const Channels& channels, const Geometry<TileOf>& geometry,
                                          const Stage& stage) {
  using device::cp_async;
  constexpr int kStage = TileOf::kStage;
  const int bytes = bytes_of(dtype), words = 16 / bytes;  // words: elements in 16 bytes
  const int64_t along_channels = tensor.channel * bytes, along_steps = tensor.step * bytes;
  const auto* base = static_cast<const unsigned char*>(tensor.data) + part.batch * tensor.batch * bytes +
                     channels.first * along_channels;
  const Walk& walk = part.walk;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const bool rows_are_channels = runs_along_steps(tensor);
  if (rows_are_channels && walk.order == nullptr && tensor.step == 1 && stage.steps == kStage) {
    const auto* corner = base + walk.position(walk.reverse ? stage.first + kStage - 1 : stage.first) * bytes;
    const int row_vectors = kStage / words, pitch = bytes * tile_pitch<TileOf>(bytes);
    if (row_vectors > 0 && device::is_aligned(corner, 16) && along_channels % 16 == 0) {
#pragma unroll 1
      for (int i = thread; i < channels.count * row_vectors; i += threads) {
        const int row = i / row_vectors, place = i % row_vectors * 16;
        cp_async<16>(tile.bytes + row * pitch + place, corner + row * along_channels + place);
      }
      return;
    }
  }
  if (!rows_are_channels && tensor.channel == 1 && along_steps % 16 == 0 && device::is_aligned(base, 16) &&
      channels.count % words == 0 && geometry.channels >= words) {
    const int row_vectors = geometry.channels / words, pitch = geometry.channels * bytes;
#pragma unroll 1
    for (int i = thread; i < stage.steps * row_vectors; i += threads) {
      const int row = i / row_vectors, place = i % row_vectors * 16;
      if (place >= channels.count * bytes) continue;
      cp_async<16>(tile.bytes + row * pitch + place,
                   base + walk.token(stage.first + row) * along_steps + place);
    }
    return;
  }
#pragma unroll 1
  for (int i = thread; i < geometry.channels * kStage; i += threads) {
    const int channel = rows_are_channels ? i / kStage : i % geometry.channels;
    const int step = rows_are_channels ? i % kStage : i / geometry.channels;
    if (channel >= channels.count || step >= stage.steps) continue;
    const int place = tile_place<TileOf>(tensor, channel, step, bytes, part, geometry, stage);
    copy_element(tile.bytes + place * bytes,
                 base + channel * along_channels + walk.token(stage.first + step) * along_steps, bytes);
  }
}

// kItem steps of one channel, which one thread prepares.
struct Item {
  int channel, step;
};

template <class TileOf>
__device__ __forceinline__ Item item_of(int index, const Geometry<TileOf>& geometry) {
  return {index % geometry.channels, index / geometry.channels * TileOf::kItem};
}

template <class TileOf>
using ItemValues = float[TileOf::kItem];

// An item of a tile; steps beyond the stage read as zero.
template <class T, class TileOf>
__device__ __forceinline__ void read_item(ItemValues<TileOf>& values, RawTile tile, const Strided& tensor,
                                          const Item& item, const Part& part,
                                          const Geometry<TileOf>& geometry, const Stage& stage) {
  constexpr int kItem = TileOf::kItem, kStage = TileOf::kStage;
  const T* shared = reinterpret_cast<const T*>(tile.bytes);
  if (runs_along_steps(tensor) && stage.steps == kStage) {
    constexpr int kWidth = kItem * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : kItem;
    using Vector = device::Vector<T, kWidth>;
    const bool mirrored = part.walk.reverse;
    const int place = mirrored ? kStage - kItem - item.step : item.step;
    const Vector* row =
        reinterpret_cast<const Vector*>(shared + item.channel * tile_pitch<TileOf>(sizeof(T)) + place);
    T all[kItem];
#pragma unroll
    for (int i = 0; i < kItem; i += kWidth) {
      const Vector some = device::load(row + i / kWidth);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) all[i + j] = some[j];
    }
#pragma unroll
    for (int i = 0; i < kItem; ++i) values[i] = device::to_float(mirrored ? all[kItem - 1 - i] : all[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    const int step = item.step + i;
    const int place = tile_place<TileOf>(tensor, item.channel, step, sizeof(T), part, geometry, stage);
    values[i] = step < stage.steps ? device::to_float(shared[place]) : 0.0f;
  }
}

// An item of a result goes to memory.
template <class T, class TileOf>
__device__ __forceinline__ void write_item(const ItemValues<TileOf>& values, const Strided& tensor,
                                           const Item& item, const Part& part, const Channels& channels,
                                           const Stage& stage) {
  constexpr int kItem = TileOf::kItem;
  if (tensor.data == nullptr) return;
  const Walk& walk = part.walk;
  const int64_t first = stage.first + item.step;
  T* row = static_cast<T*>(tensor.data) + part.batch * tensor.batch +
           (channels.first + item.channel) * tensor.channel;
  if (tensor.step == 1 && walk.order == nullptr && item.step + kItem <= stage.steps) {
    constexpr int kWidth = kItem * int(sizeof(T)) > 16 ? 16 / int(sizeof(T)) : kItem;
    using Vector = device::Vector<T, kWidth>;
    T* to = row + walk.position(walk.reverse ? first + kItem - 1 : first);
    if (device::is_aligned(to, sizeof(Vector))) {
#pragma unroll
      for (int i = 0; i < kItem; i += kWidth) {
        Vector some;
#pragma unroll
        for (int j = 0; j < kWidth; ++j)
          some[j] = device::from_float<T>(walk.reverse ? values[kItem - 1 - i - j] : values[i + j]);
        device::store(reinterpret_cast<Vector*>(to + i), some);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kItem; ++i) {
    if (item.step + i < stage.steps)
      row[walk.token(first + i) * tensor.step] = device::from_float<T>(values[i]);
  }
}

// ---- Rows of variable B and C ------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void read_state(float& value, const T* address, int64_t, int64_t token,
                                           int64_t stride) {
  value = device::to_float(address[token * stride]);
}
template <class T>
__device__ __forceinline__ void read_state(Complex& value, const T* address, int64_t, int64_t token,
                                           int64_t stride) {
  value.re = device::to_float(address[2 * token * stride]);
  value.im = device::to_float(address[(2 * token + 1) * stride]);
}

// rows[step][state], zero beyond the states and the steps.
template <class TileOf>
__device__ __forceinline__ void load_rows(typename TileOf::State* rows, const Strided& tensor, DType dtype,
                                          int states, const Part& part, int64_t group,
                                          const Geometry<TileOf>& geometry, const Stage& stage) {
  constexpr int kStage = TileOf::kStage;
  const bool along_steps = runs_along_steps({nullptr, 0, tensor.state, 0, tensor.step});
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const T* base = static_cast<const T*>(tensor.data) + part.batch * tensor.batch + group * tensor.channel;
#pragma unroll 4
    for (int i = int(threadIdx.x); i < kStage * geometry.states; i += int(blockDim.x)) {
      const int state = along_steps ? i / kStage : i % geometry.states;
      const int step = along_steps ? i % kStage : i / geometry.states;
      typename TileOf::State value = {};
      if (step < stage.steps && state < states) {
        read_state(value, base + state * tensor.state, 0, part.walk.token(stage.first + step), tensor.step);
      }
      rows[step * geometry.states + state] = value;
    }
  });
}

// ---- Sums over lanes ---------------------------------------------------------------------------

// What scatter_sum leaves to a lane: values first .. first + count - 1. Of several lanes that are left the
// same, one owns them.
struct Kept {
  int first, count;
  bool owner;
};

// Sums of v[0 .. kCount - 1] over the lanes that differ in the bits `distance`, 2 distance, ... below `end`.
// Lanes exchange halves of what they have, so that after log2(kCount) rounds of half as many shuffles each,
// every lane has a sum of its own. The order of the summands is that of the lanes' numbers.
template <int kCount, int kValues, class S>
__device__ __forceinline__ Kept scatter_sum(S (&v)[kValues], int distance, int end) {
  const int lane = device::lane_id();
  if constexpr (kCount == 1) {
    bool owner = true;
#pragma unroll
    for (int level = 1; level < device::kWarpSize; level *= 2) {
      if (level < distance || level >= end) continue;
      v[0] = add(v[0], device::shfl_xor(v[0], level));
      owner = owner && (lane & level) == 0;
    }
    return {0, 1, owner};
  } else {
    if (distance >= end) return {0, kCount, true};
    constexpr int kHalf = kCount / 2;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const S sent = upper ? v[i] : v[kHalf + i];
      const S kept = upper ? v[kHalf + i] : v[i];
      v[i] = add(kept, device::shfl_xor(sent, distance));
    }
    Kept kept = scatter_sum<kHalf>(v, 2 * distance, end);
    if (upper) kept.first += kHalf;
    return kept;
  }
}

}  // namespace tilewright::scan
