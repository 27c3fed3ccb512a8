// sidestep._native.PararealSchedule and simulate_parareal.
#pragma once

#include <pybind11/pybind11.h>

void bind_parareal(pybind11::module_& m);
