// NVTX ranges, or nothing: see profiler.h.
#include "core/profiler.h"

#include <cinttypes>
#include <cstdio>

#include "core/macros.h"

#ifdef SIDESTEP_NVTX
#include <nvtx3/nvToolsExt.h>

namespace sidestep {
namespace {

// Null without a profiler, which is there from the start of the process if at all.
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("sidestep");
  return handle;
}

bool profiled() { return !SIDESTEP_LIKELY(domain() == nullptr); }

nvtxEventAttributes_t named(const char* name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  return attributes;
}

void push(const char* name) {
  const nvtxEventAttributes_t attributes = named(name);
  nvtxDomainRangePushEx(domain(), &attributes);
}

void pop() { nvtxDomainRangePop(domain()); }

uint64_t start(const char* name) {
  const nvtxEventAttributes_t attributes = named(name);
  return nvtxDomainRangeStartEx(domain(), &attributes);
}

void finish(uint64_t range) { nvtxDomainRangeEnd(domain(), range); }

}  // namespace
}  // namespace sidestep

#else

namespace sidestep {
namespace {

constexpr bool profiled() { return false; }
void push(const char*) {}
void pop() {}
uint64_t start(const char*) { return 0; }
void finish(uint64_t) {}

}  // namespace
}  // namespace sidestep

#endif

namespace sidestep {

ProfilerRange::ProfilerRange(const char* name) : pushed_(profiled()) {
  if (pushed_) push(name);
}

ProfilerRange::~ProfilerRange() {
  if (pushed_) pop();
}

OpenRanges::~OpenRanges() {
  end_where([](const Key&) { return true; });
}

void OpenRanges::begin(Key key, const char* name) {
  if (!profiled()) return;
  end(key);
  open_[key] = start(name);
}

void OpenRanges::begin(Key key, const char* name, int64_t first, int64_t end) {
  if (!profiled()) return;
  char text[64];
  std::snprintf(text, sizeof text, "%s[%" PRId64 ":%" PRId64 "]", name, first, end);
  begin(key, text);
}

void OpenRanges::end(Key key) {
  if (open_.empty()) return;
  const auto found = open_.find(key);
  if (found == open_.end()) return;
  finish(found->second);
  open_.erase(found);
}

}  // namespace sidestep
