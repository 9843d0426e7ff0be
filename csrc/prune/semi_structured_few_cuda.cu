// The 2:4 linear layer for few tokens (decode) on the GPU.
//
//   y[t][o] = activation(sum over kept c of w[o][c] x[t][c] + bias[o]),  t < 8
//
// A warp takes a row of the weight. A lane takes 16 or 8 bytes of its values at a time and the positions that
// belong to them; of the four elements of x that a group meets it picks two by their positions, in registers.
//
// Roofline: memory; 18 bytes of 8 16-bit values and their positions (17 of 4 float32 values), about 11
// instructions a group for one token and 5 for each other.
#include "core/tune.h"
#include "prune/semi_structured_cuda.h"

namespace tilewright::prune::semi {
namespace {

constexpr int kFewTokens = 8;
constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;
constexpr int kChunks = TW_TUNED(SEMI_STRUCTURED_FEW_CHUNKS, 1);  // of a lane, on their way together

// With several tokens a lane has enough loads under way, and x wants the registers.
template <class T, int kTokens>
struct Chunk {
  static constexpr int kBytes = sizeof(T) == 2 && kTokens > 1 ? 8 : 16;
  static constexpr int kValues = kBytes / int(sizeof(T)), kGroups = kValues / 2, kColumns = 2 * kValues;
  Vector<T, kValues> values;
  uint32_t positions;  // four bits a group
};

template <class T, int kTokens>
__device__ __forceinline__ Chunk<T, kTokens> load_chunk(const T* values, const uint8_t* positions,
                                                        int64_t chunk) {
  using C = Chunk<T, kTokens>;
  C loaded;
  loaded.values = device::load_streaming(reinterpret_cast<const Vector<T, C::kValues>*>(values) + chunk);
  const auto bytes =
      device::load(reinterpret_cast<const Vector<uint8_t, C::kGroups / 2>*>(positions) + chunk);
  loaded.positions = 0;
#pragma unroll
  for (int i = 0; i < C::kGroups / 2; ++i) loaded.positions |= uint32_t{bytes[i]} << 8 * i;
  return loaded;
}

// Elements nibble & 3 and nibble >> 2 of four.
template <class T>
__device__ __forceinline__ Vector<float, 2> pick(const Vector<T, 4>& four, uint32_t nibble) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[2];
    memcpy(words, &four, sizeof words);
    // Bytes 2i and 2i + 1 of the eight, for both positions i.
    const uint32_t selector = 0x1010u + ((nibble & 3u) | (nibble & 12u) << 6) * 0x22u;
    const uint32_t picked = device::byte_permute(words[0], words[1], selector);
    Vector<T, 2> pair;
    memcpy(&pair, &picked, sizeof pair);
    return device::to_float2(pair);
  } else {
    const auto choose = [&](uint32_t at) {
      const float low = (at & 1u) != 0 ? four[1] : four[0], high = (at & 1u) != 0 ? four[3] : four[2];
      return (at & 2u) != 0 ? high : low;
    };
    return {choose(nibble & 3u), choose(nibble >> 2)};
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void add_chunk(float (&sums)[kTokens], const SemiStructuredLinearParams& p,
                                          const Chunk<T, kTokens>& loaded, int64_t chunk) {
  using C = Chunk<T, kTokens>;
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    const uint32_t nibble = loaded.positions >> 4 * g & 15u;
    const Vector<float, 2> weights =
        device::to_float2(Vector<T, 2>{loaded.values[2 * g], loaded.values[2 * g + 1]});
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= p.tokens) break;
      const T* x = static_cast<const T*>(p.x.data) + t * p.x.row;
      const Vector<float, 2> picked =
          pick(device::load(reinterpret_cast<const Vector<T, 4>*>(x) + chunk * C::kGroups + g), nibble);
      sums[t] = device::fma_rn(weights[0], picked[0], sums[t]);
      sums[t] = device::fma_rn(weights[1], picked[1], sums[t]);
    }
  }
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads) few_kernel(const __grid_constant__ SemiStructuredLinearParams p) {
  using C = Chunk<T, kTokens>;
  const SemiStructuredWeight& w = p.weight;
  const int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (row >= w.out) return;
  const T* values = values_of<T>(w, row);
  const uint8_t* positions = positions_of(w, row);
  float sums[kTokens] = {};
  const int64_t chunks = divide_up(w.in, C::kColumns);
#pragma unroll 1
  for (int64_t first = device::lane_id(); first < chunks; first += kChunks * device::kWarpSize) {
    C loaded[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t chunk = i == 0 ? first : smaller(first + i * device::kWarpSize, chunks - 1);
      loaded[i] = load_chunk<T, kTokens>(values, positions, chunk);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t chunk = first + i * device::kWarpSize;
      if (i > 0 && chunk >= chunks) break;
      add_chunk<T, kTokens>(sums, p, loaded[i], chunk);
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = device::add_lanes(sums[t]);
    if (t < p.tokens && device::lane_id() == t) finish<T>(p, t, row, sum);
  }
}

template <class T>
bool fits(const SemiStructuredLinearParams& p) {
  return p.weight.in % Chunk<T, 1>::kColumns == 0 && p.x.column == 1 && p.x.row % 4 == 0 &&
         device::is_aligned(p.x.data, 4 * sizeof(T)) && device::is_aligned(p.weight.values, 16) &&
         device::is_aligned(p.weight.positions, 2);
}

template <class T>
bool launch_few(const SemiStructuredLinearParams& p, Stream stream) {
  if (p.tokens > kFewTokens || !fits<T>(p)) return false;
  const device::Kernel<SemiStructuredLinearParams> kernel = p.tokens == 1   ? few_kernel<T, 1>
                                                            : p.tokens <= 4 ? few_kernel<T, 4>
                                                                            : few_kernel<T, kFewTokens>;
  const int64_t blocks = divide_up(p.weight.out, kWarps);
  check_value(blocks <= 0x7fffffff, "values: too many rows for one launch");
  device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p);
  return true;
}

}  // namespace

bool forward_few(const SemiStructuredLinearParams& p, Stream stream) {
  if (p.dtype == DType::kFloat32) return launch_few<float>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_few<fp16>(p, stream);
  return launch_few<bf16>(p, stream);
}

}  // namespace tilewright::prune::semi
