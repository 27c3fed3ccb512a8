// The parareal operators' part of sidestep._native.
#pragma once

#include <pybind11/pybind11.h>

void bind_parareal_kernels(pybind11::module_& m);
