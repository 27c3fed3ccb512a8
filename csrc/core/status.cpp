// Formats the sentence of a failed Status.
#include "core/status.h"

#include <cstdarg>
#include <cstdio>

namespace sidestep {

Status invalid_argument(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  return Status(SIDESTEP_INVALID_ARGUMENT, text);
}

}  // namespace sidestep
