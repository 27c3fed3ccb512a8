// The C API of the dependency schedule.
#include <algorithm>

#include "core/guarded.h"
#include "core/handle.h"
#include "core/parareal.h"
#include "core/profiler.h"

struct sidestep_parareal : sidestep::Handle<sidestep::PararealSchedule> {
  using Handle::Handle;
  static constexpr const char* kIsNull = "parareal: the handle is null, expected a schedule";

  // A chain is a fine solve where it is more than the one evaluation of the coarse solver.
  void begin_fine(const sidestep_chain& chain) {
    if (chain.evaluations < 2) return;
    fine_solves.begin({chain.block, chain.iterate}, "fine", chain.first,
                      chain.first + chain.evaluations);
  }

  sidestep::OpenRanges fine_solves;  // of the chains that run, by block and iterate
};

namespace {

using sidestep::guarded;
using sidestep::hand_over;
using sidestep::locked;
using sidestep::PararealSchedule;
using sidestep::ProfilerRange;
using sidestep::Status;

using Report = Status (PararealSchedule::*)(int64_t, int64_t,
                                            const std::vector<sidestep_boundary>**);

sidestep_status report(sidestep_parareal* handle, Report what, int64_t block, int64_t iterate,
                       sidestep_boundary* boundaries, int64_t* count) noexcept {
  return locked(handle, "parareal", {{"boundaries", boundaries}, {"count", count}},
                [&](PararealSchedule& schedule) {
                  if (what == &PararealSchedule::ended) handle->fine_solves.end({block, iterate});
                  const ProfilerRange range("form");
                  const std::vector<sidestep_boundary>* formed = nullptr;
                  const Status status = (schedule.*what)(block, iterate, &formed);
                  if (!status.ok()) return status;
                  hand_over(*formed, boundaries, count);
                  for (const sidestep_boundary& boundary : *formed)
                    handle->begin_fine(boundary.chain);
                  return status;
                });
}

}  // namespace

extern "C" {

sidestep_status sidestep_parareal_create(const sidestep_parareal_options* options,
                                         sidestep_parareal** schedule) {
  return guarded("parareal_create", {{"options", options}, {"schedule", schedule}}, [&] {
    const Status status = PararealSchedule::check(*options);
    if (status.ok()) *schedule = new sidestep_parareal(*options);
    return status;
  });
}

void sidestep_parareal_destroy(sidestep_parareal* schedule) { delete schedule; }

sidestep_status sidestep_parareal_begin(sidestep_parareal* schedule, sidestep_chain* chain) {
  return locked(schedule, "parareal_begin", {{"chain", chain}}, [&](PararealSchedule& core) {
    const Status status = core.begin(chain);
    if (status.ok()) schedule->begin_fine(*chain);
    return status;
  });
}

sidestep_status sidestep_parareal_coarse(sidestep_parareal* schedule, int64_t block,
                                         int64_t iterate, sidestep_boundary* boundaries,
                                         int64_t* count) {
  return report(schedule, &PararealSchedule::coarse, block, iterate, boundaries, count);
}

sidestep_status sidestep_parareal_ended(sidestep_parareal* schedule, int64_t block, int64_t iterate,
                                        sidestep_boundary* boundaries, int64_t* count) {
  return report(schedule, &PararealSchedule::ended, block, iterate, boundaries, count);
}

sidestep_status sidestep_parareal_limit(sidestep_parareal* schedule, int64_t iterations) {
  return locked(schedule, "parareal_limit", {}, [&](PararealSchedule& core) {
    const Status status = core.limit(iterations);
    schedule->fine_solves.end_where([&](const sidestep::OpenRanges::Key& key) {
      sidestep_chain chain{};
      return core.chain(key.first, key.second, &chain).ok() && chain.evaluations < 2;
    });
    return status;
  });
}

sidestep_status sidestep_parareal_chain(sidestep_parareal* schedule, int64_t block, int64_t iterate,
                                        sidestep_chain* chain) {
  return locked(schedule, "parareal_chain", {{"chain", chain}},
                [&](PararealSchedule& core) { return core.chain(block, iterate, chain); });
}

sidestep_status sidestep_parareal_finished(sidestep_parareal* schedule, int32_t* finished) {
  return locked(schedule, "parareal_finished", {{"finished", finished}},
                [&](PararealSchedule& core) {
                  *finished = core.finished() ? 1 : 0;
                  return Status();
                });
}

sidestep_status sidestep_parareal_cost(const sidestep_parareal_options* options,
                                       int64_t* evaluations) {
  return guarded("parareal_cost", {{"options", options}, {"evaluations", evaluations}}, [&] {
    const Status status = PararealSchedule::check(*options);
    if (status.ok()) *evaluations = sidestep::parareal_cost(*options);
    return status;
  });
}

sidestep_status sidestep_parareal_simulate(const sidestep_parareal_options* options, int64_t width,
                                           sidestep_wavefront* wavefront) {
  return guarded("parareal_simulate", {{"options", options}, {"wavefront", wavefront}}, [&] {
    sidestep::Wavefront front;
    const Status status = sidestep::simulate_parareal(*options, width, &front);
    if (!status.ok()) return status;
    wavefront->ticks = front.ticks;
    wavefront->num_evaluations = static_cast<int64_t>(front.evaluations.size());
    if (wavefront->evaluations != nullptr) {
      std::copy(front.evaluations.begin(), front.evaluations.end(), wavefront->evaluations);
    }
    if (wavefront->formed != nullptr) {
      std::copy(front.formed.begin(), front.formed.end(), wavefront->formed);
    }
    return status;
  });
}

}  // extern "C"
