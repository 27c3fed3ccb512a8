// The CPU launchers of the parareal operators: checks, chunks over threads, sums in order.
#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/cpu/simd.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

template <typename Args>
struct Work {
  const Args* args;
  void (*chunk)(const Args& args, int64_t row, int64_t begin, int64_t end, double* sums);
  int64_t chunks;  // of a row
  int count;       // sums of a chunk
  double* sums;    // [rows, chunks, count]
};

// Pieces [begin, end) of the rows x chunks grid, row-major.
template <typename Args>
void run_pieces(void* context, int64_t begin, int64_t end) {
  const Work<Args>& work = *static_cast<const Work<Args>*>(context);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t first = (piece % work.chunks) * kChunk;
    work.chunk(*work.args, piece / work.chunks, first, std::min(first + kChunk, work.args->dim),
               work.sums + piece * work.count);
  }
}

// Runs the chunks of every row, and adds up each row's sums in order.
template <typename Args>
const double* sum_rows(const Args& args, decltype(Work<Args>::chunk) chunk, int count,
                       int64_t bytes) {  // [rows, count], valid until the thread's next call
  // Scratch grows once and stays: a call allocates nothing.
  thread_local std::vector<double> sums;
  thread_local std::vector<double> totals;
  const int64_t chunks = (args.dim + kChunk - 1) / kChunk;
  const int64_t pieces = args.rows * chunks;
  sums.assign(pieces * count, 0.0);
  totals.assign(args.rows * count, 0.0);
  Work<Args> work{&args, chunk, chunks, count, sums.data()};
  if (bytes < kParallelBytes) {
    run_pieces<Args>(&work, 0, pieces);
  } else {
    const int threads = num_threads();
    const int64_t grain = std::max<int64_t>(1, pieces / (int64_t{16} * threads));
    ThreadPool::instance().parallel_for(pieces, grain, threads, run_pieces<Args>, &work);
  }
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int s = 0; s < count; ++s) {
      totals[piece / chunks * count + s] += sums[piece * count + s];
    }
  }
  return totals.data();
}

}  // namespace

Status cpu_difference_gram(const sidestep_difference_gram_args& args) {
  const Status status = check_difference_gram(args);
  if (!status.ok()) return status;
  const int columns = args.num_vectors;
  const double* total =
      sum_rows(args, simd().gram_chunk, gram_pairs(columns), difference_gram_bytes(args));
  for (int64_t row = 0; row < args.rows; ++row) {
    float* gram = args.gram + row * columns * columns;
    for (int i = 0; i < columns; ++i) {
      for (int j = i; j < columns; ++j) {
        gram[i * columns + j] = gram[j * columns + i] = static_cast<float>(*total++);
      }
    }
  }
  return Status();
}

Status cpu_parareal_correct(const sidestep_parareal_correct_args& args) {
  const Status status = check_parareal_correct(args);
  if (!status.ok()) return status;
  const double* total = sum_rows(args, simd().correct_chunk, 2, parareal_correct_bytes(args));
  const double dim = static_cast<double>(std::max<int64_t>(args.dim, 1));  // a mean of nothing is 0
  for (int64_t i = 0; i < args.rows * 2; ++i) args.residual[i] = static_cast<float>(total[i] / dim);
  return Status();
}

}  // namespace sidestep
