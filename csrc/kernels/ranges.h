// Arrays an operator is given, and the checks that hold for all of them.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace sidestep {

struct Range {
  const char* name;
  const void* data;
  int64_t bytes;
  bool written;
  bool optional;  // may be null
};

// No null address, and nothing written overlaps anything else. Those written come first.
Status check_ranges(const char* operation, const Range* ranges, int count);

}  // namespace sidestep
