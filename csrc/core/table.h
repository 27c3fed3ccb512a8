// The layout of a plan's coefficient table, [K, W] fp32, shared by host and device.
//
// Row k, flat: (R+1) lines of (R+2) coefficients, then next_scale; W = (R+1)*(R+2) + 1.
//   columns     registers 0..R-1, the model output u, the noise z
//   line i < R  the new register i:  registers'[i] = sum_j line[i][j] * column[j]
//   line R      the error functional E of the embedded estimate
//   next_scale  the next model input is next_scale * registers'[0]
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "sidestep/sidestep.h"

namespace sidestep {

constexpr int kMaxRegisters = SIDESTEP_MAX_REGISTERS;
constexpr int kMaxBranches = SIDESTEP_MAX_BRANCHES;
constexpr int kMaxColumns = kMaxRegisters + 2;
constexpr int kMaxLines = kMaxRegisters + 1;

SIDESTEP_HOST_DEVICE constexpr int table_columns(int num_registers) { return num_registers + 2; }
SIDESTEP_HOST_DEVICE constexpr int table_lines(int num_registers) { return num_registers + 1; }
SIDESTEP_HOST_DEVICE constexpr int64_t table_width(int num_registers) {
  return int64_t{table_lines(num_registers)} * table_columns(num_registers) + 1;
}

}  // namespace sidestep
