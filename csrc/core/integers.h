// Arithmetic of counts and positions, for host and device. (Not std::min and the like: CPU kernels leave no
// symbol that another level's code could be linked to.)
#pragma once

#include <cstdint>

namespace tilewright {

static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace tilewright
