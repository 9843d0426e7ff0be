// Attention; each op has a file of its own beside this one.
#include "bindings/families.h"

namespace tilewright {

void bind_attention(pybind11::module_& m) {
  bind_block_mask(m);
  bind_block_sparse(m);
  bind_select_blocks(m);
}

}  // namespace tilewright
