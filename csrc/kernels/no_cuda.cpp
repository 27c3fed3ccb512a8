// Stands in for what uses the GPU in a build without CUDA.
#include "core/memory.h"
#include "kernels/launch.h"

namespace sidestep {
namespace {

Status unavailable(const char* operation) {
  return Status(
      SIDESTEP_UNAVAILABLE,
      std::string(operation) + ": this build has no CUDA kernels (" + SIDESTEP_CUDA_INFO + ")");
}

}  // namespace

Status cuda_solver_step(const sidestep_solver_step_args&, void*, void*) {
  return unavailable("solver_step");
}

Status cuda_difference_gram(const sidestep_difference_gram_args&, void*, void*) {
  return unavailable("difference_gram");
}

Status cuda_parareal_correct(const sidestep_parareal_correct_args&, void*, void*) {
  return unavailable("parareal_correct_");
}

Status cuda_exit_decide(const ExitDecideArgs&, void*, void*) { return unavailable("exit_decide"); }

Status cuda_exit_compact(const ExitCompactArgs&, void*) { return unavailable("exit_compact_"); }
Status cuda_memory(std::unique_ptr<Memory>*) { return unavailable("engine"); }

}  // namespace sidestep
