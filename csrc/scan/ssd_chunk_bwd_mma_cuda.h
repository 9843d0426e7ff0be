// What the backward passes of the SSD scan on tensor cores share.
#pragma once

#include "scan/ssd_chunk_mma_cuda.h"

namespace tilewright::scan {
namespace {

// The gradient of y: dout, through the gate if there is one, which takes three pieces.
template <class T, int kPieces>
struct GradientChunks {
  ChunksOf<T> dout, z;

  __device__ __forceinline__ GradientChunks(const SsdChunkScanParams& p, const SsdChunk& chunk, int64_t head)
      : dout(p.dout, chunk, head, p.head_dim), z(p.z, chunk, head, p.head_dim) {}

  __device__ __forceinline__ auto operator()(int row, int column) const {
    if constexpr (kPieces < 3) {
      return dout(row, column);
    } else {
      Vector<float, kChunk> values = to_floats(dout(row, column));
      if (dout.has(row, column)) {
        const Vector<float, kChunk> gate = to_floats(z(row, column));
#pragma unroll
        for (int i = 0; i < kChunk; ++i) values[i] *= gate[i] * sigmoid(gate[i]);
      }
      return values;
    }
  }
};

// Partial sums of dB or dC of one chunk.
__device__ __forceinline__ FloatChunks partial_sums(const SsdBackward& params, float* sums, const Heads& h) {
  const SsdChunkScanParams& p = params.p;
  const int64_t row = ((h.block * p.batch + h.chunk.batch) * p.length + h.chunk.start) * p.groups + h.group;
  return {sums + row * p.states, int64_t{p.groups} * p.states, h.chunk.length, p.states};
}

__device__ __forceinline__ int64_t tile_of_states(const SsdBackward& params, const Heads& h, int tile) {
  return (h.number * params.p.heads + h.head) * tiles(params.p.states) + tile;
}

// The kernels of a dtype, with a gate or without: Launch<T, pieces of g>::over(params, stream).
template <template <class, int> class Launch>
void launch_by_dtype(const SsdBackward& params, Stream stream) {
  const bool half = params.p.dtype == DType::kFloat16, gated = params.p.z.data != nullptr;
  if (half) return gated ? Launch<fp16, 3>::over(params, stream) : Launch<fp16, 2>::over(params, stream);
  return gated ? Launch<bf16, 3>::over(params, stream) : Launch<bf16, 1>::over(params, stream);
}

}  // namespace
}  // namespace tilewright::scan
