// sidestep._native.RowScheduler.
#pragma once

#include <pybind11/pybind11.h>

void bind_scheduler(pybind11::module_& m);
