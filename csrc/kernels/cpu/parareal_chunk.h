// What the instruction sets provide to the CPU launcher: the parareal operators on one chunk of one
// row.
#pragma once

#include <cstdint>

#include "kernels/parareal.h"
#include "sidestep/sidestep.h"

namespace sidestep {

// Over elements [begin, end) of the row. `sums`, zero before, takes the upper triangle of the gram
// matrix, row-major.
using GramChunk = void (*)(const sidestep_difference_gram_args& args, int64_t row, int64_t begin,
                           int64_t end, double* sums);  // [gram_pairs]

// sums[0] = sum (x' - x)^2, sums[1] = sum x'^2 of register 0, both zero before.
using CorrectChunk = void (*)(const sidestep_parareal_correct_args& args, int64_t row,
                              int64_t begin, int64_t end, double* sums);  // [2]

#define SIDESTEP_DECLARE_PARAREAL_CHUNKS(isa)                                                \
  namespace isa {                                                                            \
  void gram_chunk(const sidestep_difference_gram_args& args, int64_t row, int64_t begin,     \
                  int64_t end, double* sums);                                                \
  void correct_chunk(const sidestep_parareal_correct_args& args, int64_t row, int64_t begin, \
                     int64_t end, double* sums);                                             \
  }
SIDESTEP_DECLARE_PARAREAL_CHUNKS(scalar)
SIDESTEP_DECLARE_PARAREAL_CHUNKS(avx2)
SIDESTEP_DECLARE_PARAREAL_CHUNKS(avx512)
#undef SIDESTEP_DECLARE_PARAREAL_CHUNKS

}  // namespace sidestep
