// What stands between the C API and the code behind it: no exception passes, and every failure is
// kept as a sentence per thread.
#pragma once

#include <exception>
#include <initializer_list>
#include <string>

#include "core/status.h"

namespace sidestep {

// The last failure of the calling thread.
std::string& last_error();

struct Pointer {
  const char* name;
  const void* value;
};

// What a function cannot do without.
inline Status check_pointers(const char* function, std::initializer_list<Pointer> pointers) {
  for (const Pointer& pointer : pointers) {
    if (pointer.value != nullptr) continue;
    return invalid_argument("%s: %s is null, expected an address", function, pointer.name);
  }
  return Status();
}

template <typename Call>
sidestep_status guarded(Call call) noexcept {
  try {
    const Status status = call();
    if (!status.ok()) last_error() = status.message();
    return status.code();
  } catch (const std::exception& error) {
    try {
      last_error() = error.what();
    } catch (...) {
      last_error().clear();
    }
    return SIDESTEP_FAILED;
  }
}

// The same, of a function that cannot do without some addresses.
template <typename Call>
sidestep_status guarded(const char* function, std::initializer_list<Pointer> pointers,
                        Call call) noexcept {
  return guarded([&] {
    const Status status = check_pointers(function, pointers);
    return status.ok() ? call() : status;
  });
}

}  // namespace sidestep
