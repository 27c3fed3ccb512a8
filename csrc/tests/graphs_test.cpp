// What the graphs say where there is nothing to capture. Run by ctest; tests/native/test_graphs.py
// runs the rest.
#include "sidestep/graphs.h"

#include <cstring>

#include "expect.h"

namespace {

void without_cuda() {
  const sidestep_graphs_options options{4};
  sidestep_graphs* graphs = nullptr;
  sidestep_graphs_counts counts{};
  const sidestep_tick tick{};
  expect(sidestep_graphs_create(&options, &graphs) == SIDESTEP_UNAVAILABLE, "no graphs");
  expect(graphs == nullptr, "the handle is as before");
  const char* sentence = "graphs: this build has no CUDA (no: ";
  expect(std::strncmp(sidestep_error(), sentence, std::strlen(sentence)) == 0, "it says why");
  expect(sidestep_graphs_run(nullptr, &tick, nullptr) == SIDESTEP_UNAVAILABLE, "no run");
  expect(sidestep_graphs_forget(nullptr) == SIDESTEP_UNAVAILABLE, "nothing to forget");
  expect(sidestep_graphs_count(nullptr, &counts) == SIDESTEP_UNAVAILABLE, "nothing to count");
  expect(sidestep_tick_enqueue(&tick, nullptr) == SIDESTEP_UNAVAILABLE, "no tick");
}

void with_cuda() {
  const sidestep_graphs_options options{0};
  sidestep_graphs* graphs = nullptr;
  const sidestep_tick tick{};
  expect(sidestep_graphs_create(&options, &graphs) == SIDESTEP_INVALID_ARGUMENT, "kept is 0");
  expect(std::strcmp(sidestep_error(), "graphs: kept is 0, expected at least 1") == 0, "says so");
  expect(sidestep_graphs_run(nullptr, &tick, nullptr) == SIDESTEP_INVALID_ARGUMENT, "no handle");
  expect(std::strcmp(sidestep_error(), "graphs: the handle is null, expected graphs") == 0,
         "says so");
  expect(sidestep_tick_enqueue(&tick, nullptr) == SIDESTEP_INVALID_ARGUMENT, "an empty tick");
}

}  // namespace

int main() {
  if (std::strncmp(sidestep_build_info("cuda"), "yes", 3) == 0) {
    with_cuda();
  } else {
    without_cuda();
  }
  sidestep_graphs_destroy(nullptr);
  return g_failures == 0 ? 0 : 1;
}
