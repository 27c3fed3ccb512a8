// The engine for C and C++ programs; sidestep/engine.h says what it does.
//
// Which rows go into the next call is RowScheduler's business, on numbers; the arrays are in
// EngineState; this file keeps what is known of each request and row. runtime/engine.py is the same
// engine in Python, with every method.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/engine_state.h"
#include "core/row_scheduler.h"
#include "core/skip_rule.h"
#include "core/status.h"
#include "sidestep/engine.h"

namespace sidestep {

class Engine {
 public:
  static Status check(const sidestep_engine_options& options);
  explicit Engine(const sidestep_engine_options& options);              // checked
  Status allocate(const sidestep_engine_options& options);              // once, before all else
  static int64_t memory_bytes(const sidestep_engine_options& options);  // of checked ones

  Status submit(const sidestep_request& request, const std::shared_ptr<const Plan>& plan,
                int64_t* id);
  Status next(sidestep_call* call, void* stream);
  Status complete(int64_t ticket, const void* outputs, int64_t size, void* stream);
  Status fail(int64_t ticket, const std::string& reason);
  Status cancel(int64_t id, bool* ended);
  bool result(sidestep_result* result);
  sidestep_scheduler_counts counts() const { return scheduler_.counts(); }

 private:
  struct Request {
    sidestep_request asked;  // its plan and guidance are not looked at after submit
    PlanTable::Entry* entry = nullptr;
    std::vector<float> guidance;  // [guidance_steps, branches]
    int64_t calls = 0;
    int64_t evaluations = 0;
    int64_t last_ticket = -1;

    const float* weights(int64_t step) const {
      return guidance.data() + (asked.guidance_steps > 1 ? step : 0) * asked.branches;
    }
    const float* noise(int64_t row, int64_t step) const;  // null where the step uses none
  };

  // What is known of the row in a slot.
  struct Row {
    SkipRule rule;
    int64_t size = 0;                           // entries of the batch that it is in
    int64_t place[SIDESTEP_MAX_BRANCHES] = {};  // those of the row
  };

  Status check_request(const sidestep_request& request, const Plan& plan) const;
  Status admit();
  Status hand_out(const Batch& batch, sidestep_call* call);
  Status check_outputs(int64_t ticket, const void* outputs, int64_t size);
  Status advance(const std::vector<sidestep_row>& rows, const void* outputs, bool fresh);
  void prepare(const std::vector<sidestep_row>& rows, bool fresh);  // fills stepping_
  Status decide(const std::vector<sidestep_row>& rows);             // fills compute_
  Status store(const std::vector<sidestep_row>& rows, const void* outputs, bool fresh);
  void hand_back(const std::vector<sidestep_row>& rows);
  void break_off(const std::vector<sidestep_row>& rows, const std::string& why);
  void end(int64_t id, sidestep_outcome outcome, const std::string& why = "");

  const int64_t dim_;
  const int32_t registers_;
  const int32_t branches_;
  const bool skips_;
  const int64_t largest_;  // bucket
  RowScheduler scheduler_;
  EngineState state_;
  std::unordered_map<int64_t, Request> requests_;  // that have not ended
  std::deque<sidestep_result> results_;

  std::vector<Row> rows_;  // by slot
  std::vector<sidestep_row> members_;
  std::vector<GatheredRow> gathered_;
  std::vector<SteppingRow> stepping_;
  std::vector<float> sizes_, times_;
  std::vector<uint8_t> compute_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> states_;
};

}  // namespace sidestep
