// What the scenarios of graphs.cu share.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "ticks.cuh"

inline int g_failures = 0;

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  ++g_failures;
}

// No kind is forgotten before `kept` others.
struct Graphs {
  sidestep_graphs* handle = nullptr;

  explicit Graphs(int64_t kept) {
    const sidestep_graphs_options options{kept};
    succeed(sidestep_graphs_create(&options, &handle));
  }
  Graphs(const Graphs&) = delete;
  ~Graphs() { sidestep_graphs_destroy(handle); }

  sidestep_status run(const sidestep_tick& tick, const Stream& stream) const {
    return sidestep_graphs_run(handle, &tick, stream.handle);
  }
  sidestep_graphs_counts counts() const {
    sidestep_graphs_counts counts{};
    succeed(sidestep_graphs_count(handle, &counts));
    return counts;
  }
  void expect_counts(const char* when, int64_t kept, int64_t enqueued, int64_t captured,
                     int64_t replayed, int64_t dropped) const {
    const sidestep_graphs_counts c = counts();
    const bool equal = c.kept == kept && c.enqueued == enqueued && c.captured == captured &&
                       c.replayed == replayed && c.dropped == dropped;
    expect(equal, std::string(when) + ": kept " + std::to_string(c.kept) + ", enqueued " +
                      std::to_string(c.enqueued) + ", captured " + std::to_string(c.captured) +
                      ", replayed " + std::to_string(c.replayed) + ", dropped " +
                      std::to_string(c.dropped));
  }
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Requests of different lengths through the row scheduler (graphs_rows.cu).
void rows();
