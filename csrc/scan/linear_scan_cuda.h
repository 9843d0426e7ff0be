// What the kernels of linear scans share: real and complex numbers, the maps that steps compose to, how work
// is cut into segments, and where a row lies in its tensors.
#pragma once

#include "core/integers.h"
#include "core/tune.h"
#include "device/half.h"
#include "device/memory.h"
#include "device/warp.h"
#include "scan/linear_scan.h"

namespace tilewright::scan {
namespace {

// ---- numbers ----

struct Complex {
  float re, im;
};

template <class T>
struct Numbers {
  using Scalar = float;
};
template <>
struct Numbers<Complex> {
  using Scalar = Complex;
};

__device__ __forceinline__ float plus(float a, float b) { return a + b; }
__device__ __forceinline__ float times(float a, float b) { return a * b; }
__device__ __forceinline__ float times_plus(float a, float b, float c) { return device::fma_rn(a, b, c); }
__device__ __forceinline__ float conjugate(float a) { return a; }
__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }
__device__ __forceinline__ bool is_nan(float x) { return x != x; }
__device__ __forceinline__ void set_one(float& x) { x = 1.0f; }

__device__ __forceinline__ Complex plus(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ __forceinline__ Complex times(Complex a, Complex b) {
  return {device::fma_rn(a.re, b.re, -(a.im * b.im)), device::fma_rn(a.re, b.im, a.im * b.re)};
}
__device__ __forceinline__ Complex times_plus(Complex a, Complex b, Complex c) {
  return {device::fma_rn(a.re, b.re, device::fma_rn(-a.im, b.im, c.re)),
          device::fma_rn(a.re, b.im, device::fma_rn(a.im, b.re, c.im))};
}
__device__ __forceinline__ Complex conjugate(Complex a) { return {a.re, -a.im}; }
__device__ __forceinline__ bool is_finite(Complex x) { return is_finite(x.re) && is_finite(x.im); }
__device__ __forceinline__ bool is_nan(Complex x) { return is_nan(x.re) || is_nan(x.im); }
__device__ __forceinline__ void set_one(Complex& x) { x = {1.0f, 0.0f}; }

template <class T>
__device__ __forceinline__ float to_scalar(T value) {
  return device::to_float(value);
}
__device__ __forceinline__ Complex to_scalar(Complex value) { return value; }

template <class T>
__device__ __forceinline__ T from_scalar(float value) {
  return device::from_float<T>(value);
}
template <class T>
__device__ __forceinline__ T from_scalar(Complex value) {
  return value;
}

// The map s -> a s + b.
template <class Scalar>
struct Map {
  Scalar a, b;
};

template <class Scalar>
__device__ __forceinline__ Map<Scalar> identity() {
  Map<Scalar> map{};
  set_one(map.a);
  return map;
}

template <class Scalar>
__device__ __forceinline__ Map<Scalar> then(Map<Scalar> first, Map<Scalar> second) {
  return {times(second.a, first.a), times_plus(second.a, first.b, second.b)};
}

// What a step does to the state that enters it.
template <bool kBackward, class Scalar>
__device__ __forceinline__ Map<Scalar> map_of(Scalar a, Scalar x) {
  if constexpr (kBackward) {
    return {conjugate(a), times(conjugate(a), x)};
  } else {
    return {a, x};
  }
}

template <class Scalar>
struct Step {
  Scalar after, y, da;
};

template <bool kBackward, class Scalar>
__device__ __forceinline__ Step<Scalar> take_step(Scalar a, Scalar x, Scalar before, Scalar state) {
  if constexpr (kBackward) {
    const Scalar lam = plus(x, state);
    return {times(conjugate(a), lam), lam, times(lam, conjugate(before))};
  } else {
    const Scalar h = times_plus(a, state, x);
    return {h, h, Scalar{}};
  }
}

// ---- how work is cut ----

struct Params {
  LinearScanParams p;
  bool across;
  bool composing;    // the first of the two visits: write what a chunk does, not its outputs
  int32_t warps;     // along: of a row
  int64_t rows;      // across: outer; along: outer * inner
  int64_t groups;    // across: threads that share a row
  int64_t chunk;     // steps; 0: sequences are not split
  int64_t slots;     // numbers of chunks, or sequences
  int64_t channels;  // outer * inner
  void *map_a,
      *map_b;  // [slot][channel] of the accumulator's dtype; map_b becomes the state before the chunk
};

constexpr int kMaxWarps = 8;                                         // of a row
constexpr int kAcrossBytes = TW_TUNED(LINEAR_SCAN_ACROSS_BYTES, 8);  // of neighbours that a thread owns

// Across: of neighbours; a number of 8 bytes is one whatever the constant says.
constexpr int across_width(int bytes) { return kAcrossBytes > bytes ? kAcrossBytes / bytes : 1; }

// Shapes alone decide how work is cut, so that results do not depend on the GPU. These numbers suit 132
// multiprocessors.
constexpr int64_t kFewThreads = 6144, kEnoughThreads = 24576, kMaxChunks = 2048, kMinSteps = 64;
constexpr int64_t kFewRows = 128, kEnoughWarps = 2112, kEnoughBlocks = 528, kMinChunk = 8192;

void plan_across(Params& q) {
  const LinearScanParams& p = q.p;
  q.rows = p.outer;
  q.groups = divide_up(p.inner, across_width(int(itemsize(p.dtype))));
  const int64_t threads = p.sequences * q.rows * q.groups;
  if (threads == 0 || threads >= kFewThreads) return;
  const int64_t wanted = divide_up(kEnoughThreads, threads);
  const int64_t chunk = divide_up(p.length, wanted < kMaxChunks ? wanted : kMaxChunks);
  const int64_t rounded = divide_up(chunk < kMinSteps ? kMinSteps : chunk, 16) * 16;
  if (p.length >= 8 * kMinSteps && p.length >= 2 * rounded) q.chunk = rounded;
}

void plan_along(Params& q) {
  const LinearScanParams& p = q.p;
  q.rows = p.outer * p.inner;
  const int64_t lane = 16 / itemsize(p.dtype), rows = p.sequences * q.rows;
  if (rows == 0) return;
  if (rows < kFewRows && p.length >= 4 * kMinChunk) {
    const int64_t chunk = divide_up(p.length * rows, kEnoughBlocks);
    q.chunk = divide_up(chunk < kMinChunk ? kMinChunk : chunk, kMinChunk) * kMinChunk;
  }
  const int64_t length = q.chunk != 0 ? q.chunk : p.length;
  const int64_t blocks = rows * (q.chunk != 0 ? divide_up(p.length, q.chunk) : 1);
  while (q.warps < kMaxWarps && q.warps * blocks < kEnoughWarps &&
         q.warps * device::kWarpSize * lane < length) {
    q.warps *= 2;
  }
}

Params plan_of(const LinearScanParams& p) {
  Params q{};
  q.p = p;
  q.across = lanes_across(p);
  q.warps = 1;
  q.channels = p.outer * p.inner;
  q.across ? plan_across(q) : plan_along(q);
  q.slots = q.chunk == 0           ? p.sequences
            : p.seqlens != nullptr ? p.length / q.chunk + p.sequences
                                   : divide_up(p.length, q.chunk);
  return q;
}

int64_t map_bytes(const Params& q) {
  const int64_t scalar = q.p.dtype == DType::kComplex64 ? 8 : 4;
  return q.chunk == 0 ? 0 : divide_up(q.slots * q.channels * scalar, 16) * 16;
}

// Where slots of a sequence begin.
__device__ __forceinline__ int64_t first_slot(const Params& q, int64_t sequence, int64_t start) {
  return start / q.chunk + sequence;
}

__device__ __forceinline__ int64_t bound(const LinearScanParams& p, int64_t i) {
  // Values that nobody could check, in a captured graph, must not lead outside the tensors.
  const int64_t value = p.seqlens[i];
  return value < 0 ? 0 : value > p.length ? p.length : value;
}

struct Sequence {
  int64_t start, steps;
};

__device__ __forceinline__ Sequence sequence_of(const LinearScanParams& p, int64_t index) {
  if (p.seqlens == nullptr) return {0, p.length};
  const int64_t start = bound(p, index), end = bound(p, index + 1);
  return {start, end < start ? 0 : end - start};
}

// Steps begin to end of a sequence, counted in the direction of the sweep.
struct Segment {
  int64_t index, start, steps, begin, end;
};

__device__ __forceinline__ Segment segment_of(const Params& q, int64_t slot) {
  int64_t index = q.chunk == 0 ? slot : 0, chunk = q.chunk == 0 ? 0 : slot;
  if (q.chunk != 0 && q.p.seqlens != nullptr) {
    int64_t low = 0, high = q.p.sequences;  // the last sequence whose first slot is not behind this one
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_slot(q, middle, bound(q.p, middle)) <= slot ? low : high) = middle;
    }
    index = low;
    chunk = slot - first_slot(q, low, bound(q.p, low));
  }
  const Sequence sequence = sequence_of(q.p, index);
  const int64_t begin = q.chunk == 0 ? 0 : chunk * q.chunk;
  int64_t end = q.chunk == 0 ? sequence.steps : begin + q.chunk;
  if (end > sequence.steps) end = sequence.steps;
  return {index, sequence.start, sequence.steps, begin, end};
}

// ---- where things lie ----

template <class T>
struct Walk {
  T* data;       // of the sweep's first step; null: absent
  int64_t step;  // in elements, negative where the sweep descends
  int64_t inner;
  __device__ __forceinline__ T* at(int64_t s) const { return data + s * step; }
};

template <class T>
struct Row {
  using Scalar = typename Numbers<T>::Scalar;
  Walk<const T> a, x, h;
  Walk<T> y, da;
  const Scalar* h0;
  Scalar* dh0;
  int64_t channel;
};

template <class T>
__device__ __forceinline__ Walk<T> stream_of(const LinearScanParams& p, const ScanTensor& t, int64_t offset,
                                             const Segment& segment) {
  if (t.data == nullptr) return {nullptr, 0, 0};
  const int64_t first = p.descending ? segment.start + segment.steps - 1 : segment.start;
  return {static_cast<T*>(t.data) + offset + first * t.step, p.descending ? -t.step : t.step, t.inner};
}

template <class T>
__device__ Row<T> row_of(const Params& q, int64_t outer, int64_t inner, const Segment& segment) {
  using Scalar = typename Numbers<T>::Scalar;
  const LinearScanParams& p = q.p;
  const ScanTensor* const tensors[7] = {&p.a, &p.x, &p.h, &p.y, &p.da, &p.h0, &p.dh0};
  int64_t offsets[7];
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    offsets[i] = inner * tensors[i]->inner + (i >= 5 ? segment.index * tensors[i]->sequence : 0);
  }
  int64_t rest = outer;
  for (int axis = p.outer_axes - 1; axis >= 0; --axis) {
    const int64_t quotient = rest / p.sizes[axis], digit = rest - quotient * p.sizes[axis];
#pragma unroll
    for (int i = 0; i < 7; ++i) offsets[i] += digit * tensors[i]->outer[axis];
    rest = quotient;
  }
  Row<T> row;
  row.a = stream_of<const T>(p, p.a, offsets[0], segment);
  row.x = stream_of<const T>(p, p.x, offsets[1], segment);
  row.h = stream_of<const T>(p, p.h, offsets[2], segment);
  row.y = stream_of<T>(p, p.y, offsets[3], segment);
  row.da = stream_of<T>(p, p.da, offsets[4], segment);
  row.h0 = p.h0.data == nullptr ? nullptr : static_cast<const Scalar*>(p.h0.data) + offsets[5];
  row.dh0 = p.dh0.data == nullptr ? nullptr : static_cast<Scalar*>(p.dh0.data) + offsets[6];
  row.channel = outer * p.inner + inner;
  return row;
}

template <class T>
__device__ __forceinline__ typename Numbers<T>::Scalar initial_state(const Row<T>& row, int64_t offset) {
  return row.h0 == nullptr ? typename Numbers<T>::Scalar{} : row.h0[offset];
}

// The state that enters a segment, `offset` elements of h0 and `lane` channels beside the row's first.
template <bool kBackward, class T>
__device__ __forceinline__ typename Numbers<T>::Scalar entering(const Params& q, const Row<T>& row,
                                                                int64_t slot, int lane, int64_t offset) {
  using Scalar = typename Numbers<T>::Scalar;
  if (q.composing) return Scalar{};
  if (q.chunk != 0) return static_cast<const Scalar*>(q.map_b)[slot * q.channels + row.channel + lane];
  return kBackward ? Scalar{} : initial_state(row, offset);
}

// What is left of a segment once it is visited.
template <class T, class Scalar>
__device__ __forceinline__ void leave(const Params& q, const Row<T>& row, const Segment& segment,
                                      int64_t slot, int lane, int64_t offset, Map<Scalar> total) {
  if (q.composing) {
    const int64_t place = slot * q.channels + row.channel + lane;
    static_cast<Scalar*>(q.map_a)[place] = total.a;
    static_cast<Scalar*>(q.map_b)[place] = total.b;
  } else if (row.dh0 != nullptr && segment.end == segment.steps) {
    row.dh0[offset] = total.b;
  }
}

}  // namespace
}  // namespace tilewright::scan
