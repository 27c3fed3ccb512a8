// The sizes that a model call may have. Few sizes mean few compiled graphs; a batch is padded to
// the smallest that holds it.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdint>
#include <vector>

#include "core/status.h"

namespace sidestep {

class Buckets {
 public:
  static Status check(const int64_t* sizes, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t before = i == 0 ? 0 : sizes[i - 1];
      if (sizes[i] <= before) {
        return invalid_argument("scheduler: buckets[%" PRId64 "] is %" PRId64 ", expected %" PRIu64
                                " or more",
                                i, sizes[i], static_cast<uint64_t>(before) + 1);
      }
    }
    return Status();
  }

  Buckets(const int64_t* sizes, int64_t count) : sizes_(sizes, sizes + count) {}

  int64_t largest() const { return sizes_.back(); }

  // The smallest that holds `entries`, which is at most largest().
  int64_t holding(int64_t entries) const {
    return *std::lower_bound(sizes_.begin(), sizes_.end(), entries);
  }

 private:
  std::vector<int64_t> sizes_;  // ascending
};

}  // namespace sidestep
