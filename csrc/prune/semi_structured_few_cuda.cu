// The 2:4 linear layer for few tokens (decode) on the GPU.
//
//   y[t][o] = activation(sum over kept c of w[o][c] x[t][c] + bias[o]),  t < 8
//
// A warp takes a row of the weight. A lane takes 16 bytes of its values at a time and the positions that belong
// to them; of the four elements of x that a group meets it picks two by their positions, in registers.
//
// Roofline: memory; 18 bytes of 8 16-bit values and their positions (17 of 4 float32 values), about 11
// instructions a group for one token and 5 for each other.
#include "prune/semi_structured_cuda.h"

namespace tilewright::prune::semi {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * device::kWarpSize;

struct FewParams {
  SemiStructuredLinearParams p;
  bool vectors;  // values by 16 bytes, x by groups
};

template <class T>
struct Chunk {
  static constexpr int kValues = 16 / int(sizeof(T)), kGroups = kValues / 2, kColumns = 2 * kValues;
  Vector<T, kValues> values;
  uint32_t positions;  // four bits a group
};

template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const FewParams& f, const T* values, const uint8_t* positions,
                                               int64_t chunk) {
  using C = Chunk<T>;
  C loaded;
  const int64_t groups = f.p.weight.in / 4, first = chunk * C::kGroups;
  if (f.vectors) {
    loaded.values = device::load_streaming(reinterpret_cast<const Vector<T, C::kValues>*>(values) + chunk);
    const auto bytes = device::load(
        reinterpret_cast<const Vector<uint8_t, C::kGroups / 2>*>(positions) + chunk);
    loaded.positions = 0;
#pragma unroll
    for (int i = 0; i < C::kGroups / 2; ++i) loaded.positions |= uint32_t{bytes[i]} << 8 * i;
    return loaded;
  }
  loaded.positions = 0;
#pragma unroll
  for (int g = 0; g < C::kGroups; ++g) {
    const bool inside = first + g < groups;
    loaded.values[2 * g] = inside ? values[2 * (first + g)] : T{};
    loaded.values[2 * g + 1] = inside ? values[2 * (first + g) + 1] : T{};
    const uint32_t byte = inside ? positions[(first + g) / 2] : 0u;
    loaded.positions |= (byte >> (first + g) % 2 * 4 & 15u) << 4 * g;
  }
  return loaded;
}

template <class T>
__device__ __forceinline__ Vector<T, 4> load_group(const FewParams& f, const T* x, int64_t column) {
  if (f.vectors) return device::load(reinterpret_cast<const Vector<T, 4>*>(x + column));
  Vector<T, 4> four{};
  if (column < f.p.weight.in) {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = x[(column + i) * f.p.x.column];
  }
  return four;
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
__global__ void __launch_bounds__(kThreads) few_kernel(const __grid_constant__ FewParams f) {
  using C = Chunk<T>;
  const SemiStructuredWeight& w = f.p.weight;
  const int64_t row = int64_t{blockIdx.x} * kWarps + device::warp_id();
  if (row >= w.out) return;
  const T* values = values_of<T>(w, row);
  const uint8_t* positions = positions_of(w, row);
  float sums[kTokens] = {};
  const int64_t chunks = divide_up(w.in, C::kColumns);
#pragma unroll 1
  for (int64_t chunk = device::lane_id(); chunk < chunks; chunk += device::kWarpSize) {
    const C loaded = load_chunk<T>(f, values, positions, chunk);
#pragma unroll
    for (int g = 0; g < C::kGroups; ++g) {
      const uint32_t nibble = loaded.positions >> 4 * g & 15u;
      const Vector<float, 2> weights =
          device::to_float2(Vector<T, 2>{loaded.values[2 * g], loaded.values[2 * g + 1]});
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t >= f.p.tokens) break;
        const T* x = static_cast<const T*>(f.p.x.data) + t * f.p.x.row;
        const Vector<float, 2> picked = pick(load_group(f, x, chunk * C::kColumns + 4 * g), nibble);
        sums[t] = device::fma_rn(weights[0], picked[0], sums[t]);
        sums[t] = device::fma_rn(weights[1], picked[1], sums[t]);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const float sum = device::add_lanes(sums[t]);
    if (t < f.p.tokens && device::lane_id() == t) finish<T>(f.p, t, row, sum);
  }
}

template <class T>
void launch_few(const SemiStructuredLinearParams& p, Stream stream) {
  using C = Chunk<T>;
  const SemiStructuredWeight& w = p.weight;
  const bool vectors = w.in % C::kColumns == 0 && p.x.column == 1 && p.x.row % 4 == 0 &&
                       device::is_aligned(p.x.data, 4 * sizeof(T)) && device::is_aligned(w.values, 16) &&
                       device::is_aligned(w.positions, 2);
  const device::Kernel<FewParams> kernel = p.tokens == 1   ? few_kernel<T, 1>
                                           : p.tokens <= 4 ? few_kernel<T, 4>
                                                           : few_kernel<T, 8>;
  const int64_t blocks = divide_up(w.out, kWarps);
  check_value(blocks <= 0x7fffffff, "values: too many rows for one launch");
  device::preload(kernel);
  device::launch(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, {p, vectors});
}

}  // namespace

void forward_few(const SemiStructuredLinearParams& p, Stream stream) {
  if (p.dtype == DType::kFloat32) return launch_few<float>(p, stream);
  if (p.dtype == DType::kFloat16) return launch_few<fp16>(p, stream);
  launch_few<bf16>(p, stream);
}

}  // namespace tilewright::prune::semi
