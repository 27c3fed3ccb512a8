// A host of the row scheduler, as small as it can be.
#ifndef SIDESTEP_TESTS_SCHEDULER_HOST_H_
#define SIDESTEP_TESTS_SCHEDULER_HOST_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "expect.h"
#include "sidestep/scheduler.h"

namespace {

// A scheduler, and the arrays that its host owns.
struct Host {
  Host(int64_t capacity, int64_t queue, std::vector<int64_t> sizes)
      : buckets(std::move(sizes)), rows(capacity), entries(buckets.back()), ids(capacity) {
    const sidestep_scheduler_options options{capacity, queue, buckets.data(),
                                             static_cast<int64_t>(buckets.size())};
    expect(sidestep_scheduler_create(&options, &scheduler) == SIDESTEP_OK, "a scheduler is made");
    batch.rows = batch_rows();
    batch.entries = entries.data();
  }
  ~Host() { sidestep_scheduler_destroy(scheduler); }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  sidestep_row* batch_rows() {
    in_batch.resize(rows.size());
    return in_batch.data();
  }

  int64_t submit(int64_t n, int64_t steps, int64_t branches = 1, int64_t group = 0) {
    const sidestep_scheduler_request request{n, steps, branches, group};
    int64_t id = -1;
    expect(sidestep_scheduler_submit(scheduler, &request, &id) == SIDESTEP_OK, "submit succeeds");
    return id;
  }

  int64_t admit() {
    expect(sidestep_scheduler_admit(scheduler, rows.data(), &count) == SIDESTEP_OK, "admit");
    return count;
  }

  bool next() {
    expect(sidestep_scheduler_next(scheduler, &batch) == SIDESTEP_OK, "next succeeds");
    return batch.size > 0;
  }

  // Completes a batch and advances its rows, all of them to compute or to skip.
  std::vector<int32_t> complete(int64_t ticket, bool compute = true) {
    expect(sidestep_scheduler_complete(scheduler, ticket, rows.data(), &count) == SIDESTEP_OK,
           "complete succeeds");
    return advance(compute);
  }

  std::vector<int32_t> advance(bool compute) {
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < count; ++i) slots.push_back(rows[i].slot);
    const std::vector<uint8_t> flags(slots.size(), compute ? 1 : 0);
    std::vector<int32_t> states(slots.size());
    expect(sidestep_scheduler_advance(scheduler, slots.data(), flags.data(), count,
                                      states.data()) == SIDESTEP_OK,
           "advance succeeds");
    return states;
  }

  int64_t extend(int64_t request, int64_t row, int64_t steps) {
    const sidestep_scheduler_extension extension{request, row, steps};
    int64_t number = -1;
    expect(sidestep_scheduler_extend(scheduler, &extension, &number) == SIDESTEP_OK, "extend");
    return number;
  }

  // Runs ticks until no row needs the model; returns how often they have allocated.
  int finish() {
    std::vector<int64_t> slots(rows.size());
    const std::vector<uint8_t> compute(rows.size(), 1);
    std::vector<int32_t> states(rows.size());
    const int before = g_allocations;
    while (next()) {
      sidestep_scheduler_complete(scheduler, batch.ticket, rows.data(), &count);
      for (int64_t i = 0; i < count; ++i) slots[i] = rows[i].slot;
      sidestep_scheduler_advance(scheduler, slots.data(), compute.data(), count, states.data());
      sidestep_scheduler_admit(scheduler, rows.data(), &count);
    }
    return g_allocations - before;
  }

  bool drop_row(int64_t request, int64_t row) {
    int32_t ended = 0;
    expect(sidestep_scheduler_drop_row(scheduler, request, row, &ended) == SIDESTEP_OK, "drop_row");
    return ended != 0;
  }

  sidestep_scheduler_counts counts() {
    sidestep_scheduler_counts counts{};
    sidestep_scheduler_count(scheduler, &counts);
    return counts;
  }

  sidestep_scheduler* scheduler = nullptr;
  std::vector<int64_t> buckets;
  std::vector<sidestep_row> rows;
  std::vector<sidestep_row> in_batch;
  std::vector<sidestep_entry> entries;
  std::vector<int64_t> ids;
  sidestep_batch batch{};
  int64_t count = 0;
};

}  // namespace

#endif  // SIDESTEP_TESTS_SCHEDULER_HOST_H_
