// Stands in for the graphs in a build without CUDA.
#include <string>

#include "core/guarded.h"
#include "sidestep/graphs.h"

namespace {

sidestep_status unavailable() {
  return sidestep::guarded([] {
    return sidestep::Status(SIDESTEP_UNAVAILABLE, std::string("graphs: this build has no CUDA (") +
                                                      SIDESTEP_CUDA_INFO + ")");
  });
}

}  // namespace

extern "C" {

sidestep_status sidestep_tick_enqueue(const sidestep_tick*, void*) { return unavailable(); }

sidestep_status sidestep_graphs_create(const sidestep_graphs_options*, sidestep_graphs**) {
  return unavailable();
}

void sidestep_graphs_destroy(sidestep_graphs*) {}

sidestep_status sidestep_graphs_run(sidestep_graphs*, const sidestep_tick*, void*) {
  return unavailable();
}

sidestep_status sidestep_graphs_forget(sidestep_graphs*) { return unavailable(); }

sidestep_status sidestep_graphs_count(sidestep_graphs*, sidestep_graphs_counts*) {
  return unavailable();
}

}  // extern "C"
