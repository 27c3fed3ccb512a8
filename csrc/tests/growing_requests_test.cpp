// Requests that grow while they run, through scheduler.h alone. Run by ctest.
#include <cstring>

#include "scheduler_host.h"

namespace {

void an_extension_is_admitted_before_a_request() {
  Host host(1, 4, {1});
  const int64_t first = host.submit(1, 1);
  host.admit();
  const int64_t second = host.submit(1, 1);
  host.next();
  sidestep_scheduler_complete(host.scheduler, host.batch.ticket, host.rows.data(), &host.count);
  const int64_t number = host.extend(first, 7, 2);
  expect(host.advance(true)[0] == SIDESTEP_ROW_DONE, "the request has grown: it goes on");
  expect(host.counts().extensions == 1 && host.counts().running == 1, "it waits for a slot");
  expect(host.admit() == 1 && host.rows[0].request == first, "and has it before the other");
  expect(host.rows[0].extension == number && host.rows[0].row == 7, "with its number and row");
  host.next();
  expect(host.batch.rows[0].extension == number, "which it keeps");
  expect(host.complete(host.batch.ticket)[0] == SIDESTEP_ROW_READY, "it takes two steps");
  host.next();
  expect(host.complete(host.batch.ticket)[0] == SIDESTEP_ROW_LAST, "the request ends with it");
  expect(host.admit() == 1 && host.rows[0].request == second, "now the other");
  expect(host.rows[0].extension == -1, "which has not grown");
}

void a_row_is_dropped_wherever_it_is() {
  Host host(3, 4, {1, 4});
  const int64_t id = host.submit(2, 5);
  host.admit();
  host.next();
  const int64_t ticket = host.batch.ticket;
  host.extend(id, 0, 3);
  host.admit();
  host.extend(id, 0, 3);
  host.extend(id, 1, 3);
  expect(!host.drop_row(id, 0), "row 1 goes on");
  expect(host.counts().free == 2 && host.counts().extensions == 1, "row 0 is nowhere");
  sidestep_scheduler_complete(host.scheduler, ticket, host.rows.data(), &host.count);
  expect(host.count == 1 && host.rows[0].row == 1, "the batch is valid without it");
  expect(host.drop_row(id, 1), "the request ends with its last row");
  expect(host.counts().done == 1 && host.counts().free == 3, "as done");
  expect(!host.drop_row(id, 1), "once");
}

void growth_is_refused_in_a_sentence() {
  Host host(1, 2, {1});
  const int64_t id = host.submit(1, 1);
  int64_t number = -1;
  int32_t ended = 0;
  sidestep_scheduler_extension extension{id, 0, 0};
  expect(
      sidestep_scheduler_extend(host.scheduler, &extension, &number) == SIDESTEP_INVALID_ARGUMENT,
      "no steps are refused");
  extension.request = 5;
  expect(
      sidestep_scheduler_extend(host.scheduler, &extension, &number) == SIDESTEP_INVALID_ARGUMENT,
      "an unknown request is refused");
  expect(std::strstr(sidestep_error(), "request 5 is unknown") != nullptr, "in a sentence");
  expect(number == -1, "and nothing is written");
  expect(sidestep_scheduler_drop_row(host.scheduler, id, 0, &ended) == SIDESTEP_INVALID_ARGUMENT,
         "a request that waits has no rows yet");
}

void a_grown_tick_allocates_nothing() {
  Host host(4, 4, {2, 4});
  const int64_t id = host.submit(1, 6);
  for (int i = 0; i < 8; ++i) host.extend(id, 0, 5);
  host.admit();
  expect(host.finish() == 0, "a tick allocates nothing");
  expect(host.counts().done == 1 && host.counts().extensions == 0, "and all rows are done");
}

}  // namespace

int main() {
  an_extension_is_admitted_before_a_request();
  a_row_is_dropped_wherever_it_is();
  growth_is_refused_in_a_sentence();
  a_grown_tick_allocates_nothing();
  return g_failures == 0 ? 0 : 1;
}
