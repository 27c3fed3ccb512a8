// The exit score over some tokens of one row, for one instruction set.
//
// Included by exit_score_{scalar,avx2,avx512}.cpp, which define SIDESTEP_ISA (a namespace) and
// SIDESTEP_WIDTH (floats per vector). All instruction sets give the same bits: no fused
// multiply-add, and partial sums run over 16 lanes in a fixed order.
#pragma once

#include "kernels/cpu/exit_score_chunk.h"
#include "kernels/cpu/halves.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/solver_step_chunk.h"

namespace sidestep {
namespace SIDESTEP_ISA {
namespace {

struct Token {
  const char* elements;  // [D] of dtype
  int64_t dim;
  int32_t dtype;
};

// What is summed over a token's elements: term(j, i, h) is term j of element i, which is h.
struct Elements {
  template <typename V>
  SIDESTEP_HOST_DEVICE V term(int, int64_t, V h) const {
    return h;
  }
};

struct Squares {
  float mean;
  template <typename V>
  SIDESTEP_HOST_DEVICE V term(int, int64_t, V h) const {
    return (h - mean) * (h - mean);
  }
};

struct Products {
  const float* probe;  // [K, D]
  int64_t dim;
  float mean;
  template <typename V>
  SIDESTEP_HOST_DEVICE V term(int j, int64_t i, V h) const {
    return load<V>(probe + j * dim + i) * (h - mean);
  }
};

// sums[j] = sum_i term(j, i, h_i): fp32 within a block, float64 over the blocks.
template <int K, typename Terms>
SIDESTEP_HOST_DEVICE void sum_token(const Token& token, const Terms& terms, double (&sums)[K]) {
  for (int j = 0; j < K; ++j) sums[j] = 0.0;
  for (int64_t i = 0; i < token.dim;) {
    const int64_t stop = token.dim - i < kBlock ? token.dim : i + kBlock;
    Vec vectors[K][kParts] = {};
    for (; i + kLanes <= stop; i += kLanes) {
      Vec h[kParts];
      read_output(token.dtype, token.elements, i, h);
      SIDESTEP_UNROLL
      for (int j = 0; j < K; ++j) {
        SIDESTEP_UNROLL
        for (int p = 0; p < kParts; ++p) vectors[j][p] += terms.term(j, i + p * kWidth, h[p]);
      }
    }
    float lanes[K][kLanes];
    __builtin_memcpy(lanes, vectors, sizeof(vectors));
    for (int lane = 0; i < stop; ++i, ++lane) {
      float h[1];
      read_output(token.dtype, token.elements, i, h);
      for (int j = 0; j < K; ++j) lanes[j][lane] += terms.term(j, i, h[0]);
    }
    for (int j = 0; j < K; ++j) sums[j] += lane_total(lanes[j]);
  }
}

// The scores of K probes from `first` on.
template <int K>
void score_probes(const ExitScoreArgs& args, const Token& token, int64_t row, int64_t first,
                  float mean, double rstd, double* sums) {
  double dots[K];
  sum_token<K>(token, Products{args.probe + first * args.dim, args.dim, mean}, dots);
  const float* bias = args.bias + row * args.probes + first;
  float logits[K];
  for (int j = 0; j < K; ++j) logits[j] = static_cast<float>(rstd * dots[j]) + bias[j];
  add_scores(logits, K, args.sigmoid, sums + first);
}

void score_token(const ExitScoreArgs& args, const Token& token, int64_t row, double* sums) {
  const auto dim = static_cast<double>(token.dim);
  float mean = 0.0f;
  double rstd = 1.0;
  if (args.normalize) {
    double total[1];
    sum_token<1>(token, Elements{}, total);
    mean = static_cast<float>(total[0] / dim);
    sum_token<1>(token, Squares{mean}, total);
    rstd = 1.0 / __builtin_sqrt(total[0] / dim + args.eps);
  }
  using Probes =
      void (*)(const ExitScoreArgs&, const Token&, int64_t, int64_t, float, double, double*);
  constexpr Probes kProbes[] = {score_probes<1>, score_probes<2>, score_probes<3>, score_probes<4>};
  for (int64_t first = 0; first < args.probes; first += 4) {
    const int64_t left = args.probes - first;
    kProbes[(left < 4 ? left : 4) - 1](args, token, row, first, mean, rstd, sums);
  }
}

}  // namespace

void score_chunk(const ExitScoreArgs& args, int64_t row, int64_t begin, int64_t end, double* sums) {
  const int64_t size = args.dtype == SIDESTEP_FLOAT32 ? 4 : 2;
  const char* hidden = static_cast<const char*>(args.hidden);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t at = row * args.row_stride + n * args.token_stride;
    score_token(args, Token{hidden + at * size, args.dim, args.dtype}, row, sums);
  }
}

}  // namespace SIDESTEP_ISA
}  // namespace sidestep
