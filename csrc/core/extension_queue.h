// The rows that running and waiting requests have grown by and that wait for a slot, in the order
// in which they came.
#pragma once

#include <cstdint>
#include <vector>

namespace sidestep {

struct Extension {
  int64_t number;
  int64_t request;
  int64_t row;
  int64_t steps;
  int64_t since;  // when it came to need the model, counted in rows
};

class ExtensionQueue {
 public:
  int64_t size() const { return static_cast<int64_t>(list_.size()); }

  void push(const Extension& extension) { list_.push_back(extension); }

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
