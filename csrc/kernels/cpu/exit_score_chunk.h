// What the instruction sets provide to the CPU launcher: the exit score over some tokens of one
// row.
#pragma once

#include <cstdint>

#include "kernels/exit_score.h"

namespace sidestep {

// The tokens whose sum is the unit of threading, and so part of the definition of the score's bits.
constexpr int64_t kScoreTokens = 64;

// sums[j] += sum_n f(z_nj) over tokens [begin, end) of the row.
using ScoreChunk = void (*)(const ExitScoreArgs& args, int64_t row, int64_t begin, int64_t end,
                            double* sums);  // [probes]

// sums[j] += f(logits[j]). Not in the instruction sets' files: what libm inlines is the linker's.
void add_scores(const float* logits, int count, bool sigmoid, double* sums);

#define SIDESTEP_DECLARE_SCORE_CHUNK(isa)                                              \
  namespace isa {                                                                      \
  void score_chunk(const ExitScoreArgs& args, int64_t row, int64_t begin, int64_t end, \
                   double* sums);                                                      \
  }
SIDESTEP_DECLARE_SCORE_CHUNK(scalar)
SIDESTEP_DECLARE_SCORE_CHUNK(avx2)
SIDESTEP_DECLARE_SCORE_CHUNK(avx512)
#undef SIDESTEP_DECLARE_SCORE_CHUNK

}  // namespace sidestep
