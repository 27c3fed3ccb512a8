// The arrays of an engine, in one block of its memory, and one solver step of many rows.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/memory.h"
#include "core/plan_table.h"
#include "core/status.h"
#include "sidestep/engine.h"

namespace sidestep {

// A row that steps. Its outputs are lines [D] of one array, one line for each of its branches.
struct SteppingRow {
  int64_t slot;
  int64_t line;           // of the plan table
  int64_t branches;       // G
  const float* guidance;  // [G], host
  const float* noise;     // [D] in the engine's memory, or null
  int64_t place[SIDESTEP_MAX_BRANCHES];
};

// A row whose next model input is wanted.
struct GatheredRow {
  int64_t slot;
  int64_t line;
  int64_t branches;
};

class EngineState {
 public:
  static Status check(const sidestep_engine_options& options);
  explicit EngineState(const sidestep_engine_options& options);  // checked
  ~EngineState();

  static int64_t bytes(const sidestep_engine_options& options);  // of a checked one
  Status allocate(const sidestep_engine_options& options);       // once, before all else

  PlanTable& table() { return table_; }
  Memory& memory() { return *memory_; }
  const void* kept() const { return kept_; }
  int64_t kept_place(int64_t slot, int64_t branch) const { return branch * capacity_ + slot; }

  // The first register is given, the others are 0.
  Status begin(int64_t slot, const float* latent);
  Status finish(int64_t slot, float* latent);

  // x: [N, D], branch by branch, the rows with the most branches first; then entry 0, up to `size`.
  Status gather(const std::vector<GatheredRow>& rows, int64_t size, void* x);

  // One step of each row; the slots all differ.
  Status step(const std::vector<SteppingRow>& rows, const void* outputs);

  // Of the rows stepped last: mean |x' - x|. Waits for the device.
  Status sizes(int64_t count, std::vector<float>* sizes);

  // A fresh output stays for the steps that skip.
  Status keep(const SteppingRow& row, const void* outputs);

 private:
  Status upload_numbers(const std::vector<SteppingRow>& rows);
  Status step_run(const std::vector<SteppingRow>& rows, const void* outputs, int64_t first,
                  int64_t last);
  sidestep_solver_step_args arguments(const float* table, int64_t first, int64_t rows,
                                      int64_t branches) const;
  const char* element(const void* array, int64_t line) const;

  int64_t dim_;
  int64_t capacity_;
  int64_t branches_;
  int32_t registers_;
  int32_t dtype_;
  int32_t device_;
  bool skips_;
  int64_t element_;  // bytes
  PlanTable table_;
  std::unique_ptr<Memory> memory_;
  void* owned_ = nullptr;

  float* registers_at_ = nullptr;  // [capacity, R, D]
  float* noise_ = nullptr;         // [capacity, D]
  char* kept_ = nullptr;           // [G, capacity, D] of the dtype, where requests may skip
  float* stats_ = nullptr;         // [capacity, 2]
  float* zeros_ = nullptr;         // [capacity, G]: weights of outputs that are not looked at
  float* weights_ = nullptr;       // [capacity, G]
  int64_t* lines_ = nullptr;       // [2, capacity]: of the rows, then their slots
  void* workspace_ = nullptr;

  std::vector<float> host_weights_;
  std::vector<int64_t> host_lines_;
  std::vector<float> host_stats_;
};

}  // namespace sidestep
