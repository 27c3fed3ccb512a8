// The arithmetic of the parareal operators, written once for the CPU and the GPU.
//
//   d_j          = new_j - old_j
//
//   gram[i, j]   = d_i . d_j
//
//   boundary'[r] = fine[r] + (sum_j C[r, j] d_j)
//
// for the V = R + 1 vectors of a row: its registers, then the model's output.
//
// The second is SRDS, Alg. 1: x_i^p = F_i^p + (G x_{i-1}^p - G x_{i-1}^{p-1}), for a coarse solver
// G that is linear in [registers; model output]. Everything is fp32 and never fused; the sum runs
// over its columns in order. A coefficient of 0 skips its column and a difference of 0 its element,
// so that NaN there cannot spread, and equal inputs leave `fine` as it is, -0 included.
#pragma once

#include <cstdint>

#include "core/macros.h"
#include "sidestep/sidestep.h"

namespace sidestep {

constexpr int kMaxVectors = SIDESTEP_MAX_REGISTERS + 1;

SIDESTEP_HOST_DEVICE constexpr int gram_pairs(int num_vectors) {
  return num_vectors * (num_vectors + 1) / 2;
}

// V is float, or a vector of floats. Equal infinities differ by 0 too.
template <typename V>
SIDESTEP_HOST_DEVICE V difference(V now, V before) {
  return now != before ? now - before : V{};
}

// -0 + v is v for every v: what is left out adds -0, and so does a sum that is empty.
template <typename V>
SIDESTEP_HOST_DEVICE V next_correction(V sum, float c, V d) {
  return sum + (d != V{} ? c * d : -0.0f - V{});
}

// One register of boundary, on P consecutive elements V.
template <int C, typename V, int P>
SIDESTEP_HOST_DEVICE void correct(const float* coefficients,  // [C]
                                  const V (&d)[C][P], const V (&fine)[P], V (&corrected)[P]) {
  V sum[P];
  SIDESTEP_UNROLL
  for (int p = 0; p < P; ++p) sum[p] = -0.0f - V{};
  SIDESTEP_UNROLL
  for (int j = 0; j < C; ++j) {
    const float c = coefficients[j];
    if (c == 0.0f) continue;  // the same for all of a row
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) sum[p] = next_correction(sum[p], c, d[j][p]);
  }
  SIDESTEP_UNROLL
  for (int p = 0; p < P; ++p) corrected[p] = fine[p] + sum[p];
}

// Bit j: some register of boundary reads column j.
SIDESTEP_HOST_DEVICE uint32_t columns_corrected(const float* coefficients,  // [R, R+1]
                                                int num_registers) {
  uint32_t read = 0;
  for (int j = 0; j <= num_registers; ++j) {
    for (int r = 0; r < num_registers; ++r) {
      if (coefficients[r * (num_registers + 1) + j] != 0.0f) read |= 1u << j;
    }
  }
  return read;
}

}  // namespace sidestep
