// Python's integers and lists come in through casts, so that <pybind11/stl.h> is not needed.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

template <typename T>
std::vector<T> read(const pybind11::sequence& values) {
  std::vector<T> read;
  read.reserve(values.size());
  for (const pybind11::handle value : values) read.push_back(value.cast<T>());
  return read;
}
