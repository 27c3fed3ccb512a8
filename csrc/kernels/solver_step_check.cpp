// Checks every argument of the fused step before anything is touched.
#include <algorithm>
#include <cinttypes>
#include <vector>

#include "core/table.h"
#include "kernels/launch.h"
#include "kernels/ranges.h"

namespace sidestep {
namespace {

int64_t element_size(int32_t dtype) { return dtype == SIDESTEP_FLOAT32 ? 4 : 2; }

Status check_sizes(const sidestep_solver_step_args& a) {
  if (a.num_registers < 1 || a.num_registers > kMaxRegisters) {
    return invalid_argument("solver_step: registers has R = %d, expected 1 to %d", a.num_registers,
                            kMaxRegisters);
  }
  if (a.num_branches < 1 || a.num_branches > kMaxBranches) {
    return invalid_argument("solver_step: outputs has %d branches, expected 1 to %d",
                            a.num_branches, kMaxBranches);
  }
  if (a.dtype < SIDESTEP_FLOAT32 || a.dtype > SIDESTEP_BFLOAT16) {
    return invalid_argument(
        "solver_step: dtype is %d, expected 0 (float32), 1 (float16) or 2 (bfloat16)", a.dtype);
  }
  if (a.slots < 0 || a.dim < 0 || a.rows < 0) {
    return invalid_argument("solver_step: slots = %" PRId64 ", D = %" PRId64 ", rows = %" PRId64
                            ", expected none below 0",
                            a.slots, a.dim, a.rows);
  }
  if (a.steps < 1) {
    return invalid_argument("solver_step: table has %" PRId64 " rows, expected at least 1",
                            a.steps);
  }
  if (a.rows > a.slots) {
    return invalid_argument("solver_step: registers has %" PRId64
                            " slots, expected at least the %" PRId64 " rows",
                            a.slots, a.rows);
  }
  return Status();
}

}  // namespace

Status check_solver_step(const sidestep_solver_step_args& a) {
  const Status sizes = check_sizes(a);
  if (!sizes.ok()) return sizes;
  const int64_t element = element_size(a.dtype);
  const int64_t row_bytes = a.rows * a.dim;
  const Range ranges[] = {
      {"registers", a.registers, a.slots * a.num_registers * a.dim * 4, true, false},
      {"model_input", a.model_input, a.num_branches * row_bytes * element, true, true},
      {"stats", a.stats, a.rows * 2 * 4, true, false},
      {"weights", a.weights, a.rows * a.num_branches * 4, false, false},
      {"noise", a.noise, row_bytes * 4, false, true},
      {"table", a.table, a.steps * table_width(a.num_registers) * 4, false, false},
      {"step", a.step, a.rows * 8, false, false},
      {"slot", a.slot, a.rows * 8, false, true},
      {"outputs[0]", a.outputs[0], row_bytes * element, false, false},
      {"outputs[1]", a.outputs[1], row_bytes * element, false, false},
      {"outputs[2]", a.outputs[2], row_bytes * element, false, false},
  };
  return check_ranges("solver_step", ranges, 8 + a.num_branches);
}

Status check_rows(const sidestep_solver_step_args& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.step[row] < 0 || a.step[row] >= a.steps) {
      return invalid_argument("solver_step: step[%" PRId64 "] is %" PRId64
                              ", expected 0 <= step < %" PRId64,
                              row, a.step[row], a.steps);
    }
  }
  if (a.slot == nullptr) return Status();
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.slot[row] < 0 || a.slot[row] >= a.slots) {
      return invalid_argument("solver_step: slot[%" PRId64 "] is %" PRId64
                              ", expected 0 <= slot < %" PRId64,
                              row, a.slot[row], a.slots);
    }
  }
  // Grows once and stays: a step allocates nothing.
  thread_local std::vector<int64_t> sorted;
  sorted.assign(a.slot, a.slot + a.rows);
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    return invalid_argument("solver_step: slot holds %" PRId64 " twice, expected one row per slot",
                            *twice);
  }
  return Status();
}

int64_t solver_step_bytes(const sidestep_solver_step_args& a) {
  const int64_t branches = (a.model_input != nullptr ? 2 : 1) * a.num_branches;
  const int64_t per_element =
      4 * (2 * a.num_registers + (a.noise != nullptr ? 1 : 0)) + branches * element_size(a.dtype);
  return a.rows * a.dim * per_element;
}

int64_t cuda_solver_step_workspace(int64_t rows, int64_t dim) {
  return kCudaWorkspaceHeader + rows * cuda_chunks(dim) * 2 * 4;
}

}  // namespace sidestep
