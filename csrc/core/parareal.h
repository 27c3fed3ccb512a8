// The dependency schedule of one trajectory; sidestep/parareal.h says what it does, in the same
// letters: block i = 1..B, iterate p or q = 0..K. It holds numbers only.
#pragma once

#include <cstdint>
#include <vector>

#include "core/status.h"
#include "sidestep/parareal.h"

namespace sidestep {

class PararealSchedule {
 public:
  static Status check(const sidestep_parareal_options& options);
  explicit PararealSchedule(const sidestep_parareal_options& options);  // checked

  int64_t blocks() const { return static_cast<int64_t>(bounds_.size()) - 1; }
  int64_t iterations() const { return iterations_; }
  int64_t steps(int64_t block) const { return bounds_[block] - bounds_[block - 1]; }
  bool finished() const { return next_.back() > iterations_; }

  // The boundaries are valid until the next call.
  Status begin(sidestep_chain* chain);
  Status coarse(int64_t block, int64_t iterate, const std::vector<sidestep_boundary>** formed);
  Status ended(int64_t block, int64_t iterate, const std::vector<sidestep_boundary>** formed);
  Status limit(int64_t iterations);
  Status chain(int64_t block, int64_t iterate, sidestep_chain* chain) const;

 private:
  enum class State : uint8_t { kNotStarted, kStarted, kCoarse, kEnded };

  bool exists(int64_t block, int64_t iterate) const;
  State& state(int64_t block, int64_t iterate);
  sidestep_chain describe(int64_t block, int64_t iterate) const;
  Status check_started(const char* what, int64_t block, int64_t iterate);
  bool can_form(int64_t block, int64_t iterate);
  const std::vector<sidestep_boundary>& form(int64_t block);  // all that can be

  std::vector<int64_t> bounds_;  // [B + 1]
  int64_t created_;              // iterations at first
  int64_t iterations_;           // and now
  std::vector<State> states_;    // [B, created_ + 1] of the chains
  std::vector<int64_t> next_;    // [B + 1] the iterate of each boundary that is formed next
  std::vector<sidestep_boundary> formed_;
};

// Evaluations of all chains together.
int64_t parareal_cost(const sidestep_parareal_options& options);

struct Wavefront {
  int64_t ticks = 0;
  std::vector<sidestep_evaluation> evaluations;  // in order of ticks
  std::vector<int64_t> formed;                   // [K + 1] ticks until x_B^p is there
};

// The schedule with at most `width` evaluations a tick, 0: any number.
Status simulate_parareal(const sidestep_parareal_options& options, int64_t width,
                         Wavefront* wavefront);

}  // namespace sidestep
