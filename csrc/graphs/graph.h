// One tick in a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include "core/status.h"
#include "sidestep/graphs.h"

namespace sidestep {

class Graph {
 public:
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { drop(); }

  bool captured() const { return executable_ != nullptr; }

  // Captures the tick on the stream; nothing of it runs. The stream is as before, whatever happens.
  Status capture(const sidestep_tick& tick, cudaStream_t stream);
  Status launch(cudaStream_t stream);

  // Waits until it runs no more, and lets go of it.
  Status drop();

 private:
  cudaGraphExec_t executable_ = nullptr;
  cudaEvent_t launched_ = nullptr;  // the last time
};

// Not the default stream, and none that captures already.
Status check_stream(cudaStream_t stream);

// The sentence of a call that CUDA has refused, and no error left for the process's next call.
Status graph_status(const char* what, cudaError_t error);

}  // namespace sidestep
