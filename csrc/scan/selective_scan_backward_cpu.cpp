// The gradient of the selective scan on the CPU, for float32, bfloat16 and float16 with real A.
//
//   g = dout silu(z)                   dz = dout y silu'(z)
//   l[t, n] = C[t, n] g[t] + a[t+1, n] l[t+1, n]      (at the last step: + dlast_state)
//   dC = sum_d g h                     dB = sum_d l dt u                over the channels d of a group
//   du = D g + dt sum_n l B            dA = sum_t l dt (a h[t-1])       dD = sum_t g u
//   ddt = u sum_n l B + sum_n l A (a h[t-1])          ddelta = ddt softplus'(delta + bias)
//
// A task is a sequence's block of tiles of one group. It goes through the chunks from the last to the first,
// tile after tile; four states at a time it recomputes h and a of the chunk's steps from the state kept by
// the forward pass, into the L1 cache, and comes back through them with l in registers. What it adds to dB
// and dC is summed over its channels and kept per block in float32; then the blocks are added in their order.
// So that this does not grow with the length, it is done in rounds of some chunks. Blocks and rounds depend
// on the shapes alone, so the bits do not depend on the threads.
//
// Roofline, per (batch, channel, step) with N states: 7 accesses (u, delta, z, dout; du, ddelta, dz), 28
// bytes in float32, and the kept states; about 17 N FLOPs and N powers of two. On AVX-512 a vector of
// channels takes 12 instructions a state to recompute, 9 for the gradients and 6 for the sums over lanes: the
// arithmetic decides.
#include "scan/selective_scan_simd.h"

namespace tilewright::TW_ISA::selective {
namespace {

constexpr int kQuad = 4;  // states at a time; their factors are kept together
constexpr int kSums = 2 * kQuad;
constexpr int64_t kSumBudget = 4 << 20;  // bytes of dB and dC that all blocks keep in a round, about
constexpr int64_t kTasks = 128;          // enough for as many threads, if there are so many tiles

// ---- how the work is cut, and the workspace ----

struct Plan {
  int64_t tiles;                     // of all groups
  int64_t tiles_per_block, blocks;   // blocks of a group
  int64_t chunks_per_round, rounds;  // counted from each sequence's end
  int64_t chunk_sums;                // floats of dB and dC that a block keeps a chunk

  explicit Plan(const SelectiveScanParams& p) {
    const int64_t per_group = tiles_per_group(p);
    tiles = p.groups * per_group;
    tiles_per_block = larger(1, smaller(per_group, p.sequences * tiles / kTasks));
    blocks = divide_up(per_group, tiles_per_block);
    chunk_sums = p.variable_B || p.variable_C ? kScanChunk * divide_up(p.states, kQuad) * kSums : 0;
    const int64_t chunks = larger(1, most_chunks(p));
    const int64_t bytes = larger(1, p.sequences * p.groups * blocks * chunk_sums * int64_t(sizeof(float)));
    chunks_per_round = chunk_sums == 0 ? chunks : smaller(chunks, larger(1, kSumBudget / bytes));
    rounds = divide_up(chunks, chunks_per_round);
  }
};

struct Workspace {
  float *B, *C;       // rows, null where constant
  float *carry, *dA;  // [sequence][tile][state][lane]; carry: a l of the step that follows
  float *dB, *dC;     // likewise, where B or C is constant
  float *dD, *dbias;  // [sequence][tile][lane]
  float* sums;        // [sequence][group][block][chunk of the round][step][quad][dB, dC][4]
  int64_t bytes;

  Workspace(const SelectiveScanParams& p, const Plan& plan) {
    float* next = static_cast<float*>(p.workspace);
    int64_t floats = 0;
    const auto take = [&](int64_t count) {
      float* const taken = next == nullptr || count == 0 ? nullptr : next + floats;
      floats += count;
      return taken;
    };
    const int64_t vectors = p.sequences * plan.tiles * kLanes;
    B = take(staged_floats(p, p.variable_B));
    C = take(staged_floats(p, p.variable_C));
    carry = take(vectors * p.states);
    dA = take(vectors * p.states);
    dB = take(p.variable_B ? 0 : vectors * p.states);
    dC = take(p.variable_C ? 0 : vectors * p.states);
    dD = take(vectors);
    dbias = take(vectors);
    sums = take(p.sequences * p.groups * plan.blocks * plan.chunks_per_round * plan.chunk_sums);
    bytes = floats * int64_t(sizeof(float));
  }
};

// The chunks of a sequence that a round goes through.
struct Span {
  int64_t begin, end;
};

Span span_of(const Plan& plan, const Sequence& sequence, int64_t round) {
  const int64_t end = larger(0, sequence.chunks() - round * plan.chunks_per_round);
  return {larger(0, end - plan.chunks_per_round), end};
}

// ---- four states over a chunk ----

struct alignas(64) Rows {
  float value[kScanChunk * kLanes];
};

struct BackwardTile {
  alignas(64) float rate[kMaxStates * kLanes];  // A log2(e)
  alignas(64) float constant_B[kMaxStates * kLanes], constant_C[kMaxStates * kLanes];
  Operand B, C;
  float *carry, *dA, *dB, *dC, *dD, *dbias;
};

struct BackwardChunk {
  int64_t count;
  Rows u, slope, dt, dtu, g, gate;  // slope: of softplus; gate: dout silu'(z)
  Rows y, from_B, from_A;           // sums over the states: C h; l B; l a h[t-1] A log2(e)
  Operand B, C;                     // at the chunk's first step
  const float* kept;                // the states before the chunk, [state][dim]
  int64_t dim, lanes;
  LaneMask mask;
  float* sums;
  int64_t sums_step;
};

struct alignas(64) Factors {
  float h[(kScanChunk + 1) * kQuad * kLanes];  // before each step, and after the last
  float a[kScanChunk * kQuad * kLanes];
};

// h and a of every step, and C h added to y.
template <int kCount, bool kVariableB, bool kVariableC>
void recompute(BackwardChunk& c, const BackwardTile& tile, int64_t n, Factors& f) {
  Float h[kCount], rate[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const float* kept = c.kept + (n + i) * c.dim;
    h[i] = c.lanes == kLanes ? load(kept) : load_some(kept, c.lanes);
    rate[i] = load(tile.rate + (n + i) * kLanes);
    store(f.h + i * kLanes, h[i]);
  }
  const float *B = operand_at<kVariableB>(c.B, n), *C = operand_at<kVariableC>(c.C, n);
  const int64_t end = c.count * kLanes, B_step = c.B.step, C_step = c.C.step;
  for (int64_t row = 0; row < end; row += kLanes) {
    const Float dt = load(c.dt.value + row), dtu = load(c.dtu.value + row);
    Float y = load(c.y.value + row);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Float a = decay(dt * rate[i]);
      h[i] = fma(a, h[i], dtu * operand<kVariableB>(B, i));
      y = fma(operand<kVariableC>(C, i), h[i], y);
      store(f.a + row * kQuad + i * kLanes, a);
      store(f.h + (row + kLanes) * kQuad + i * kLanes, h[i]);
    }
    store(c.y.value + row, y);
    B += B_step;
    C += C_step;
  }
}

// Sums over time of one state's gradients: of the carried gradient, A, and B and C where they are constant.
struct Totals {
  Float carry, dA, dB, dC;
};

template <int kCount, bool kVariableB, bool kVariableC>
void go_back(BackwardChunk& c, const BackwardTile& tile, int64_t n, const Factors& f) {
  Totals total[kCount];
  Float rate[kCount], h[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    total[i] = {load(tile.carry + (n + i) * kLanes), splat(0.0f), splat(0.0f), splat(0.0f)};
    rate[i] = load(tile.rate + (n + i) * kLanes);
    h[i] = load(f.h + (c.count * kQuad + i) * kLanes);
  }
  const float* B = operand_at<kVariableB>(c.B, n) + (c.count - 1) * c.B.step;
  const float* C = operand_at<kVariableC>(c.C, n) + (c.count - 1) * c.C.step;
  float* sums = c.sums + (c.count - 1) * c.sums_step + n / kQuad * kSums;
  const int64_t B_step = c.B.step, C_step = c.C.step, sums_step = c.sums_step;
  const LaneMask mask = c.mask;
  for (int64_t row = (c.count - 1) * kLanes; row >= 0; row -= kLanes) {
    const Float dt = load(c.dt.value + row), dtu = load(c.dtu.value + row), g = load(c.g.value + row);
    Float from_B = load(c.from_B.value + row), from_A = load(c.from_A.value + row);
    Float dB[kQuad] = {}, dC[kQuad] = {};
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      Totals& sum = total[i];
      const Float l = fma(operand<kVariableC>(C, i), g, sum.carry);
      kVariableC ? dC[i] = kept_product(mask, g, h[i]) : sum.dC = fma(g, h[i], sum.dC);
      kVariableB ? dB[i] = kept_product(mask, l, dtu) : sum.dB = fma(l, dtu, sum.dB);
      from_B = fma(operand<kVariableB>(B, i), l, from_B);
      sum.carry = l * load(f.a + row * kQuad + i * kLanes);
      h[i] = load(f.h + row * kQuad + i * kLanes);
      const Float into_rate = sum.carry * h[i];
      from_A = fma(rate[i], into_rate, from_A);
      sum.dA = fma(dt, into_rate, sum.dA);
    }
    if (kVariableB || kVariableC) add_sums(sums, dB, dC);
    store(c.from_B.value + row, from_B);
    store(c.from_A.value + row, from_A);
    B -= B_step;
    C -= C_step;
    sums -= sums_step;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const int64_t at = (n + i) * kLanes;
    store(tile.carry + at, total[i].carry);
    store(tile.dA + at, load(tile.dA + at) + total[i].dA);
    if (!kVariableB) store(tile.dB + at, load(tile.dB + at) + total[i].dB);
    if (!kVariableC) store(tile.dC + at, load(tile.dC + at) + total[i].dC);
  }
}

template <bool kVariableB, bool kVariableC>
void all_states(BackwardChunk& c, const BackwardTile& tile, int64_t states) {
  Factors factors;
  const auto some = [&](auto count, int64_t n) {
    recompute<count(), kVariableB, kVariableC>(c, tile, n, factors);
    go_back<count(), kVariableB, kVariableC>(c, tile, n, factors);
  };
  int64_t n = 0;
  for (; n + kQuad <= states; n += kQuad) some(std::integral_constant<int, kQuad>{}, n);
  if (states - n == 3) some(std::integral_constant<int, 3>{}, n);
  if (states - n == 2) some(std::integral_constant<int, 2>{}, n);
  if (states - n == 1) some(std::integral_constant<int, 1>{}, n);
}

// ---- a tile over a chunk ----

void stage_gate(BackwardChunk& c) {  // g holds dout, gate holds z
  for (int64_t row = 0; row < c.count * kLanes; row += kLanes) {
    const Float dout = load(c.g.value + row), z = load(c.gate.value + row), s = sigmoid(z);
    store(c.g.value + row, dout * (z * s));
    store(c.gate.value + row, dout * (s * fma(z, splat(1.0f) - s, splat(1.0f))));
  }
}

void stage_step_sizes(const SelectiveScanParams& p, const Tile& tile, BackwardChunk& c) {  // dt holds delta
  const Float bias = load_channels(p.delta_bias, tile), D = load_channels(p.D, tile);
  for (int64_t row = 0; row < c.count * kLanes; row += kLanes) {
    const Float u = load(c.u.value + row), delta = load(c.dt.value + row) + bias;
    const Softplus step = p.softplus ? softplus_with_slope(delta) : Softplus{delta, splat(1.0f)};
    store(c.slope.value + row, step.slope);
    store(c.dt.value + row, step.value);
    store(c.dtu.value + row, step.value * u);
    store(c.y.value + row, p.D == nullptr ? splat(0.0f) : D * u);
    store(c.from_B.value + row, splat(0.0f));
    store(c.from_A.value + row, splat(0.0f));
  }
}

// du into dt, ddelta into slope, dz into gate; dD and ddelta_bias are added up.
void finish(const SelectiveScanParams& p, const Tile& tile, BackwardChunk& c, BackwardTile& state) {
  const Float D = load_channels(p.D, tile);
  Float dD = splat(0.0f), dbias = splat(0.0f);
  for (int64_t row = 0; row < c.count * kLanes; row += kLanes) {
    const Float u = load(c.u.value + row), g = load(c.g.value + row), from_B = load(c.from_B.value + row);
    const Float through_dt = load(c.dt.value + row) * from_B;
    const Float ddt = fma(u, from_B, load(c.from_A.value + row) * kLn2);
    const Float ddelta = ddt * load(c.slope.value + row);
    store(c.dt.value + row, p.D == nullptr ? through_dt : fma(D, g, through_dt));
    store(c.slope.value + row, ddelta);
    store(c.gate.value + row, load(c.gate.value + row) * load(c.y.value + row));
    dD = fma(g, u, dD);
    dbias = dbias + ddelta;
  }
  store(state.dD, load(state.dD) + dD);
  store(state.dbias, load(state.dbias) + dbias);
}

template <class T>
void write_gradient(const Strided& x, int64_t batch, const Tile& tile, const Chunk& chunk, const Rows& rows) {
  if (x.data != nullptr) unstage(channels_of<T>(x, batch, tile), tile.lanes, chunk, rows.value);
}

// What is written at the end of this chunk, and what the next one (the one before it in time) reads.
template <class T>
void prefetch_chunk(const SelectiveScanParams& p, const Sequence& sequence, const Tile& tile,
                    const Chunk& chunk, int64_t index, const float* kept) {
  const auto ask = [&](const Strided& x, const Chunk& of) {
    if (x.data != nullptr) prefetch(channels_of<T>(x, sequence.batch, tile), tile.lanes, of);
  };
  ask(p.du, chunk);
  ask(p.ddelta, chunk);
  ask(p.dz, chunk);
  if (index == 0) return;
  const Chunk next = chunk_of(p, sequence, index - 1);
  ask(p.u, next);
  ask(p.delta, next);
  ask(p.dout, next);
  ask(p.z, next);
  for (int64_t n = 0; n < p.states; ++n) __builtin_prefetch(kept + (n - p.states) * p.dim, 0, 2);
}

template <class T>
[[gnu::noinline]] void backward_chunk(const SelectiveScanParams& p, const Sequence& sequence,
                                      const Tile& tile, int64_t index, BackwardTile& state,
                                      BackwardChunk& c) {
  const Chunk chunk = chunk_of(p, sequence, index);
  c.count = chunk.count;
  c.B = {state.B.data + index * kScanChunk * state.B.step, state.B.step};
  c.C = {state.C.data + index * kScanChunk * state.C.step, state.C.step};
  c.kept =
      static_cast<const float*>(p.chunk_states) + (sequence.slot + index) * p.states * p.dim + tile.channel;
  stage(channels_of<T>(p.u, sequence.batch, tile), tile.lanes, chunk, c.u.value);
  stage(channels_of<T>(p.delta, sequence.batch, tile), tile.lanes, chunk, c.dt.value);
  stage(channels_of<T>(p.dout, sequence.batch, tile), tile.lanes, chunk, c.g.value);
  if (p.z.data != nullptr) {
    stage(channels_of<T>(p.z, sequence.batch, tile), tile.lanes, chunk, c.gate.value);
    stage_gate(c);
  }
  stage_step_sizes(p, tile, c);
  prefetch_chunk<T>(p, sequence, tile, chunk, index, c.kept);
  with_variability(p, [&](auto variable_B, auto variable_C) {
    all_states<variable_B(), variable_C()>(c, state, p.states);
  });
  finish(p, tile, c, state);
  write_gradient<T>(p.du, sequence.batch, tile, chunk, c.dt);
  write_gradient<T>(p.ddelta, sequence.batch, tile, chunk, c.slope);
  if (p.z.data != nullptr) write_gradient<T>(p.dz, sequence.batch, tile, chunk, c.gate);
}

// ---- a block over a round ----

void zero(float* x, int64_t count) {
  if (count > 0) std::memset(x, 0, size_t(count) * sizeof(float));
}

[[gnu::noinline]] void start_tile(const SelectiveScanParams& p, const Sequence& sequence, const Tile& tile,
                                  const BackwardTile& state) {
  const int64_t vectors = p.states * kLanes;
  if (p.dlast_state != nullptr) {
    load_weights(contiguous(p, p.dlast_state, sequence.index), tile, p.states, state.carry);
  } else {
    zero(state.carry, vectors);
  }
  zero(state.dA, vectors);
  if (!p.variable_B) zero(state.dB, vectors);
  if (!p.variable_C) zero(state.dC, vectors);
  zero(state.dD, kLanes);
  zero(state.dbias, kLanes);
}

// The tile's part of the workspace and of the weights.
[[gnu::noinline]] void open_tile(const SelectiveScanParams& p, const Plan& plan, const Workspace& w,
                                 const Sequence& sequence, const Tile& tile, BackwardTile& state) {
  const int64_t at = (sequence.index * plan.tiles + tile.index) * kLanes, states_at = at * p.states;
  state.carry = w.carry + states_at;
  state.dA = w.dA + states_at;
  state.dB = p.variable_B ? nullptr : w.dB + states_at;
  state.dC = p.variable_C ? nullptr : w.dC + states_at;
  state.dD = w.dD + at;
  state.dbias = w.dbias + at;
  load_rates(p, tile, state.rate);
  state.B = operand_of(p, p.B, p.variable_B, w.B, sequence, tile, state.constant_B);
  state.C = operand_of(p, p.C, p.variable_C, w.C, sequence, tile, state.constant_C);
}

float* sums_of(const SelectiveScanParams& p, const Plan& plan, const Workspace& w, const Sequence& sequence,
               int64_t group, int64_t block) {
  const int64_t index = (sequence.index * p.groups + group) * plan.blocks + block;
  return w.sums + index * plan.chunks_per_round * plan.chunk_sums;
}

template <class T>
void backward_block(const SelectiveScanParams& p, const Plan& plan, const Workspace& w,
                    const Sequence& sequence, int64_t group, int64_t block, int64_t round) {
  const Span span = span_of(plan, sequence, round);
  if (span.end == 0 && round > 0) return;
  float* sums = sums_of(p, plan, w, sequence, group, block);
  zero(sums, (span.end - span.begin) * plan.chunk_sums);
  const int64_t per_group = tiles_per_group(p), begin = block * plan.tiles_per_block;
  const int64_t end = smaller(per_group, begin + plan.tiles_per_block);
  BackwardTile state;
  BackwardChunk c;
  for (int64_t index = group * per_group + begin; index < group * per_group + end; ++index) {
    const Tile tile = tile_at(p, index);
    open_tile(p, plan, w, sequence, tile, state);
    if (round == 0) start_tile(p, sequence, tile, state);
    c.dim = p.dim;
    c.lanes = tile.lanes;
    c.mask = lane_mask(tile.lanes);
    c.sums_step = plan.chunk_sums / kScanChunk;
    for (int64_t chunk = span.end - 1; chunk >= span.begin; --chunk) {
      c.sums = sums + (chunk - span.begin) * plan.chunk_sums;
      backward_chunk<T>(p, sequence, tile, chunk, state, c);
    }
    if (span.begin == 0 && p.dinitial_state != nullptr) {
      store_weights(contiguous(p, p.dinitial_state, sequence.index), tile, p.states, state.carry);
    }
  }
}

// ---- sums over blocks and over sequences, in their order ----

// rows[step][state] from the sums' [step][quad][dB, dC][4], then to the tokens.
template <class T>
[[gnu::noinline]] void write_states(const SelectiveScanParams& p, const Strided& x, const Sequence& sequence,
                                    int64_t group, const Chunk& chunk, const float* sums, int64_t sums_step) {
  alignas(64) float rows[kScanChunk * kMaxStates];
  const int64_t pitch = row_pitch(p);
  for (int64_t i = 0; i < chunk.count; ++i) {
    for (int64_t n = 0; n < p.states; ++n) {
      rows[i * pitch + n] = sums[i * sums_step + n / kQuad * kSums + n % kQuad];
    }
  }
  for (int64_t n = 0; n < p.states; n += kLanes) {
    unstage(states_of<T>(x, sequence.batch, group, n), smaller(kLanes, p.states - n), chunk, rows + n, pitch);
  }
}

template <class T>
void reduce_blocks(const SelectiveScanParams& p, const Plan& plan, const Workspace& w, int64_t round,
                   int threads) {
  const bool write_B = p.variable_B && p.dB.data != nullptr, write_C = p.variable_C && p.dC.data != nullptr;
  if (!write_B && !write_C) return;
  for_each_chunk(p, p.groups, threads, [&](const Sequence& sequence, int64_t index, int64_t group) {
    const Span span = span_of(plan, sequence, round);
    if (index < span.begin || index >= span.end) return;
    alignas(64) float total[kScanChunk * kMaxStates * 2];
    zero(total, plan.chunk_sums);
    for (int64_t block = 0; block < plan.blocks; ++block) {
      const float* sums =
          sums_of(p, plan, w, sequence, group, block) + (index - span.begin) * plan.chunk_sums;
      for (int64_t i = 0; i < plan.chunk_sums; i += kLanes)
        store(total + i, load(total + i) + load(sums + i));
    }
    const Chunk chunk = chunk_of(p, sequence, index);
    const int64_t step = plan.chunk_sums / kScanChunk;
    if (write_B) write_states<T>(p, p.dB, sequence, group, chunk, total, step);
    if (write_C) write_states<T>(p, p.dC, sequence, group, chunk, total + kQuad, step);
  });
}

// The sum over sequences of [sequence][tile][vectors][lane].
void sum_sequences(const SelectiveScanParams& p, const Plan& plan, const Tile& tile, const float* parts,
                   int64_t vectors, float* total) {
  zero(total, vectors * kLanes);
  for (int64_t s = 0; s < p.sequences; ++s) {
    const float* part = parts + (s * plan.tiles + tile.index) * vectors * kLanes;
    for (int64_t i = 0; i < vectors * kLanes; i += kLanes) store(total + i, load(total + i) + load(part + i));
  }
}

void reduce_sequences(const SelectiveScanParams& p, const Plan& plan, const Workspace& w, int threads) {
  parallel_chunks(plan.tiles, threads, [&](int64_t index) {
    const Tile tile = tile_at(p, index);
    alignas(64) float total[kMaxStates * kLanes];
    const auto write = [&](const float* parts, int64_t states, const Strided& to) {
      if (to.data == nullptr) return;
      sum_sequences(p, plan, tile, parts, states, total);
      store_weights(to, tile, states, total);
    };
    write(w.dA, p.states, contiguous(p, p.dA, 0));
    if (!p.variable_B) write(w.dB, p.states, p.dB);
    if (!p.variable_C) write(w.dC, p.states, p.dC);
    write(w.dD, 1, {p.dD, 0, 1, 0, 0});
    write(w.dbias, 1, {p.ddelta_bias, 0, 1, 0, 0});
  });
}

template <class T>
void backward_all(const SelectiveScanParams& p, int threads) {
  const Plan plan(p);
  const Workspace w(p, plan);
  if (p.variable_B) stage_rows<T>(p, p.B, w.B, threads);
  if (p.variable_C) stage_rows<T>(p, p.C, w.C, threads);
  const int64_t blocks = p.groups * plan.blocks;
  for (int64_t round = 0; round < plan.rounds; ++round) {
    parallel_chunks(p.sequences * blocks, threads, [&](int64_t task) {
      const int64_t block = task % blocks;
      backward_block<T>(p, plan, w, sequence_at(p, task / blocks), block / plan.blocks, block % plan.blocks,
                        round);
    });
    reduce_blocks<T>(p, plan, w, round, threads);
  }
  reduce_sequences(p, plan, w, threads);
}

}  // namespace

int64_t backward_workspace(const SelectiveScanParams& p) { return Workspace(p, Plan(p)).bytes; }

void backward(const SelectiveScanParams& p, int threads) {
  with_storage(p.dtype, [&](auto type) { backward_all<decltype(type)>(p, threads); });
}

}  // namespace tilewright::TW_ISA::selective
