// Drives the dependency schedule as a C++ host does: through parareal.h alone. Run by ctest.
#include "sidestep/parareal.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "expect.h"

namespace {

// Blocks whose sizes differ by one at most.
std::vector<int64_t> split(int64_t steps, int64_t blocks) {
  std::vector<int64_t> bounds;
  for (int64_t i = 0; i <= blocks; ++i) bounds.push_back(steps * i / blocks);
  return bounds;
}

sidestep_parareal_options options_of(const std::vector<int64_t>& bounds, int64_t iterations) {
  return {bounds.data(), static_cast<int64_t>(bounds.size()) - 1, iterations};
}

// All running chains take one evaluation a tick; returns the ticks until the last has ended.
int64_t run(sidestep_parareal* schedule, int64_t iterations) {
  struct Running {
    sidestep_chain chain;
    int64_t taken;
  };
  std::vector<sidestep_boundary> boundaries(iterations + 1);
  std::vector<Running> running(1, {{}, 0});
  expect(sidestep_parareal_begin(schedule, &running[0].chain) == SIDESTEP_OK, "begin");
  int64_t ticks = 0;
  for (; !running.empty(); ++ticks) {
    std::vector<Running> next;
    int64_t count = 0;
    const auto start = [&] {
      for (int64_t i = 0; i < count; ++i) {
        if (boundaries[i].chain.evaluations > 0) next.push_back({boundaries[i].chain, 0});
      }
    };
    for (Running& one : running) {
      const sidestep_chain& chain = one.chain;
      if (++one.taken == 1) {
        expect(sidestep_parareal_coarse(schedule, chain.block, chain.iterate, boundaries.data(),
                                        &count) == SIDESTEP_OK,
               "coarse");
        start();
      }
      if (one.taken < chain.evaluations) {
        next.push_back(one);
        continue;
      }
      expect(sidestep_parareal_ended(schedule, chain.block, chain.iterate, boundaries.data(),
                                     &count) == SIDESTEP_OK,
             "ended");
      start();
    }
    running = next;
  }
  return ticks;
}

void a_host_takes_as_long_as_the_paper_says() {
  for (const int64_t steps : {7, 25, 97}) {
    for (const int64_t blocks : {int64_t{1}, int64_t{5}, steps}) {
      if (steps % blocks != 0) continue;
      const int64_t m = steps / blocks;
      for (int64_t K = 0; K <= blocks; K += std::max<int64_t>(1, blocks / 3)) {
        const auto bounds = split(steps, blocks);
        const auto options = options_of(bounds, K);
        sidestep_parareal* schedule = nullptr;
        expect(sidestep_parareal_create(&options, &schedule) == SIDESTEP_OK, "create");
        expect(run(schedule, K) == K * (m - 1) + blocks, "K(m - 1) + B ticks");
        int32_t finished = 0;
        sidestep_parareal_finished(schedule, &finished);
        expect(finished == 1, "finished");
        sidestep_parareal_destroy(schedule);
        int64_t evaluations = 0;
        expect(sidestep_parareal_cost(&options, &evaluations) == SIDESTEP_OK, "cost");
        expect(evaluations == m * (K * blocks - K * (K - 1) / 2) + blocks - K, "evaluations");
      }
    }
  }
}

void the_simulation_keeps_to_its_width() {
  const auto bounds = split(50, 8);
  const auto options = options_of(bounds, 3);
  int64_t cost = 0;
  sidestep_parareal_cost(&options, &cost);
  std::vector<sidestep_evaluation> evaluations(cost);
  std::vector<int64_t> formed(4);
  for (const int64_t width : {1, 2, 3, 0}) {
    sidestep_wavefront front{evaluations.data(), formed.data(), 0, 0};
    expect(sidestep_parareal_simulate(&options, width, &front) == SIDESTEP_OK, "simulate");
    expect(front.num_evaluations == cost, "every evaluation is made");
    expect(width == 0 || front.ticks >= (cost + width - 1) / width, "not faster than the width");
    expect(width != 1 || front.ticks == cost, "one at a time");
    expect(formed[3] == front.ticks, "the last iterate is there at the end");
    std::vector<int64_t> wide(front.ticks, 0);
    for (const sidestep_evaluation& one : evaluations) ++wide[one.tick];
    for (const int64_t count : wide) expect(count > 0 && (width == 0 || count <= width), "width");
  }
}

void failures_are_statuses() {
  sidestep_parareal* schedule = nullptr;
  std::vector<int64_t> bounds = {0, 3, 3};
  auto options = options_of(bounds, 1);
  expect(sidestep_parareal_create(&options, &schedule) == SIDESTEP_INVALID_ARGUMENT,
         "an empty block is refused");
  expect(std::strstr(sidestep_error(), "bounds[2] is 3, expected 4") != nullptr, "in a sentence");
  bounds = {5, 8, 10};
  options = options_of(bounds, 3);
  expect(sidestep_parareal_create(&options, &schedule) == SIDESTEP_INVALID_ARGUMENT,
         "more iterations than blocks are refused");
  sidestep_chain chain{};
  expect(sidestep_parareal_begin(nullptr, &chain) == SIDESTEP_INVALID_ARGUMENT,
         "a null handle is refused");
  options = options_of(bounds, 1);
  expect(sidestep_parareal_create(&options, &schedule) == SIDESTEP_OK, "any first step");
  std::vector<sidestep_boundary> boundaries(2);
  int64_t count = -1;
  expect(sidestep_parareal_coarse(schedule, 1, 0, boundaries.data(), &count) ==
             SIDESTEP_INVALID_ARGUMENT,
         "nothing before begin");
  sidestep_parareal_begin(schedule, &chain);
  expect(chain.first == 5 && chain.evaluations == 3, "the first chain");
  expect(sidestep_parareal_ended(schedule, 1, 0, boundaries.data(), &count) ==
                 SIDESTEP_INVALID_ARGUMENT &&
             count == -1,
         "the end does not come first");
  expect(sidestep_parareal_limit(schedule, 2) == SIDESTEP_INVALID_ARGUMENT, "a limit lowers");
  sidestep_parareal_destroy(schedule);
}

void reports_allocate_nothing() {
  const auto bounds = split(12, 4);
  const auto options = options_of(bounds, 4);
  sidestep_parareal* schedule = nullptr;
  sidestep_parareal_create(&options, &schedule);
  std::vector<sidestep_boundary> boundaries(5);
  sidestep_chain chain{};
  int64_t count = 0;
  const int before = g_allocations;
  sidestep_parareal_begin(schedule, &chain);
  // Each chain of the first iterate runs to its end before the next begins.
  for (int64_t block = 1; block <= 4; ++block) {
    sidestep_parareal_coarse(schedule, block, 0, boundaries.data(), &count);
    sidestep_parareal_ended(schedule, block, 0, boundaries.data(), &count);
  }
  expect(g_allocations == before, "a report allocates nothing");
  sidestep_parareal_destroy(schedule);
}

}  // namespace

int main() {
  a_host_takes_as_long_as_the_paper_says();
  the_simulation_keeps_to_its_width();
  failures_are_statuses();
  reports_allocate_nothing();
  return g_failures == 0 ? 0 : 1;
}
