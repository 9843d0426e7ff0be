// Pruning; each group of ops has a file of its own beside this one.
#include "bindings/families.h"

namespace tilewright {

void bind_prune(pybind11::module_& m) {
  bind_activation_sparse(m);
  bind_block_sparse_linear(m);
  bind_prune_masks(m);
  bind_prune_obs(m);
  bind_semi_structured(m);
}

}  // namespace tilewright
