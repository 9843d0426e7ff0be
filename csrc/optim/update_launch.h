// What travels to the optimizers' CUDA kernels as parameters, and where things are in the workspace.
#pragma once

#include "device/launch.h"
#include "optim/coefficients.h"
#include "optim/update.h"

namespace tilewright::optim {

constexpr int kMaxGrads = 3840;  // rows a launch: their gradients' addresses are kernel parameters
constexpr int kMaxGroups = 384;  // parameter groups a launch of the coefficients kernel

// Rows first_row .. first_row + num_rows of the table.
struct Slice {
  const Row* rows;
  Coefficients* coefficients;
  double* partials;
  int64_t num_tiles;
  uint32_t num_rows;
  int32_t coded;    // some row has 8-bit states
  int32_t general;  // some row is of the general kind
  const void* grads[kMaxGrads];
};
static_assert(sizeof(Slice) <= device::kMaxParamsBytes);

constexpr int kMaxRows = 288;  // rows a launch of the upload kernel

// The table travels as kernel parameters: a captured graph holds a copy of those, where it would hold only
// the address of memory that is copied from.
struct Upload {
  Row* destination;
  int32_t num_rows;
  Row rows[kMaxRows];
};
static_assert(sizeof(Upload) <= device::kMaxParamsBytes);

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
    const int64_t end_tile = last < p.num_rows ? p.rows[last].first_tile : p.num_tiles;
    slice.num_tiles = end_tile - p.rows[first].first_tile;
    slice.num_rows = uint32_t(last - first);
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

}  // namespace tilewright::optim
