// A tick on a stream, in stages, and what is checked of it before.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"
#include "sidestep/graphs.h"

namespace sidestep {

// Sizes, null pointers and overlap of every step; reads no array.
Status check_tick(const sidestep_tick& tick);

// What of a tick, for a message.
struct Stage {
  const char* what;
  int64_t j;  // the step

  std::string text() const { return std::string(what) + " of step " + std::to_string(j); }
};

// Told of every stage and how it went; what it returns, unless it is ok, ends the tick.
class StageObserver {
 public:
  virtual ~StageObserver() = default;
  virtual Status passed(const Stage& stage, const Status& status) = 0;
};

Status enqueue_stages(const sidestep_tick& tick, void* stream, StageObserver& observer);

// The tick as it is, without a graph.
Status enqueue_tick(const sidestep_tick& tick, void* stream);

}  // namespace sidestep
