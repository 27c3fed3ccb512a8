// The parareal operators on one chunk of one row, for one instruction set.
//
// Included by parareal_{scalar,avx2,avx512}.cpp, which define SIDESTEP_ISA (a namespace) and
// SIDESTEP_WIDTH (floats per vector). All instruction sets give the same bits: no fused
// multiply-add, and partial sums run over 16 lanes in a fixed order.
#pragma once

#include "kernels/cpu/lanes.h"
#include "kernels/cpu/parareal_chunk.h"
#include "kernels/cpu/solver_step_chunk.h"
#include "kernels/parareal.h"

namespace sidestep {
namespace SIDESTEP_ISA {
namespace {

// P vectors V of each column that is read; the others count as equal.
template <int C, typename V, int P>
SIDESTEP_HOST_DEVICE void read_differences(const float* now,     // [C, D], at the first element
                                           const float* before,  // [C, D], likewise
                                           int64_t dim, uint32_t read, V (&d)[C][P]) {
  constexpr int64_t kStride = sizeof(V) / sizeof(float);
  SIDESTEP_UNROLL
  for (int j = 0; j < C; ++j) {
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) {
      const int64_t at = j * dim + p * kStride;
      d[j][p] = (read >> j & 1u) != 0 ? difference(load<V>(now + at), load<V>(before + at)) : V{};
    }
  }
}

// sums[pair * stride + p] += d_i * d_j, over the upper triangle.
template <int C, typename V, int P>
SIDESTEP_HOST_DEVICE void gram_group(const float* now, const float* before, int64_t dim, V* sums,
                                     int stride) {
  V d[C][P];
  read_differences<C, V, P>(now, before, dim, ~0u, d);
  int pair = 0;
  SIDESTEP_UNROLL
  for (int i = 0; i < C; ++i) {
    SIDESTEP_UNROLL
    for (int j = i; j < C; ++j, ++pair) {
      SIDESTEP_UNROLL
      for (int p = 0; p < P; ++p) sums[pair * stride + p] += d[i][p] * d[j][p];
    }
  }
}

template <int C>
void gram_elements(const sidestep_difference_gram_args& args, int64_t row, int64_t begin,
                   int64_t end, double* sums) {
  constexpr int kPairs = gram_pairs(C);
  const float* now = args.new_vectors + row * C * args.dim;
  const float* before = args.old_vectors + row * C * args.dim;
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kBlock ? end : i + kBlock;
    Vec vectors[kPairs][kParts] = {};
    for (; i + kLanes <= stop; i += kLanes) {
      gram_group<C, Vec, kParts>(now + i, before + i, args.dim, vectors[0], kParts);
    }
    float lanes[kPairs][kLanes];
    __builtin_memcpy(lanes, vectors, sizeof(vectors));
    for (int lane = 0; i < stop; ++i, ++lane) {
      gram_group<C, float, 1>(now + i, before + i, args.dim, &lanes[0][lane], kLanes);
    }
    for (int pair = 0; pair < kPairs; ++pair) sums[pair] += lane_total(lanes[pair]);
  }
}

// One row's correction; every pointer at the row's first element.
struct Correction {
  float* boundary;            // [R, D]
  const float* fine;          // [R, D]
  const float* now;           // [R+1, D]
  const float* before;        // [R+1, D]
  const float* coefficients;  // [R, R+1]
  int64_t dim;
  uint32_t read;  // bit j: some register reads column j
};

// P vectors V from element `at` on; register 0 adds to the sums.
template <int R, typename V, int P>
SIDESTEP_HOST_DEVICE void correct_group(const Correction& row, int64_t at, V* change, V* size) {
  constexpr int64_t kStride = sizeof(V) / sizeof(float);
  V d[R + 1][P];
  read_differences<R + 1, V, P>(row.now + at, row.before + at, row.dim, row.read, d);
  SIDESTEP_UNROLL
  for (int r = 0; r < R; ++r) {
    V fine[P];
    V corrected[P];
    float* to = row.boundary + r * row.dim + at;
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) fine[p] = load<V>(row.fine + r * row.dim + at + p * kStride);
    correct<R + 1, V, P>(row.coefficients + r * (R + 1), d, fine, corrected);
    SIDESTEP_UNROLL
    for (int p = 0; p < P; ++p) {
      if (r == 0) {
        const V moved = corrected[p] - load<V>(to + p * kStride);
        change[p] += moved * moved;
        size[p] += corrected[p] * corrected[p];
      }
      store(to + p * kStride, corrected[p]);
    }
  }
}

template <int R>
void correct_elements(const sidestep_parareal_correct_args& args, int64_t row, int64_t begin,
                      int64_t end, double* sums) {
  const int64_t states = row * R * args.dim;
  const int64_t vectors = row * (R + 1) * args.dim;
  Correction correction{args.boundary + states,
                        args.fine + states,
                        args.new_vectors + vectors,
                        args.old_vectors + vectors,
                        args.coefficients + row * R * (R + 1),
                        args.dim,
                        0};
  correction.read = columns_corrected(correction.coefficients, R);
  for (int64_t i = begin; i < end;) {
    const int64_t stop = end - i < kBlock ? end : i + kBlock;
    Vec vectors[2][kParts] = {};
    for (; i + kLanes <= stop; i += kLanes) {
      correct_group<R, Vec, kParts>(correction, i, vectors[0], vectors[1]);
    }
    float lanes[2][kLanes];
    __builtin_memcpy(lanes, vectors, sizeof(vectors));
    for (int lane = 0; i < stop; ++i, ++lane) {
      correct_group<R, float, 1>(correction, i, &lanes[0][lane], &lanes[1][lane]);
    }
    for (int s = 0; s < 2; ++s) sums[s] += lane_total(lanes[s]);
  }
}

}  // namespace

void gram_chunk(const sidestep_difference_gram_args& args, int64_t row, int64_t begin, int64_t end,
                double* sums) {
  constexpr GramChunk kElements[] = {gram_elements<1>, gram_elements<2>, gram_elements<3>,
                                     gram_elements<4>, gram_elements<5>, gram_elements<6>,
                                     gram_elements<7>};
  kElements[args.num_vectors - 1](args, row, begin, end, sums);
}

void correct_chunk(const sidestep_parareal_correct_args& args, int64_t row, int64_t begin,
                   int64_t end, double* sums) {
  constexpr CorrectChunk kElements[] = {correct_elements<1>, correct_elements<2>,
                                        correct_elements<3>, correct_elements<4>,
                                        correct_elements<5>, correct_elements<6>};
  kElements[args.num_registers - 1](args, row, begin, end, sums);
}

}  // namespace SIDESTEP_ISA
}  // namespace sidestep
