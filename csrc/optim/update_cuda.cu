// Optimizer steps on the GPU: one launch a pass, whatever the number of tensors.
//
// A warp takes a tile (a quantization block), eight elements a lane, and finds its tensor by walking the
// table of rows as its tile number grows; for blocks of 256 the absmax is one warp reduction and nothing is
// shared but the codec's tables. Larger blocks, from older checkpoints, are swept twice: once for the absmax,
// once to write.
//
// Roofline, AdamW: 10.06 bytes per 16-bit parameter, 16.06 per fp32 one.
#define TW_HOST_DEVICE __host__ __device__
#define TW_FEW_REGISTERS _Pragma("unroll 2")
#include "device/atomics.h"
#include "device/launch.h"
#include "device/smem.h"
#include "optim/codec_cuda.h"
#include "optim/coefficients.h"
#include "optim/update.h"

namespace tilewright::optim {
namespace {

constexpr int kMaxGrads = 3840;  // rows a launch: their gradients' addresses are kernel parameters
constexpr int kMaxGroups = 384;  // parameter groups a launch of the coefficients kernel

// Rows first_row .. first_row + num_rows of the table.
struct Slice {
  const Row* rows;
  Coefficients* coefficients;
  double* partials;
  int64_t first_tile;
  int64_t num_tiles;
  int32_t num_rows;
  int32_t coded;    // some row has 8-bit states
  int32_t general;  // some row is of the general kind
  const void* grads[kMaxGrads];
};
static_assert(sizeof(Slice) <= device::kMaxParamsBytes);

struct CoefficientsLaunch {
  Row* rows;
  Coefficients* coefficients;
  const double* partials;
  int64_t num_rows;
  int32_t num_partials;
  int32_t first_group;
  int32_t num_groups;
  Algorithm algorithm;
  StepParams params;
  Group groups[kMaxGroups];
};
static_assert(sizeof(CoefficientsLaunch) <= device::kMaxParamsBytes);

struct Smem {
  CodecTables signed_tables;
  CodecTables unsigned_tables;
};

struct NormSmem {
  double warp_sum[kWarps];
};

template <class T>
__device__ __forceinline__ T load_struct(const T* address) {
  using Four = device::Vector<uint32_t, 4>;
  static_assert(sizeof(T) % sizeof(Four) == 0);
  Four words[sizeof(T) / sizeof(Four)];
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / sizeof(Four); ++i)
    words[i] = device::load(reinterpret_cast<const Four*>(address) + i);
  T value;
  memcpy(&value, words, sizeof value);
  return value;
}

// The warp's tiles: every (grid's warps)-th one of the slice. Calls body(row index in the slice, tile within
// the row).
template <class Body>
__device__ __forceinline__ void for_tiles(const Slice& slice, const Body& body) {
  const int64_t warps = int64_t{gridDim.x} * kWarps;
  const int64_t end = slice.first_tile + slice.num_tiles;
  int64_t tile = slice.first_tile + int64_t{blockIdx.x} * kWarps + device::warp_id();
  int row = 0;
  int64_t row_begin = slice.first_tile;
  int64_t row_end = slice.num_rows > 1 ? slice.rows[1].first_tile : end;
  for (; tile < end; tile += warps) {
    while (tile >= row_end) {
      ++row;
      row_begin = row_end;
      row_end = row + 1 < slice.num_rows ? slice.rows[row + 1].first_tile : end;
    }
    body(row, tile - row_begin);
  }
}

// What the states are multiplied with before the gradient is added.
template <Algorithm kAlgorithm>
__device__ __forceinline__ float state1_factor(const Coefficients& c) {
  return kAlgorithm == Algorithm::kLion ? 1.0f : c.beta1;
}

// The parameter after the step. s1 and s2 come multiplied with state1_factor and beta2 and leave as the new
// states.
template <Algorithm kAlgorithm>
__device__ __forceinline__ float updated(const Coefficients& c, float g, float p, float& s1, float& s2) {
  if constexpr (kAlgorithm == Algorithm::kAdam) {
    s1 = device::fma_rn(c.one_minus_beta1, g, s1);
    s2 = device::fma_rn(c.one_minus_beta2 * g, g, s2);
    const float denominator = device::fma_rn(device::sqrt_approx(s2), c.inverse_correction2, c.eps);
    return device::fma_rn(-c.step_size * s1, device::rcp_approx(denominator), p * c.decay);
  } else if constexpr (kAlgorithm == Algorithm::kLion) {
    const float direction = device::fma_rn(c.beta1, s1, c.one_minus_beta1 * g);
    s1 = device::fma_rn(c.beta2, s1, c.one_minus_beta2 * g);
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : direction;  // NaN stays NaN
    return device::fma_rn(p, c.decay, -c.step_size * sign);
  } else {
    s1 = device::fma_rn(c.one_minus_beta1, g, s1);
    return p - c.step_size * device::fma_rn(c.momentum_weight, s1, c.grad_weight * g);
  }
}

// Rounds up with the probability of the dropped part, by 16 random bits.
__device__ __forceinline__ float stochastic_bf16(float x, uint32_t random) {
  const uint32_t b = device::float_bits(x);
  if ((b & kInfinityBits) == kInfinityBits) return x;
  return device::bits_float((b + random) & 0xffff0000u);
}

__device__ __forceinline__ float stochastic_fp16(float x, uint32_t random) {
  const uint32_t b = device::float_bits(x), magnitude = b & 0x7fffffffu;
  if (magnitude >= 0x477fe000u) return x;  // the largest finite value and above: to nearest
  if (magnitude >= 0x38800000u) return device::bits_float((b + (random >> 3)) & ~0x1fffu);
  // Below 2^-14 the steps are 2^-24 wide.
  const float steps = truncf(device::bits_float(magnitude) * 0x1p24f + float(random) * 0x1p-16f) * 0x1p-24f;
  return device::bits_float(device::float_bits(steps) | (b & 0x80000000u));
}

template <bool kWhole, class T>
__device__ __forceinline__ void store_params(T* param, float (&p)[kLaneElements], const Coefficients& c,
                                             int32_t id, const Lane& lane) {
  if constexpr (sizeof(T) == 2) {
    if (c.stochastic) {
      const PhiloxWords random = random_octet(c, id, lane.offset / kLaneElements);
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i) {
        const uint32_t bits = random.word[i / 2] >> (16 * (i % 2)) & 0xffffu;
        p[i] = std::is_same_v<T, bf16> ? stochastic_bf16(p[i], bits) : stochastic_fp16(p[i], bits);
      }
    }
  }
  T rounded[kLaneElements];
  round_lane(rounded, p);
  store_lane<kWhole>(param + lane.offset, rounded, lane.count);
}

template <Algorithm kAlgorithm, bool kWhole, class T>
__device__ __forceinline__ void update_lane(const Coefficients& c, const T* grad, const T* param, Lane lane,
                                            float (&p)[kLaneElements], float (&s1)[kLaneElements],
                                            float (&s2)[kLaneElements]) {
  float g[kLaneElements];
  load_lane<kWhole>(g, grad + lane.offset, lane.count);
  load_lane<kWhole>(p, param + lane.offset, lane.count);
  // Both are the exception; a branch that the whole warp takes costs less than sixteen idle instructions.
  if (c.grad_scale != 1.0f) [[unlikely]] {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) g[i] *= c.grad_scale;
  }
  if (c.l2 != 0.0f) [[unlikely]] {
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) g[i] = device::fma_rn(c.l2, p[i], g[i]);
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) p[i] = updated<kAlgorithm>(c, g[i], p[i], s1[i], s2[i]);
}

// States that a non-finite or an overflowing gradient reached become zero, both of an element: its neighbours
// in the block keep theirs. Its parameter is what torch would make of it.
__device__ __forceinline__ void drop_nonfinite(float (&s1)[kLaneElements], float (&s2)[kLaneElements]) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const uint32_t exponent1 = device::float_bits(s1[i]) & kInfinityBits;
    const uint32_t exponent2 = device::float_bits(s2[i]) & kInfinityBits;
    if (exponent1 == kInfinityBits || exponent2 == kInfinityBits) s1[i] = s2[i] = 0.0f;
  }
}

// Largest magnitude of the warp's states; NaN is passed over, and encoded as 0.
__device__ __forceinline__ float warp_absmax(const float (&s)[kLaneElements], float largest) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) largest = device::max(largest, fabsf(s[i]));
  return device::bits_float(device::reduce_max(device::float_bits(largest)));
}

__device__ __forceinline__ bool is_infinite(float magnitude) {
  return device::float_bits(magnitude) == kInfinityBits;
}

// Codes beyond the end of the tensor were read as zero, which the signed map does not decode to zero.
__device__ __forceinline__ void clear_absent(float (&s)[kLaneElements], const Lane& lane) {
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    if (i >= lane.count) s[i] = 0.0f;
  }
}

// The usual case: 256 elements, the built-in maps, everything in registers between one read and one write.
// kWhole: no element is missing and every address allows its widest access.
template <Algorithm kAlgorithm, bool kWhole, class T>
__device__ __forceinline__ void update_usual_tile(const Smem& smem, const Row& row, const Coefficients& c,
                                                  const T* grad, int64_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  uint8_t* codes1 = static_cast<uint8_t*>(row.state1);
  uint8_t* codes2 = static_cast<uint8_t*>(row.state2);
  const Lane lane = lane_of(tile * kWarpElements, row.numel);
  const LaneCodes old1 = load_codes<kWhole>(codes1 + lane.offset, lane.count);
  const LaneCodes old2 = kTwo ? load_codes<kWhole>(codes2 + lane.offset, lane.count) : LaneCodes{};
  float p[kLaneElements], s1[kLaneElements], s2[kLaneElements] = {};
  decode_lane(s1, old1, smem.signed_tables, row.absmax1[tile] * state1_factor<kAlgorithm>(c));
  if (!kWhole) clear_absent(s1, lane);
  if (kTwo) decode_lane(s2, old2, smem.unsigned_tables, row.absmax2[tile] * c.beta2);
  update_lane<kAlgorithm, kWhole>(c, grad, param, lane, p, s1, s2);
  store_params<kWhole>(param, p, c, row.id, lane);

  float absmax1 = warp_absmax(s1, 0.0f);
  float absmax2 = kTwo ? warp_absmax(s2, 0.0f) : 0.0f;
  if (is_infinite(absmax1) || is_infinite(absmax2)) [[unlikely]] {
    drop_nonfinite(s1, s2);
    absmax1 = warp_absmax(s1, 0.0f);
    if (kTwo) absmax2 = warp_absmax(s2, 0.0f);
  }
  store_codes<kWhole>(codes1 + lane.offset, encode_lane<true>(s1, absmax1, smem.signed_tables), lane.count);
  if (device::lane_id() == 0) row.absmax1[tile] = absmax1;
  if constexpr (kTwo) {
    store_codes<kWhole>(codes2 + lane.offset,
                        encode_lane<false, SmallValues::kPositive>(s2, absmax2, smem.unsigned_tables),
                        lane.count);
    if (device::lane_id() == 0) row.absmax2[tile] = absmax2;
  }
}

// A block of any size, maps of any kind: in chunks, swept once for the scales and once to write. Nothing is
// written in the first sweep, so the second computes the same values again.
template <Algorithm kAlgorithm, class T>
__device__ __forceinline__ void update_general_tile(const Smem& smem, const Row& row, const Coefficients& c,
                                                    const T* grad, int64_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  uint8_t* codes1 = static_cast<uint8_t*>(row.state1);
  uint8_t* codes2 = static_cast<uint8_t*>(row.state2);
  const int64_t begin = tile * row.block_size;
  const int64_t end = begin + row.block_size < row.numel ? begin + row.block_size : row.numel;
  const float scale1 = row.absmax1[tile] * state1_factor<kAlgorithm>(c);
  const float scale2 = kTwo ? row.absmax2[tile] * c.beta2 : 0.0f;

  float p[kLaneElements], s1[kLaneElements], s2[kLaneElements] = {};
  bool drop = false;
  const auto compute = [&](int64_t chunk) {
    const Lane lane = lane_of(chunk, end);
    decode_lane_any(s1, load_codes<false>(codes1 + lane.offset, lane.count), smem.signed_tables, row.map1,
                    scale1);
    if (kTwo)
      decode_lane_any(s2, load_codes<false>(codes2 + lane.offset, lane.count), smem.unsigned_tables, row.map2,
                      scale2);
    clear_absent(s1, lane);
    clear_absent(s2, lane);
    update_lane<kAlgorithm, false>(c, grad, param, lane, p, s1, s2);
    if (drop) drop_nonfinite(s1, s2);
    return lane;
  };

  float absmax1, absmax2;
  for (;;) {
    absmax1 = absmax2 = 0.0f;
    for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
      compute(chunk);
      absmax1 = warp_absmax(s1, absmax1);
      if (kTwo) absmax2 = warp_absmax(s2, absmax2);
    }
    if (drop || !(is_infinite(absmax1) || is_infinite(absmax2))) break;
    drop = true;
  }

  for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
    const Lane lane = compute(chunk);
    const LaneCodes new1 = encode_lane_any<true>(s1, absmax1, smem.signed_tables, row.map1);
    store_codes<false>(codes1 + lane.offset, new1, lane.count);
    if (kTwo) {
      const LaneCodes new2 =
          encode_lane_any<false, SmallValues::kPositive>(s2, absmax2, smem.unsigned_tables, row.map2);
      store_codes<false>(codes2 + lane.offset, new2, lane.count);
    }
    store_params<false>(param, p, c, row.id, lane);
  }
  if (device::lane_id() == 0) {
    row.absmax1[tile] = absmax1;
    if (kTwo) row.absmax2[tile] = absmax2;
  }
}

template <Algorithm kAlgorithm, bool kWhole, class T>
__device__ __forceinline__ void update_plain_tile(const Row& row, const Coefficients& c, const T* grad,
                                                  int64_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  const Lane lane = lane_of(tile * kWarpElements, row.numel);
  float* state1 = static_cast<float*>(row.state1) + lane.offset;
  float* state2 = static_cast<float*>(row.state2) + lane.offset;
  float p[kLaneElements], s1[kLaneElements], s2[kLaneElements] = {};
  load_lane<kWhole>(s1, state1, lane.count);
  if (kTwo) load_lane<kWhole>(s2, state2, lane.count);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    s1[i] *= state1_factor<kAlgorithm>(c);
    if (kTwo) s2[i] *= c.beta2;
  }
  update_lane<kAlgorithm, kWhole>(c, grad, param, lane, p, s1, s2);
  store_lane<kWhole>(state1, s1, lane.count);
  if (kTwo) store_lane<kWhole>(state2, s2, lane.count);
  store_params<kWhole>(param, p, c, row.id, lane);
}

static_assert(kPlainTile == kWarpElements && kUsualBlock == kWarpElements);

// Whether the warp may use the widest accesses throughout the tile.
__device__ __forceinline__ bool is_whole(const Row& row, const void* grad, int64_t tile,
                                         uintptr_t state_alignment) {
  return (tile + 1) * kWarpElements <= row.numel && is_aligned(row.param, 16) && is_aligned(grad, 16) &&
         is_aligned(row.state1, state_alignment) && is_aligned(row.state2, state_alignment);
}

// kGeneral picks the rows: a model without foreign maps or large blocks has none of the general kind, and the
// kernel for the others keeps the registers that those would cost.
template <Algorithm kAlgorithm, bool kGeneral, class T>
__device__ __forceinline__ void update_tile(const Smem& smem, const Row& row, const Coefficients& c,
                                            const void* grads, int64_t tile) {
  const T* grad = static_cast<const T*>(grads);
  if constexpr (kGeneral) {
    update_general_tile<kAlgorithm>(smem, row, c, grad, tile);
  } else if (row.absmax1 == nullptr) {
    if (is_whole(row, grad, tile, 16)) {
      update_plain_tile<kAlgorithm, true>(row, c, grad, tile);
    } else {
      update_plain_tile<kAlgorithm, false>(row, c, grad, tile);
    }
  } else if (is_whole(row, grad, tile, 8)) {
    update_usual_tile<kAlgorithm, true>(smem, row, c, grad, tile);
  } else {
    update_usual_tile<kAlgorithm, false>(smem, row, c, grad, tile);
  }
}

template <Algorithm kAlgorithm, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral ? 2 : 3)
    update_kernel(const __grid_constant__ Slice slice) {
  Smem& smem = device::shared_memory<Smem>();
  if (slice.coded) {
    load_tables(smem.signed_tables, kDeviceSigned);
    if (kAlgorithm == Algorithm::kAdam) load_tables(smem.unsigned_tables, kDeviceUnsigned);
    device::sync_block();
  }
  for_tiles(slice, [&](int index, int64_t tile) {
    const Row& row = slice.rows[index];
    const Coefficients c = load_struct(slice.coefficients + index);
    if (c.skip || bool(row.general) != kGeneral) return;
    with_float_type(row.dtype, [&](auto zero) {
      update_tile<kAlgorithm, kGeneral, decltype(zero)>(smem, row, c, slice.grads[index], tile);
    });
  });
}

// The sum over the thread block, in a fixed order, given to every thread.
__device__ __forceinline__ double sum_over_block(NormSmem& smem, double value) {
  for (int distance = 16; distance > 0; distance /= 2) value += device::shfl_xor(value, distance);
  if (device::lane_id() == 0) smem.warp_sum[device::warp_id()] = value;
  device::sync_block();
  double total = 0;
  for (int warp = 0; warp < kWarps; ++warp) total += smem.warp_sum[warp];
  return total;
}

template <class T>
__device__ __forceinline__ double squared_sum(const Row& row, const void* grad, int64_t tile) {
  const T* values = static_cast<const T*>(grad);
  const int64_t begin = tile * row.block_size;
  const int64_t end = begin + row.block_size < row.numel ? begin + row.block_size : row.numel;
  double total = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
    const Lane lane = lane_of(chunk, end);
    float x[kLaneElements], sum = 0;
    load_lane(x, values + lane.offset, lane.count, is_aligned(values, 16));
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) sum = device::fma_rn(x[i], x[i], sum);
    total += sum;
  }
  return total;
}

// Each thread block adds up its tiles in a fixed order and writes one partial sum: the norm has the same bits
// every time.
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Slice slice) {
  NormSmem& smem = device::shared_memory<NormSmem>();
  double total = 0;
  for_tiles(slice, [&](int index, int64_t tile) {
    const Row& row = slice.rows[index];
    total += with_float_type(
        row.dtype, [&](auto zero) { return squared_sum<decltype(zero)>(row, slice.grads[index], tile); });
  });
  total = sum_over_block(smem, total);
  if (threadIdx.x == 0) slice.partials[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    coefficients_kernel(const __grid_constant__ CoefficientsLaunch p) {
  double squared = 0;
  for (int i = int(threadIdx.x); i < p.num_partials; i += kThreads) squared += p.partials[i];
  squared = sum_over_block(device::shared_memory<NormSmem>(), squared);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.num_rows) return;
  const Row& row = p.rows[index];
  const int group = row.group - p.first_group;
  if (group < 0 || group >= p.num_groups) return;
  if (p.params.found_inf != nullptr && *p.params.found_inf != 0.0f) {
    p.coefficients[index].skip = 1;
    return;
  }
  const int64_t step = *row.step + 1;
  *row.step = step;
  p.coefficients[index] = coefficients(p.algorithm, p.groups[group], step, p.params, squared);
}

template <bool kGeneral>
device::Kernel<Slice> kernel_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kAdam:
      return update_kernel<Algorithm::kAdam, kGeneral>;
    case Algorithm::kLion:
      return update_kernel<Algorithm::kLion, kGeneral>;
    default:
      return update_kernel<Algorithm::kSgd, kGeneral>;
  }
}

unsigned grid_for(device::Kernel<Slice> kernel, int64_t tiles, size_t shared_bytes, int device) {
  const int64_t needed = (tiles + kWarps - 1) / kWarps;
  const int64_t resident =
      int64_t{device::multiprocessor_count(device)} * device::resident_blocks(kernel, kThreads, shared_bytes);
  return unsigned(needed < resident ? needed : resident);
}

// Where things are in the workspace.
struct Layout {
  Row* rows;
  Coefficients* coefficients;
  double* partials;

  Layout(void* workspace, int64_t num_rows) {
    rows = static_cast<Row*>(workspace);
    coefficients = reinterpret_cast<Coefficients*>(rows + num_rows);
    partials = reinterpret_cast<double*>(coefficients + num_rows);
  }
};

// Calls body(slice) for every run of at most kMaxGrads rows.
template <class Body>
void for_slices(const UpdateParams& p, const Layout& layout, const Body& body) {
  for (int64_t first = 0; first < p.num_rows; first += kMaxGrads) {
    const int64_t last = first + kMaxGrads < p.num_rows ? first + kMaxGrads : p.num_rows;
    Slice slice;
    slice.rows = layout.rows + first;
    slice.coefficients = layout.coefficients + first;
    slice.partials = layout.partials;
    slice.first_tile = p.rows[first].first_tile;
    slice.num_tiles = (last < p.num_rows ? p.rows[last].first_tile : p.num_tiles) - slice.first_tile;
    slice.num_rows = int32_t(last - first);
    slice.coded = 0;
    slice.general = 0;
    for (int64_t i = first; i < last; ++i) {
      slice.grads[i - first] = p.grads[i];
      slice.coded |= p.rows[i].absmax1 != nullptr;
      slice.general |= p.rows[i].general;
    }
    if (slice.num_tiles > 0) body(slice);
  }
}

int64_t launch_norm(const UpdateParams& p, Layout layout, int device, Stream stream) {
  int64_t partials = 0;
  for_slices(p, layout, [&](Slice& slice) {
    unsigned grid = grid_for(norm_kernel, slice.num_tiles, sizeof(NormSmem), device);
    if (grid > kMaxPartials - partials) grid = unsigned(kMaxPartials - partials);
    check_value(grid > 0, "max_grad_norm: too many tensors");
    slice.partials = layout.partials + partials;
    device::launch(norm_kernel, dim3(grid), dim3(kThreads), sizeof(NormSmem), stream, slice);
    partials += grid;
  });
  return partials;
}

void launch_coefficients(const UpdateParams& p, const Group* groups, int64_t num_groups,
                         const StepParams& params, const Layout& layout, int64_t num_partials,
                         Stream stream) {
  for (int64_t first = 0; first < num_groups; first += kMaxGroups) {
    CoefficientsLaunch launch;
    launch.rows = layout.rows;
    launch.coefficients = layout.coefficients;
    launch.partials = layout.partials;
    launch.num_rows = p.num_rows;
    launch.num_partials = int32_t(num_partials);
    launch.first_group = int32_t(first);
    launch.num_groups = int32_t(num_groups - first < kMaxGroups ? num_groups - first : kMaxGroups);
    launch.algorithm = p.algorithm;
    launch.params = params;
    for (int i = 0; i < launch.num_groups; ++i) launch.groups[i] = groups[first + i];
    device::launch(coefficients_kernel, dim3(unsigned((p.num_rows + kThreads - 1) / kThreads)),
                   dim3(kThreads), sizeof(NormSmem), stream, launch);
  }
}

}  // namespace

void step_cuda(const UpdateParams& p, const Group* groups, int64_t num_groups, const StepParams& params,
               void* workspace, bool upload, int device, Stream stream) {
  const device::DeviceGuard guard(device);
  const device::Kernel<Slice> usual = kernel_of<false>(p.algorithm), general = kernel_of<true>(p.algorithm);
  device::preload(usual);
  device::preload(general);
  device::preload(norm_kernel);
  device::preload(coefficients_kernel);
  const Layout layout(workspace, p.num_rows);
  if (upload) device::copy_to_device(layout.rows, p.rows, size_t(p.num_rows) * sizeof(Row), stream);
  const int64_t partials = params.max_grad_norm >= 0 ? launch_norm(p, layout, device, stream) : 0;
  launch_coefficients(p, groups, num_groups, params, layout, partials, stream);
  for_slices(p, layout, [&](const Slice& slice) {
    for (const device::Kernel<Slice> kernel : {usual, general}) {
      if (kernel == general && !slice.general) continue;
      const unsigned grid = grid_for(kernel, slice.num_tiles, sizeof(Smem), device);
      device::launch(kernel, dim3(grid), dim3(kThreads), sizeof(Smem), stream, slice);
    }
  });
}

}  // namespace tilewright::optim
