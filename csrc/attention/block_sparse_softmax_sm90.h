// From scores to powers, as a warpgroup of the Hopper kernel has them in its registers: 64 queries, 128 keys.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention/block_sparse_tiles_sm90.h"
#include "device/half.h"
#include "device/math.h"
#include "device/memory.h"
#include "device/warp.h"
#include "device/wgmma.h"

namespace tilewright::attention::sm90 {

// Scores are multiples of `unit` as powers of two. Where the scale is not positive, or with softcap, they are
// brought to that first: by `factor`, or to cap * tanh(s * slope * ln 2 / 2).
struct ScoreScale {
  float unit, factor, cap, slope;
};

// Of the two rows of a thread: the greatest score and the sum of the powers so far, and by what the last step
// scaled.
struct Rows {
  float max[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};
  float scale[2];
};

constexpr int kScores = kKeys / 2;  // a thread's share of a tile
constexpr int kSteps = kKeys / device::kWgmmaDepth;

using Scores = float[kScores];
using Powers = uint32_t[kSteps][4];

// This thread's share of what its two rows see: a word of 32 keys of each, by its number in the quad.
__device__ __forceinline__ void visible_words(const BlockSparseParams& p, const KeyTile& tile, int group,
                                              int32_t row, uint32_t (&words)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t at = device::min(row + 8 * i, int32_t(p.q_len) - 1);
    words[i] = visible_word(p, tile, group, at, device::lane_id() % 4 * 32);
  }
}

__device__ __forceinline__ void mask_scores(Scores& s, const uint32_t (&words)[2]) {
  const int lane = device::lane_id();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t word = device::shfl(words[i], lane / 4 * 4 + w) >> lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if ((word >> (8 * j + c) & 1u) == 0) s[16 * w + 4 * j + 2 * i + c] = -INFINITY;
        }
      }
    }
  }
}

__device__ __forceinline__ void transform_scores(const ScoreScale& p, Scores& s) {
  if (p.cap == 0.0f) {
#pragma unroll
    for (float& x : s) x *= p.factor;
    return;
  }
  // tanh y = 1 - 2 / (exp 2y + 1)
#pragma unroll
  for (float& x : s) {
    x = p.cap - 2.0f * p.cap * device::rcp_approx(device::exp2_approx(x * p.slope) + 1.0f);
  }
}

// Turns scores into powers, and notes by what sums over the keys before have to be scaled.
__device__ __forceinline__ void softmax(const ScoreScale& p, Scores& s, bool masked,
                                        const uint32_t (&words)[2], Rows& rows) {
  if (p.unit == 1.0f) transform_scores(p, s);
  if (masked) mask_scores(s, words);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float max = rows.max[i];
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j)
      max = device::max(max, device::max(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
    max = device::max(max, device::shfl_xor(max, 1));
    max = device::max(max, device::shfl_xor(max, 2));
    const float base = max == -INFINITY ? 0.0f : max * p.unit;
    rows.scale[i] = device::exp2_approx(device::fma_rn(rows.max[i], p.unit, -base));
    rows.max[i] = max;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kScores / 4; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[4 * j + 2 * i + c];
        x = device::exp2_approx(device::fma_rn(x, p.unit, -base));
        sum += x;
      }
    }
    // Not once at the end: the compiler moves arithmetic behind the wait for products that follows, but not
    // the shuffles, so what they need is done beside the products.
    sum += device::shfl_xor(sum, 1);
    sum += device::shfl_xor(sum, 2);
    rows.sum[i] = device::fma_rn(rows.sum[i], rows.scale[i], sum);
  }
}

template <int kCount>
__device__ __forceinline__ void scale_rows(float (&o)[kCount], const Rows& rows) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= rows.scale[i / 2 % 2];
}

template <class T>
__device__ __forceinline__ void narrow(Powers& powers, const Scores& s) {
#pragma unroll
  for (int i = 0; i < kScores / 2; ++i) {
    const auto pair = device::from_float2<T>(device::Vector<float, 2>{s[2 * i], s[2 * i + 1]});
    memcpy(&powers[i / 4][i % 4], &pair, sizeof pair);
  }
}

}  // namespace tilewright::attention::sm90
