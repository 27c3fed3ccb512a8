// Ranges for a profiler: NVTX in the domain `sidestep`, around what the C API does. (Python marks
// its own, with the same names.)
//
// Where no profiler was there at the process's start, or the build has no CUDA toolkit and so no
// nvtx3/nvToolsExt.h, a range is one look at a variable, and nothing is allocated.
#pragma once

#include <cstdint>
#include <map>
#include <utility>

namespace sidestep {

// A range of this thread, to the end of the scope.
class ProfilerRange {
 public:
  explicit ProfilerRange(const char* name);
  ~ProfilerRange();
  ProfilerRange(const ProfilerRange&) = delete;
  ProfilerRange& operator=(const ProfilerRange&) = delete;

 private:
  bool pushed_;
};

// Ranges that one call begins and another ends, on any thread; they may overlap.
class OpenRanges {
 public:
  using Key = std::pair<int64_t, int64_t>;

  OpenRanges() = default;
  ~OpenRanges();  // ends them all
  OpenRanges(const OpenRanges&) = delete;
  OpenRanges& operator=(const OpenRanges&) = delete;

  void begin(Key key, const char* name);
  void begin(Key key, const char* name, int64_t first, int64_t end);  // name[first:end]
  void end(Key key);                                                  // one that was begun, or none

  template <typename Condition>
  void end_where(Condition condition) {
    for (auto range = open_.begin(); range != open_.end();) {
      const Key key = (range++)->first;
      if (condition(key)) end(key);
    }
  }

 private:
  std::map<Key, uint64_t> open_;  // what NVTX calls each
};

}  // namespace sidestep
