// Coefficients of one tensor's update and the random bits of stochastic rounding: scalar functions that CPU
// and GPU share to the letter. A .cu file defines both macros before it includes this.
#pragma once

#include <cmath>

#include "core/philox.h"
#include "optim/update.h"

namespace tilewright::optim {

// torch.nn.utils.clip_grad_norm_'s factor for a total norm.
TW_HOST_DEVICE static inline double clip_factor(double norm, double max_norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1.0 ? 1.0 : factor;  // a NaN norm stays one
}

// `step` counts this one. `squared` is the sum of squares of all gradients as they come, scaled or not.
TW_HOST_DEVICE static inline Coefficients coefficients(Algorithm algorithm, const Group& group, int32_t id,
                                                       int64_t step, const StepParams& params,
                                                       double squared) {
  const double lr = group.device_lr != nullptr ? double(*group.device_lr) : group.lr;
  double scale = params.grad_scale != nullptr ? 1.0 / double(*params.grad_scale) : 1.0;
  if (params.max_grad_norm >= 0) scale *= clip_factor(sqrt(squared) * scale, params.max_grad_norm);
  const bool first_momentum =
      algorithm == Algorithm::kSgd && step == 1;  // torch starts from the gradient itself
  Coefficients c{};
  c.grad_scale = float(group.maximize ? -scale : scale);
  c.l2 = group.decoupled ? 0.0f : float(group.weight_decay);
  c.decay = group.decoupled ? float(1.0 - lr * group.weight_decay) : 1.0f;
  c.beta1 = first_momentum ? 0.0f : float(group.beta1);
  c.one_minus_beta1 = algorithm == Algorithm::kSgd ? (first_momentum ? 1.0f : float(1.0 - group.dampening))
                                                   : float(1.0 - group.beta1);
  c.beta2 = float(group.beta2);
  c.one_minus_beta2 = float(1.0 - group.beta2);
  c.step_size = float(lr);
  c.inverse_correction2 = 1.0f;
  if (algorithm == Algorithm::kAdam) {
    c.step_size = float(lr / (1.0 - pow(group.beta1, double(step))));
    c.inverse_correction2 = float(1.0 / sqrt(1.0 - pow(group.beta2, double(step))));
  }
  c.eps = float(group.eps);
  c.momentum_weight = group.nesterov ? float(group.beta1) : 1.0f;
  c.grad_weight = group.nesterov ? 1.0f : 0.0f;
  c.stochastic = group.stochastic;
  c.seed[0] = uint32_t(params.seed);
  c.seed[1] = uint32_t(params.seed >> 32);
  c.step = uint32_t(step);
  c.id = id;
  return c;
}

// 128 random bits for elements 8 * octet .. 8 * octet + 7 of a parameter: 16 each, lower half-words first.
TW_HOST_DEVICE static inline PhiloxWords random_octet(const Coefficients& c, int64_t octet) {
  return philox(uint32_t(octet), uint32_t(uint64_t(octet) >> 32), c.step, uint32_t(c.id), c.seed[0],
                c.seed[1]);
}

}  // namespace tilewright::optim
