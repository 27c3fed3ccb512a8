// What the instruction sets provide to the CPU launcher: the fused step on one chunk of one row.
#pragma once

#include <cstdint>

#include "kernels/solver_step.h"
#include "sidestep/sidestep.h"

namespace sidestep {

// A chunk is the unit of threading; a block the elements that are summed in fp32 before float64
// takes over. Both are part of the definition of the stats' bits.
constexpr int64_t kChunk = 4096;
constexpr int64_t kBlock = 1024;

// sums[0] = sum |x' - x|, sums[1] = sum |E . columns| over elements [begin, end) of the row.
using StepChunk = void (*)(const sidestep_solver_step_args& args, const StepProgram& program,
                           int64_t row, int64_t slot, int64_t begin, int64_t end, double sums[2]);

#define SIDESTEP_DECLARE_STEP_CHUNK(isa)                                                          \
  namespace isa {                                                                                 \
  void step_chunk(const sidestep_solver_step_args& args, const StepProgram& program, int64_t row, \
                  int64_t slot, int64_t begin, int64_t end, double sums[2]);                      \
  }
SIDESTEP_DECLARE_STEP_CHUNK(scalar)
SIDESTEP_DECLARE_STEP_CHUNK(avx2)
SIDESTEP_DECLARE_STEP_CHUNK(avx512)
#undef SIDESTEP_DECLARE_STEP_CHUNK

}  // namespace sidestep
