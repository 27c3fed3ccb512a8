// Null addresses and overlaps, for every operator.
#include "kernels/ranges.h"

namespace sidestep {
namespace {

bool overlap(const Range& a, const Range& b) {
  if (a.data == nullptr || b.data == nullptr || a.bytes == 0 || b.bytes == 0) return false;
  const auto first = reinterpret_cast<uintptr_t>(a.data);
  const auto second = reinterpret_cast<uintptr_t>(b.data);
  return first < second + static_cast<uintptr_t>(b.bytes) &&
         second < first + static_cast<uintptr_t>(a.bytes);
}

}  // namespace

Status check_ranges(const char* operation, const Range* ranges, int count) {
  for (int i = 0; i < count; ++i) {
    if (ranges[i].data == nullptr && ranges[i].bytes > 0 && !ranges[i].optional) {
      return invalid_argument("%s: %s is null, expected an address", operation, ranges[i].name);
    }
  }
  for (int i = 0; i < count && ranges[i].written; ++i) {
    for (int j = i + 1; j < count; ++j) {
      if (overlap(ranges[i], ranges[j])) {
        return invalid_argument("%s: %s overlaps %s in memory, expected separate tensors",
                                operation, ranges[i].name, ranges[j].name);
      }
    }
  }
  return Status();
}

}  // namespace sidestep
