// Fuzz target: any bytes as a sequence of calls of the engine, most of them wrong. Arrays are as
// long as their comments ask for; numbers and null addresses are what the bytes say.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "sidestep/engine.h"

namespace {

constexpr int64_t kMostRows = 4;
constexpr int64_t kMostDim = 40;
constexpr int64_t kMostEntries = 9;
constexpr int64_t kMostSteps = 8;
constexpr int64_t kMostMemory = 1 << 24;
constexpr int64_t kAlignment = 256;

void expect(bool condition) {
  if (!condition) std::abort();
}

// Numbers out of the input; zeros once it is used up.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }

  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }

  // Mostly `likely`; else a number that breaks things.
  int64_t number(int64_t likely) {
    static const int64_t kStrange[] = {-1, 0, 1, 2, 3, 7, 1 << 20, INT32_MAX, INT64_MAX, INT64_MIN};
    const uint8_t choice = byte();
    return choice < 240 ? likely : kStrange[choice % 10];
  }
  int32_t small(int64_t likely) { return static_cast<int32_t>(number(likely)); }

  template <typename T>
  T* pointer(T* likely) {
    return byte() < 245 ? likely : nullptr;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

struct Plan {
  explicit Plan(const std::string& file) : handle(nullptr, sidestep_plan_destroy) {
    sidestep_plan* loaded = nullptr;
    expect(sidestep_plan_load((SIDESTEP_FUZZ_ROOT + file).c_str(), &loaded) == SIDESTEP_OK);
    handle.reset(loaded);
    expect(sidestep_plan_describe(loaded, &info) == SIDESTEP_OK && info.steps <= kMostSteps);
  }

  std::unique_ptr<sidestep_plan, void (*)(sidestep_plan*)> handle;
  sidestep_plan_info info{};
};

// Without noise and with one or two draws; of 0 to 8 steps, 1 to 6 registers.
const std::vector<Plan>& plans() {
  static const std::vector<Plan> loaded = [] {
    std::vector<Plan> made;
    for (const char* file :
         {"examples/cpp/ddim-8.plan", "csrc/fuzz/plans/sde-3.plan", "csrc/fuzz/plans/unipc-4.plan",
          "csrc/fuzz/plans/two-draws.plan", "csrc/fuzz/plans/nothing.plan"}) {
      made.emplace_back(file);
    }
    return made;
  }();
  return loaded;
}

struct Session {
  std::unique_ptr<void, void (*)(void*)> memory{nullptr, std::free};  // the engine's, if it is ours
  sidestep_engine* engine = nullptr;
  int64_t dim = 0;
  int64_t last_ticket = 0;
  int64_t last_size = 0;
  int64_t last_id = 0;
  std::vector<std::vector<float>> arrays;  // of requests, until the end
  std::vector<float> x = std::vector<float>(kMostEntries * kMostDim);
  std::vector<float> t = std::vector<float>(kMostEntries);
  std::vector<sidestep_call_entry> entries = std::vector<sidestep_call_entry>(kMostEntries);
};

// Of exactly that size, so that a byte too many is seen; at times wrong in size or place.
void give_memory(Bytes* in, int64_t bytes, Session* session, sidestep_engine_options* options) {
  expect(bytes % kAlignment == 0);
  session->memory.reset(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes)));
  expect(session->memory != nullptr);
  std::memset(session->memory.get(), 0xff, static_cast<size_t>(bytes));
  options->memory = static_cast<char*>(session->memory.get()) + (in->byte() < 230 ? 0 : 8);
  options->memory_bytes = std::min(in->number(bytes), bytes);
}

sidestep_status create(Bytes* in, Session* session) {
  const int64_t buckets[] = {in->number(1), in->number(3), kMostEntries};
  sidestep_engine_options options{};
  options.dim = session->dim = in->byte() < 220 ? 1 + in->byte() % kMostDim : in->number(0);
  options.capacity = in->number(kMostRows);
  if (options.capacity > kMostRows) options.capacity = INT64_MAX;
  options.queue = in->number(4);
  options.buckets = in->pointer(buckets);
  options.num_buckets = in->byte() < 230 ? 3 : -1;
  options.table_steps = in->number(40);
  options.num_registers = in->byte() < 128 ? SIDESTEP_MAX_REGISTERS : in->small(2);
  options.num_branches = in->small(2);
  options.dtype = in->byte() < 240 ? in->byte() % 3 : in->small(0);
  options.device = in->small(SIDESTEP_CPU);
  options.skips = in->small(1);
  int64_t bytes = -1;
  const sidestep_status asked = sidestep_engine_memory(in->pointer(&options), in->pointer(&bytes));
  expect(asked != SIDESTEP_OK || bytes > 0);
  if (session->dim > kMostDim) return asked;
  if (bytes > 0 && bytes <= kMostMemory && in->byte() < 128) {
    give_memory(in, bytes, session, &options);
  }
  return sidestep_engine_create(in->pointer(&options), in->pointer(&session->engine));
}

sidestep_status submit(Bytes* in, Session* session) {
  static const float kGuidance[kMostSteps * SIDESTEP_MAX_BRANCHES] = {-1.5f, 2.5f, 0.5f};
  const Plan& plan = plans()[in->byte() % plans().size()];
  sidestep_request request{};
  request.plan = in->pointer(plan.handle.get());
  request.guidance = in->pointer(kGuidance);
  request.guidance_steps = in->byte() < 128 ? 1 : in->number(plan.info.steps);
  request.rows = in->byte() < 200 ? 1 + in->byte() % kMostRows : in->number(1);
  const int64_t size = std::clamp<int64_t>(request.rows, 0, kMostRows) *
                       std::clamp<int64_t>(session->dim, 0, kMostDim);
  session->arrays.emplace_back(size, 0.25f);
  request.latents = in->pointer(session->arrays.back().data());
  if (in->byte() == 255 && size > 0) session->arrays.back()[0] = HUGE_VALF;
  session->arrays.emplace_back(plan.info.steps * plan.info.noise_columns * size, -0.5f);
  request.noise = in->pointer(session->arrays.back().data());
  request.dim = in->number(session->dim);
  request.group = in->byte() % 2;
  request.branches = in->byte() < 200 ? 1 + in->byte() % 2 : in->small(2);
  request.max_skip = in->byte() < 128 ? 0 : in->small(3);
  request.skip_threshold = in->byte() < 240 ? 0.2f : -1.0f;
  return sidestep_engine_submit(in->pointer(session->engine), in->pointer(&request),
                                in->pointer(&session->last_id));
}

sidestep_status next(Bytes* in, Session* session) {
  sidestep_call call{};
  call.x = in->pointer(session->x.data());
  call.t = in->pointer(session->t.data());
  call.entries = in->pointer(session->entries.data());
  call.room = in->number(kMostEntries);
  const sidestep_status status =
      sidestep_engine_next(in->pointer(session->engine), in->pointer(&call), nullptr);
  expect(call.num_entries <= call.size && call.size <= kMostEntries);
  if (status == SIDESTEP_OK && call.size > 0) {
    session->last_ticket = call.ticket;
    session->last_size = call.size;
  }
  return status;
}

sidestep_status one_call(Bytes* in, Session* session) {
  sidestep_engine* engine = in->pointer(session->engine);
  int32_t flag = 0;
  sidestep_result result{};
  sidestep_scheduler_counts counts{};
  switch (in->byte() % 8) {
    case 0:
    case 1:
      return submit(in, session);
    case 2:
    case 3:
      return next(in, session);
    case 4:
      return sidestep_engine_complete(engine, in->number(session->last_ticket),
                                      in->pointer(session->x.data()),
                                      in->number(session->last_size), nullptr);
    case 5:
      return sidestep_engine_fail(engine, in->number(session->last_ticket), in->pointer("why"));
    case 6:
      return sidestep_engine_cancel(engine, in->number(session->last_id), in->pointer(&flag));
    default:
      sidestep_engine_count(engine, in->pointer(&counts));
      return sidestep_engine_result(engine, in->pointer(&result), in->pointer(&flag));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes in(data, size);
  Session session;
  sidestep_status status = create(&in, &session);
  while (!in.empty()) {
    expect(status >= SIDESTEP_OK && status <= SIDESTEP_FULL);
    expect(status == SIDESTEP_OK || sidestep_error()[0] != 0);
    status = one_call(&in, &session);
  }
  sidestep_engine_destroy(session.engine);
  return 0;
}
