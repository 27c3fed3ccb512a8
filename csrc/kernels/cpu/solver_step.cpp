// The CPU launcher of the fused step: checks, one program per row, chunks over threads, sums in
// order.
#include <algorithm>
#include <vector>

#include "core/thread_pool.h"
#include "kernels/cpu/simd.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

struct Sums {
  double value[2];
};

struct Work {
  const sidestep_solver_step_args* args;
  StepChunk step_chunk;
  const StepProgram* programs;  // [rows]
  Sums* sums;                   // [rows, chunks]
  int64_t chunks;
};

void read_program(const sidestep_solver_step_args& args, int64_t row, StepProgram* program) {
  const float* line = args.table + args.step[row] * table_width(args.num_registers);
  for (int i = 0; i <= args.num_registers; ++i) {
    read_line(line, args.num_registers, args.noise != nullptr, i, program);
  }
  program->next_scale = read_next_scale(line, args.num_registers);
}

// Pieces [begin, end) of the rows x chunks grid, row-major.
void run_pieces(void* context, int64_t begin, int64_t end) {
  const Work& work = *static_cast<const Work*>(context);
  const sidestep_solver_step_args& args = *work.args;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / work.chunks;
    const int64_t first = (piece % work.chunks) * kChunk;
    work.step_chunk(args, work.programs[row], row, args.slot != nullptr ? args.slot[row] : row,
                    first, std::min(first + kChunk, args.dim), work.sums[piece].value);
  }
}

}  // namespace

Status cpu_solver_step(const sidestep_solver_step_args& args) {
  const Status sizes = check_solver_step(args);
  if (!sizes.ok()) return sizes;
  const Status values = check_rows(args);
  if (!values.ok()) return values;
  if (args.rows == 0) return Status();
  if (args.dim == 0) {
    std::fill_n(args.stats, args.rows * 2, 0.0f);
    return Status();
  }

  // Scratch grows once and stays: a step allocates nothing.
  thread_local std::vector<StepProgram> programs;
  thread_local std::vector<Sums> sums;
  const int64_t chunks = (args.dim + kChunk - 1) / kChunk;
  programs.resize(args.rows);
  sums.resize(args.rows * chunks);
  for (int64_t row = 0; row < args.rows; ++row) read_program(args, row, &programs[row]);

  Work work{&args, simd().step_chunk, programs.data(), sums.data(), chunks};
  const int64_t pieces = args.rows * chunks;
  if (solver_step_bytes(args) < kParallelBytes) {
    run_pieces(&work, 0, pieces);
  } else {
    const int threads = num_threads();
    const int64_t grain = std::max<int64_t>(1, pieces / (int64_t{16} * threads));
    ThreadPool::instance().parallel_for(pieces, grain, threads, run_pieces, &work);
  }

  for (int64_t row = 0; row < args.rows; ++row) {
    double total[2] = {0.0, 0.0};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int s = 0; s < 2; ++s) total[s] += sums[row * chunks + chunk].value[s];
    }
    for (int s = 0; s < 2; ++s) {
      args.stats[row * 2 + s] = static_cast<float>(total[s] / static_cast<double>(args.dim));
    }
  }
  return Status();
}

}  // namespace sidestep
