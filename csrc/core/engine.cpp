// The engine: see engine.h.
#include "core/engine.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>

namespace sidestep {
namespace {

sidestep_scheduler_options scheduler_options(const sidestep_engine_options& options) {
  return {options.capacity, options.queue, options.buckets, options.num_buckets};
}

}  // namespace

Status Engine::check(const sidestep_engine_options& options) {
  Status status = EngineState::check(options);
  if (status.ok()) status = RowScheduler::check(scheduler_options(options));
  if (!status.ok()) return status;
  const int64_t largest = options.buckets[options.num_buckets - 1];
  if (options.num_branches <= largest) return status;
  return invalid_argument("engine: the largest bucket is %" PRId64
                          ", expected at least the %d branches of a row",
                          largest, options.num_branches);
}

Engine::Engine(const sidestep_engine_options& options)
    : dim_(options.dim),
      registers_(options.num_registers),
      branches_(options.num_branches),
      skips_(options.skips != 0),
      largest_(options.buckets[options.num_buckets - 1]),
      scheduler_(scheduler_options(options)),
      state_(options),
      rows_(options.capacity),
      sizes_(options.capacity),
      times_(largest_),
      compute_(options.capacity),
      slots_(options.capacity),
      states_(options.capacity) {
  members_.reserve(options.capacity);
  gathered_.reserve(options.capacity);
  stepping_.reserve(options.capacity);
}

Status Engine::allocate(const sidestep_engine_options& options) { return state_.allocate(options); }

int64_t Engine::memory_bytes(const sidestep_engine_options& options) {
  return EngineState::bytes(options);
}

const float* Engine::Request::noise(int64_t row, int64_t step) const {
  const Plan& plan = *entry->plan;
  const int64_t draw = plan.used_draw(step);
  if (draw < 0) return nullptr;
  const int64_t index = (step * plan.noise_columns() + draw) * asked.rows + row;
  return asked.noise + index * asked.dim;
}

Status Engine::check_request(const sidestep_request& request, const Plan& plan) const {
  const char* name = plan.name().c_str();
  if (plan.num_registers() > registers_) {
    return invalid_argument("engine: %.100s has %d registers, expected at most the engine's %d",
                            name, plan.num_registers(), registers_);
  }
  if (request.dim != dim_) {
    return invalid_argument("engine: the request's dim is %" PRId64 ", expected %" PRId64,
                            request.dim, dim_);
  }
  if (request.branches < 1 || request.branches > branches_) {
    return invalid_argument("engine: the request has %d branches, expected 1 to the engine's %d",
                            request.branches, branches_);
  }
  if (request.guidance_steps != 1 && request.guidance_steps != plan.steps()) {
    return invalid_argument("engine: guidance_steps is %" PRId64 ", expected 1 or the %" PRId64
                            " steps of the plan",
                            request.guidance_steps, plan.steps());
  }
  for (int64_t i = 0; i < request.guidance_steps * request.branches; ++i) {
    if (std::fabs(request.guidance[i]) < 1e30f) continue;
    return invalid_argument("engine: guidance[%" PRId64 "] is %g, expected a finite weight", i,
                            static_cast<double>(request.guidance[i]));
  }
  if (plan.stochastic() && request.noise == nullptr) {
    return invalid_argument("engine: %.100s is stochastic, but noise is null", name);
  }
  if (request.max_skip < 0 || !(request.skip_threshold >= 0) ||
      !std::isfinite(request.skip_threshold)) {
    return invalid_argument("engine: max_skip is %d and skip_threshold %g, expected 0 or more",
                            request.max_skip, static_cast<double>(request.skip_threshold));
  }
  if (request.max_skip > 0 && !skips_) {
    return invalid_argument("engine: max_skip is %d, but the engine was made with skips = 0",
                            request.max_skip);
  }
  return Status();
}

Status Engine::submit(const sidestep_request& request, const std::shared_ptr<const Plan>& plan,
                      int64_t* id) {
  Status status = check_request(request, *plan);
  if (!status.ok()) return status;
  Request made;
  made.asked = request;
  made.guidance.assign(request.guidance,
                       request.guidance + request.guidance_steps * request.branches);
  status = state_.table().acquire(plan, &made.entry);
  if (!status.ok()) return status;
  status = scheduler_.submit({request.rows, plan->steps(), request.branches, request.group}, id);
  if (!status.ok()) {
    state_.table().release(made.entry);
    return status;
  }
  requests_.emplace(*id, std::move(made));
  if (plan->steps() == 0) end(*id, SIDESTEP_REQUEST_DONE);
  return status;
}

Status Engine::next(sidestep_call* call, void* stream) {
  if (call->x == nullptr || call->entries == nullptr || call->room < largest_) {
    return invalid_argument("engine: next has x = %p and entries = %p with room for %" PRId64
                            ", expected room for the largest bucket of %" PRId64,
                            call->x, static_cast<void*>(call->entries), call->room, largest_);
  }
  state_.memory().use(stream);
  Status status = admit();
  if (!status.ok()) return status;
  const Batch& batch = scheduler_.next();
  call->size = call->num_entries = 0;
  call->ticket = -1;
  if (batch.rows.empty()) return status;
  const int64_t ticket = batch.ticket;
  status = hand_out(batch, call);
  if (status.ok()) return status;
  call->size = call->num_entries = 0;
  fail(ticket, status.message());
  return status;
}

// Waiting requests move into free slots; where the device refuses, the rows in question fail.
Status Engine::admit() {
  members_ = scheduler_.admit();
  Status status;
  for (const sidestep_row& row : members_) {
    const auto found = requests_.find(row.request);
    if (found == requests_.end()) continue;  // failed with an earlier row
    Request& request = found->second;
    Status of_row = state_.table().write(request.entry, &state_.memory());
    if (of_row.ok()) of_row = state_.begin(row.slot, request.asked.latents + row.row * dim_);
    rows_[row.slot] = Row();
    rows_[row.slot].rule = SkipRule(request.asked.skip_threshold, request.asked.max_skip);
    if (of_row.ok()) continue;
    status = of_row;
    break_off({row}, of_row.message());
  }
  return status;
}

Status Engine::hand_out(const Batch& batch, sidestep_call* call) {
  const auto size = static_cast<int64_t>(batch.entries.size());
  for (const sidestep_row& row : batch.rows) rows_[row.slot].size = size;
  for (int64_t i = 0; i < size; ++i) {
    const sidestep_row& row = batch.rows[batch.entries[i].position];
    const Request& request = requests_.at(row.request);
    const int64_t branch = batch.entries[i].branch;
    const double time = request.entry->plan->time(row.step);
    call->entries[i] = {request.asked.tag, row.request, row.row, branch, row.step, time};
    times_[i] = static_cast<float>(time);
    if (i < batch.num_entries) rows_[row.slot].place[branch] = i;
  }
  gathered_.clear();
  for (const sidestep_row& row : batch.rows) {
    const auto& lines = requests_.at(row.request).entry->lines;
    gathered_.push_back({row.slot, lines[row.step], row.branches});
  }
  call->size = size;
  call->num_entries = batch.num_entries;
  call->ticket = batch.ticket;
  const Status status = state_.gather(gathered_, size, call->x);
  if (!status.ok() || call->t == nullptr) return status;
  return state_.memory().upload(call->t, times_.data(), size * 4);
}

Status Engine::check_outputs(int64_t ticket, const void* outputs, int64_t size) {
  const std::vector<sidestep_row>& rows = scheduler_.in_flight(ticket);
  if (rows.empty()) return Status();
  const int64_t expected = rows_[rows.front().slot].size;
  if (outputs != nullptr && size == expected) return Status();
  return invalid_argument("engine: complete has outputs = %p of %" PRId64
                          " entries, expected those of the call's %" PRId64,
                          outputs, size, expected);
}

Status Engine::complete(int64_t ticket, const void* outputs, int64_t size, void* stream) {
  Status status = check_outputs(ticket, outputs, size);
  if (!status.ok()) return status;
  state_.memory().use(stream);
  const std::vector<sidestep_row>* rows = nullptr;
  status = scheduler_.complete(ticket, &rows);
  if (!status.ok() || rows->empty()) return status;
  members_ = *rows;
  for (const sidestep_row& row : members_) {
    Request& request = requests_.at(row.request);
    if (request.last_ticket != ticket) ++request.calls;
    request.last_ticket = ticket;
    ++request.evaluations;
  }
  status = advance(members_, outputs, true);
  while (status.ok()) {
    members_ = scheduler_.skipping();
    if (members_.empty()) return status;
    status = advance(members_, state_.kept(), false);
  }
  return status;
}

// One step of these rows; what the device refuses ends their requests.
Status Engine::advance(const std::vector<sidestep_row>& rows, const void* outputs, bool fresh) {
  prepare(rows, fresh);
  Status status = state_.step(stepping_, outputs);
  if (status.ok()) status = decide(rows);
  if (status.ok()) status = store(rows, outputs, fresh);
  if (status.ok()) {
    hand_back(rows);
  } else {
    break_off(rows, status.message());
  }
  return status;
}

void Engine::prepare(const std::vector<sidestep_row>& rows, bool fresh) {
  stepping_.clear();
  for (const sidestep_row& row : rows) {
    const Request& request = requests_.at(row.request);
    SteppingRow stepping{row.slot,
                         request.entry->lines[row.step],
                         row.branches,
                         request.weights(row.step),
                         request.noise(row.row, row.step),
                         {}};
    for (int64_t g = 0; g < row.branches; ++g) {
      stepping.place[g] = fresh ? rows_[row.slot].place[g] : state_.kept_place(row.slot, g);
    }
    stepping_.push_back(stepping);
  }
}

// Which rows call the model at their next step. Reads the device only if a row may skip.
Status Engine::decide(const std::vector<sidestep_row>& rows) {
  const auto count = static_cast<int64_t>(rows.size());
  std::fill_n(compute_.begin(), count, uint8_t{1});
  const auto decides = [this](const sidestep_row& row) {
    const Request& request = requests_.at(row.request);
    return rows_[row.slot].rule.active() && row.step + 1 < request.entry->plan->steps();
  };
  if (std::none_of(rows.begin(), rows.end(), decides)) return Status();
  const Status status = state_.sizes(count, &sizes_);
  for (int64_t i = 0; i < count && status.ok(); ++i) {
    if (!decides(rows[i])) continue;
    const bool next = rows_[rows[i].slot].rule.computes_next(rows[i].step, sizes_[i]);
    compute_[i] = next ? 1 : 0;
  }
  return status;
}

Status Engine::store(const std::vector<sidestep_row>& rows, const void* outputs, bool fresh) {
  Status status;
  for (size_t i = 0; i < rows.size() && status.ok(); ++i) {
    const Request& request = requests_.at(rows[i].request);
    if (rows[i].step + 1 == request.entry->plan->steps()) {
      status = state_.finish(rows[i].slot, request.asked.latents + rows[i].row * dim_);
    } else if (fresh && compute_[i] == 0) {
      status = state_.keep(stepping_[i], outputs);
    }
  }
  return status;
}

// To the scheduler; latents that are not finite end a request that decides by them.
void Engine::hand_back(const std::vector<sidestep_row>& rows) {
  size_t count = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const auto found = requests_.find(rows[i].request);
    if (found == requests_.end()) continue;
    const bool decided =
        rows_[rows[i].slot].rule.active() && rows[i].step + 1 < found->second.entry->plan->steps();
    if (decided && !std::isfinite(sizes_[i])) {
      break_off({rows[i]}, "row " + std::to_string(rows[i].row) + " at step " +
                               std::to_string(rows[i].step) + ": the latents are not finite");
    }
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (requests_.count(rows[i].request) == 0) continue;
    slots_[count] = rows[i].slot;
    compute_[count++] = compute_[i];
  }
  scheduler_.advance(slots_.data(), compute_.data(), static_cast<int64_t>(count), states_.data());
  count = 0;
  for (const sidestep_row& row : rows) {
    if (requests_.count(row.request) == 0) continue;
    if (states_[count++] == SIDESTEP_ROW_LAST) end(row.request, SIDESTEP_REQUEST_DONE);
  }
}

void Engine::break_off(const std::vector<sidestep_row>& rows, const std::string& why) {
  for (const sidestep_row& row : rows) {
    bool ended = false;
    scheduler_.drop(row.request, true, &ended);
    if (ended) end(row.request, SIDESTEP_REQUEST_FAILED, why);
  }
}

Status Engine::fail(int64_t ticket, const std::string& reason) {
  const std::vector<int64_t>* ids = nullptr;
  const Status status = scheduler_.fail(ticket, &ids);
  if (!status.ok()) return status;
  for (const int64_t id : *ids) end(id, SIDESTEP_REQUEST_FAILED, reason);
  return status;
}

Status Engine::cancel(int64_t id, bool* ended) {
  const Status status = scheduler_.drop(id, false, ended);
  if (status.ok() && *ended) end(id, SIDESTEP_REQUEST_CANCELLED);
  return status;
}

bool Engine::result(sidestep_result* result) {
  if (results_.empty()) return false;
  *result = results_.front();
  results_.pop_front();
  return true;
}

// The scheduler has let go of a request: so does the engine, and keeps the result.
void Engine::end(int64_t id, sidestep_outcome outcome, const std::string& why) {
  const auto found = requests_.find(id);
  Request& request = found->second;
  sidestep_result result{};
  result.tag = request.asked.tag;
  result.request = id;
  result.calls = request.calls;
  result.evaluations = request.evaluations;
  result.outcome = outcome;
  std::snprintf(result.error, sizeof(result.error), "%s", why.c_str());
  results_.push_back(result);
  state_.table().release(request.entry);
  requests_.erase(found);
}

}  // namespace sidestep
