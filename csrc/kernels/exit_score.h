// The exit score: how much a row's hidden state still says about what the remaining layers do.
//
//   z_nj     = rstd_n (w_j . (h_n - mu_n)) + bias_j      = w_j . LN(h_n) + bias_j
//
//   score_j  = mean_n f(z_nj)                            f: sigmoid, or nothing
//
// for the tokens h_n of a row and probes w_j (AdaDiff, the uncertainty estimation module). Time
// enters through the row's bias. LN is without affine; its scale is taken out of the inner product,
// so that LN(h) is never formed, and its mean is taken off before, so that a large mean costs no
// digits. A token is read from memory once, and after that from the nearest cache.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace sidestep {

struct ExitScoreArgs {
  const void* hidden;  // [rows, tokens, D] of dtype; a token's elements are adjacent
  const float* probe;  // [probes, D]
  const float* bias;   // [rows, probes]
  float* score;        // [rows, probes] written; 0 without tokens
  int64_t row_stride;  // of hidden, in elements
  int64_t token_stride;
  int64_t rows;
  int64_t tokens;
  int64_t dim;     // D
  int64_t probes;  // at least 1
  double eps;      // in rstd = 1 / sqrt(var + eps)
  int32_t dtype;   // a sidestep_dtype
  bool normalize;  // LN; otherwise mu = 0 and rstd = 1
  bool sigmoid;
};

Status check_exit_score(const ExitScoreArgs& args);
Status cpu_exit_score(const ExitScoreArgs& args);
int64_t exit_score_bytes(const ExitScoreArgs& args);  // that a call moves at most

}  // namespace sidestep
