// Which instruction set the CPU kernels use: the best this processor has, unless a test chooses.
#pragma once

#include "core/status.h"
#include "kernels/cpu/solver_step_chunk.h"

namespace sidestep {

const char* simd_name();            // "avx512", "avx2" or "scalar"
Status set_simd(const char* name);  // refuses what this processor or build lacks
StepChunk step_chunk_function();

}  // namespace sidestep
