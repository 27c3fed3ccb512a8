// AdaptiveDiffusion's published rule (Ye et al., NeurIPS 2024), for one row.
//
// With the step sizes d_k = mean |x_{k+1} - x_k| the last output is reused at step k + 1 if
//
//     |(d_k + d_{k-2}) / 2 - d_{k-1}| <= threshold * d_{k-1}
//
// after four steps that are always computed, in fp32, with the published program's cap: it is
// looked at only when more than four decisions were made.
// runtime/methods/criteria/third_difference.py, mode "paper", decides the same to the bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sidestep {

class SkipRule {
 public:
  SkipRule() = default;
  SkipRule(float threshold, int64_t max_skip) : threshold_(threshold), max_skip_(max_skip) {}

  // Whether there is one; without, every step calls the model.
  bool active() const { return max_skip_ > 0; }

  // Step `step` has moved the latent by `size`: whether step + 1 calls the model.
  bool computes_next(int64_t step, float size) {
    sizes_[0] = sizes_[1];
    sizes_[1] = sizes_[2];
    sizes_[2] = size;
    ++seen_;
    if (seen_ < 3 || step + 1 < kWarmUp) return true;
    const float difference = std::fabs((sizes_[2] + sizes_[0]) / 2 - sizes_[1]);
    const bool stable = difference <= threshold_ * sizes_[1];
    const bool capped = decided_ > kUncapped && run_ >= std::min(max_skip_, decided_);
    ++decided_;
    const bool skips = stable && !capped;
    run_ = skips ? run_ + 1 : 0;
    return !skips;
  }

 private:
  static constexpr int64_t kWarmUp = 4;    // steps
  static constexpr int64_t kUncapped = 4;  // decisions

  float threshold_ = 0.0f;
  int64_t max_skip_ = 0;
  float sizes_[3] = {};
  int64_t seen_ = 0;
  int64_t decided_ = 0;
  int64_t run_ = 0;  // skips in a row
};

}  // namespace sidestep
