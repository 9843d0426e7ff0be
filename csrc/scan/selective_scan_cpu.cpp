// The selective scan on the CPU, compiled once per instruction-set level: the forward pass of float32,
// bfloat16 and float16 with real A, and the way to the other passes.
//
// A task is a sequence's tile of channels, a vector of one channel a lane. Chunk by chunk it brings u, delta
// and z into rows of lanes, takes eight states (four below AVX-512) at a time over all steps of the chunk
// with the states in registers, and brings the output back. B and C, the same for every channel of a group,
// are brought into float32 rows before, once.
//
// Roofline, per (batch, channel, step) with N states: 4 accesses (u, delta, z, out), so 16 bytes in float32,
// and 5 N + 10 FLOPs plus N powers of two. At N = 16 on AVX-512 a vector of channels takes 12 instructions a
// state, 200 a step with what is not per state, so two vector instructions a cycle give 6 cycles a channel
// and step: the arithmetic decides, not memory.
#include "scan/selective_scan_simd.h"

namespace tilewright::TW_ISA {
namespace selective {
namespace {

constexpr int kStatesAtOnce = kLanes == 16 ? 8 : 4;  // so that states and rates stay in registers

struct alignas(64) Rows {
  float value[kScanChunk * kLanes];
};

// A tile's chunk of steps: dt, dt u, and the sum over the states that grows to the output.
struct ForwardChunk {
  int64_t count;
  Rows dt, dtu, y;
  Operand B, C;  // at the chunk's first step
};

struct alignas(64) ForwardTile {
  float h[kMaxStates * kLanes], rate[kMaxStates * kLanes], B[kMaxStates * kLanes], C[kMaxStates * kLanes];
};

// h = a h + dt u B and y += C h for the states n to n + kCount.
template <int kCount, bool kVariableB, bool kVariableC>
void advance(ForwardChunk& c, ForwardTile& tile, int64_t n) {
  Float h[kCount], rate[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    h[i] = load(tile.h + (n + i) * kLanes);
    rate[i] = load(tile.rate + (n + i) * kLanes);
  }
  const float *B = operand_at<kVariableB>(c.B, n), *C = operand_at<kVariableC>(c.C, n);
  const int64_t end = c.count * kLanes, B_step = c.B.step, C_step = c.C.step;
  for (int64_t row = 0; row < end; row += kLanes) {
    const Float dt = load(c.dt.value + row), dtu = load(c.dtu.value + row);
    Float y = load(c.y.value + row);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      h[i] = fma(decay(dt * rate[i]), h[i], dtu * operand<kVariableB>(B, i));
      y = fma(operand<kVariableC>(C, i), h[i], y);
    }
    store(c.y.value + row, y);
    B += B_step;
    C += C_step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(tile.h + (n + i) * kLanes, h[i]);
}

template <bool kVariableB, bool kVariableC>
void advance_all(ForwardChunk& c, ForwardTile& tile, int64_t states) {
  int64_t n = 0;
  for (; n + kStatesAtOnce <= states; n += kStatesAtOnce) {
    advance<kStatesAtOnce, kVariableB, kVariableC>(c, tile, n);
  }
  for (; n + 2 <= states; n += 2) advance<2, kVariableB, kVariableC>(c, tile, n);
  if (n < states) advance<1, kVariableB, kVariableC>(c, tile, n);
}

void keep_states(const SelectiveScanParams& p, const Tile& tile, const float* h, int64_t slot) {
  float* kept = static_cast<float*>(p.chunk_states) + slot * p.states * p.dim + tile.channel;
  for (int64_t n = 0; n < p.states; ++n, kept += p.dim) {
    if (tile.lanes == kLanes) {
      store(kept, load(h + n * kLanes));
    } else {
      store_some(kept, load(h + n * kLanes), tile.lanes);
    }
  }
}

// dt, dt u, and D u where the sum starts.
template <class T>
void stage_inputs(const SelectiveScanParams& p, int64_t batch, const Tile& tile, const Chunk& chunk,
                  ForwardChunk& c) {
  stage(channels_of<T>(p.delta, batch, tile), tile.lanes, chunk, c.dt.value);
  stage(channels_of<T>(p.u, batch, tile), tile.lanes, chunk, c.dtu.value);
  const Float bias = load_channels(p.delta_bias, tile), D = load_channels(p.D, tile);
  for (int64_t row = 0; row < chunk.count * kLanes; row += kLanes) {
    const Float u = load(c.dtu.value + row), delta = load(c.dt.value + row) + bias;
    const Float dt = p.softplus ? softplus(delta) : delta;
    store(c.dt.value + row, dt);
    store(c.dtu.value + row, dt * u);
    store(c.y.value + row, p.D == nullptr ? splat(0.0f) : D * u);
  }
}

// What is read and written behind the states of this chunk, and what the next one reads.
template <class T>
void prefetch_chunk(const SelectiveScanParams& p, int64_t batch, const Tile& tile, const Chunk& chunk,
                    const Chunk& next) {
  if (p.z.data != nullptr) prefetch(channels_of<T>(p.z, batch, tile), tile.lanes, chunk);
  prefetch(channels_of<T>(p.out, batch, tile), tile.lanes, chunk);
  prefetch(channels_of<T>(p.delta, batch, tile), tile.lanes, next);
  prefetch(channels_of<T>(p.u, batch, tile), tile.lanes, next);
}

template <class T>
void write_output(const SelectiveScanParams& p, int64_t batch, const Tile& tile, const Chunk& chunk,
                  ForwardChunk& c) {
  if (p.z.data != nullptr) {
    Rows& gate = c.dt;
    stage(channels_of<T>(p.z, batch, tile), tile.lanes, chunk, gate.value);
    for (int64_t row = 0; row < chunk.count * kLanes; row += kLanes) {
      const Float z = load(gate.value + row);
      store(c.y.value + row, load(c.y.value + row) * (z / (splat(1.0f) + exp(-z))));
    }
  }
  unstage(channels_of<T>(p.out, batch, tile), tile.lanes, chunk, c.y.value);
}

template <class T>
[[gnu::noinline]] void forward_tile(const SelectiveScanParams& p, const Sequence& sequence, const Tile& tile,
                                    const float* B_rows, const float* C_rows) {
  ForwardTile weights;
  ForwardChunk c;
  load_rates(p, tile, weights.rate);
  const Operand B = operand_of(p, p.B, p.variable_B, B_rows, sequence, tile, weights.B);
  const Operand C = operand_of(p, p.C, p.variable_C, C_rows, sequence, tile, weights.C);
  if (p.initial_state != nullptr) {
    load_weights(contiguous(p, p.initial_state, sequence.index), tile, p.states, weights.h);
  } else {
    std::memset(weights.h, 0, size_t(p.states * kLanes) * sizeof(float));
  }
  Chunk next = chunk_of(p, sequence, 0);
  for (int64_t index = 0; index < sequence.chunks(); ++index) {
    const Chunk chunk = next;
    if (p.chunk_states != nullptr) keep_states(p, tile, weights.h, sequence.slot + index);
    stage_inputs<T>(p, sequence.batch, tile, chunk, c);
    if (index + 1 < sequence.chunks()) next = chunk_of(p, sequence, index + 1);
    prefetch_chunk<T>(p, sequence.batch, tile, chunk, next);
    c.count = chunk.count;
    c.B = {B.data + index * kScanChunk * B.step, B.step};
    c.C = {C.data + index * kScanChunk * C.step, C.step};
    with_variability(p, [&](auto variable_B, auto variable_C) {
      advance_all<variable_B(), variable_C()>(c, weights, p.states);
    });
    write_output<T>(p, sequence.batch, tile, chunk, c);
  }
  if (p.last_state != nullptr) {
    store_weights(contiguous(p, p.last_state, sequence.index), tile, p.states, weights.h);
  }
}

template <class T>
void forward(const SelectiveScanParams& p, int threads) {
  float* B_rows = static_cast<float*>(p.workspace);
  float* C_rows = B_rows + staged_floats(p, p.variable_B);
  if (p.variable_B) stage_rows<T>(p, p.B, B_rows, threads);
  if (p.variable_C) stage_rows<T>(p, p.C, C_rows, threads);
  const int64_t tiles = p.groups * tiles_per_group(p);
  parallel_chunks(p.sequences * tiles, threads, [&](int64_t task) {
    forward_tile<T>(p, sequence_at(p, task / tiles), tile_at(p, task % tiles), B_rows, C_rows);
  });
}

}  // namespace
}  // namespace selective

int64_t selective_scan_workspace_cpu(const scan::SelectiveScanParams& p, bool backward, int) {
  if (selective::is_general(p)) return selective::general_workspace(p, backward);
  if (backward) return selective::backward_workspace(p);
  return int64_t(sizeof(float)) *
         (selective::staged_floats(p, p.variable_B) + selective::staged_floats(p, p.variable_C));
}

void selective_scan_fwd_cpu(const scan::SelectiveScanParams& p, int threads) {
  if (selective::is_general(p)) return selective::general_forward(p, threads);
  selective::with_storage(p.dtype, [&](auto type) { selective::forward<decltype(type)>(p, threads); });
}

void selective_scan_bwd_cpu(const scan::SelectiveScanParams& p, int threads) {
  if (selective::is_general(p)) return selective::general_backward(p, threads);
  selective::backward(p, threads);
}

}  // namespace tilewright::TW_ISA
