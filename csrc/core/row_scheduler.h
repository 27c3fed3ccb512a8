// The row scheduler of the engine; sidestep/scheduler.h says what it does. It holds numbers only.
//
// Only the constructor, the queue of extensions and the sentence of a refusal allocate: the results
// below are vectors of the scheduler that were given their size at its construction, and are valid
// until its next call.
#pragma once

#include <cstdint>
#include <vector>

#include "core/buckets.h"
#include "core/extension_queue.h"
#include "core/request_list.h"
#include "core/status.h"
#include "sidestep/scheduler.h"

namespace sidestep {

struct Batch {
  int64_t ticket = -1;
  int64_t num_entries = 0;              // without padding
  std::vector<sidestep_row> rows;       // those with the most branches first
  std::vector<sidestep_entry> entries;  // padded; empty when no row needs the model
};

class RowScheduler {
 public:
  static Status check(const sidestep_scheduler_options& options);
  explicit RowScheduler(const sidestep_scheduler_options& options);  // checked

  Status submit(const sidestep_scheduler_request& request, int64_t* id);
  Status extend(const sidestep_scheduler_extension& extension, int64_t* number);
  const std::vector<sidestep_row>& admit();
  const Batch& next();
  const std::vector<sidestep_row>& in_flight(int64_t ticket);  // none once it is back
  Status complete(int64_t ticket, const std::vector<sidestep_row>** rows);
  Status fail(int64_t ticket, const std::vector<int64_t>** ids);
  const std::vector<sidestep_row>& skipping();
  Status advance(const int64_t* slots, const uint8_t* compute, int64_t count, int32_t* states);
  Status drop(int64_t id, bool failed, bool* ended);
  Status drop_row(int64_t id, int64_t row, bool* ended);
  sidestep_scheduler_counts counts() const;

 private:
  enum class State : uint8_t { kFree, kReady, kInFlight, kStepping, kSkipping };

  // A slot, and the row in it.
  struct Slot {
    State state = State::kFree;
    int64_t request = -1;
    int64_t row = 0;
    int64_t step = 0;
    int64_t steps = 0;
    int64_t branches = 1;
    int64_t group = 0;
    int64_t extension = -1;  // its number; -1 for a row of submit
    int64_t since = 0;       // when it came to need the model, counted in rows
    int64_t ticket = -1;     // of the batch it is in
    int64_t position = 0;    // in that batch
  };

  sidestep_row describe(int64_t slot) const;
  Status check_id(int64_t id) const;
  Status check_ticket(const char* what, int64_t ticket) const;
  Slot& occupy(const LiveRequest& request, int64_t row, int64_t steps);  // a free slot
  void admit_extensions();
  void choose();                 // fills batch_.rows
  void lay_out();                // fills batch_.entries
  void collect(int64_t ticket);  // fills rows_ with the rows of that batch, in its order
  int32_t finish_row(int64_t slot);
  void release(int64_t slot);
  void end(int64_t id, int64_t* counter);

  Buckets buckets_;
  RequestList requests_;
  ExtensionQueue extensions_;
  std::vector<Slot> slots_;
  std::vector<int64_t> free_;  // slots, the next one to give away last
  int64_t next_id_ = 0;
  int64_t next_ticket_ = 0;
  int64_t next_extension_ = 0;
  int64_t clock_ = 0;
  int64_t done_ = 0;
  int64_t cancelled_ = 0;
  int64_t failed_ = 0;

  Batch batch_;
  std::vector<sidestep_row> rows_;
  std::vector<int64_t> numbers_;
};

}  // namespace sidestep
