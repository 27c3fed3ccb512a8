// The Python module sidestep._native: numbers and raw addresses in, exceptions out, nothing else.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings/call.h"
#include "bindings/exits.h"
#include "bindings/parareal.h"
#include "bindings/parareal_kernels.h"
#include "bindings/scheduler.h"
#include "core/thread_pool.h"
#include "kernels/cpu/simd.h"
#include "kernels/launch.h"
#include "sidestep/sidestep.h"

namespace py = pybind11;

namespace {

sidestep_solver_step_args make_args(uintptr_t registers, int64_t slots, int32_t num_registers,
                                    int64_t dim, const py::tuple& outputs, int32_t dtype,
                                    uintptr_t weights, uintptr_t noise, uintptr_t table,
                                    int64_t steps, uintptr_t step, uintptr_t slot, int64_t rows,
                                    uintptr_t model_input, uintptr_t stats) {
  sidestep_solver_step_args args{};
  args.registers = address<float>(registers);
  const size_t branches = outputs.size();
  for (size_t g = 0; g < branches && g < SIDESTEP_MAX_BRANCHES; ++g) {
    args.outputs[g] = address<const void>(outputs[g].cast<uintptr_t>());
  }
  args.weights = address<const float>(weights);
  args.noise = address<const float>(noise);
  args.table = address<const float>(table);
  args.step = address<const int64_t>(step);
  args.slot = address<const int64_t>(slot);
  args.model_input = address<void>(model_input);
  args.stats = address<float>(stats);
  args.slots = slots;
  args.dim = dim;
  args.rows = rows;
  args.steps = steps;
  args.num_registers = num_registers;
  args.num_branches = static_cast<int32_t>(branches);
  args.dtype = dtype;
  return args;
}

void solver_step(uintptr_t registers, int64_t slots, int32_t num_registers, int64_t dim,
                 const py::tuple& outputs, int32_t dtype, uintptr_t weights, uintptr_t noise,
                 uintptr_t table, int64_t steps, uintptr_t step, uintptr_t slot, int64_t rows,
                 uintptr_t model_input, uintptr_t stats) {
  const auto args = make_args(registers, slots, num_registers, dim, outputs, dtype, weights, noise,
                              table, steps, step, slot, rows, model_input, stats);
  call(sidestep::cpu_solver_step, args, sidestep::solver_step_bytes(args));
}

void cuda_solver_step(uintptr_t registers, int64_t slots, int32_t num_registers, int64_t dim,
                      const py::tuple& outputs, int32_t dtype, uintptr_t weights, uintptr_t noise,
                      uintptr_t table, int64_t steps, uintptr_t step, uintptr_t slot, int64_t rows,
                      uintptr_t model_input, uintptr_t stats, uintptr_t workspace,
                      uintptr_t stream) {
  const auto args = make_args(registers, slots, num_registers, dim, outputs, dtype, weights, noise,
                              table, steps, step, slot, rows, model_input, stats);
  raise(sidestep::cuda_solver_step(args, address<void>(workspace), address<void>(stream)));
}

void set_num_threads(int n) {
  if (n < 1) {
    throw py::value_error("set_num_threads: n is " + std::to_string(n) + ", expected at least 1");
  }
  sidestep::set_num_threads(n);
}

py::dict build_info() {
  py::dict info;
  for (const char* key : {"version", "compiler", "cuda", "simd"}) {
    info[key] = sidestep_build_info(key);
  }
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "sidestep's native kernels on raw addresses, and its core; use sidestep.kernels instead.";
  m.def("solver_step", &solver_step,
        "(registers, slots, R, D, outputs, dtype, weights, noise, table, K, step, slot, rows, "
        "model_input, stats): the fused step on CPU addresses; 0 stands for None.");
  m.def(
      "cuda_solver_step", &cuda_solver_step,
      "(..., workspace, stream): the same on device addresses; see sidestep.h for the workspace.");
  m.def("cuda_solver_step_workspace", &sidestep::cuda_solver_step_workspace,
        "(rows, D): bytes of the workspace, which must be zero before its first use.");
  m.def("set_num_threads", &set_num_threads, "(n): threads a large call may use.");
  m.def("num_threads", &sidestep::num_threads);
  m.def(
      "set_simd", [](const std::string& name) { raise(sidestep::set_simd(name.c_str())); },
      "(name): \"avx512\", \"avx2\" or \"scalar\"; all give the same bits.");
  m.def("simd", [] { return sidestep::simd().name; });
  m.def("build_info", &build_info, "What was built: version, compiler, cuda, simd.");
  bind_parareal_kernels(m);
  bind_exits(m);
  bind_scheduler(m);
  bind_parareal(m);
}
