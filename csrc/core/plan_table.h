// The coefficients of every plan in use, in one table in the engine's memory.
//
// Requests with the same plan share its lines, and a plan that nobody uses any more stays until its
// lines are needed. A step has two lines, one in each half of the table: its coefficients, and a
// step that changes nothing but whose next_scale is the input scale of this step. That one is how
// the model's input is gathered, by the same kernel: model_input = cast(1 * x * input_scale).
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "core/plan.h"
#include "core/status.h"

namespace sidestep {

class PlanTable {
 public:
  struct Entry {
    std::shared_ptr<const Plan> plan;
    std::vector<int64_t> lines;  // of each step
    int64_t users = 0;
    bool written = false;
  };

  PlanTable(int registers, int64_t steps);

  int64_t steps() const { return steps_; }
  static int64_t bytes(int registers, int64_t steps);
  void place(float* table) { table_ = table; }  // [2, steps, W]
  const float* coefficients() const { return table_; }
  const float* inputs() const { return table_ + steps_ * width_; }

  // SIDESTEP_FULL where the plans in use leave no room. The entry stays where it is while it has
  // users.
  Status acquire(const std::shared_ptr<const Plan>& plan, Entry** entry);
  void release(Entry* entry) { --entry->users; }

  // Writes the lines if they are not there yet.
  Status write(Entry* entry, Memory* memory);

 private:
  Status make_room(const Plan& plan);
  void write_step(const Plan& plan, int64_t step, float* coefficients, float* input) const;

  int registers_;
  int64_t steps_;
  int64_t width_;
  float* table_ = nullptr;
  std::list<Entry> entries_;  // the longest unused first
  std::vector<int64_t> free_;
};

}  // namespace sidestep
