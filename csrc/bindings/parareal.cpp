// sidestep._native.PararealSchedule: the dependency schedule with plain tuples and lists.
#include "bindings/parareal.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "bindings/raise.h"
#include "bindings/read.h"
#include "core/parareal.h"

namespace py = pybind11;

namespace {

using sidestep::PararealSchedule;
using Array = py::array_t<int64_t>;

// Valid as long as `bounds`.
sidestep_parareal_options options_of(const std::vector<int64_t>& bounds, int64_t iterations) {
  return {bounds.data(), static_cast<int64_t>(bounds.size()) - 1, iterations};
}

py::tuple write(const sidestep_chain& chain) {
  return py::make_tuple(chain.block, chain.iterate, chain.first, chain.evaluations);
}

py::list write(const std::vector<sidestep_boundary>& boundaries) {
  py::list list(boundaries.size());
  for (size_t i = 0; i < boundaries.size(); ++i) {
    const sidestep_boundary& boundary = boundaries[i];
    py::object chain = py::none();
    if (boundary.chain.evaluations > 0) chain = write(boundary.chain);
    list[i] = py::make_tuple(boundary.block, boundary.iterate, boundary.exact != 0, chain);
  }
  return list;
}

std::unique_ptr<PararealSchedule> create(const py::sequence& sequence, int64_t iterations) {
  const auto bounds = read<int64_t>(sequence);
  const auto options = options_of(bounds, iterations);
  raise(PararealSchedule::check(options));
  return std::make_unique<PararealSchedule>(options);
}

py::tuple begin(PararealSchedule& self) {
  sidestep_chain chain{};
  raise(self.begin(&chain));
  return write(chain);
}

py::list coarse(PararealSchedule& self, int64_t block, int64_t iterate) {
  const std::vector<sidestep_boundary>* formed = nullptr;
  raise(self.coarse(block, iterate, &formed));
  return write(*formed);
}

py::list ended(PararealSchedule& self, int64_t block, int64_t iterate) {
  const std::vector<sidestep_boundary>* formed = nullptr;
  raise(self.ended(block, iterate, &formed));
  return write(*formed);
}

py::tuple chain(const PararealSchedule& self, int64_t block, int64_t iterate) {
  sidestep_chain chain{};
  raise(self.chain(block, iterate, &chain));
  return write(chain);
}

int64_t cost(const py::sequence& sequence, int64_t iterations) {
  const auto bounds = read<int64_t>(sequence);
  const auto options = options_of(bounds, iterations);
  raise(PararealSchedule::check(options));
  return sidestep::parareal_cost(options);
}

py::tuple simulate(const py::sequence& sequence, int64_t iterations, int64_t width) {
  const auto bounds = read<int64_t>(sequence);
  sidestep::Wavefront front;
  raise(sidestep::simulate_parareal(options_of(bounds, iterations), width, &front));
  const auto& evaluations = front.evaluations;
  static_assert(sizeof(sidestep_evaluation) == 4 * sizeof(int64_t), "four columns");
  Array chart({static_cast<py::ssize_t>(evaluations.size()), py::ssize_t{4}});
  std::copy(evaluations.begin(), evaluations.end(),
            reinterpret_cast<sidestep_evaluation*>(chart.mutable_data()));
  Array formed(static_cast<py::ssize_t>(front.formed.size()), front.formed.data());
  return py::make_tuple(front.ticks, chart, formed);
}

}  // namespace

void bind_parareal(py::module_& m) {
  py::class_<PararealSchedule>(
      m, "PararealSchedule",
      "What of an SRDS trajectory is possible when; see sidestep/parareal.h.\n\n"
      "Blocks count from 1: block i is [bounds[i-1], bounds[i]).\n"
      "A chain is (block, iterate, first step, evaluations);\n"
      "a boundary is (block, iterate, exact, the chain that it starts or None).")
      .def(py::init(&create), py::arg("bounds"), py::arg("iterations"))
      .def("begin", &begin, "The chain that starts from the start; once.")
      .def("coarse", &coarse, py::arg("block"), py::arg("iterate"),
           "The first evaluation of that chain is there. Returns the boundaries to form now.")
      .def("ended", &ended, py::arg("block"), py::arg("iterate"),
           "That chain has taken its last step. Returns the boundaries to form now.")
      .def(
          "limit",
          [](PararealSchedule& self, int64_t iterations) { raise(self.limit(iterations)); },
          py::arg("iterations"), "Lowers the most iterations: no higher iterate is begun.")
      .def("chain", &chain, py::arg("block"), py::arg("iterate"),
           "That chain, with the evaluations that are of use under the present limit.")
      .def_property_readonly("blocks", &PararealSchedule::blocks)
      .def_property_readonly("iterations", &PararealSchedule::iterations)
      .def_property_readonly("finished", &PararealSchedule::finished,
                             "Whether the last boundary is there in its last iterate.");
  m.def("parareal_cost", &cost, py::arg("bounds"), py::arg("iterations"),
        "Evaluations without an early stop.");
  m.def("simulate_parareal", &simulate, py::arg("bounds"), py::arg("iterations"), py::arg("width"),
        "(ticks, [E, 4] of tick, block, iterate, step; [K + 1] ticks until x_B^p); width 0: any.");
}
