// The C API of the row scheduler.
#include "core/guarded.h"
#include "core/handle.h"
#include "core/profiler.h"
#include "core/row_scheduler.h"
#include "sidestep/scheduler.h"

struct sidestep_scheduler : sidestep::Handle<sidestep::RowScheduler> {
  using Handle::Handle;
  static constexpr const char* kIsNull = "scheduler: the handle is null, expected a scheduler";

  sidestep::OpenRanges model_calls;  // of the batches in flight, by ticket
};

namespace {

using sidestep::guarded;
using sidestep::hand_over;
using sidestep::locked;
using sidestep::ProfilerRange;
using sidestep::RowScheduler;
using sidestep::Status;

}  // namespace

extern "C" {

sidestep_status sidestep_scheduler_create(const sidestep_scheduler_options* options,
                                          sidestep_scheduler** scheduler) {
  return guarded("scheduler_create", {{"options", options}, {"scheduler", scheduler}}, [&] {
    const Status status = RowScheduler::check(*options);
    if (status.ok()) *scheduler = new sidestep_scheduler(*options);
    return status;
  });
}

void sidestep_scheduler_destroy(sidestep_scheduler* scheduler) { delete scheduler; }

sidestep_status sidestep_scheduler_submit(sidestep_scheduler* scheduler,
                                          const sidestep_scheduler_request* request, int64_t* id) {
  return locked(scheduler, "scheduler_submit", {{"request", request}, {"id", id}},
                [&](RowScheduler& rows) { return rows.submit(*request, id); });
}

sidestep_status sidestep_scheduler_extend(sidestep_scheduler* scheduler,
                                          const sidestep_scheduler_extension* extension,
                                          int64_t* number) {
  return locked(scheduler, "scheduler_extend", {{"extension", extension}, {"number", number}},
                [&](RowScheduler& rows) { return rows.extend(*extension, number); });
}

sidestep_status sidestep_scheduler_admit(sidestep_scheduler* scheduler, sidestep_row* rows,
                                         int64_t* count) {
  return locked(scheduler, "scheduler_admit", {{"rows", rows}, {"count", count}},
                [&](RowScheduler& core) {
                  hand_over(core.admit(), rows, count);
                  return Status();
                });
}

sidestep_status sidestep_scheduler_next(sidestep_scheduler* scheduler, sidestep_batch* batch) {
  return locked(scheduler, "scheduler_next", {{"batch", batch}}, [&](RowScheduler& core) {
    const Status status = sidestep::check_pointers(
        "scheduler_next", {{"batch.rows", batch->rows}, {"batch.entries", batch->entries}});
    if (!status.ok()) return status;
    const ProfilerRange range("next");
    const sidestep::Batch& chosen = core.next();
    hand_over(chosen.rows, batch->rows, &batch->num_rows);
    hand_over(chosen.entries, batch->entries, &batch->size);
    batch->num_entries = chosen.num_entries;
    batch->ticket = chosen.ticket;
    if (!chosen.rows.empty()) scheduler->model_calls.begin({chosen.ticket, 0}, "model");
    return Status();
  });
}

sidestep_status sidestep_scheduler_complete(sidestep_scheduler* scheduler, int64_t ticket,
                                            sidestep_row* rows, int64_t* count) {
  return locked(scheduler, "scheduler_complete", {{"rows", rows}, {"count", count}},
                [&](RowScheduler& core) {
                  scheduler->model_calls.end({ticket, 0});
                  const ProfilerRange range("complete");
                  const std::vector<sidestep_row>* completed = nullptr;
                  const Status status = core.complete(ticket, &completed);
                  if (status.ok()) hand_over(*completed, rows, count);
                  return status;
                });
}

sidestep_status sidestep_scheduler_fail(sidestep_scheduler* scheduler, int64_t ticket, int64_t* ids,
                                        int64_t* count) {
  return locked(scheduler, "scheduler_fail", {{"ids", ids}, {"count", count}},
                [&](RowScheduler& core) {
                  scheduler->model_calls.end({ticket, 0});
                  const std::vector<int64_t>* failed = nullptr;
                  const Status status = core.fail(ticket, &failed);
                  if (status.ok()) hand_over(*failed, ids, count);
                  return status;
                });
}

sidestep_status sidestep_scheduler_skipping(sidestep_scheduler* scheduler, sidestep_row* rows,
                                            int64_t* count) {
  return locked(scheduler, "scheduler_skipping", {{"rows", rows}, {"count", count}},
                [&](RowScheduler& core) {
                  hand_over(core.skipping(), rows, count);
                  return Status();
                });
}

sidestep_status sidestep_scheduler_advance(sidestep_scheduler* scheduler, const int64_t* slots,
                                           const uint8_t* compute, int64_t count, int32_t* states) {
  return locked(scheduler, "scheduler_advance", {}, [&](RowScheduler& core) {
    const ProfilerRange range("advance");
    Status status;
    if (count != 0) {
      status = sidestep::check_pointers(
          "scheduler_advance", {{"slots", slots}, {"compute", compute}, {"states", states}});
    }
    return status.ok() ? core.advance(slots, compute, count, states) : status;
  });
}

sidestep_status sidestep_scheduler_drop(sidestep_scheduler* scheduler, int64_t id, int32_t failed,
                                        int32_t* ended) {
  return locked(scheduler, "scheduler_drop", {{"ended", ended}}, [&](RowScheduler& core) {
    bool was_live = false;
    const Status status = core.drop(id, failed != 0, &was_live);
    if (status.ok()) *ended = was_live ? 1 : 0;
    return status;
  });
}

sidestep_status sidestep_scheduler_drop_row(sidestep_scheduler* scheduler, int64_t id, int64_t row,
                                            int32_t* ended) {
  return locked(scheduler, "scheduler_drop_row", {{"ended", ended}}, [&](RowScheduler& core) {
    bool was_last = false;
    const Status status = core.drop_row(id, row, &was_last);
    if (status.ok()) *ended = was_last ? 1 : 0;
    return status;
  });
}

sidestep_status sidestep_scheduler_count(sidestep_scheduler* scheduler,
                                         sidestep_scheduler_counts* counts) {
  return locked(scheduler, "scheduler_count", {{"counts", counts}}, [&](RowScheduler& core) {
    *counts = core.counts();
    return Status();
  });
}

}  // extern "C"
