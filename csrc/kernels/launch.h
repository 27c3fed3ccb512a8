// The launchers of the operators and the checks they share. (Those of the exits, which no embedder
// needs so far, are declared beside their arguments.)
#pragma once

#include <cstdint>

#include "core/status.h"
#include "kernels/exit_compact.h"
#include "kernels/exit_score.h"
#include "sidestep/sidestep.h"

namespace sidestep {

// Sizes, null pointers and overlap; reads no array, so it serves host and device memory alike.
Status check_solver_step(const sidestep_solver_step_args& args);

// Values of step and slot: in range, and no slot twice. Host memory only.
Status check_rows(const sidestep_solver_step_args& args);

Status check_difference_gram(const sidestep_difference_gram_args& args);
Status check_parareal_correct(const sidestep_parareal_correct_args& args);

Status cpu_solver_step(const sidestep_solver_step_args& args);
Status cpu_difference_gram(const sidestep_difference_gram_args& args);
Status cpu_parareal_correct(const sidestep_parareal_correct_args& args);

// Bytes a call moves at most: what decides about threads and the GIL.
int64_t solver_step_bytes(const sidestep_solver_step_args& args);
int64_t difference_gram_bytes(const sidestep_difference_gram_args& args);
int64_t parareal_correct_bytes(const sidestep_parareal_correct_args& args);

// From this many bytes on the CPU uses threads.
constexpr int64_t kParallelBytes = int64_t{2} << 20;

// The GPU's unit of partial sums, and the bytes before them: a counter that every launch leaves at
// 0.
constexpr int64_t kCudaChunk = 2048;
constexpr int64_t kCudaWorkspaceHeader = 16;

// Those of a row.
constexpr int64_t cuda_chunks(int64_t dim) { return (dim + kCudaChunk - 1) / kCudaChunk; }

// Without CUDA in the build these say so.
Status cuda_solver_step(const sidestep_solver_step_args& args, void* workspace, void* stream);
Status cuda_difference_gram(const sidestep_difference_gram_args& args, void* workspace,
                            void* stream);
Status cuda_parareal_correct(const sidestep_parareal_correct_args& args, void* workspace,
                             void* stream);
int64_t cuda_solver_step_workspace(int64_t rows, int64_t dim);
int64_t cuda_difference_gram_workspace(int64_t rows, int64_t dim, int32_t num_vectors);
int64_t cuda_parareal_correct_workspace(int64_t rows, int64_t dim);

}  // namespace sidestep
