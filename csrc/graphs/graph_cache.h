// The graphs of one handle: the kinds of ticks that were met last.
#pragma once

#include <list>

#include "core/status.h"
#include "graphs/graph.h"
#include "graphs/tick_key.h"

namespace sidestep {

class GraphCache {
 public:
  static Status check(const sidestep_graphs_options& options);
  explicit GraphCache(const sidestep_graphs_options& options) : limit_(options.kept) {}

  Status run(const sidestep_tick& tick, void* stream);
  Status forget();
  sidestep_graphs_counts counts() const;

 private:
  struct Kind {
    Kind(int device, const sidestep_tick& tick) : key(device, tick) {}
    TickKey key;
    Graph graph;  // of the second tick on
  };

  Kind* find(int device, const sidestep_tick& tick);
  Status remember(int device, const sidestep_tick& tick);

  int64_t limit_;
  std::list<Kind> kinds_;  // the latest first
  sidestep_graphs_counts counts_{};
};

}  // namespace sidestep
