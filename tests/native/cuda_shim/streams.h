// Streams, events and graphs: a stream runs what it is given at once, or records it while it
// captures. What was launched counts as running until somebody has waited for it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalState = 401,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
};

struct CUgraph_st {
  std::vector<std::function<void()>> nodes;
};
struct CUgraphExec_st {
  std::vector<std::function<void()>> nodes;
  std::shared_ptr<std::atomic<bool>> running;  // of its last launch
};
struct CUstream_st {
  CUgraph_st* capture = nullptr;
  bool invalidated = false;
  std::vector<std::shared_ptr<std::atomic<bool>>> running;
};
struct CUevent_st {
  std::vector<std::shared_ptr<std::atomic<bool>>> after;
};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};
constexpr unsigned int cudaEventDisableTiming = 2;
constexpr unsigned int cudaStreamNonBlocking = 1;

namespace cuda_shim {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }

inline cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr || stream->capture == nullptr) {
    work();
  } else if (stream->invalidated) {
    return failed(cudaErrorStreamCaptureInvalidated);
  } else {
    stream->capture->nodes.push_back(std::move(work));
  }
  return cudaSuccess;
}

inline void wait_for(std::vector<std::shared_ptr<std::atomic<bool>>>* launches) {
  for (const auto& running : *launches) *running = false;
  launches->clear();
}

}  // namespace cuda_shim

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorIllegalState:
      return "the operation cannot be performed in the present state";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_shim::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream->capture;
  delete stream;
  return cudaSuccess;
}

// Waiting for work that only records is an error, and ends the capture without a graph.
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream == nullptr) return cudaSuccess;
  if (stream->capture == nullptr) {
    cuda_shim::wait_for(&stream->running);
    return cudaSuccess;
  }
  stream->invalidated = true;
  return cuda_shim::failed(cudaErrorStreamCaptureUnsupported);
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned int) {
  *event = new CUevent_st;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->after = stream->running;
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cuda_shim::wait_for(&event->after);
  return cudaSuccess;
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  if (stream == nullptr || stream->capture == nullptr) return cudaSuccess;
  *status =
      stream->invalidated ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr) return cuda_shim::failed(cudaErrorStreamCaptureUnsupported);
  if (stream->capture != nullptr) return cuda_shim::failed(cudaErrorIllegalState);
  stream->capture = new CUgraph_st;
  stream->invalidated = false;
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  if (stream == nullptr || stream->capture == nullptr) {
    return cuda_shim::failed(cudaErrorIllegalState);
  }
  cudaGraph_t recorded = std::exchange(stream->capture, nullptr);
  if (stream->invalidated) {
    delete recorded;
    return cuda_shim::failed(cudaErrorStreamCaptureInvalidated);
  }
  *graph = recorded;
  return cudaSuccess;
}

inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                 unsigned long long) {
  if (graph == nullptr) return cuda_shim::failed(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st{graph->nodes, std::make_shared<std::atomic<bool>>(false)};
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (executable == nullptr) return cuda_shim::failed(cudaErrorInvalidValue);
  for (const auto& node : executable->nodes) cuda_shim::enqueue(stream, node);
  if (stream == nullptr) return cudaSuccess;
  executable->running = std::make_shared<std::atomic<bool>>(true);
  stream->running.push_back(executable->running);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
// CUDA does not say what becomes of a graph that still runs: here it is an error.
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (*executable->running) return cuda_shim::failed(cudaErrorIllegalState);
  delete executable;
  return cudaSuccess;
}
