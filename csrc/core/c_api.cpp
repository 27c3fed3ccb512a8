// The C API of the kernels and of the library itself.
#include <cstring>

#include "core/guarded.h"
#include "core/profiler.h"
#include "core/thread_pool.h"
#include "core/version.h"
#include "kernels/cpu/simd.h"
#include "kernels/launch.h"
#include "sidestep/sidestep.h"

namespace {

using sidestep::guarded;

// An operator under the name of the range that Python has around it.
template <typename Args, typename Call>
sidestep_status marked(const char* name, const char* function, const Args* args,
                       Call call) noexcept {
  const sidestep::ProfilerRange range(name);
  return guarded(function, {{"args", args}}, call);
}

}  // namespace

extern "C" {

sidestep_status sidestep_solver_step(const sidestep_solver_step_args* args) {
  return marked("step", "solver_step", args, [&] { return sidestep::cpu_solver_step(*args); });
}

sidestep_status sidestep_difference_gram(const sidestep_difference_gram_args* args) {
  return marked("correct", "difference_gram", args,
                [&] { return sidestep::cpu_difference_gram(*args); });
}

sidestep_status sidestep_parareal_correct(const sidestep_parareal_correct_args* args) {
  return marked("correct", "parareal_correct", args,
                [&] { return sidestep::cpu_parareal_correct(*args); });
}

sidestep_status sidestep_cuda_solver_step(const sidestep_solver_step_args* args, void* workspace,
                                          void* stream) {
  return marked("step", "solver_step", args,
                [&] { return sidestep::cuda_solver_step(*args, workspace, stream); });
}

sidestep_status sidestep_cuda_difference_gram(const sidestep_difference_gram_args* args,
                                              void* workspace, void* stream) {
  return marked("correct", "difference_gram", args,
                [&] { return sidestep::cuda_difference_gram(*args, workspace, stream); });
}

sidestep_status sidestep_cuda_parareal_correct(const sidestep_parareal_correct_args* args,
                                               void* workspace, void* stream) {
  return marked("correct", "parareal_correct", args,
                [&] { return sidestep::cuda_parareal_correct(*args, workspace, stream); });
}

int64_t sidestep_cuda_solver_step_workspace(int64_t rows, int64_t dim) {
  return sidestep::cuda_solver_step_workspace(rows, dim);
}

int64_t sidestep_cuda_difference_gram_workspace(int64_t rows, int64_t dim, int32_t num_vectors) {
  return sidestep::cuda_difference_gram_workspace(rows, dim, num_vectors);
}

int64_t sidestep_cuda_parareal_correct_workspace(int64_t rows, int64_t dim) {
  return sidestep::cuda_parareal_correct_workspace(rows, dim);
}

int32_t sidestep_abi_version(void) { return SIDESTEP_ABI_VERSION; }

const char* sidestep_version(void) { return SIDESTEP_VERSION; }

const char* sidestep_build_info(const char* key) {
  if (key == nullptr) return nullptr;
  if (std::strcmp(key, "version") == 0) return SIDESTEP_VERSION;
  if (std::strcmp(key, "compiler") == 0) return SIDESTEP_COMPILER;
  if (std::strcmp(key, "cuda") == 0) return SIDESTEP_CUDA_INFO;
  if (std::strcmp(key, "simd") == 0) return sidestep::simd().name;
  return nullptr;
}

sidestep_status sidestep_set_num_threads(int32_t n) {
  return guarded([&] {
    if (n < 1) {
      return sidestep::invalid_argument("set_num_threads: n is %d, expected at least 1", n);
    }
    sidestep::set_num_threads(n);
    return sidestep::Status();
  });
}

int32_t sidestep_num_threads(void) { return sidestep::num_threads(); }

}  // extern "C"
