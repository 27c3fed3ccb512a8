// How a failed status becomes a Python exception.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "core/status.h"

inline void raise(const sidestep::Status& status) {
  if (status.ok()) return;
  if (status.code() == SIDESTEP_INVALID_ARGUMENT) throw pybind11::value_error(status.message());
  throw std::runtime_error(status.message());
}
