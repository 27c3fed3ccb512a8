// What a launcher returns: a code and, on failure, one sentence. Nothing here throws to a caller of
// the C API; the Python binding turns a failure into an exception.
#pragma once

#include <string>
#include <utility>

#include "sidestep/sidestep.h"

namespace sidestep {

class Status {
 public:
  Status() = default;
  Status(sidestep_status code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == SIDESTEP_OK; }
  sidestep_status code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  sidestep_status code_ = SIDESTEP_OK;
  std::string message_;
};

// printf-style; the sentence names the operation, the argument, what was expected and what came.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
Status invalid_argument(const char* format, ...);

}  // namespace sidestep
