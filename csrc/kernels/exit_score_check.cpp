// Checks every argument of the exit score before anything is touched.
#include <cinttypes>

#include "kernels/exit_score.h"
#include "kernels/ranges.h"

namespace sidestep {
namespace {

int64_t element_size(int32_t dtype) { return dtype == SIDESTEP_FLOAT32 ? 4 : 2; }

int64_t hidden_bytes(const ExitScoreArgs& a) {
  if (a.rows == 0 || a.tokens == 0) return 0;
  const int64_t last = (a.rows - 1) * a.row_stride + (a.tokens - 1) * a.token_stride;
  return (last + a.dim) * element_size(a.dtype);
}

}  // namespace

Status check_exit_score(const ExitScoreArgs& a) {
  if (a.dtype < SIDESTEP_FLOAT32 || a.dtype > SIDESTEP_BFLOAT16) {
    return invalid_argument("exit_score: hidden has dtype %d, expected a sidestep_dtype", a.dtype);
  }
  if (a.rows < 0 || a.tokens < 0 || a.dim < 1 || a.probes < 1) {
    return invalid_argument("exit_score: rows = %" PRId64 ", N = %" PRId64 ", D = %" PRId64
                            ", k = %" PRId64
                            ", expected rows and N not below 0 and D and k at least 1",
                            a.rows, a.tokens, a.dim, a.probes);
  }
  if (a.row_stride < 0 || a.token_stride < 0) {
    return invalid_argument("exit_score: hidden has strides [%" PRId64 ", %" PRId64
                            ", 1], expected none below 0",
                            a.row_stride, a.token_stride);
  }
  const int64_t scores = a.rows * a.probes * 4;
  const Range ranges[] = {
      {"score", a.score, scores, true, false},
      {"hidden", a.hidden, hidden_bytes(a), false, false},
      {"probe", a.probe, a.probes * a.dim * 4, false, false},
      {"bias", a.bias, scores, false, false},
  };
  return check_ranges("exit_score", ranges, 4);
}

int64_t exit_score_bytes(const ExitScoreArgs& a) {
  return a.rows * a.tokens * a.dim * element_size(a.dtype);
}

}  // namespace sidestep
