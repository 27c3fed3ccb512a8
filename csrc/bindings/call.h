// What the bindings of the operators share: addresses, and when the interpreter's lock is let go.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/raise.h"
#include "kernels/launch.h"

template <typename T>
T* address(uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// A small call is over before another thread could have taken the lock.
template <typename Args>
void call(sidestep::Status (*launch)(const Args& args), const Args& args, int64_t bytes) {
  if (bytes < sidestep::kParallelBytes) return raise(launch(args));
  sidestep::Status status;
  {
    pybind11::gil_scoped_release release;
    status = launch(args);
  }
  raise(status);
}
