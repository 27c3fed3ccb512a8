// Fuzz target: any bytes as a plan file. What is read must describe itself; what is refused must
// say why.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "sidestep/plan.h"

namespace {

void expect(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sidestep_plan* plan = nullptr;
  const sidestep_status status = sidestep_plan_read(data, static_cast<int64_t>(size), &plan);
  expect((status == SIDESTEP_OK) == (plan != nullptr));
  if (plan == nullptr) {
    expect(std::strncmp(sidestep_error(), data == nullptr ? "plan_read: " : "plan: ", 6) == 0);
    return 0;
  }
  sidestep_plan_info info;
  expect(sidestep_plan_describe(plan, &info) == SIDESTEP_OK);
  expect(info.steps >= 0 && info.steps <= SIDESTEP_MAX_STEPS && std::strlen(info.digest) == 64);
  expect(info.num_registers >= 1 && info.num_registers <= SIDESTEP_MAX_REGISTERS);
  std::vector<double> times(info.steps);
  std::vector<double> scales(info.steps);
  expect(sidestep_plan_calls(plan, times.data(), scales.data()) == SIDESTEP_OK);
  sidestep_plan_destroy(plan);
  return 0;
}
