// What stands between the C API and the code behind it: no exception passes, and every failure is
// kept as a sentence per thread.
#pragma once

#include <exception>
#include <string>

#include "core/status.h"

namespace sidestep {

// The last failure of the calling thread.
std::string& last_error();

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

}  // namespace sidestep
