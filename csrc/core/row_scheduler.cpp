// The row scheduler: see row_scheduler.h.
#include "core/row_scheduler.h"

#include <algorithm>
#include <cinttypes>

namespace sidestep {
namespace {

// Ids, tickets and times count up from 0 and fit for centuries; sizes are bounded to fit in memory.
constexpr int64_t kMaxSize = int64_t{1} << 20;

Status check_size(const char* name, int64_t value, int64_t least) {
  if (value >= least && value <= kMaxSize) return Status();
  return invalid_argument("scheduler: %s is %" PRId64 ", expected %" PRId64 " to %" PRId64, name,
                          value, least, kMaxSize);
}

}  // namespace

Status RowScheduler::check(const sidestep_scheduler_options& options) {
  Status status = check_size("capacity", options.capacity, 1);
  if (status.ok()) status = check_size("queue", options.queue, 1);
  if (status.ok()) status = check_size("num_buckets", options.num_buckets, 1);
  if (status.ok() && options.buckets == nullptr) {
    status = invalid_argument("scheduler: buckets is null, expected an address");
  }
  if (status.ok()) status = Buckets::check(options.buckets, options.num_buckets);
  if (!status.ok()) return status;
  return check_size("the largest bucket", options.buckets[options.num_buckets - 1], 1);
}

RowScheduler::RowScheduler(const sidestep_scheduler_options& options)
    : buckets_(options.buckets, options.num_buckets),
      requests_(options.capacity, options.queue),
      slots_(options.capacity) {
  free_.reserve(options.capacity);
  for (int64_t slot = options.capacity - 1; slot >= 0; --slot) free_.push_back(slot);
  batch_.rows.reserve(options.capacity);
  batch_.entries.reserve(buckets_.largest());
  rows_.reserve(options.capacity);
  numbers_.reserve(options.capacity);
}

Status RowScheduler::submit(const sidestep_scheduler_request& request, int64_t* id) {
  const auto capacity = static_cast<int64_t>(slots_.size());
  if (request.rows < 1 || request.rows > capacity) {
    return invalid_argument("scheduler: the request has %" PRId64
                            " rows, expected 1 to the capacity of %" PRId64,
                            request.rows, capacity);
  }
  if (request.branches < 1 || request.branches > buckets_.largest()) {
    return invalid_argument("scheduler: the request has %" PRId64
                            " branches, expected 1 to the largest bucket of %" PRId64,
                            request.branches, buckets_.largest());
  }
  if (request.steps < 0) {
    return invalid_argument("scheduler: the request has %" PRId64 " steps, expected 0 or more",
                            request.steps);
  }
  if (request.steps == 0) {
    *id = next_id_++;
    ++done_;
    return Status();
  }
  if (requests_.full()) {
    return Status(SIDESTEP_FULL, "scheduler: the queue is full, " +
                                     std::to_string(requests_.waiting()) +
                                     " requests wait; submit again when one has ended");
  }
  *id = next_id_++;
  requests_.push({*id, request.rows, request.steps, request.branches, request.group, request.rows});
  return Status();
}

Status RowScheduler::extend(const sidestep_scheduler_extension& extension, int64_t* number) {
  const Status status = check_id(extension.request);
  if (!status.ok()) return status;
  LiveRequest* request = requests_.find(extension.request);
  if (request == nullptr) {
    return invalid_argument("scheduler: extend of request %" PRId64 ", which has ended",
                            extension.request);
  }
  if (extension.steps < 1) {
    return invalid_argument("scheduler: the extension has %" PRId64 " steps, expected 1 or more",
                            extension.steps);
  }
  extensions_.push({next_extension_, extension.request, extension.row, extension.steps, clock_++});
  ++request->remaining;
  *number = next_extension_++;
  return Status();
}

const std::vector<sidestep_row>& RowScheduler::admit() {
  rows_.clear();
  admit_extensions();
  for (LiveRequest* request = requests_.first_waiting();
       request != nullptr && request->rows <= static_cast<int64_t>(free_.size());
       request = requests_.first_waiting()) {
    for (int64_t row = 0; row < request->rows; ++row) {
      occupy(*request, row, request->steps).since = clock_++;
    }
    requests_.start_first_waiting();
    admit_extensions();  // those of this request, before the next request
  }
  return rows_;
}

// Those of requests that run, until no slot is free.
void RowScheduler::admit_extensions() {
  extensions_.remove([this](const Extension& extension) {
    if (free_.empty() || !requests_.runs(extension.request)) return false;
    Slot& slot = occupy(*requests_.find(extension.request), extension.row, extension.steps);
    slot.since = extension.since;
    slot.extension = rows_.back().extension = extension.number;
    return true;
  });
}

RowScheduler::Slot& RowScheduler::occupy(const LiveRequest& request, int64_t row, int64_t steps) {
  const int64_t at = free_.back();
  free_.pop_back();
  Slot& slot = slots_[at];
  slot = Slot();
  slot.state = State::kReady;
  slot.request = request.id;
  slot.row = row;
  slot.steps = steps;
  slot.branches = request.branches;
  slot.group = request.group;
  rows_.push_back(describe(at));
  return slot;
}

const Batch& RowScheduler::next() {
  choose();
  lay_out();
  if (batch_.rows.empty()) return batch_;
  batch_.ticket = next_ticket_++;
  for (size_t position = 0; position < batch_.rows.size(); ++position) {
    Slot& slot = slots_[batch_.rows[position].slot];
    slot.state = State::kInFlight;
    slot.ticket = batch_.ticket;
    slot.position = static_cast<int64_t>(position);
    batch_.rows[position].position = slot.position;
  }
  return batch_;
}

// The row that has waited longest, and all of its group that fit beside it, in order of waiting.
void RowScheduler::choose() {
  numbers_.clear();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].state == State::kReady) numbers_.push_back(static_cast<int64_t>(slot));
  }
  std::sort(numbers_.begin(), numbers_.end(),
            [this](int64_t a, int64_t b) { return slots_[a].since < slots_[b].since; });
  batch_.rows.clear();
  int64_t entries = 0;
  for (const int64_t at : numbers_) {
    const Slot& slot = slots_[at];
    if (slot.group != slots_[numbers_.front()].group) continue;
    if (entries + slot.branches > buckets_.largest()) continue;
    entries += slot.branches;
    batch_.rows.push_back(describe(at));
  }
  std::sort(batch_.rows.begin(), batch_.rows.end(),
            [this](const sidestep_row& a, const sidestep_row& b) {
              if (a.branches != b.branches) return a.branches > b.branches;
              return slots_[a.slot].since < slots_[b.slot].since;
            });
}

// Branch by branch; then entry 0 again, so that padding is always a valid row.
void RowScheduler::lay_out() {
  batch_.entries.clear();
  batch_.num_entries = 0;
  batch_.ticket = -1;
  if (batch_.rows.empty()) return;
  for (int64_t branch = 0; branch < batch_.rows.front().branches; ++branch) {
    for (size_t position = 0; position < batch_.rows.size(); ++position) {
      if (batch_.rows[position].branches <= branch) break;
      batch_.entries.push_back({static_cast<int64_t>(position), branch});
    }
  }
  batch_.num_entries = static_cast<int64_t>(batch_.entries.size());
  batch_.entries.resize(buckets_.holding(batch_.num_entries), sidestep_entry{0, 0});
}

const std::vector<sidestep_row>& RowScheduler::in_flight(int64_t ticket) {
  collect(ticket);
  return rows_;
}

Status RowScheduler::complete(int64_t ticket, const std::vector<sidestep_row>** rows) {
  const Status status = check_ticket("complete", ticket);
  if (!status.ok()) return status;
  collect(ticket);
  for (const sidestep_row& row : rows_) {
    slots_[row.slot].state = State::kStepping;
  }
  *rows = &rows_;
  return Status();
}

Status RowScheduler::fail(int64_t ticket, const std::vector<int64_t>** ids) {
  const Status status = check_ticket("fail", ticket);
  if (!status.ok()) return status;
  collect(ticket);
  numbers_.clear();
  for (const sidestep_row& row : rows_) {
    if (requests_.find(row.request) == nullptr) continue;  // ended with an earlier row of it
    numbers_.push_back(row.request);
    end(row.request, &failed_);
  }
  *ids = &numbers_;
  return Status();
}

const std::vector<sidestep_row>& RowScheduler::skipping() {
  rows_.clear();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].state == State::kSkipping) {
      rows_.push_back(describe(static_cast<int64_t>(slot)));
    }
  }
  return rows_;
}

Status RowScheduler::advance(const int64_t* slots, const uint8_t* compute, int64_t count,
                             int32_t* states) {
  const auto capacity = static_cast<int64_t>(slots_.size());
  if (count < 0 || count > capacity) {
    return invalid_argument("scheduler: advance of %" PRId64 " rows, expected 0 to %" PRId64, count,
                            capacity);
  }
  for (int64_t i = 0; i < count; ++i) {
    const bool stepping =
        slots[i] >= 0 && slots[i] < capacity &&
        (slots_[slots[i]].state == State::kStepping || slots_[slots[i]].state == State::kSkipping);
    if (!stepping) {
      return invalid_argument("scheduler: advance of slots[%" PRId64 "] = %" PRId64
                              ", expected a row that has been completed or skips",
                              i, slots[i]);
    }
  }
  numbers_.assign(slots, slots + count);
  std::sort(numbers_.begin(), numbers_.end());
  const auto twice = std::adjacent_find(numbers_.begin(), numbers_.end());
  if (twice != numbers_.end()) {
    return invalid_argument("scheduler: advance of slot %" PRId64 " twice, expected it once",
                            *twice);
  }
  for (int64_t i = 0; i < count; ++i) {
    Slot& slot = slots_[slots[i]];
    if (++slot.step == slot.steps) {
      states[i] = finish_row(slots[i]);
    } else if (compute[i] != 0) {
      slot.state = State::kReady;
      slot.since = clock_++;
      states[i] = SIDESTEP_ROW_READY;
    } else {
      slot.state = State::kSkipping;
      states[i] = SIDESTEP_ROW_SKIPPING;
    }
  }
  return Status();
}

Status RowScheduler::drop(int64_t id, bool failed, bool* ended) {
  const Status status = check_id(id);
  if (!status.ok()) return status;
  *ended = requests_.find(id) != nullptr;
  if (*ended) end(id, failed ? &failed_ : &cancelled_);
  return Status();
}

Status RowScheduler::drop_row(int64_t id, int64_t row, bool* ended) {
  const Status status = check_id(id);
  if (!status.ok()) return status;
  *ended = false;
  LiveRequest* request = requests_.find(id);
  if (request == nullptr) return Status();
  if (!requests_.runs(id)) {
    return invalid_argument(
        "scheduler: drop_row of request %" PRId64 ", which waits, expected one that runs", id);
  }
  request->remaining -= extensions_.remove(
      [&](const Extension& waits) { return waits.request == id && waits.row == row; });
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    const Slot& held = slots_[slot];
    if (held.state == State::kFree || held.request != id || held.row != row) continue;
    release(static_cast<int64_t>(slot));
    --request->remaining;
  }
  *ended = request->remaining == 0;
  if (*ended) end(id, &done_);
  return Status();
}

sidestep_scheduler_counts RowScheduler::counts() const {
  sidestep_scheduler_counts counts{};
  counts.waiting = requests_.waiting();
  counts.running = requests_.running();
  counts.free = static_cast<int64_t>(free_.size());
  for (const Slot& slot : slots_) {
    counts.ready += slot.state == State::kReady;
    counts.in_flight += slot.state == State::kInFlight;
  }
  counts.submitted = next_id_;
  counts.done = done_;
  counts.cancelled = cancelled_;
  counts.failed = failed_;
  counts.extensions = extensions_.size();
  return counts;
}

sidestep_row RowScheduler::describe(int64_t at) const {
  const Slot& slot = slots_[at];
  const int64_t position = slot.state == State::kInFlight ? slot.position : -1;
  return {slot.request, slot.row, at, slot.step, position, slot.branches, slot.extension};
}

Status RowScheduler::check_id(int64_t id) const {
  if (id >= 0 && id < next_id_) return Status();
  return invalid_argument("scheduler: request %" PRId64 " is unknown, expected 0 to %" PRId64, id,
                          next_id_ - 1);
}

Status RowScheduler::check_ticket(const char* what, int64_t ticket) const {
  if (ticket >= 0 && ticket < next_ticket_) return Status();
  return invalid_argument("scheduler: %s of batch %" PRId64 ", which was never handed out", what,
                          ticket);
}

void RowScheduler::collect(int64_t ticket) {
  rows_.clear();
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].state == State::kInFlight && slots_[slot].ticket == ticket) {
      rows_.push_back(describe(static_cast<int64_t>(slot)));
    }
  }
  std::sort(rows_.begin(), rows_.end(),
            [](const sidestep_row& a, const sidestep_row& b) { return a.position < b.position; });
}

int32_t RowScheduler::finish_row(int64_t slot) {
  LiveRequest* request = requests_.find(slots_[slot].request);
  const int64_t id = request->id;
  const bool last = --request->remaining == 0;
  release(slot);
  if (last) end(id, &done_);
  return last ? SIDESTEP_ROW_LAST : SIDESTEP_ROW_DONE;
}

void RowScheduler::release(int64_t slot) {
  slots_[slot] = Slot();
  free_.push_back(slot);
}

void RowScheduler::end(int64_t id, int64_t* counter) {
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_[slot].state != State::kFree && slots_[slot].request == id) {
      release(static_cast<int64_t>(slot));
    }
  }
  extensions_.remove([id](const Extension& waits) { return waits.request == id; });
  requests_.erase(id);
  ++*counter;
}

}  // namespace sidestep
