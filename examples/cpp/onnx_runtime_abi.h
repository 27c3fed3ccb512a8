// The part of ONNX Runtime's C API that this example calls, without its header.
//
// The wheel `onnxruntime` on PyPI ships the shared library and no header. The library exports one
// symbol, OrtGetApiBase, which hands out tables of functions by version; the table of a version is
// never changed once it is released, new functions come behind it. These are entries of version 1
// (102 functions, the last one is ReleaseCustomOpDomain at 101), so that any release of the library
// has them where they are here. A program that has ONNX Runtime's header includes that instead.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtEnv;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtSession;
struct OrtValue;
struct OrtSessionOptions;

struct OrtApi {
  const void* from_0[2];
  const char* (*GetErrorMessage)(const OrtStatus*);
  OrtStatus* (*CreateEnv)(int logging_level, const char* name, OrtEnv**);
  const void* from_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*,
                              OrtSession**);
  const void* from_8[1];
  OrtStatus* (*Run)(OrtSession*, const void* run_options, const char* const* input_names,
                    const OrtValue* const* inputs, size_t num_inputs,
                    const char* const* output_names, size_t num_outputs, OrtValue** outputs);
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
  const void* from_11[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int threads);
  const void* from_25[24];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes,
                                               const int64_t* shape, size_t dimensions,
                                               int element_type, OrtValue**);
  const void* from_50[19];
  OrtStatus* (*CreateCpuMemoryInfo)(int allocator_type, int memory_type, OrtMemoryInfo**);
  const void* from_70[22];
  void (*ReleaseEnv)(OrtEnv*);
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
  void (*ReleaseSession)(OrtSession*);
  void (*ReleaseValue)(OrtValue*);
  const void* from_97[3];
  void (*ReleaseSessionOptions)(OrtSessionOptions*);
};

static_assert(offsetof(OrtApi, CreateSession) == 7 * sizeof(void*), "entries of version 1");
static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void*), "entries of version 1");
static_assert(offsetof(OrtApi, SetIntraOpNumThreads) == 24 * sizeof(void*), "of version 1");
static_assert(offsetof(OrtApi, CreateTensorWithDataAsOrtValue) == 49 * sizeof(void*), "of 1");
static_assert(offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void*), "of version 1");
static_assert(offsetof(OrtApi, ReleaseEnv) == 92 * sizeof(void*), "entries of version 1");
static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*), "of version 1");

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

constexpr uint32_t kOrtApiVersion = 1;
constexpr int kOrtLoggingWarning = 2;
constexpr int kOrtFloat = 1;           // ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
constexpr int kOrtArenaAllocator = 1;  // OrtArenaAllocator
constexpr int kOrtMemoryDefault = 0;   // OrtMemTypeDefault
