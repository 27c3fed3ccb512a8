// A C++ server in small, for what a profiler sees of it: `host scheduler`, `host parareal`,
// `host operators`; `host seconds` times a range and prints nanoseconds.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "core/profiler.h"
#include "sidestep/parareal.h"
#include "sidestep/scheduler.h"

namespace {

// One request of one row and three steps; its second batch is begun and never completed.
int scheduler() {
  const int64_t bucket = 2;
  const sidestep_scheduler_options options{2, 2, &bucket, 1};
  sidestep_scheduler* scheduler = nullptr;
  sidestep_scheduler_create(&options, &scheduler);
  const sidestep_scheduler_request request{1, 3, 1, 0};
  int64_t id = -1;
  int64_t count = 0;
  std::vector<sidestep_row> rows(2);
  std::vector<sidestep_row> in_batch(2);
  std::vector<sidestep_entry> entries(2);
  sidestep_batch batch{in_batch.data(), entries.data(), 0, 0, 0, -1};
  sidestep_scheduler_submit(scheduler, &request, &id);
  sidestep_scheduler_admit(scheduler, rows.data(), &count);
  sidestep_scheduler_next(scheduler, &batch);
  sidestep_scheduler_next(scheduler, &batch);  // all rows are in flight: no batch
  sidestep_scheduler_complete(scheduler, 0, rows.data(), &count);
  const uint8_t compute = 1;
  int32_t state = -1;
  sidestep_scheduler_advance(scheduler, &rows[0].slot, &compute, 1, &state);
  sidestep_scheduler_next(scheduler, &batch);
  sidestep_scheduler_destroy(scheduler);
  return state == SIDESTEP_ROW_READY && batch.ticket == 1 ? 0 : 1;
}

// Two blocks of four steps; stopped once the last boundary is there in its first iterate.
int parareal() {
  const int64_t bounds[3] = {0, 4, 8};
  const sidestep_parareal_options options{bounds, 2, 2};
  sidestep_parareal* schedule = nullptr;
  sidestep_parareal_create(&options, &schedule);
  sidestep_chain chain{};
  sidestep_boundary boundaries[3];
  int64_t count = 0;
  sidestep_parareal_begin(schedule, &chain);
  sidestep_parareal_coarse(schedule, 1, 0, boundaries, &count);  // x_1^0, and chain (2, 0)
  sidestep_parareal_coarse(schedule, 2, 0, boundaries, &count);  // x_2^0
  sidestep_parareal_ended(schedule, 1, 0, boundaries, &count);   // x_1^1, and chain (2, 1)
  sidestep_parareal_limit(schedule, 1);                          // (2, 1) is the coarse solver only
  const bool started = count == 1 && boundaries[0].chain.evaluations == 4;
  sidestep_parareal_destroy(schedule);  // with (2, 0) under way
  return started ? 0 : 1;
}

// Refused or unavailable, and marked all the same.
int operators() {
  const sidestep_solver_step_args step{};
  const sidestep_difference_gram_args gram{};
  const sidestep_parareal_correct_args correct{};
  sidestep_solver_step(&step);
  sidestep_cuda_solver_step(&step, nullptr, nullptr);
  sidestep_difference_gram(&gram);
  sidestep_cuda_difference_gram(&gram, nullptr, nullptr);
  sidestep_parareal_correct(&correct);
  sidestep_cuda_parareal_correct(&correct, nullptr, nullptr);
  return 0;
}

int seconds() {
  constexpr int kRanges = 1000000;
  double best = 1e9;
  for (int turn = 0; turn < 10; ++turn) {
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kRanges; ++i) const sidestep::ProfilerRange range("model");
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    if (took.count() < best) best = took.count();
  }
  std::printf("%.1f ns a range\n", best / kRanges);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "scheduler") return scheduler();
  if (what == "parareal") return parareal();
  if (what == "operators") return operators();
  if (what == "seconds") return seconds();
  return 2;
}
