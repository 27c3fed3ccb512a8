// Which ticks run as they are, which are captured, and which are replayed.
#include "graphs/graph_cache.h"

#include <cinttypes>

#include "graphs/tick.h"

namespace sidestep {

Status GraphCache::check(const sidestep_graphs_options& options) {
  if (options.kept >= 1) return Status();
  return invalid_argument("graphs: kept is %" PRId64 ", expected at least 1", options.kept);
}

// Moves it to the front.
GraphCache::Kind* GraphCache::find(int device, const sidestep_tick& tick) {
  for (auto kind = kinds_.begin(); kind != kinds_.end(); ++kind) {
    if (!kind->key.matches(device, tick)) continue;
    kinds_.splice(kinds_.begin(), kinds_, kind);
    return &*kind;
  }
  return nullptr;
}

Status GraphCache::remember(int device, const sidestep_tick& tick) {
  kinds_.emplace_front(device, tick);
  if (static_cast<int64_t>(kinds_.size()) <= limit_) return Status();
  const Status dropped = kinds_.back().graph.drop();
  kinds_.pop_back();
  ++counts_.dropped;
  return dropped;
}

Status GraphCache::run(const sidestep_tick& tick, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  int device = 0;
  Status status = check_tick(tick);
  if (status.ok()) status = check_stream(stream);
  if (status.ok()) status = graph_status("asking for the device", cudaGetDevice(&device));
  if (!status.ok()) return status;
  Kind* kind = find(device, tick);
  if (kind == nullptr) {
    status = enqueue_tick(tick, stream);
    if (!status.ok()) return status;
    ++counts_.enqueued;
    return remember(device, tick);
  }
  if (!kind->graph.captured()) {
    status = kind->graph.capture(tick, stream);
    if (!status.ok()) return status;
    ++counts_.captured;
  }
  status = kind->graph.launch(stream);
  if (status.ok()) ++counts_.replayed;
  return status;
}

Status GraphCache::forget() {
  Status status;
  for (Kind& kind : kinds_) {
    const Status dropped = kind.graph.drop();
    if (status.ok()) status = dropped;
  }
  kinds_.clear();
  return status;
}

sidestep_graphs_counts GraphCache::counts() const {
  sidestep_graphs_counts counts = counts_;
  counts.kept = static_cast<int64_t>(kinds_.size());
  return counts;
}

}  // namespace sidestep
