// A plan: a sampler as a table of numbers, read from the file of Python's Plan.save.
//
// runtime/plan.py defines what the numbers mean, and the digest: SHA-256 of ascii((name,
// initial_scale.hex(), threshold)), then of each array, "-" where there is none, else its shape as
// Python writes a tuple, and its bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/safetensors.h"
#include "core/status.h"
#include "sidestep/plan.h"

namespace sidestep {

// What Python's ascii() writes of a text in valid UTF-8.
std::string python_ascii(const std::string& text);

class Plan {
 public:
  static Status read(const uint8_t* data, int64_t size, std::shared_ptr<const Plan>* plan);

  const std::string& name() const { return name_; }
  const std::string& digest() const { return digest_; }
  double initial_scale() const { return initial_scale_; }
  int64_t steps() const { return steps_; }
  int num_registers() const { return registers_; }
  int64_t noise_columns() const { return columns_ - registers_ - 1; }
  bool stochastic() const;
  double time(int64_t step) const { return timesteps_[step]; }
  double input_scale(int64_t step) const { return input_scales_[step]; }

  // Which noise draw of the step enters the result; -1: none.
  int64_t used_draw(int64_t step) const { return used_draws_[step]; }

  // The line of the step in the table of kernels/solver_step.h, for `registers` registers, at least
  // the plan's own: those beyond stay as they are.
  void write_line(int64_t step, int registers, float* line) const;  // [W]

 private:
  Status take(const SafeTensors& file);
  Status take_metadata(const SafeTensors& file, std::string* head);
  Status take_matrices(const SafeTensor& tensor);
  Status take_column(const SafeTensors& file, const char* key, int64_t width,
                     std::vector<double>* values);
  Status take_draws(const SafeTensors& file);
  Status find_draws();
  double coefficient(int64_t step, int line, int64_t column) const;  // line R is the error's

  std::string name_;
  std::string digest_;
  double initial_scale_ = 1.0;
  int64_t steps_ = 0;
  int registers_ = 0;
  int64_t columns_ = 0;           // registers, u, noise
  std::vector<double> matrices_;  // [K, R, columns]
  std::vector<double> errors_;    // [K, columns], or empty
  std::vector<double> timesteps_;
  std::vector<double> input_scales_;
  std::vector<int64_t> draws_;
  std::vector<int64_t> used_draws_;
};

}  // namespace sidestep
