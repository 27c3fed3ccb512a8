// The CPU launcher of the exit score: checks, tokens over threads, sums in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/cpu/simd.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

struct Work {
  const ExitScoreArgs* args;
  ScoreChunk score_chunk;
  int64_t chunks;  // of a row
  double* sums;    // [rows, chunks, probes], zero before
};

// Pieces [begin, end) of the rows x chunks grid, row-major.
void run_pieces(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t first = piece % work.chunks * kScoreTokens;
    work.score_chunk(*work.args, piece / work.chunks, first,
                     std::min(first + kScoreTokens, work.args->tokens),
                     work.sums + piece * work.args->probes);
  }
}

}  // namespace

void add_scores(const float* logits, int count, bool sigmoid, double* sums) {
  for (int j = 0; j < count; ++j) {
    sums[j] += sigmoid ? 1.0f / (1.0f + std::exp(-logits[j])) : logits[j];
  }
}

Status cpu_exit_score(const ExitScoreArgs& args) {
  const Status status = check_exit_score(args);
  if (!status.ok()) return status;
  if (args.tokens == 0) {
    std::fill_n(args.score, args.rows * args.probes, 0.0f);
    return Status();
  }
  thread_local std::vector<double> sums;  // grows once and stays: a call allocates nothing
  const int64_t chunks = (args.tokens + kScoreTokens - 1) / kScoreTokens;
  const int64_t pieces = args.rows * chunks;
  sums.assign(pieces * args.probes, 0.0);
  Work work{&args, simd().score_chunk, chunks, sums.data()};
  const int threads = exit_score_bytes(args) < kParallelBytes ? 1 : num_threads();
  const int64_t grain = std::max<int64_t>(1, pieces / (int64_t{16} * threads));
  ThreadPool::instance().parallel_for(pieces, grain, threads, run_pieces, &work);
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t j = 0; j < args.probes; ++j) {
      double total = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += sums[(row * chunks + chunk) * args.probes + j];
      }
      args.score[row * args.probes + j] =
          static_cast<float>(total / static_cast<double>(args.tokens));
    }
  }
  return Status();
}

}  // namespace sidestep
