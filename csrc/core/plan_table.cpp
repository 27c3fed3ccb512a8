// The table of plans in use: see plan_table.h.
#include "core/plan_table.h"

#include <algorithm>
#include <cinttypes>

#include "core/table.h"

namespace sidestep {

PlanTable::PlanTable(int registers, int64_t steps)
    : registers_(registers), steps_(steps), width_(table_width(registers)) {
  free_.reserve(steps);
  for (int64_t line = steps - 1; line >= 0; --line) free_.push_back(line);
}

int64_t PlanTable::bytes(int registers, int64_t steps) {
  return 2 * steps * table_width(registers) * static_cast<int64_t>(sizeof(float));
}

Status PlanTable::acquire(const std::shared_ptr<const Plan>& plan, Entry** entry) {
  const auto found = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& held) {
    return held.plan->digest() == plan->digest();
  });
  if (found != entries_.end()) {
    entries_.splice(entries_.end(), entries_, found);
  } else {
    if (plan->steps() > steps_) {
      return invalid_argument("engine: %.100s has %" PRId64
                              " steps, expected at most the table_steps of %" PRId64,
                              plan->name().c_str(), plan->steps(), steps_);
    }
    const Status status = make_room(*plan);
    if (!status.ok()) return status;
    Entry made{plan, std::vector<int64_t>(free_.end() - plan->steps(), free_.end()), 0, false};
    std::reverse(made.lines.begin(), made.lines.end());
    entries_.push_back(std::move(made));
    free_.resize(free_.size() - plan->steps());
  }
  *entry = &entries_.back();
  ++(*entry)->users;
  return Status();
}

// Forgets plans that nobody uses until there are enough free lines.
Status PlanTable::make_room(const Plan& plan) {
  const auto enough = [&] { return static_cast<int64_t>(free_.size()) >= plan.steps(); };
  for (auto entry = entries_.begin(); entry != entries_.end() && !enough();) {
    if (entry->users > 0) {
      ++entry;
      continue;
    }
    free_.insert(free_.end(), entry->lines.rbegin(), entry->lines.rend());
    entry = entries_.erase(entry);
  }
  if (enough()) return Status();
  const int64_t held = steps_ - static_cast<int64_t>(free_.size());
  return Status(SIDESTEP_FULL,
                "engine: no room for the " + std::to_string(plan.steps()) + " steps of " +
                    plan.name().substr(0, 100) + ", plans in use hold " + std::to_string(held) +
                    " of " + std::to_string(steps_) +
                    " lines; wait for results, or make the engine with more table_steps");
}

// Lines that follow one another go up together.
Status PlanTable::write(Entry* entry, Memory* memory) {
  if (entry->written) return Status();
  const auto& lines = entry->lines;
  std::vector<float> steps;
  std::vector<float> inputs;
  Status status;
  for (size_t first = 0, k = 0; k < lines.size() && status.ok(); ++k) {
    steps.resize(steps.size() + width_);
    inputs.resize(inputs.size() + width_);
    write_step(*entry->plan, static_cast<int64_t>(k), steps.data() + steps.size() - width_,
               inputs.data() + inputs.size() - width_);
    if (k + 1 < lines.size() && lines[k + 1] == lines[k] + 1) continue;
    float* to = table_ + lines[first] * width_;
    const auto bytes = static_cast<int64_t>(steps.size() * sizeof(float));
    status = memory->upload(to, steps.data(), bytes);
    if (status.ok()) status = memory->upload(to + steps_ * width_, inputs.data(), bytes);
    steps.clear();
    inputs.clear();
    first = k + 1;
  }
  entry->written = status.ok();
  return status;
}

void PlanTable::write_step(const Plan& plan, int64_t step, float* coefficients,
                           float* input) const {
  plan.write_line(step, registers_, coefficients);
  for (int i = 0; i < registers_; ++i) input[i * table_columns(registers_) + i] = 1.0f;
  input[width_ - 1] = static_cast<float>(plan.input_scale(step));
}

}  // namespace sidestep
