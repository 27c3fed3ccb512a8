// Uses libsidestep as a C++ program does: through sidestep.h alone. Run by ctest.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "expect.h"
#include "sidestep/sidestep.h"

namespace {

// Two registers, one branch: x' = 0.5 x + 2 u, history' = u, E = x - history, next input 3 x'.
struct Step {
  static constexpr int64_t kRows = 2;
  explicit Step(int64_t dim) : registers(kRows * 2 * dim), output(kRows * dim), input(kRows * dim) {
    for (size_t i = 0; i < registers.size(); ++i) registers[i] = 0.25f * static_cast<float>(i % 17);
    for (size_t i = 0; i < output.size(); ++i) output[i] = 0.5f * static_cast<float>(i % 5) - 1.0f;
    args.registers = registers.data();
    args.outputs[0] = output.data();
    args.weights = weights;
    args.table = table;
    args.step = step;
    args.model_input = input.data();
    args.stats = stats;
    args.slots = kRows;
    args.dim = dim;
    args.rows = kRows;
    args.steps = 1;
    args.num_registers = 2;
    args.num_branches = 1;
    args.dtype = SIDESTEP_FLOAT32;
  }

  std::vector<float> registers;
  std::vector<float> output;
  std::vector<float> input;
  float weights[kRows] = {1.0f, 1.0f};
  float table[13] = {0.5f, 0, 2.0f, 0, /**/ 0, 0, 1.0f, 0, /**/ 1.0f, -1.0f, 0, 0, /**/ 3.0f};
  int64_t step[kRows] = {0, 0};
  float stats[kRows * 2] = {};
  sidestep_solver_step_args args{};
};

void values_are_the_plans(int64_t dim) {
  Step step(dim);
  const std::vector<float> before = step.registers;
  expect(sidestep_solver_step(&step.args) == SIDESTEP_OK, "a valid step succeeds");
  for (int64_t row = 0; row < Step::kRows; ++row) {
    double change = 0;
    double error = 0;
    for (int64_t i = 0; i < dim; ++i) {
      const int64_t x = row * 2 * dim + i;
      const int64_t history = x + dim;
      const float u = step.output[row * dim + i];
      const float next = 0.5f * before[x] + 2.0f * u;
      expect(step.registers[x] == next, "x' is 0.5 x + 2 u");
      expect(step.registers[history] == u, "the history is u");
      expect(step.input[row * dim + i] == 3.0f * next, "the model input is 3 x'");
      change += std::fabs(next - before[x]);
      error += std::fabs(before[x] - before[history]);
    }
    const double mean = static_cast<double>(dim);
    expect(std::fabs(step.stats[row * 2] - change / mean) < 1e-6 * change / mean, "mean |x' - x|");
    expect(std::fabs(step.stats[row * 2 + 1] - error / mean) < 1e-6 * error / mean, "mean |E|");
  }
}

void threads_do_not_change_bits() {
  Step one(300001);
  Step two(300001);
  expect(sidestep_set_num_threads(1) == SIDESTEP_OK, "one thread can be chosen");
  expect(sidestep_solver_step(&one.args) == SIDESTEP_OK, "one thread succeeds");
  expect(sidestep_set_num_threads(3) == SIDESTEP_OK, "three threads can be chosen");
  expect(sidestep_num_threads() == 3, "the choice can be read");
  expect(sidestep_solver_step(&two.args) == SIDESTEP_OK, "three threads succeed");
  expect(one.registers == two.registers && one.input == two.input, "same values on more threads");
  expect(std::memcmp(one.stats, two.stats, sizeof(one.stats)) == 0, "same stats on more threads");
}

void a_step_allocates_nothing() {
  for (const int64_t dim : {16, 300001}) {
    Step step(dim);
    int64_t slot[Step::kRows] = {1, 0};
    step.args.slot = slot;
    sidestep_solver_step(&step.args);  // scratch memory and threads come with the first
    const int before = g_allocations;
    for (int i = 0; i < 5; ++i) sidestep_solver_step(&step.args);
    expect(g_allocations == before, "a step allocates nothing");
  }
}

void failures_are_statuses() {
  Step step(8);
  const std::vector<float> before = step.registers;
  step.step[1] = 1;
  expect(sidestep_solver_step(&step.args) == SIDESTEP_INVALID_ARGUMENT, "a step >= K is refused");
  expect(std::strstr(sidestep_error(), "step[1] is 1") != nullptr, "the sentence names the value");
  expect(step.registers == before, "a refused call changes nothing");
  expect(sidestep_set_num_threads(0) == SIDESTEP_INVALID_ARGUMENT, "no threads are refused");
  step.step[1] = 0;
  if (std::strncmp(sidestep_build_info("cuda"), "no", 2) == 0) {
    expect(sidestep_cuda_solver_step(&step.args, nullptr, nullptr) == SIDESTEP_UNAVAILABLE,
           "a build without CUDA says so");
  }
}

void build_can_be_asked() {
  expect(sidestep_abi_version() == SIDESTEP_ABI_VERSION, "header and library agree");
  expect(std::strcmp(sidestep_build_info("version"), sidestep_version()) == 0, "one version");
  expect(sidestep_build_info("nothing") == nullptr, "an unknown key is NULL");
}

}  // namespace

int main() {
  for (const int64_t dim : {1, 7, 129, 4231}) values_are_the_plans(dim);
  threads_do_not_change_bits();
  a_step_allocates_nothing();
  failures_are_statuses();
  build_can_be_asked();
  return g_failures == 0 ? 0 : 1;
}
