// The kernels of selftest.h. Each is a few lines that use the device layer as a real kernel would.
#include "emulator/selftest.h"

#include <cstring>
#include <map>

#include "core/check.h"
#include "device/async_copy.h"
#include "device/atomics.h"
#include "device/half.h"
#include "device/launch.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/smem.h"
#include "device/sync.h"
#include "device/warp.h"

namespace tilewright::selftest {

using namespace tilewright::device;

namespace {

template <class Map>
const auto& choose(const Map& map, const std::string& name) {
  const auto found = map.find(name);
  check_value(found != map.end(), "selftest: no \"", name, "\"");
  return found->second;
}

unsigned volume(Extent extent) { return extent[0] * extent[1] * extent[2]; }

dim3 to_dim3(Extent extent) { return {extent[0], extent[1], extent[2]}; }

__device__ __forceinline__ unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// ---- Threads and warps -------------------------------------------------------------------------

struct IndicesParams {
  uint32_t* out;  // [blocks, threads, 8]
};

__global__ void indices_kernel(const __grid_constant__ IndicesParams params) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const uint32_t row[8] = {blockIdx.x,  blockIdx.y,  blockIdx.z,          threadIdx.x,
                           threadIdx.y, threadIdx.z, uint32_t(lane_id()), uint32_t(warp_id())};
  for (unsigned i = 0; i < 8; ++i) params.out[(block * threads + thread) * 8 + i] = row[i];
}

template <class T>
struct WarpParams {
  T (*op)(T value, int argument, uint32_t mask);
  const T* values;  // [threads]
  T* out;           // [threads]
  int argument;
  uint32_t mask;
};

template <class T>
__global__ void warp_kernel(const __grid_constant__ WarpParams<T> params) {
  if ((params.mask >> lane_id() & 1u) == 0) return;
  params.out[threadIdx.x] = params.op(params.values[threadIdx.x], params.argument, params.mask);
}

template <class T>
using WarpOps = std::map<std::string, T (*)(T, int, uint32_t)>;

template <class T>
WarpOps<T> shuffles() {
  return {{"shfl", [](T v, int argument, uint32_t mask) { return shfl(v, argument, mask); }},
          {"shfl_xor", [](T v, int argument, uint32_t mask) { return shfl_xor(v, argument, mask); }},
          {"shfl_up", [](T v, int argument, uint32_t mask) { return shfl_up(v, argument, mask); }},
          {"shfl_down", [](T v, int argument, uint32_t mask) { return shfl_down(v, argument, mask); }},
          {"match_any", [](T v, int, uint32_t mask) { return T(match_any(v, mask)); }}};
}

WarpOps<uint32_t> word_ops() {
  using Word = uint32_t;
  WarpOps<Word> ops = shuffles<Word>();
  ops.insert({{"ballot", [](Word v, int, Word mask) { return ballot(v != 0, mask); }},
              {"any", [](Word v, int, Word mask) { return Word{any(v != 0, mask)}; }},
              {"all", [](Word v, int, Word mask) { return Word{all(v != 0, mask)}; }},
              {"reduce_max", [](Word v, int, Word mask) { return reduce_max(v, mask); }},
              {"reduce_min", [](Word v, int, Word mask) { return reduce_min(v, mask); }},
              {"reduce_add", [](Word v, int, Word mask) { return reduce_add(v, mask); }},
              {"reduce_or", [](Word v, int, Word mask) { return reduce_or(v, mask); }}});
  return ops;
}

struct VotesParams {
  const uint32_t* predicates;  // [threads]
  uint32_t* out;               // [threads, 3]
};

__global__ void votes_kernel(const __grid_constant__ VotesParams params) {
  if (params.predicates[threadIdx.x] > 1) return;
  const bool predicate = params.predicates[threadIdx.x] != 0;
  params.out[threadIdx.x * 3] = sync_block_or(predicate);
  params.out[threadIdx.x * 3 + 1] = sync_block_and(predicate);
  barrier_sync(1, int(blockDim.x + kWarpSize - 1) / kWarpSize * kWarpSize);
  params.out[threadIdx.x * 3 + 2] = uint32_t(sync_block_count(predicate));
}

}  // namespace

Words indices(Extent grid, Extent block) {
  Words out(size_t(volume(grid)) * volume(block) * 8);
  launch(indices_kernel, to_dim3(grid), to_dim3(block), 0, nullptr, {out.data()});
  return out;
}

Words warp_words(const std::string& op, const Words& values, int argument, uint32_t mask) {
  Words out(values.size(), kUntouched);
  launch(warp_kernel<uint32_t>, 1, unsigned(values.size()), 0, nullptr,
         {choose(word_ops(), op), values.data(), out.data(), argument, mask});
  return out;
}

Doubles warp_doubles(const std::string& op, const Doubles& values, int argument) {
  Doubles out(values.size());
  launch(warp_kernel<double>, 1, unsigned(values.size()), 0, nullptr,
         {choose(shuffles<double>(), op), values.data(), out.data(), argument, kFullWarp});
  return out;
}

Words block_votes(const Words& predicates) {
  Words out(predicates.size() * 3);
  launch(votes_kernel, 1, unsigned(predicates.size()), 0, nullptr, {predicates.data(), out.data()});
  return out;
}

// ---- Order and barriers ------------------------------------------------------------------------

namespace {

struct OrderParams {
  uint32_t* thread_order;  // [blocks, threads]
  uint32_t* block_order;   // [blocks]
  uint32_t* blocks_begun;
};

struct OrderShared {
  uint32_t threads_begun;
};

__global__ void order_kernel(const __grid_constant__ OrderParams params) {
  OrderShared& shared = shared_memory<OrderShared>();
  if (threadIdx.x == 0) {
    shared.threads_begun = 0;
    params.block_order[blockIdx.x] = atomic_add(params.blocks_begun, 1u);
  }
  sync_block();
  params.thread_order[global_thread()] = atomic_add(&shared.threads_begun, 1u);
}

constexpr unsigned kMaxBlockThreads = 1024;

struct ValuesParams {
  const float* values;  // [threads]
  float* out;
  bool with_barriers;
};

struct ValuesShared {
  float values[kMaxBlockThreads];
};

__global__ void block_sum_kernel(const __grid_constant__ ValuesParams params) {
  ValuesShared& shared = shared_memory<ValuesShared>();
  shared.values[threadIdx.x] = params.values[threadIdx.x];
  for (unsigned distance = blockDim.x / 2; distance > 0; distance /= 2) {
    if (params.with_barriers) sync_block();
    if (threadIdx.x < distance) shared.values[threadIdx.x] += shared.values[threadIdx.x + distance];
  }
  if (threadIdx.x == 0) *params.out = shared.values[0];
}

__global__ void pass_in_warp_kernel(const __grid_constant__ ValuesParams params) {
  ValuesShared& shared = shared_memory<ValuesShared>();
  shared.values[threadIdx.x] = params.values[threadIdx.x];
  if (params.with_barriers) sync_warp();
  params.out[threadIdx.x] = shared.values[threadIdx.x ^ 1u];
}

// Barriers 1 and 2: the slot is full, the slot is free.
constexpr unsigned kRingLength = 64;
constexpr int kFull = 1;
constexpr int kFree = 2;

struct RingParams {
  const float* values;  // [rounds, kRingLength]
  float* out;           // likewise
  unsigned rounds;
};

struct RingShared {
  float slot[kRingLength];
};

__global__ void ring_kernel(const __grid_constant__ RingParams params) {
  RingShared& shared = shared_memory<RingShared>();
  const bool produces = threadIdx.x < kRingLength;
  const unsigned i = threadIdx.x % kRingLength;
  for (unsigned round = 0; round < params.rounds; ++round) {
    const unsigned offset = round * kRingLength;
    if (produces) {
      if (round != 0) barrier_sync(kFree, 2 * kRingLength);
      shared.slot[i] = params.values[offset + i];
      barrier_arrive(kFull, 2 * kRingLength);
    } else {
      barrier_sync(kFull, 2 * kRingLength);
      params.out[offset + i] = shared.slot[kRingLength - 1 - i];
      if (round + 1 != params.rounds) barrier_arrive(kFree, 2 * kRingLength);
    }
  }
}

struct GridSumParams {
  const float* values;  // [count]
  unsigned count;
  float* partial;  // [blocks]
  uint32_t* finished;
  float* out;
};

struct GridSumShared {
  bool last;
};

__global__ void grid_sum_kernel(const __grid_constant__ GridSumParams params) {
  GridSumShared& shared = shared_memory<GridSumShared>();
  float sum = 0.0f;
  for (unsigned i = global_thread(); i < params.count; i += gridDim.x * blockDim.x) sum += params.values[i];
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += shfl_xor(sum, distance);
  if (threadIdx.x == 0) {
    params.partial[blockIdx.x] = sum;
    fence();
    shared.last = atomic_add(params.finished, 1u) == gridDim.x - 1;
  }
  sync_block();
  if (!shared.last || threadIdx.x != 0) return;
  fence();
  float total = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) total += params.partial[block];
  *params.out = total;
}

}  // namespace

Words running_order(unsigned blocks, unsigned threads) {
  Words out(size_t(blocks) * threads + blocks);
  uint32_t blocks_begun = 0;
  launch(order_kernel, blocks, threads, sizeof(OrderShared), nullptr,
         {out.data(), out.data() + size_t(blocks) * threads, &blocks_begun});
  return out;
}

float block_sum(const Floats& values, bool with_barriers) {
  float out = 0.0f;
  launch(block_sum_kernel, 1, unsigned(values.size()), sizeof(ValuesShared), nullptr,
         {values.data(), &out, with_barriers});
  return out;
}

Floats pass_in_warp(const Floats& values, bool with_barriers) {
  Floats out(values.size());
  launch(pass_in_warp_kernel, 1, unsigned(values.size()), sizeof(ValuesShared), nullptr,
         {values.data(), out.data(), with_barriers});
  return out;
}

Floats pass_by_named_barriers(const Floats& values) {
  check_value(values.size() % kRingLength == 0, "values: a multiple of ", kRingLength);
  Floats out(values.size());
  launch(ring_kernel, 1, 2 * kRingLength, sizeof(RingShared), nullptr,
         {values.data(), out.data(), unsigned(values.size()) / kRingLength});
  return out;
}

float grid_sum(const Floats& values, unsigned blocks) {
  Floats partial(blocks);
  uint32_t finished = 0;
  float out = 0.0f;
  launch(grid_sum_kernel, blocks, kWarpSize, sizeof(GridSumShared), nullptr,
         {values.data(), unsigned(values.size()), partial.data(), &finished, &out});
  return out;
}

// ---- Memory ------------------------------------------------------------------------------------

namespace {

struct FoundParams {
  float* out;  // [2, threads]
};

__global__ void found_kernel(const __grid_constant__ FoundParams params) {
  ValuesShared& shared = shared_memory<ValuesShared>();
  params.out[global_thread()] = shared.values[threadIdx.x];
  shared.values[threadIdx.x] = 1.0f;
}

struct WriteParams {
  int offset;
};

struct ByteShared {
  uint8_t first;
};

__global__ void write_kernel(const __grid_constant__ WriteParams params) {
  (&shared_memory<ByteShared>().first)[params.offset] = 0;
}

struct CopyParams {
  const uint8_t* source;
  uint8_t* destination;
  bool streaming;
};

template <int kBytes>
__global__ void copy_kernel(const __grid_constant__ CopyParams params) {
  using Piece = Vector<uint8_t, kBytes>;
  const auto* source = reinterpret_cast<const Piece*>(params.source) + threadIdx.x;
  auto* destination = reinterpret_cast<Piece*>(params.destination) + threadIdx.x;
  if (params.streaming) {
    store_streaming(destination, load_streaming(source));
  } else {
    store(destination, load(source));
  }
}

constexpr unsigned kTiles = 4;  // the last is not committed
constexpr unsigned kTileLength = 64;

struct TilesParams {
  const float* values;  // [kTiles, kTileLength]
  float* out;           // likewise
  int pending;
  unsigned valid;
};

struct TilesShared {
  alignas(16) float tiles[kTiles][kTileLength];
};

template <int kBytes>
__global__ void tiles_kernel(const __grid_constant__ TilesParams params) {
  TilesShared& shared = shared_memory<TilesShared>();
  constexpr unsigned kElements = kBytes / sizeof(float);
  const unsigned first = threadIdx.x * kElements;
  for (unsigned tile = 0; tile < kTiles; ++tile) {
    const unsigned element = tile * kTileLength + first;
    if (first < kTileLength) {
      cp_async<kBytes>(&shared.tiles[tile][first], params.values + element, element < params.valid);
    }
    if (tile + 1 < kTiles) cp_async_commit();
  }
  if (params.pending == 0) cp_async_wait<0>();
  if (params.pending == 1) cp_async_wait<1>();
  if (params.pending == 2) cp_async_wait<2>();
  if (params.pending == 3) cp_async_wait<3>();
  sync_block();
  for (unsigned tile = 0; tile < kTiles; ++tile) {
    params.out[tile * kTileLength + threadIdx.x] = shared.tiles[tile][threadIdx.x];
  }
}

struct AtomicsParams {
  float* f32;
  double* f64;
  int32_t* i32;   // sum, max, min
  uint32_t* u32;  // sum, max, min, exchange, compare-and-swap
  uint64_t* u64;  // sum, exchange, compare-and-swap
  float* from_shared;
  uint32_t* found;       // [blocks * threads]
  uint64_t* found_long;  // likewise
};

struct AtomicsShared {
  float sum;
};

template <class T>
__device__ __forceinline__ void count_by_cas(T* counter) {
  T expected = atomic_cas(counter, T{0}, T{0});
  for (T found; (found = atomic_cas(counter, expected, expected + 1)) != expected;) expected = found;
}

__global__ void atomics_kernel(const __grid_constant__ AtomicsParams params) {
  AtomicsShared& shared = shared_memory<AtomicsShared>();
  const unsigned rank = global_thread();
  if (threadIdx.x == 0) shared.sum = 0.0f;
  sync_block();
  atomic_add(params.f32, float(rank));
  atomic_add(params.f64, double(rank) / 2);
  atomic_add(params.i32, -int32_t(rank));
  atomic_add(params.u32, rank);
  atomic_add(params.u64, uint64_t{rank} << 32);
  atomic_add(&shared.sum, float(rank));
  atomic_max(params.i32 + 1, int32_t(rank) - 5);
  atomic_min(params.i32 + 2, 5 - int32_t(rank));
  atomic_max(params.u32 + 1, 0x80000000u + rank);
  atomic_min(params.u32 + 2, 0xffffffffu - rank);
  params.found[rank] = atomic_exchange(params.u32 + 3, rank + 1);
  params.found_long[rank] = atomic_exchange(params.u64 + 1, (uint64_t{rank} + 1) << 32);
  count_by_cas(params.u32 + 4);
  count_by_cas(params.u64 + 2);
  sync_block();
  if (threadIdx.x == 0) atomic_add(params.from_shared, shared.sum);
}

}  // namespace

Floats uninitialised(unsigned count) {
  Floats out(size_t(count) * 2);
  launch(found_kernel, 2, count, sizeof(ValuesShared), nullptr, {out.data()});
  return out;
}

void write_shared(unsigned bytes, int offset) { launch(write_kernel, 1, 1, bytes, nullptr, {offset}); }

Bytes copy_vectors(const Bytes& values, int vector_bytes, bool streaming, int shift) {
  const std::map<int, Kernel<CopyParams>> kernels = {{1, copy_kernel<1>},   {2, copy_kernel<2>},
                                                     {4, copy_kernel<4>},   {8, copy_kernel<8>},
                                                     {16, copy_kernel<16>}, {32, copy_kernel<32>}};
  const auto kernel = kernels.find(vector_bytes);
  check_value(kernel != kernels.end(), "vector_bytes: got ", vector_bytes);
  using Line = Vector<uint8_t, 64>;
  std::vector<Line> source(values.size() / sizeof(Line) + 2), destination(source.size());
  std::memcpy(source[0].v + shift, values.data(), values.size());
  launch(kernel->second, 1, unsigned(values.size()) / unsigned(vector_bytes), 0, nullptr,
         {source[0].v + shift, destination[0].v + shift, streaming});
  return {destination[0].v + shift, destination[0].v + shift + values.size()};
}

Floats async_tiles(const Floats& values, int bytes, int pending, int valid) {
  check_value(values.size() == kTiles * kTileLength, "values: ", kTiles * kTileLength, " of them");
  const std::map<int, Kernel<TilesParams>> kernels = {
      {4, tiles_kernel<4>}, {8, tiles_kernel<8>}, {16, tiles_kernel<16>}};
  const auto kernel = kernels.find(bytes);
  check_value(kernel != kernels.end(), "bytes: got ", bytes);
  Floats out(values.size());
  launch(kernel->second, 1, kTileLength, sizeof(TilesShared), nullptr,
         {values.data(), out.data(), pending, unsigned(valid)});
  return out;
}

Atomics atomics(unsigned blocks, unsigned threads) {
  float f32 = 0.0f, from_shared = 0.0f;
  double f64 = 0.0;
  Ints i32 = {0, -1000, 1000};
  Words u32 = {0, 0, 0xffffffffu, 0, 0};
  Longs u64 = {0, 0, 0};
  Words found(size_t(blocks) * threads);
  Longs found_long(found.size());
  launch(atomics_kernel, blocks, threads, sizeof(AtomicsShared), nullptr,
         {&f32, &f64, i32.data(), u32.data(), u64.data(), &from_shared, found.data(), found_long.data()});
  found.push_back(u32[3]);
  found_long.push_back(u64[1]);
  return {{double(f32), f64, double(i32[0]), double(u32[0]), double(u64[0]), double(from_shared)},
          {i32[1], i32[2]},
          {u32[1], u32[2]},
          found,
          found_long,
          {u32[4], u64[2]}};
}

// ---- Arithmetic --------------------------------------------------------------------------------

namespace {

template <class T>
struct MathParams {
  T (*function)(T, T, T);
  const T *a, *b, *c;  // [count] each
  T* out;
  unsigned count;
};

template <class T>
__global__ void math_kernel(const __grid_constant__ MathParams<T> params) {
  const unsigned i = global_thread();
  if (i < params.count) params.out[i] = params.function(params.a[i], params.b[i], params.c[i]);
}

template <class T>
std::vector<T> run_math(T (*function)(T, T, T), const std::vector<T>& a, const std::vector<T>& b,
                        const std::vector<T>& c) {
  constexpr unsigned kThreads = 64;
  check_value(a.size() == b.size() && a.size() == c.size(), "operands: of one length");
  const unsigned count = unsigned(a.size());
  std::vector<T> out(count);
  launch(math_kernel<T>, (count + kThreads - 1) / kThreads, kThreads, 0, nullptr,
         {function, a.data(), b.data(), c.data(), out.data(), count});
  return out;
}

struct HalfParams {
  float* values;   // [2, count]
  uint16_t* bits;  // [2, count]
  unsigned count;  // even
};

template <class T>
__global__ void narrow_kernel(const __grid_constant__ HalfParams params) {
  const unsigned i = 2 * global_thread();
  if (i >= params.count) return;
  const Vector<float, 2> pair = {params.values[i], params.values[i + 1]};
  const Vector<T, 2> packed = from_float2<T>(pair);
  for (unsigned j = 0; j < 2; ++j) {
    params.bits[i + j] = from_float<T>(pair.v[j]).bits;
    params.bits[params.count + i + j] = packed.v[j].bits;
  }
}

template <class T>
__global__ void widen_kernel(const __grid_constant__ HalfParams params) {
  const unsigned i = 2 * global_thread();
  if (i >= params.count) return;
  const Vector<T, 2> pair = {T{params.bits[i]}, T{params.bits[i + 1]}};
  const Vector<float, 2> wide = to_float2(pair);
  for (unsigned j = 0; j < 2; ++j) {
    params.values[i + j] = to_float(pair.v[j]);
    params.values[params.count + i + j] = wide.v[j];
  }
}

void run_half(Kernel<HalfParams> kernel, float* values, uint16_t* bits, size_t count) {
  constexpr unsigned kThreads = 256;
  check_value(count % 2 == 0, "values: an even number of them");
  launch(kernel, unsigned(count / 2 + kThreads - 1) / kThreads, kThreads, 0, nullptr,
         {values, bits, unsigned(count)});
}

}  // namespace

Floats float_math(const std::string& name, const Floats& a, const Floats& b, const Floats& c) {
  static const std::map<std::string, float (*)(float, float, float)> functions = {
      {"fma_rn", [](float x, float y, float z) { return fma_rn(x, y, z); }},
      {"add_rn", [](float x, float y, float) { return add_rn(x, y); }},
      {"mul_rn", [](float x, float y, float) { return mul_rn(x, y); }},
      {"div_rn", [](float x, float y, float) { return div_rn(x, y); }},
      {"sqrt_rn", [](float x, float, float) { return sqrt_rn(x); }},
      {"rcp_approx", [](float x, float, float) { return rcp_approx(x); }},
      {"sqrt_approx", [](float x, float, float) { return sqrt_approx(x); }},
      {"rsqrt_approx", [](float x, float, float) { return rsqrt_approx(x); }},
      {"exp2_approx", [](float x, float, float) { return exp2_approx(x); }},
      {"exp2_polynomial", [](float x, float, float) { return exp2_polynomial(x); }},
      {"exp", [](float x, float, float) { return exp(x); }},
      {"log1p", [](float x, float, float) { return log1p(x); }},
      {"log2", [](float x, float, float) { return log2(x); }},
      {"tanh", [](float x, float, float) { return tanh(x); }},
      {"sinpi", [](float x, float, float) { return sincospi(x).sine; }},
      {"cospi", [](float x, float, float) { return sincospi(x).cosine; }},
      {"min", [](float x, float y, float) { return min(x, y); }},
      {"max", [](float x, float y, float) { return max(x, y); }},
      {"min_nan", [](float x, float y, float) { return min_nan(x, y); }},
      {"max_nan", [](float x, float y, float) { return max_nan(x, y); }},
      {"float_bits", [](float x, float, float) { return bits_float(float_bits(x) ^ 0x80000000u); }}};
  return run_math(choose(functions, name), a, b, c);
}

Words word_math(const std::string& name, const Words& a, const Words& b, const Words& selector) {
  static const std::map<std::string, uint32_t (*)(uint32_t, uint32_t, uint32_t)> functions = {
      {"byte_permute", [](uint32_t x, uint32_t y, uint32_t s) { return byte_permute(x, y, s); }},
      {"mul_hi", [](uint32_t x, uint32_t y, uint32_t) { return mul_hi(x, y); }},
      {"min", [](uint32_t x, uint32_t y, uint32_t) { return min(x, y); }},
      {"max", [](uint32_t x, uint32_t y, uint32_t) { return max(x, y); }},
      {"min_signed", [](uint32_t x, uint32_t y, uint32_t) { return uint32_t(min(int32_t(x), int32_t(y))); }},
      {"max_signed", [](uint32_t x, uint32_t y, uint32_t) { return uint32_t(max(int32_t(x), int32_t(y))); }}};
  return run_math(choose(functions, name), a, b, selector);
}

Halves narrow(const std::string& type, const Floats& values) {
  static const std::map<std::string, Kernel<HalfParams>> kernels = {{"bf16", narrow_kernel<bf16>},
                                                                    {"fp16", narrow_kernel<fp16>}};
  Floats input = values;
  Halves out(values.size() * 2);
  run_half(choose(kernels, type), input.data(), out.data(), values.size());
  return out;
}

Floats widen(const std::string& type, const Halves& bits) {
  static const std::map<std::string, Kernel<HalfParams>> kernels = {{"bf16", widen_kernel<bf16>},
                                                                    {"fp16", widen_kernel<fp16>}};
  Halves input = bits;
  Floats out(bits.size() * 2);
  run_half(choose(kernels, type), out.data(), input.data(), bits.size());
  return out;
}

}  // namespace tilewright::selftest
