// What a graph cannot change: two ticks with equal keys are one kind.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "sidestep/graphs.h"

namespace sidestep {

inline auto numbers_of(const sidestep_solver_step_args& a) {
  return std::tie(a.registers, a.weights, a.noise, a.table, a.step, a.slot, a.model_input, a.stats,
                  a.slots, a.dim, a.rows, a.steps, a.num_registers, a.num_branches, a.dtype);
}

inline bool same(const sidestep_solver_step_args& a, const sidestep_solver_step_args& b) {
  return numbers_of(a) == numbers_of(b) &&
         std::equal(a.outputs, a.outputs + a.num_branches, b.outputs);
}

inline bool same(const sidestep_tensor& a, const sidestep_tensor& b) {
  return std::tie(a.data, a.num_dims, a.dtype) == std::tie(b.data, b.num_dims, b.dtype) &&
         std::equal(a.shape, a.shape + a.num_dims, b.shape) &&
         std::equal(a.strides, a.strides + a.num_dims, b.strides);
}

// The device, and all of a tick.
class TickKey {
 public:
  TickKey(int device, const sidestep_tick& tick)
      : device_(device), tick_(tick), tensors_(tick.tensors, tick.tensors + tick.num_tensors) {}

  bool operator==(const TickKey& other) const { return matches(other.device_, other.whole()); }

  // Whether it is that tick's, found out without making one.
  bool matches(int device, const sidestep_tick& tick) const {
    const auto rest = [](const sidestep_tick& t) {
      return std::tie(t.read_table, t.workspace, t.model, t.context, t.num_tensors, t.plan,
                      t.chain);
    };
    return device_ == device && rest(tick_) == rest(tick) && same(tick_.args, tick.args) &&
           std::equal(tensors_.begin(), tensors_.end(), tick.tensors,
                      [](const auto& a, const auto& b) { return same(a, b); });
  }

 private:
  sidestep_tick whole() const {
    sidestep_tick tick = tick_;
    tick.tensors = tensors_.data();
    return tick;
  }

  int device_;
  sidestep_tick tick_;  // tensors aside
  std::vector<sidestep_tensor> tensors_;
};

}  // namespace sidestep
