// Streams and graphs: a stream runs what it is given at once, or records it while it captures.
#pragma once

#include <functional>
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
};
struct CUstream_st {
  CUgraph_st* capture = nullptr;
  bool invalidated = false;
};
using cudaStream_t = CUstream_st*;
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };

namespace cuda_shim {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t failed(cudaError_t error) { return last_error = error; }

inline cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
  if (stream == nullptr || stream->capture == nullptr) {
    work();
  } else {
    stream->capture->nodes.push_back(std::move(work));
  }
  return cudaSuccess;
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

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
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
  if (stream == nullptr || stream->capture == nullptr) return cudaSuccess;
  stream->invalidated = true;
  return cuda_shim::failed(cudaErrorStreamCaptureUnsupported);
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

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                        unsigned long long = 0) {
  if (graph == nullptr) return cuda_shim::failed(cudaErrorInvalidValue);
  *executable = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (executable == nullptr) return cuda_shim::failed(cudaErrorInvalidValue);
  for (const auto& node : executable->nodes) cuda_shim::enqueue(stream, node);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
