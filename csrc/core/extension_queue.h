// The rows that running and waiting requests have grown by and that wait for a slot, most urgent
// first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sidestep {

// When a row came to need the model, counted in rows, and how many rows it lets pass: it is as
// urgent as one that came that much later and lets none pass.
struct Urgency {
  int64_t since = 0;  // the delay included
  int64_t delay = 0;

  // No two came at the same time, so that no two are equal.
  bool operator<(const Urgency& other) const {
    return since != other.since ? since < other.since : delay < other.delay;
  }
};

struct Extension {
  int64_t number;
  int64_t request;
  int64_t row;
  int64_t steps;
  Urgency urgency;
};

class ExtensionQueue {
 public:
  int64_t size() const { return static_cast<int64_t>(list_.size()); }

  void push(const Extension& extension) {
    const auto place = std::upper_bound(
        list_.begin(), list_.end(), extension,
        [](const Extension& a, const Extension& b) { return a.urgency < b.urgency; });
    list_.insert(place, extension);
  }

  // Asks leaves(extension) once for each, in order; returns how many left.
  template <typename Leaves>
  int64_t remove(Leaves leaves) {
    auto kept = list_.begin();
    for (const Extension& extension : list_) {
      if (!leaves(extension)) *kept++ = extension;
    }
    const int64_t left = list_.end() - kept;
    list_.erase(kept, list_.end());
    return left;
  }

 private:
  std::vector<Extension> list_;
};

}  // namespace sidestep
