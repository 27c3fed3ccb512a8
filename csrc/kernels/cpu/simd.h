// Which instruction set the CPU kernels use: the best this processor has, unless a test chooses.
#pragma once

#include "core/status.h"
#include "kernels/cpu/exit_score_chunk.h"
#include "kernels/cpu/parareal_chunk.h"
#include "kernels/cpu/solver_step_chunk.h"

namespace sidestep {

struct Simd {
  const char* name;  // "avx512", "avx2" or "scalar"
  StepChunk step_chunk;
  GramChunk gram_chunk;
  CorrectChunk correct_chunk;
  ScoreChunk score_chunk;
  bool (*present)();
};

const Simd& simd();                 // the one in use
Status set_simd(const char* name);  // refuses what this processor or build lacks

}  // namespace sidestep
