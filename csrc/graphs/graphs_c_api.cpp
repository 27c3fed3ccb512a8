// The C API of the graphs.
#include "core/guarded.h"
#include "core/handle.h"
#include "core/profiler.h"
#include "graphs/graph_cache.h"
#include "graphs/tick.h"

struct sidestep_graphs : sidestep::Handle<sidestep::GraphCache> {
  using Handle::Handle;
  static constexpr const char* kIsNull = "graphs: the handle is null, expected graphs";
};

namespace {

using sidestep::GraphCache;
using sidestep::guarded;
using sidestep::locked;
using sidestep::ProfilerRange;
using sidestep::Status;

}  // namespace

extern "C" {

sidestep_status sidestep_tick_enqueue(const sidestep_tick* tick, void* stream) {
  const ProfilerRange range("tick");
  return guarded("tick_enqueue", {{"tick", tick}},
                 [&] { return sidestep::enqueue_tick(*tick, stream); });
}

sidestep_status sidestep_graphs_create(const sidestep_graphs_options* options,
                                       sidestep_graphs** graphs) {
  return guarded("graphs_create", {{"options", options}, {"graphs", graphs}}, [&] {
    const Status status = GraphCache::check(*options);
    if (status.ok()) *graphs = new sidestep_graphs(*options);
    return status;
  });
}

void sidestep_graphs_destroy(sidestep_graphs* graphs) { delete graphs; }

sidestep_status sidestep_graphs_run(sidestep_graphs* graphs, const sidestep_tick* tick,
                                    void* stream) {
  const ProfilerRange range("tick");
  return locked(graphs, "graphs_run", {{"tick", tick}},
                [&](GraphCache& cache) { return cache.run(*tick, stream); });
}

sidestep_status sidestep_graphs_forget(sidestep_graphs* graphs) {
  return locked(graphs, "graphs_forget", {}, [](GraphCache& cache) { return cache.forget(); });
}

sidestep_status sidestep_graphs_count(sidestep_graphs* graphs, sidestep_graphs_counts* counts) {
  return locked(graphs, "graphs_count", {{"counts", counts}}, [&](GraphCache& cache) {
    *counts = cache.counts();
    return Status();
  });
}

}  // extern "C"
