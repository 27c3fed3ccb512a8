// Stands in for a profiler: NVTX loads it from $NVTX_INJECTION64_PATH, and it writes every range of
// a named domain into $NVTX_LOG, a line each: "domain +name" where it begins, "domain -name" where
// it ends.
#include <nvtx3/nvToolsExt.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Domain {
  std::string name;
  std::map<nvtxRangeId_t, std::string> started;
};

std::mutex g_mutex;
std::FILE* g_log = nullptr;
nvtxRangeId_t g_ranges = 0;
thread_local std::map<Domain*, std::vector<std::string>> t_pushed;

Domain* domain_of(nvtxDomainHandle_t handle) { return reinterpret_cast<Domain*>(handle); }

void write(const Domain& domain, char sign, const std::string& name) {
  std::fprintf(g_log, "%s %c%s\n", domain.name.c_str(), sign, name.c_str());
  std::fflush(g_log);
}

std::string name_of(const nvtxEventAttributes_t& attributes) {
  if (attributes.messageType == NVTX_MESSAGE_TYPE_ASCII) return attributes.message.ascii;
  if (attributes.messageType != NVTX_MESSAGE_TYPE_REGISTERED) return "?";
  return *reinterpret_cast<const std::string*>(attributes.message.registered);
}

// Handles live as long as the process.
nvtxDomainHandle_t create(const char* name) {
  return reinterpret_cast<nvtxDomainHandle_t>(new Domain{name, {}});
}

nvtxStringHandle_t register_string(nvtxDomainHandle_t, const char* text) {
  return reinterpret_cast<nvtxStringHandle_t>(new std::string(text));
}

int push(nvtxDomainHandle_t handle, const nvtxEventAttributes_t* attributes) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::vector<std::string>& stack = t_pushed[domain_of(handle)];
  stack.push_back(name_of(*attributes));
  write(*domain_of(handle), '+', stack.back());
  return static_cast<int>(stack.size()) - 1;
}

int pop(nvtxDomainHandle_t handle) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  std::vector<std::string>& stack = t_pushed[domain_of(handle)];
  const std::string name = stack.empty() ? "nothing was pushed" : stack.back();
  write(*domain_of(handle), '-', name);
  if (!stack.empty()) stack.pop_back();
  return static_cast<int>(stack.size());
}

nvtxRangeId_t start(nvtxDomainHandle_t handle, const nvtxEventAttributes_t* attributes) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  Domain& domain = *domain_of(handle);
  write(domain, '+', domain.started[++g_ranges] = name_of(*attributes));
  return g_ranges;
}

void end(nvtxDomainHandle_t handle, nvtxRangeId_t id) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  Domain& domain = *domain_of(handle);
  const auto found = domain.started.find(id);
  write(domain, '-', found == domain.started.end() ? "nothing was started" : found->second);
  if (found != domain.started.end()) domain.started.erase(found);
}

template <typename Function>
NvtxFunctionPointer pointer(Function function) {
  return reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t tables) {
  const char* path = std::getenv("NVTX_LOG");
  g_log = path == nullptr ? nullptr : std::fopen(path, "w");
  const auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(tables(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (g_log == nullptr || callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0 ||
      size <= NVTX_CBID_CORE2_DomainCreateA) {
    return 0;
  }
  *table[NVTX_CBID_CORE2_DomainRangeStartEx] = pointer(start);
  *table[NVTX_CBID_CORE2_DomainRangeEnd] = pointer(end);
  *table[NVTX_CBID_CORE2_DomainRangePushEx] = pointer(push);
  *table[NVTX_CBID_CORE2_DomainRangePop] = pointer(pop);
  *table[NVTX_CBID_CORE2_DomainRegisterStringA] = pointer(register_string);
  *table[NVTX_CBID_CORE2_DomainCreateA] = pointer(create);
  return 1;
}
