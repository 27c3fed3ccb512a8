// The C API of the engine.
#include <memory>
#include <string>

#include "core/engine.h"
#include "core/guarded.h"
#include "core/handle.h"
#include "core/plan_handle.h"
#include "core/profiler.h"

struct sidestep_engine : sidestep::Handle<sidestep::Engine> {
  using Handle::Handle;
  static constexpr const char* kIsNull = "engine: the handle is null, expected an engine";

  sidestep::OpenRanges model_calls;  // of the calls in flight, by ticket
};

namespace {

using sidestep::check_pointers;
using sidestep::Engine;
using sidestep::guarded;
using sidestep::locked;
using sidestep::ProfilerRange;
using sidestep::Status;

}  // namespace

extern "C" {

sidestep_status sidestep_engine_memory(const sidestep_engine_options* options, int64_t* bytes) {
  return guarded("engine_memory", {{"options", options}, {"bytes", bytes}}, [&] {
    const Status status = Engine::check(*options);
    if (status.ok()) *bytes = Engine::memory_bytes(*options);
    return status;
  });
}

sidestep_status sidestep_engine_create(const sidestep_engine_options* options,
                                       sidestep_engine** engine) {
  return guarded("engine_create", {{"options", options}, {"engine", engine}}, [&] {
    Status status = Engine::check(*options);
    if (!status.ok()) return status;
    auto made = std::make_unique<sidestep_engine>(*options);
    status = made->core.allocate(*options);
    if (status.ok()) *engine = made.release();
    return status;
  });
}

void sidestep_engine_destroy(sidestep_engine* engine) { delete engine; }

sidestep_status sidestep_engine_submit(sidestep_engine* engine, const sidestep_request* request,
                                       int64_t* id) {
  return locked(engine, "engine_submit", {{"request", request}, {"id", id}}, [&](Engine& core) {
    const Status status = check_pointers(
        "engine_submit",
        {{"plan", request->plan}, {"latents", request->latents}, {"guidance", request->guidance}});
    return status.ok() ? core.submit(*request, request->plan->core, id) : status;
  });
}

sidestep_status sidestep_engine_next(sidestep_engine* engine, sidestep_call* call, void* stream) {
  return locked(engine, "engine_next", {{"call", call}}, [&](Engine& core) {
    const ProfilerRange range("next");
    const Status status = core.next(call, stream);
    if (status.ok() && call->size > 0) engine->model_calls.begin({call->ticket, 0}, "model");
    return status;
  });
}

sidestep_status sidestep_engine_complete(sidestep_engine* engine, int64_t ticket,
                                         const void* outputs, int64_t size, void* stream) {
  return locked(engine, "engine_complete", {}, [&](Engine& core) {
    engine->model_calls.end({ticket, 0});
    const ProfilerRange range("complete");
    return core.complete(ticket, outputs, size, stream);
  });
}

sidestep_status sidestep_engine_fail(sidestep_engine* engine, int64_t ticket, const char* reason) {
  return locked(engine, "engine_fail", {}, [&](Engine& core) {
    engine->model_calls.end({ticket, 0});
    return core.fail(ticket, reason == nullptr ? "the model call failed" : reason);
  });
}

sidestep_status sidestep_engine_cancel(sidestep_engine* engine, int64_t id, int32_t* ended) {
  return locked(engine, "engine_cancel", {{"ended", ended}}, [&](Engine& core) {
    bool was_live = false;
    const Status status = core.cancel(id, &was_live);
    if (status.ok()) *ended = was_live ? 1 : 0;
    return status;
  });
}

sidestep_status sidestep_engine_result(sidestep_engine* engine, sidestep_result* result,
                                       int32_t* any) {
  return locked(engine, "engine_result", {{"result", result}, {"any", any}}, [&](Engine& core) {
    *any = core.result(result) ? 1 : 0;
    return Status();
  });
}

sidestep_status sidestep_engine_count(sidestep_engine* engine, sidestep_scheduler_counts* counts) {
  return locked(engine, "engine_count", {{"counts", counts}}, [&](Engine& core) {
    *counts = core.counts();
    return Status();
  });
}

}  // extern "C"
