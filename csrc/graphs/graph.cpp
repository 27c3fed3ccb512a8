// Captures, launches and lets go of graphs. Every call of CUDA is checked.
#include "graphs/graph.h"

#include <string>

#include "graphs/tick.h"

namespace sidestep {
namespace {

Status ask_capture(cudaStream_t stream, cudaStreamCaptureStatus* state) {
  return graph_status("asking whether the stream captures", cudaStreamIsCapturing(stream, state));
}

// A capture that ends with its scope.
class Capture : public StageObserver {
 public:
  explicit Capture(cudaStream_t stream) : stream_(stream) {}
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  ~Capture() override {
    cudaGraph_t graph = nullptr;
    if (open_ && cudaStreamEndCapture(stream_, &graph) != cudaSuccess) cudaGetLastError();
    if (graph != nullptr && cudaGraphDestroy(graph) != cudaSuccess) cudaGetLastError();
  }

  // Other threads may go on using the device meanwhile.
  Status begin() {
    const Status status =
        graph_status("the beginning of a capture",
                     cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    open_ = status.ok();
    return status;
  }

  Status end(cudaGraph_t* graph) {
    open_ = false;
    return graph_status("the end of a capture", cudaStreamEndCapture(stream_, graph));
  }

  // A stage may break the capture and not know it.
  Status passed(const Stage& stage, const Status& status) override {
    const Status state = status.ok() ? still_captures() : status;
    if (state.ok()) return state;
    return Status(state.code(), "tick: capturing it in a CUDA graph failed at " + stage.text() +
                                    ": " + state.message());
  }

 private:
  Status still_captures() {
    cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
    const Status asked = ask_capture(stream_, &state);
    if (!asked.ok() || state == cudaStreamCaptureStatusActive) return asked;
    if (state == cudaStreamCaptureStatusNone) {
      open_ = false;
      return Status(SIDESTEP_FAILED, "the stream does not capture any more");
    }
    const cudaError_t left = cudaGetLastError();
    const std::string reason =
        left == cudaSuccess ? "" : std::string(": ") + cudaGetErrorString(left);
    return Status(SIDESTEP_FAILED, "something in it is not permitted there" + reason);
  }

  cudaStream_t stream_;
  bool open_ = false;
};

}  // namespace

Status graph_status(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  cudaGetLastError();
  return Status(SIDESTEP_FAILED, std::string("tick: ") + what + ": " + cudaGetErrorString(error));
}

Status check_stream(cudaStream_t stream) {
  if (stream == nullptr) {
    return invalid_argument("tick: stream is the default stream, expected one that can capture");
  }
  cudaStreamCaptureStatus state = cudaStreamCaptureStatusNone;
  const Status asked = ask_capture(stream, &state);
  if (!asked.ok() || state == cudaStreamCaptureStatusNone) return asked;
  return invalid_argument("tick: stream captures already, expected one that does not");
}

Status Graph::capture(const sidestep_tick& tick, cudaStream_t stream) {
  Status status;
  if (launched_ == nullptr) {
    status = graph_status("making an event",
                          cudaEventCreateWithFlags(&launched_, cudaEventDisableTiming));
    if (!status.ok()) return status;
  }
  cudaGraph_t graph = nullptr;
  {
    Capture capture(stream);
    status = capture.begin();
    if (status.ok()) status = enqueue_stages(tick, stream, capture);
    if (status.ok()) status = capture.end(&graph);
  }
  if (!status.ok()) return status;
  status = graph_status("making a graph", cudaGraphInstantiateWithFlags(&executable_, graph, 0));
  const Status destroyed = graph_status("letting go of a capture", cudaGraphDestroy(graph));
  return status.ok() ? destroyed : status;
}

Status Graph::launch(cudaStream_t stream) {
  const Status status = graph_status("a launch", cudaGraphLaunch(executable_, stream));
  if (!status.ok()) return status;
  return graph_status("an event after a launch", cudaEventRecord(launched_, stream));
}

Status Graph::drop() {
  Status status;
  const auto then = [&status](const char* what, cudaError_t error) {
    const Status next = graph_status(what, error);
    if (status.ok()) status = next;
  };
  if (launched_ != nullptr) {
    then("waiting for the last launch", cudaEventSynchronize(launched_));
    then("letting go of an event", cudaEventDestroy(launched_));
  }
  if (executable_ != nullptr) then("letting go of a graph", cudaGraphExecDestroy(executable_));
  launched_ = nullptr;
  executable_ = nullptr;
  return status;
}

}  // namespace sidestep
