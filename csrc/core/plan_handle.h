// The handle of a plan in the C API.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

#include "core/plan.h"

struct sidestep_plan {
  explicit sidestep_plan(std::shared_ptr<const sidestep::Plan> core) : core(std::move(core)) {}

  const std::shared_ptr<const sidestep::Plan> core;
};
