// Optimizer steps on the GPU: one launch a pass, whatever the number of tensors.
//
// A warp takes a tile (a quantization block), eight elements a lane, and finds the tensors that it has tiles
// of 32 rows of their table at a time; for blocks of 256 the absmax is one warp reduction and nothing is
// shared but the codec's tables. Larger blocks, from older checkpoints, are swept twice: once for the absmax,
// once to write.
//
// Roofline, AdamW: 10.06 bytes per 16-bit parameter, 16.06 per fp32 one.
#define TW_HOST_DEVICE __host__ __device__
#define TW_FEW_REGISTERS _Pragma("unroll 2")
#include "core/tune.h"
#include "device/atomics.h"
#include "device/launch.h"
#include "device/smem.h"
#include "optim/codec_cuda.h"
#include "optim/update_launch.h"

namespace tilewright::optim {
namespace {

// A multiprocessor's, of the usual kind.
template <Algorithm kAlgorithm>
constexpr int kUpdateBlocks = kAlgorithm == Algorithm::kAdam ? TW_TUNED(OPTIMIZER_TWO_STATES_BLOCKS, 3)
                                                             : TW_TUNED(OPTIMIZER_ONE_STATE_BLOCKS, 3);

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

// A row's coefficients in registers, but for those that are seldom needed.
struct Factors : Coefficients {
  const Coefficients* all;
  uint32_t row;
  bool adjusts_grad;

  __device__ __forceinline__ Factors(const Coefficients* coefficients, uint32_t index)
      : Coefficients(load_struct(coefficients + index)),
        all(coefficients),
        row(index),
        adjusts_grad(grad_scale != 1.0f || l2 != 0.0f) {}

  __device__ __forceinline__ const Coefficients& in_memory() const { return all[device::fresh(row)]; }
};

// A warp's next tile, counted from the first one of the row that it is at.
struct Tiles {
  uint32_t next, step;

  // Calls body(tile) for those before `last`. (A reference: what lies in memory is not kept in a register.)
  template <class Body>
  __device__ __forceinline__ void visit(const uint32_t& last, const Body& body) {
    for (; next < last; next += step) body(next);
  }
};

// A warp takes every (grid's warps)-th tile of the slice. Calls body(row index in the slice, tiles) for each
// row that it has tiles of: what is the same for all of them is then read once. Each lane looks at a row of
// its own: one after the other, hundreds of small tensors would cost more to pass by than to update.
template <class Body>
__device__ __forceinline__ void for_rows(const Slice& slice, const Body& body) {
  const uint32_t step = gridDim.x * kWarps;
  for (uint32_t row = 0; row < slice.num_rows;) {
    const uint32_t index = row + device::lane_id();
    uint32_t next = 0;  // the first tile of the row that is the warp's
    bool has_tiles = false;
    if (index < slice.num_rows) {
      const uint32_t first = blockIdx.x * kWarps + device::warp_id();
      // Fewer than 2^32 tiles fit a device's memory.
      const uint32_t begin = uint32_t(slice.rows[index].first_tile - slice.rows[0].first_tile);
      next = first - begin + (begin > first ? (begin - first + step - 1) / step * step : 0);
      has_tiles = next < slice.rows[index].num_tiles;
    }
    const uint32_t found = device::ballot(has_tiles);
    if (found == 0) {
      row += device::kWarpSize;
      continue;
    }
    const int lane = device::count_bits(~found & (found - 1));
    Tiles tiles{device::shfl(next, lane), step};
    body(row + lane, tiles);
    row += lane + 1;
  }
}

// What the states are multiplied with before the gradient is added.
template <Algorithm kAlgorithm>
__device__ __forceinline__ float state1_factor(const Factors& c) {
  return kAlgorithm == Algorithm::kLion ? 1.0f : c.beta1;
}

// The parameter after the step. s1 and s2 come multiplied with state1_factor and beta2 and leave as the new
// states.
template <Algorithm kAlgorithm>
__device__ __forceinline__ float updated(const Factors& c, float g, float p, float& s1, float& s2) {
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
__device__ __forceinline__ void store_params(T* param, float (&p)[kLaneElements], const Factors& c,
                                             const Lane& lane) {
  if constexpr (sizeof(T) == 2) {
    if (c.stochastic) {
      const PhiloxWords random = random_octet(c.in_memory(), lane.offset / kLaneElements);
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
__device__ __forceinline__ void update_lane(const Factors& c, const T* grad, const T* param, Lane lane,
                                            float (&p)[kLaneElements], float (&s1)[kLaneElements],
                                            float (&s2)[kLaneElements]) {
  float g[kLaneElements];
  load_lane<kWhole>(g, grad + lane.offset, lane.count);
  load_lane<kWhole>(p, param + lane.offset, lane.count);
  // One branch that the whole warp takes or not: it costs less than two instructions an element that do
  // nothing.
  if (c.adjusts_grad) [[unlikely]] {
    const float scale = c.in_memory().grad_scale, l2 = c.in_memory().l2;
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      g[i] *= scale;
      if (l2 != 0.0f) g[i] = device::fma_rn(l2, p[i], g[i]);
    }
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
__device__ __forceinline__ void update_usual_tile(const Smem& smem, const Row& row, const Factors& c,
                                                  const T* grad, uint32_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  uint8_t* codes1 = static_cast<uint8_t*>(row.state1);
  uint8_t* codes2 = static_cast<uint8_t*>(row.state2);
  const Lane lane = lane_of(int64_t{tile} * kWarpElements, row.numel);
  const LaneCodes old1 = load_codes<kWhole>(codes1 + lane.offset, lane.count);
  const LaneCodes old2 = kTwo ? load_codes<kWhole>(codes2 + lane.offset, lane.count) : LaneCodes{};
  float p[kLaneElements], s1[kLaneElements], s2[kLaneElements] = {};
  decode_lane(s1, old1, smem.signed_tables, row.absmax1[tile] * state1_factor<kAlgorithm>(c));
  if (!kWhole) clear_absent(s1, lane);
  if (kTwo) decode_lane(s2, old2, smem.unsigned_tables, row.absmax2[tile] * c.beta2);
  update_lane<kAlgorithm, kWhole>(c, grad, param, lane, p, s1, s2);
  store_params<kWhole>(param, p, c, lane);

  float absmax1 = warp_absmax(s1, 0.0f);
  float absmax2 = kTwo ? warp_absmax(s2, 0.0f) : 1.0f;
  const auto finish = [&](LaneCodes new1, LaneCodes new2) {
    store_codes<kWhole>(codes1 + lane.offset, new1, lane.count);
    if (kTwo) store_codes<kWhole>(codes2 + lane.offset, new2, lane.count);
    if (device::lane_id() == 0) row.absmax1[tile] = absmax1;
    if (kTwo && device::lane_id() == 0) row.absmax2[tile] = absmax2;
  };
  if (kWhole && is_ordinary(absmax1) && is_ordinary(absmax2)) [[likely]] {
    return finish(
        encode_scaled<true, SmallValues::kNearest>(s1, quick_reciprocal(absmax1), smem.signed_tables),
        kTwo ? encode_scaled<false, SmallValues::kPositive>(s2, quick_reciprocal(absmax2),
                                                            smem.unsigned_tables)
             : LaneCodes{});
  }
  if (is_infinite(absmax1) || is_infinite(absmax2)) {
    drop_nonfinite(s1, s2);
    absmax1 = warp_absmax(s1, 0.0f);
    if (kTwo) absmax2 = warp_absmax(s2, 0.0f);
  }
  finish(encode_lane<true>(s1, absmax1, smem.signed_tables),
         kTwo ? encode_lane<false, SmallValues::kPositive>(s2, absmax2, smem.unsigned_tables) : LaneCodes{});
}

// A block of any size, maps of any kind: in chunks, swept once for the scales and once to write. Nothing is
// written in the first sweep, so the second computes the same values again.
template <Algorithm kAlgorithm, class T>
__device__ __forceinline__ void update_general_tile(const Smem& smem, const Row& row, const Factors& c,
                                                    const T* grad, uint32_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  uint8_t* codes1 = static_cast<uint8_t*>(row.state1);
  uint8_t* codes2 = static_cast<uint8_t*>(row.state2);
  const int64_t begin = int64_t{tile} * row.block_size;
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
    store_params<false>(param, p, c, lane);
  }
  if (device::lane_id() == 0) {
    row.absmax1[tile] = absmax1;
    if (kTwo) row.absmax2[tile] = absmax2;
  }
}

template <Algorithm kAlgorithm, bool kWhole, class T>
__device__ __forceinline__ void update_plain_tile(const Row& row, const Factors& c, const T* grad,
                                                  int64_t tile) {
  constexpr bool kTwo = kAlgorithm == Algorithm::kAdam;
  T* param = static_cast<T*>(row.param);
  const Lane lane = lane_of(int64_t{tile} * kWarpElements, row.numel);
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
  store_params<kWhole>(param, p, c, lane);
}

static_assert(kPlainTile == kWarpElements && kUsualBlock == kWarpElements);

// How many of a row's tiles are whole, with addresses that allow the widest accesses.
__device__ __forceinline__ uint32_t whole_tiles(const Row& row, const void* grad, uintptr_t state_alignment) {
  const bool aligned = device::is_aligned(row.param, 16) && device::is_aligned(grad, 16) &&
                       device::is_aligned(row.state1, state_alignment) &&
                       device::is_aligned(row.state2, state_alignment);
  return aligned ? uint32_t(row.numel / kWarpElements) : 0;
}

// kGeneral picks the rows: a model without foreign maps or large blocks has none of the general kind, and the
// kernel for the others keeps the registers that those would cost. What whole tiles need of their row stays
// in registers from tile to tile; the others, which are few, read it again.
template <Algorithm kAlgorithm, bool kGeneral, class T>
__device__ __forceinline__ void update_row(const Smem& smem, const Slice& slice, uint32_t index,
                                           Tiles& tiles) {
  if constexpr (!kGeneral) {
    const Row row = load_struct(slice.rows + index);
    const T* grad = static_cast<const T*>(slice.grads[index]);
    const bool coded = row.absmax1 != nullptr;
    const Factors c(slice.coefficients, index);
    const uint32_t whole = whole_tiles(row, grad, coded ? 8 : 16);
    if (coded) {
      tiles.visit(whole,
                  [&](uint32_t tile) { update_usual_tile<kAlgorithm, true>(smem, row, c, grad, tile); });
    } else {
      tiles.visit(whole, [&](uint32_t tile) { update_plain_tile<kAlgorithm, true>(row, c, grad, tile); });
    }
  }
  tiles.visit(slice.rows[device::fresh(index)].num_tiles, [&](uint32_t tile) {
    const uint32_t again = device::fresh(index);
    const Row& row = slice.rows[again];
    const T* grad = static_cast<const T*>(slice.grads[again]);
    const Factors c(slice.coefficients, again);
    if constexpr (kGeneral) {
      update_general_tile<kAlgorithm>(smem, row, c, grad, tile);
    } else if (row.absmax1 != nullptr) {
      update_usual_tile<kAlgorithm, false>(smem, row, c, grad, tile);
    } else {
      update_plain_tile<kAlgorithm, false>(row, c, grad, tile);
    }
  });
}

template <Algorithm kAlgorithm, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral ? 2 : kUpdateBlocks<kAlgorithm>)
    update_kernel(const __grid_constant__ Slice slice) {
  Smem& smem = device::shared_memory<Smem>();
  if (slice.coded) {
    load_tables(smem.signed_tables, kDeviceSigned);
    if (kAlgorithm == Algorithm::kAdam) load_tables(smem.unsigned_tables, kDeviceUnsigned);
    device::sync_block();
  }
  for_rows(slice, [&](uint32_t index, Tiles& tiles) {
    const Row& row = slice.rows[index];
    const Coefficients& c = slice.coefficients[index];
    if (c.skip || bool(row.general) != kGeneral) return;
    with_float_type(row.dtype, [&](auto zero) {
      update_row<kAlgorithm, kGeneral, decltype(zero)>(smem, slice, index, tiles);
    });
  });
}

__global__ void __launch_bounds__(kThreads) upload_kernel(const __grid_constant__ Upload p) {
  copy_table(reinterpret_cast<uint32_t*>(p.destination), reinterpret_cast<const uint32_t*>(p.rows),
             p.num_rows * int(sizeof(Row) / sizeof(uint32_t)));
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
__device__ __forceinline__ double squared_sum(const Row& row, const void* grad, uint32_t tile) {
  const T* values = static_cast<const T*>(grad);
  const int64_t begin = int64_t{tile} * row.block_size;
  const int64_t end = begin + row.block_size < row.numel ? begin + row.block_size : row.numel;
  double total = 0;
  for (int64_t chunk = begin; chunk < end; chunk += kWarpElements) {
    const Lane lane = lane_of(chunk, end);
    float x[kLaneElements], sum = 0;
    load_lane(x, values + lane.offset, lane.count, device::is_aligned(values, 16));
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
  for_rows(slice, [&](uint32_t index, Tiles& tiles) {
    const Row row = load_struct(slice.rows + index);
    with_float_type(row.dtype, [&](auto zero) {
      tiles.visit(row.num_tiles, [&](uint32_t tile) {
        total += squared_sum<decltype(zero)>(row, slice.grads[index], tile);
      });
    });
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
  p.coefficients[index] = coefficients(p.algorithm, p.groups[group], row.id, step, p.params, squared);
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

void launch_upload(const UpdateParams& p, const Layout& layout, Stream stream) {
  for (int64_t first = 0; first < p.num_rows; first += kMaxRows) {
    Upload upload;
    upload.destination = layout.rows + first;
    upload.num_rows = int32_t(p.num_rows - first < kMaxRows ? p.num_rows - first : kMaxRows);
    for (int i = 0; i < upload.num_rows; ++i) upload.rows[i] = p.rows[first + i];
    device::launch(upload_kernel, dim3(1), dim3(kThreads), 0, stream, upload);
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
  const Layout layout(workspace, p.num_rows);
  if (upload) launch_upload(p, layout, stream);
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
