// One optimizer step over any number of tensors, with 8-bit blockwise or fp32 states.
//
// A step is at most three passes, each a single sweep over everything: the gradient norm (only when
// clipping), the coefficients (one small computation per tensor: bias corrections, clip factor, step count),
// the update. Work is cut into tiles: a tile is one quantization block, or kPlainTile elements of a tensor
// with fp32 states.
#pragma once

#include <cstdint>

#include "core/isa.h"
#include "core/stream.h"
#include "core/tensor.h"

namespace tilewright::optim {

enum class Algorithm : int32_t { kAdam, kLion, kSgd };

constexpr int32_t kUsualBlock = 256;
constexpr int32_t kPlainTile = kUsualBlock;  // elements
constexpr int64_t kTilesPerChunk = 64;  // of the CPU sweeps; fixed, so that sums do not depend on the threads

// Hyperparameters of one parameter group for one step.
struct Group {
  double lr;
  const float* device_lr;  // read instead of lr when not null
  double beta1;            // momentum for SGD
  double beta2;
  double eps;
  double weight_decay;
  double dampening;  // SGD
  bool decoupled;  // weight decay shrinks the parameter itself (AdamW, Lion) instead of entering the gradient
  bool nesterov;   // SGD
  bool maximize;
  bool stochastic;  // round 16-bit parameters stochastically
};

// One parameter tensor. Strides do not appear: parameter, gradient and states share one dense layout.
struct alignas(16) Row {
  void* param;     // [numel] of dtype, updated in place
  void* state1;    // [numel] uint8 codes, or float32 if absmax1 is null
  void* state2;    // likewise; null for one-state algorithms
  float* absmax1;  // [ceil(numel / block_size)]
  float* absmax2;
  const float* map1;  // [256] a map other than the built-in signed one, else null
  const float* map2;  // [256] a map other than the built-in unsigned one, else null
  int64_t* step;      // [1] steps taken so far, advanced by the coefficients pass
  int64_t numel;
  int64_t first_tile;  // tiles of all rows before this one
  int32_t block_size;  // elements of a tile
  DType dtype;         // of parameter and gradient
  int32_t group;
  int32_t id;       // the parameter's number in its optimizer, the same in every step
  int32_t general;  // 8-bit states with a map or a block size other than the usual ones
  uint32_t num_tiles;
  int32_t unused[2];
};

// What the update of one row needs, in the precision it computes in.
struct alignas(16) Coefficients {
  float grad_scale;  // unscaling, clipping and the sign of maximize
  float l2;          // weight decay added to the gradient
  float decay;       // factor of the parameter
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float step_size;
  float inverse_correction2;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float momentum_weight, grad_weight;  // SGD: the step is momentum_weight * state + grad_weight * gradient
  int32_t skip;                        // found_inf: leave everything as it is
  int32_t stochastic;
  uint32_t seed[2];
  uint32_t step;
  int32_t id;  // the row's
};

// Scalars of a step that concern all rows.
struct StepParams {
  const float* grad_scale;  // [1] null, or what the gradients were multiplied with
  const float* found_inf;   // [1] null, or nonzero to skip the step
  double max_grad_norm;     // negative: no clipping
  uint64_t seed;
};

struct UpdateParams {
  const Row* rows;           // [num_rows]
  const void* const* grads;  // [num_rows]
  int64_t num_rows;
  int64_t num_tiles;
  Coefficients* coefficients;  // [num_rows]
  Algorithm algorithm;
};

// Sum of squares of all gradients, the same bits for any number of threads.
double squared_norm(const UpdateParams&, int threads);

// A step on the CPU.
void step_cpu(const UpdateParams&, const Group* groups, const StepParams&, int threads);

// A step on the GPU. `rows` is host memory; workspace is device memory of workspace_bytes(num_rows). The
// table of rows travels to the device only when `upload` says that it differs from what the workspace holds;
// it and the gradients' addresses travel as kernel parameters, so fresh gradients cost neither a copy nor an
// allocation, and a captured step needs no host memory when it is replayed.
constexpr int64_t kMaxPartials = 4096;  // of the gradient norm
static inline int64_t workspace_bytes(int64_t num_rows) {
  return kMaxPartials * int64_t(sizeof(double)) + num_rows * int64_t(sizeof(Row) + sizeof(Coefficients));
}
void step_cuda(const UpdateParams&, const Group* groups, int64_t num_groups, const StepParams&,
               void* workspace, bool upload, int device, Stream);

}  // namespace tilewright::optim

namespace tilewright {
TW_DECLARE_CPU(void, update_cpu, (const optim::UpdateParams&, int threads))
TW_DECLARE_CPU(double, squared_norm_cpu, (const optim::UpdateParams&, int64_t chunk))
}  // namespace tilewright
