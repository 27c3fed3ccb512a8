// The C API of plans.
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/guarded.h"
#include "core/plan_handle.h"

namespace {

using sidestep::guarded;
using sidestep::invalid_argument;
using sidestep::Plan;
using sidestep::Status;

constexpr size_t kMostBytes = size_t{1} << 28;

struct Closer {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

Status read_file(const char* path, std::vector<uint8_t>* bytes) {
  const std::unique_ptr<std::FILE, Closer> file(std::fopen(path, "rb"));
  if (file == nullptr) {
    return invalid_argument("plan: cannot open %.300s: %s", path, std::strerror(errno));
  }
  uint8_t piece[1 << 14];
  for (size_t count; (count = std::fread(piece, 1, sizeof(piece), file.get())) > 0;) {
    if (bytes->size() + count > kMostBytes) {
      return invalid_argument("plan: %.300s is larger than 256 MiB, expected a plan", path);
    }
    bytes->insert(bytes->end(), piece, piece + count);
  }
  if (std::ferror(file.get()) == 0) return Status();
  return invalid_argument("plan: cannot read %.300s: %s", path, std::strerror(errno));
}

Status make(const uint8_t* data, int64_t size, sidestep_plan** plan) {
  std::shared_ptr<const Plan> core;
  const Status status = Plan::read(data, size, &core);
  if (status.ok()) *plan = new sidestep_plan(std::move(core));
  return status;
}

}  // namespace

extern "C" {

sidestep_status sidestep_plan_load(const char* path, sidestep_plan** plan) {
  return guarded("plan_load", {{"path", path}, {"plan", plan}}, [&] {
    std::vector<uint8_t> bytes;
    const Status status = read_file(path, &bytes);
    return status.ok() ? make(bytes.data(), static_cast<int64_t>(bytes.size()), plan) : status;
  });
}

sidestep_status sidestep_plan_read(const void* data, int64_t size, sidestep_plan** plan) {
  return guarded("plan_read", {{"data", data}, {"plan", plan}},
                 [&] { return make(static_cast<const uint8_t*>(data), size, plan); });
}

void sidestep_plan_destroy(sidestep_plan* plan) { delete plan; }

sidestep_status sidestep_plan_describe(const sidestep_plan* plan, sidestep_plan_info* info) {
  return guarded("plan_describe", {{"plan", plan}, {"info", info}}, [&] {
    const Plan& core = *plan->core;
    *info = {core.name().c_str(),      core.digest().c_str(),
             core.initial_scale(),     core.steps(),
             core.num_registers(),     static_cast<int32_t>(core.noise_columns()),
             core.stochastic() ? 1 : 0};
    return Status();
  });
}

sidestep_status sidestep_plan_calls(const sidestep_plan* plan, double* times,
                                    double* input_scales) {
  return guarded("plan_calls", {{"plan", plan}}, [&] {
    for (int64_t k = 0; k < plan->core->steps(); ++k) {
      if (times != nullptr) times[k] = plan->core->time(k);
      if (input_scales != nullptr) input_scales[k] = plan->core->input_scale(k);
    }
    return Status();
  });
}

}  // extern "C"
