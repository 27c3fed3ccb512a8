// The last failure of each thread.
#include "core/guarded.h"

namespace sidestep {

std::string& last_error() {
  thread_local std::string error;
  return error;
}

}  // namespace sidestep

extern "C" const char* sidestep_error(void) { return sidestep::last_error().c_str(); }
