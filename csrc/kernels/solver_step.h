// The arithmetic of the fused step, written once for the CPU and the GPU.
//
//   u           = sum_g w[g] * o[g]                        guidance, branches in order
//   registers'  = M_k . [registers; u; z]                  the plan's step k (docs/plans.md)
//   change      = mean |x' - x|                            x = registers[0]
//   error       = mean |E_k . [registers; u; z]|
//   model_input = cast(x' * next_scale)                    once per branch
//
// Everything is fp32, one multiplication and one addition per term, never fused. A sum runs over
// its live terms in column order; a zero coefficient's column is skipped, not multiplied, so that
// NaN in a register the step does not use cannot spread. A sum without live terms is 0.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "core/table.h"
#include "sidestep/sidestep.h"

namespace sidestep {

// One row's step: line k of the table with the decisions that hold for all of the row's elements.
struct StepProgram {
  float coefficient[kMaxLines][kMaxColumns];
  float next_scale;
  uint32_t live[kMaxLines];  // bit j: column j takes part in the line
};

// What a sum starts from. -0 + v is v for every v, +0 and -0 included, so a sum of live terms
// begins with its first product exactly.
SIDESTEP_HOST_DEVICE float sum_start(bool any_live) { return any_live ? -0.0f : 0.0f; }

// V is float, or a vector of floats.
template <typename V>
SIDESTEP_HOST_DEVICE V next_term(V sum, float c, V v) {
  return sum + c * v;
}

// Copies line `line` of one table row, and finds its live columns. Without noise z counts as 0.
SIDESTEP_HOST_DEVICE void read_line(const float* table_row,  // [W]
                                    int num_registers, bool has_noise, int line,
                                    StepProgram* program) {
  const int columns = table_columns(num_registers);
  uint32_t live = 0;
  for (int j = 0; j < columns; ++j) {
    const float c = table_row[line * columns + j];
    program->coefficient[line][j] = c;
    if (c != 0.0f && (has_noise || j <= num_registers)) live |= 1u << j;
  }
  program->live[line] = live;
}

SIDESTEP_HOST_DEVICE float read_next_scale(const float* table_row, int num_registers) {
  return table_row[table_lines(num_registers) * table_columns(num_registers)];
}

// A register whose line is the unit vector e_i stays as it is and is not written.
SIDESTEP_HOST_DEVICE bool keeps_register(const StepProgram& program, int i) {
  return program.live[i] == 1u << i && program.coefficient[i][i] == 1.0f;
}

// Columns that some line reads, kept registers aside; x is always read, for the change.
SIDESTEP_HOST_DEVICE uint32_t columns_read(const StepProgram& program, int num_registers) {
  uint32_t read = 1u;
  for (int i = 0; i <= num_registers; ++i) {
    if (i == num_registers || !keeps_register(program, i)) read |= program.live[i];
  }
  return read;
}

// u = sum_g w[g] * o[g], one branch at a time: u starts from sum_start, branches of weight 0 are
// skipped.
template <typename V, int P>
SIDESTEP_HOST_DEVICE void add_branch(float weight,
                                     const V (&output)[P],  // [P] consecutive elements
                                     V (&u)[P]) {
  SIDESTEP_UNROLL
  for (int p = 0; p < P; ++p) u[p] = next_term(u[p], weight, output[p]);
}

// The step on P consecutive elements V, once all their columns are read. Which terms are live is
// the same for all of a row, so every branch here is uniform.
//
// The sink takes the results: write(i, sum) stores registers'[i], input(scaled) the next model
// input before its cast, change(p, x' - x) and error(p, E . columns) add the absolute value to the
// stats.
template <int R, typename V, int P, typename Sink>
SIDESTEP_HOST_DEVICE void step_columns(const StepProgram& program,
                                       const V (&column)[R + 2][P],  // registers, u, z
                                       Sink& sink) {
  SIDESTEP_UNROLL
  for (int line = 0; line < R + 1; ++line) {
    const bool kept = line < R && keeps_register(program, line);
    const bool empty_error = line == R && program.live[line] == 0;
    if ((kept && line > 0) || empty_error) continue;
    V sum[P];
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) sum[p] = sum_start(program.live[line] != 0) - V{};
    SIDESTEP_UNROLL
    for (int j = 0; j < R + 2; ++j) {
      if ((program.live[line] >> j & 1u) == 0) continue;
      SIDESTEP_UNROLL
      for (int p = 0; p < P; ++p) {
        sum[p] = next_term(sum[p], program.coefficient[line][j], column[j][p]);
      }
    }
    if (line == R) {
      SIDESTEP_UNROLL
      for (int p = 0; p < P; ++p) sink.error(p, sum[p]);
    } else if (!kept) {
      sink.write(line, sum);
    }
    if (line == 0) {
      V scaled[P];
      SIDESTEP_UNROLL
      for (int p = 0; p < P; ++p) {
        sink.change(p, sum[p] - column[0][p]);
        scaled[p] = sum[p] * program.next_scale;
      }
      sink.input(scaled);
    }
  }
}

}  // namespace sidestep
