// Drives the row scheduler as a C++ host does: through scheduler.h alone. Run by ctest.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "scheduler_host.h"

namespace {

void a_batch_is_laid_out_branch_by_branch() {
  Host host(8, 4, {1, 4, 8});
  host.submit(2, 3, 1);
  host.submit(1, 3, 3);
  expect(host.admit() == 3, "three rows are admitted");
  expect(host.next(), "a batch is ready");
  expect(host.batch.num_rows == 3 && host.batch.num_entries == 5 && host.batch.size == 8,
         "5 entries are padded to 8");
  expect(host.batch.rows[0].request == 1, "the row with three branches comes first");
  const int64_t expected[8][2] = {{0, 0}, {1, 0}, {2, 0}, {0, 1}, {0, 2}, {0, 0}, {0, 0}, {0, 0}};
  for (int i = 0; i < 8; ++i) {
    expect(host.entries[i].position == expected[i][0], "the entry's row");
    expect(host.entries[i].branch == expected[i][1], "the entry's branch");
  }
  expect(!host.next(), "all rows are in flight");
}

void rows_skip_without_the_model() {
  Host host(2, 2, {2});
  host.submit(1, 4);
  host.admit();
  host.next();
  expect(host.complete(host.batch.ticket, false)[0] == SIDESTEP_ROW_SKIPPING, "the row skips");
  for (int step = 1; step < 4; ++step) {
    expect(!host.next(), "a row that skips does not ask for the model");
    sidestep_scheduler_skipping(host.scheduler, host.rows.data(), &host.count);
    expect(host.count == 1 && host.rows[0].step == step, "it is at its step");
    const int32_t state = host.advance(false)[0];
    expect(state == (step == 3 ? SIDESTEP_ROW_LAST : SIDESTEP_ROW_SKIPPING), "until it is done");
  }
  expect(host.counts().done == 1 && host.counts().free == 2, "its slot is free");
}

void the_longest_wait_goes_first() {
  Host host(6, 8, {2});
  for (int i = 0; i < 6; ++i) host.submit(1, 5, 1, i % 2);
  host.admit();
  std::map<int64_t, int> calls;
  int latest = 0;
  for (int tick = 0; tick < 12; ++tick) {
    host.next();
    for (int64_t i = 0; i < host.batch.num_rows; ++i) {
      expect(host.batch.rows[i].request % 2 == host.batch.rows[0].request % 2, "groups stay apart");
      ++calls[host.batch.rows[i].request];
      latest = std::max(latest, calls[host.batch.rows[i].request]);
    }
    for (const auto& [request, count] : calls) expect(latest - count <= 2, "nobody falls behind");
    host.complete(host.batch.ticket);
  }
  expect(calls.size() == 6, "everybody had a turn");
}

void stale_tickets_complete_nothing() {
  Host host(1, 4, {1});
  const int64_t first = host.submit(1, 2);
  host.submit(1, 2);
  host.admit();
  host.next();
  const int64_t old = host.batch.ticket;
  int32_t ended = 0;
  sidestep_scheduler_drop(host.scheduler, first, 0, &ended);
  expect(ended == 1, "the first request was running");
  expect(host.admit() == 1, "the second has its slot");
  expect(host.next() && host.batch.ticket == old + 1, "and is in flight");
  sidestep_scheduler_complete(host.scheduler, old, host.rows.data(), &host.count);
  expect(host.count == 0, "the first batch completes nothing");
  expect(host.counts().in_flight == 1, "the second is untouched");
  host.complete(old + 1);
  sidestep_scheduler_complete(host.scheduler, old + 1, host.rows.data(), &host.count);
  expect(host.count == 0, "a batch completes once");
  sidestep_scheduler_drop(host.scheduler, first, 0, &ended);
  expect(ended == 0, "a request ends once");
}

void a_failed_batch_ends_its_requests_only() {
  Host host(4, 4, {2, 4});
  host.submit(2, 2, 1, 0);
  host.submit(1, 2, 1, 1);
  host.admit();
  host.next();
  sidestep_scheduler_fail(host.scheduler, host.batch.ticket, host.ids.data(), &host.count);
  expect(host.count == 1 && host.ids[0] == 0, "a request of two rows fails once");
  expect(host.counts().running == 1 && host.counts().free == 3, "the other one goes on");
}

void failures_are_statuses() {
  sidestep_scheduler* scheduler = nullptr;
  int64_t sizes[2] = {4, 4};
  sidestep_scheduler_options options{2, 1, sizes, 2};
  expect(sidestep_scheduler_create(&options, &scheduler) == SIDESTEP_INVALID_ARGUMENT,
         "equal buckets are refused");
  expect(std::strstr(sidestep_error(), "buckets[1] is 4, expected 5") != nullptr, "in a sentence");
  options.capacity = 0;
  expect(sidestep_scheduler_create(&options, &scheduler) == SIDESTEP_INVALID_ARGUMENT,
         "no slots are refused");
  int64_t id = -1;
  sidestep_scheduler_request request{3, 1, 1, 0};
  expect(sidestep_scheduler_submit(nullptr, &request, &id) == SIDESTEP_INVALID_ARGUMENT,
         "a null handle is refused");

  Host host(2, 1, {4});
  expect(sidestep_scheduler_submit(host.scheduler, &request, &id) == SIDESTEP_INVALID_ARGUMENT,
         "more rows than slots are refused");
  request.rows = 1;
  expect(sidestep_scheduler_submit(host.scheduler, &request, &id) == SIDESTEP_OK, "one waits");
  expect(sidestep_scheduler_submit(host.scheduler, &request, &id) == SIDESTEP_FULL, "two do not");
  expect(std::strstr(sidestep_error(), "the queue is full") != nullptr, "in a sentence");
  request.steps = 0;
  expect(sidestep_scheduler_submit(host.scheduler, &request, &id) == SIDESTEP_OK && id == 1,
         "no steps need no room");
  int32_t ended = 0;
  expect(sidestep_scheduler_drop(host.scheduler, 2, 0, &ended) == SIDESTEP_INVALID_ARGUMENT,
         "an unknown request is refused");
  expect(sidestep_scheduler_complete(host.scheduler, 0, host.rows.data(), &host.count) ==
             SIDESTEP_INVALID_ARGUMENT,
         "a batch that never was is refused");
  host.admit();
  const int64_t slots[1] = {host.rows[0].slot};
  const uint8_t compute[1] = {1};
  int32_t states[1] = {-1};
  expect(sidestep_scheduler_advance(host.scheduler, slots, compute, 1, states) ==
                 SIDESTEP_INVALID_ARGUMENT &&
             states[0] == -1,
         "a row that waits for the model does not advance");
}

void a_tick_allocates_nothing() {
  Host host(16, 16, {4, 8});
  for (int i = 0; i < 8; ++i) host.submit(2, 6, 1 + i % 3, i % 2);
  host.admit();
  expect(host.finish() == 0, "a tick allocates nothing");
  expect(host.counts().done == 8, "and all requests are done");
}

// Anything in any order, many batches in flight: rows are never lost, never in two batches, and all
// requests end.
struct Storm {
  explicit Storm(uint32_t seed) : random(seed) {}

  int below(int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); }

  void submit() {
    const sidestep_scheduler_request request{1 + below(4), below(5), 1 + below(3), below(2)};
    int64_t id = -1;
    const sidestep_status status = sidestep_scheduler_submit(host.scheduler, &request, &id);
    if (status == SIDESTEP_OK) {
      expect(id == submitted++, "ids count up");
    } else {
      expect(status == SIDESTEP_FULL && host.counts().waiting == 5, "the queue is full");
    }
  }

  void next() {
    host.admit();
    if (!host.next()) return;
    expect(host.batch.num_entries <= host.batch.size, "the bucket holds the entries");
    flying.emplace_back();
    for (int64_t i = 0; i < host.batch.num_rows; ++i) {
      flying.back().insert(host.batch.rows[i].slot);
      expect(host.batch.rows[i].position == i, "rows know their place");
    }
  }

  void complete() {
    if (flying.empty()) return;
    const int ticket = below(static_cast<int>(flying.size()));  // stale ones too
    sidestep_scheduler_complete(host.scheduler, ticket, host.rows.data(), &host.count);
    for (int64_t i = 0; i < host.count; ++i) {
      expect(flying[ticket].erase(host.rows[i].slot) == 1, "a row completes in its batch, once");
    }
    host.advance(below(3) != 0);
  }

  void skip() {
    sidestep_scheduler_skipping(host.scheduler, host.rows.data(), &host.count);
    host.advance(below(2) != 0);
  }

  void drop() {
    int32_t ended = 0;
    if (below(2) != 0 && submitted > 0) {
      const int id = below(static_cast<int>(submitted));
      sidestep_scheduler_drop(host.scheduler, id, below(2), &ended);
    } else if (!flying.empty()) {
      const int ticket = below(static_cast<int>(flying.size()));
      sidestep_scheduler_fail(host.scheduler, ticket, host.ids.data(), &host.count);
    }
  }

  void check() {
    const sidestep_scheduler_counts counts = host.counts();
    const int64_t live = counts.waiting + counts.running;
    expect(counts.submitted == submitted, "requests are counted");
    expect(live + counts.done + counts.cancelled + counts.failed == submitted, "none is lost");
    expect(counts.free + counts.ready + counts.in_flight <= 6, "no slot is given twice");
  }

  Host host{6, 5, {1, 3, 7}};
  std::mt19937 random;
  std::vector<std::set<int64_t>> flying;  // slots by ticket
  int64_t submitted = 0;
};

void anything_in_any_order(uint32_t seed) {
  Storm storm(seed);
  for (int turn = 0; turn < 600; ++turn) {
    const int what = storm.below(24);
    if (what < 4 && turn < 400) storm.submit();
    if (what >= 4 && what < 9) storm.next();
    if (what >= 9 && what < 18) storm.complete();
    if (what >= 18 && what < 23) storm.skip();
    if (what == 23) storm.drop();
    storm.check();
  }
  for (int64_t id = 0; id < storm.submitted; ++id) {
    int32_t ended = 0;
    sidestep_scheduler_drop(storm.host.scheduler, id, 0, &ended);
  }
  const sidestep_scheduler_counts counts = storm.host.counts();
  expect(counts.free == 6 && counts.running == 0, "all slots come back");
  expect(counts.done > 10, "many requests ran to their end");
}

void threads_may_share_a_scheduler() {
  Host host(4, 1000, {4});
  std::vector<std::thread> clients;
  for (int t = 0; t < 3; ++t) {
    clients.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        const sidestep_scheduler_request request{1, 2, 1, 0};
        int64_t id = -1;
        int32_t ended = 0;
        sidestep_scheduler_submit(host.scheduler, &request, &id);
        if (i % 5 == 0) sidestep_scheduler_drop(host.scheduler, id, 0, &ended);
      }
    });
  }
  while (host.counts().done + host.counts().cancelled < 150) {
    host.admit();
    if (host.next()) host.complete(host.batch.ticket);
  }
  for (std::thread& client : clients) client.join();
  expect(host.counts().free == 4 && host.counts().waiting == 0, "all requests ended");
}

}  // namespace

int main() {
  a_batch_is_laid_out_branch_by_branch();
  rows_skip_without_the_model();
  the_longest_wait_goes_first();
  stale_tickets_complete_nothing();
  a_failed_batch_ends_its_requests_only();
  failures_are_statuses();
  a_tick_allocates_nothing();
  for (uint32_t seed = 0; seed < 20; ++seed) anything_in_any_order(seed);
  threads_may_share_a_scheduler();
  return g_failures == 0 ? 0 : 1;
}
