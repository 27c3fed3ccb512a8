// What the C APIs of the core share: a handle with a lock, and results copied into the caller's
// arrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <vector>

#include "core/guarded.h"

namespace sidestep {

template <typename Core>
struct Handle {
  template <typename Options>
  explicit Handle(const Options& options) : core(options) {}

  std::mutex mutex;
  Core core;
};

// Calls call(core) with the handle locked; Named is a Handle whose kIsNull says that there is none.
template <typename Named, typename Call>
sidestep_status locked(Named* handle, const char* function, std::initializer_list<Pointer> pointers,
                       Call call) noexcept {
  return guarded(function, pointers, [&] {
    if (handle == nullptr) return invalid_argument("%s", Named::kIsNull);
    const std::lock_guard<std::mutex> lock(handle->mutex);
    return call(handle->core);
  });
}

template <typename T>
void hand_over(const std::vector<T>& from, T* to, int64_t* count) {
  std::copy(from.begin(), from.end(), to);
  *count = static_cast<int64_t>(from.size());
}

}  // namespace sidestep
