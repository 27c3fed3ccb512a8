// sidestep._native.RowScheduler: the row scheduler with plain tuples and lists.
#include "bindings/scheduler.h"

#include <memory>
#include <string>
#include <vector>

#include "bindings/raise.h"
#include "bindings/read.h"
#include "core/row_scheduler.h"

namespace py = pybind11;

namespace {

using sidestep::RowScheduler;

struct QueueFull : std::runtime_error {
  using std::runtime_error::runtime_error;
};

py::tuple tuple_of(const sidestep_row& row) {
  return py::make_tuple(row.request, row.row, row.slot, row.step, row.position);
}

py::list write(const std::vector<sidestep_row>& rows) {
  py::list list(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) list[i] = tuple_of(rows[i]);
  return list;
}

std::unique_ptr<RowScheduler> create(int64_t capacity, int64_t queue, const py::sequence& sizes) {
  const auto buckets = read<int64_t>(sizes);
  const sidestep_scheduler_options options{capacity, queue, buckets.data(),
                                           static_cast<int64_t>(buckets.size())};
  raise(RowScheduler::check(options));
  return std::make_unique<RowScheduler>(options);
}

int64_t submit(RowScheduler& self, int64_t rows, int64_t steps, int64_t branches, int64_t group) {
  int64_t id = -1;
  const sidestep::Status status = self.submit({rows, steps, branches, group}, &id);
  if (status.code() == SIDESTEP_FULL) throw QueueFull(status.message());
  raise(status);
  return id;
}

py::list admit(RowScheduler& self) {
  const std::vector<sidestep_row>& rows = self.admit();
  py::list list(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) {
    list[i] = tuple_of(rows[i]) + py::make_tuple(rows[i].extension);
  }
  return list;
}

int64_t extend(RowScheduler& self, int64_t id, int64_t row, int64_t steps) {
  int64_t number = -1;
  raise(self.extend({id, row, steps}, &number));
  return number;
}

py::object next(RowScheduler& self) {
  const sidestep::Batch& batch = self.next();
  if (batch.rows.empty()) return py::none();
  py::list entries(batch.entries.size());
  for (size_t i = 0; i < batch.entries.size(); ++i) {
    entries[i] = py::make_tuple(batch.entries[i].position, batch.entries[i].branch);
  }
  return py::make_tuple(batch.ticket, write(batch.rows), entries, batch.num_entries);
}

py::list complete(RowScheduler& self, int64_t ticket) {
  const std::vector<sidestep_row>* rows = nullptr;
  raise(self.complete(ticket, &rows));
  return write(*rows);
}

py::list fail(RowScheduler& self, int64_t ticket) {
  const std::vector<int64_t>* ids = nullptr;
  raise(self.fail(ticket, &ids));
  py::list list;
  for (const int64_t id : *ids) list.append(id);
  return list;
}

py::list advance(RowScheduler& self, const py::sequence& slots, const py::sequence& compute) {
  if (slots.size() != compute.size()) {
    throw py::value_error("scheduler: advance of " + std::to_string(slots.size()) + " slots with " +
                          std::to_string(compute.size()) + " decisions, expected one for each");
  }
  const auto places = read<int64_t>(slots);
  std::vector<uint8_t> flags;
  for (const py::handle flag : compute) flags.push_back(flag.cast<bool>() ? 1 : 0);
  std::vector<int32_t> states(places.size());
  raise(self.advance(places.data(), flags.data(), static_cast<int64_t>(places.size()),
                     states.data()));
  py::list list(states.size());
  for (size_t i = 0; i < states.size(); ++i) list[i] = states[i];
  return list;
}

bool drop(RowScheduler& self, int64_t id, bool failed) {
  bool ended = false;
  raise(self.drop(id, failed, &ended));
  return ended;
}

bool drop_row(RowScheduler& self, int64_t id, int64_t row) {
  bool ended = false;
  raise(self.drop_row(id, row, &ended));
  return ended;
}

py::dict counts(const RowScheduler& self) {
  const sidestep_scheduler_counts counts = self.counts();
  py::dict named;
  named["waiting"] = counts.waiting;
  named["running"] = counts.running;
  named["free"] = counts.free;
  named["ready"] = counts.ready;
  named["in_flight"] = counts.in_flight;
  named["submitted"] = counts.submitted;
  named["done"] = counts.done;
  named["cancelled"] = counts.cancelled;
  named["failed"] = counts.failed;
  named["extensions"] = counts.extensions;
  return named;
}

}  // namespace

void bind_scheduler(py::module_& m) {
  py::register_exception<QueueFull>(m, "QueueFull", PyExc_RuntimeError);
  py::class_<RowScheduler>(m, "RowScheduler",
                           "Which rows go into the next model call; see sidestep/scheduler.h.\n\n"
                           "A row is (request, row, slot, step, position in its batch or -1).")
      .def(py::init(&create), py::arg("capacity"), py::arg("queue"), py::arg("buckets"))
      .def("submit", &submit, py::arg("rows"), py::arg("steps"), py::arg("branches"),
           py::arg("group"), "Queues a request and returns its id; raises QueueFull.")
      .def(
          "admit", &admit,
          "Gives free slots to extensions, then to waiting requests; returns their rows, each with "
          "its extension number behind it, -1 for a row of submit.")
      .def("extend", &extend, py::arg("id"), py::arg("row"), py::arg("steps"),
           "Adds a row to a request that has not ended; returns its extension number.")
      .def("next", &next,
           "(ticket, rows, entries, entries without padding) of the next model call, or None; an "
           "entry is (position, branch).")
      .def("complete", &complete, py::arg("ticket"), "The rows that are still in that batch.")
      .def("fail", &fail, py::arg("ticket"), "Ends the requests of that batch; returns their ids.")
      .def(
          "skipping", [](RowScheduler& self) { return write(self.skipping()); },
          "The rows that skip.")
      .def("advance", &advance, py::arg("slots"), py::arg("compute"),
           "These rows took their step. Returns what became of each: 0 needs the model, 1 skips, "
           "2 done, 3 done and the last of its request.")
      .def("drop", &drop, py::arg("id"), py::arg("failed"),
           "Ends a request; returns whether it had not ended before.")
      .def("drop_row", &drop_row, py::arg("id"), py::arg("row"),
           "Ends the rows of that index; returns whether the request is done by it.")
      .def("counts", &counts);
}
