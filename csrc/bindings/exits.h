// The exit operators' part of sidestep._native.
#pragma once

#include <pybind11/pybind11.h>

void bind_exits(pybind11::module_& m);
