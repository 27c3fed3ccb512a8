/* CUDA graphs of whole ticks: inputs read, model called, step taken, in one launch.
 *
 * A tick of m steps is, for every row at its own step k of its plan,
 *
 *     read       model_input = cast(s_k registers[slot, 0])             where read_table is given
 *     m times:   outputs     = model(model_input)                       the caller's callback
 *                registers'  = M_k . [registers; u; noise]              sidestep_cuda_solver_step
 *                model_input = cast(s_{k+1} registers'[slot, 0])
 *
 * m = 1 is a step of rows that a scheduler puts together (sidestep/scheduler.h); a block of SRDS is
 * a chain of m fine steps.
 *
 * The first tick of a kind runs as it is, so that libraries can set up what they need; the second
 * is captured, and replayed as are all that follow. Results are the same bits. A kind is everything
 * that a graph cannot change: the device, and every number and every address of sidestep_tick. What
 * may change is what lies at those addresses: the host copies the rows' slots, steps and weights
 * there before each tick, on the same stream. Rows that are not there have step -1, so that a kind
 * serves as many rows as it has room for.
 *
 * The functions of one handle may be called from several threads, one of which is in it at a time;
 * the callback must not use the handle that calls it. In a build without CUDA all of them return
 * SIDESTEP_UNAVAILABLE.
 */
#ifndef SIDESTEP_GRAPHS_H_
#define SIDESTEP_GRAPHS_H_

#include "sidestep/sidestep.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SIDESTEP_MAX_DIMS 8

/* Puts the model call of step j, 0 <= j < m, on the stream (a cudaStream_t): it reads model_input
 * and writes outputs. Returns 0, or any other number for a failure.
 *
 * It may be called inside a capture. What it enqueues then must stay on this stream, or come back
 * to it by events; it must not wait, allocate, or look at a value on the host. */
typedef int32_t (*sidestep_model)(void* context, int64_t j, void* stream);

/* A tensor of the model call that a graph knows by its address. */
typedef struct sidestep_tensor {
  const void* data;
  int64_t shape[SIDESTEP_MAX_DIMS]; /* the rest 0 */
  int64_t strides[SIDESTEP_MAX_DIMS];
  int32_t num_dims;
  int32_t dtype; /* the caller's own number */
} sidestep_tensor;

typedef struct sidestep_tick {
  /* Of step 0; weights, noise, step and stats hold m such arrays one after another. */
  sidestep_solver_step_args args;
  /* [K, W] like args.table, or NULL: model_input is there already. Its lines change nothing: the
   * unit vectors, an E of zeros, and the step's input scale s_k as next_scale. */
  const float* read_table;
  void* workspace; /* sidestep_cuda_solver_step_workspace() bytes, as for that function */
  sidestep_model model;
  void* context;
  const sidestep_tensor* tensors; /* [num_tensors] what the model call looks at beside the rows:
                                     conditioning, times, weights */
  int64_t num_tensors;
  int64_t plan;  /* a number for what else tells model calls apart */
  int64_t chain; /* m, 1 or more */
} sidestep_tick;

/* Puts a tick on the stream without a graph. One that fails half-way has put its beginning there.
 */
SIDESTEP_API sidestep_status sidestep_tick_enqueue(const sidestep_tick* tick, void* stream);

typedef struct sidestep_graphs sidestep_graphs;

typedef struct sidestep_graphs_options {
  int64_t kept; /* kinds that are remembered, 1 or more: the latest ones */
} sidestep_graphs_options;

typedef struct sidestep_graphs_counts {
  int64_t kept;     /* kinds now */
  int64_t enqueued; /* ticks that ran as they are, so far */
  int64_t captured;
  int64_t replayed;
  int64_t dropped; /* kinds that made room for others */
} sidestep_graphs_counts;

SIDESTEP_API sidestep_status sidestep_graphs_create(const sidestep_graphs_options* options,
                                                    sidestep_graphs** graphs);

/* Waits for the graphs that still run. */
SIDESTEP_API void sidestep_graphs_destroy(sidestep_graphs* graphs);

/* Puts a tick on a stream of the current device, other than the default stream, which cannot
 * capture. A capture that fails has run nothing: the error says where it broke off, the stream is
 * as before, and sidestep_tick_enqueue() takes the tick. */
SIDESTEP_API sidestep_status sidestep_graphs_run(sidestep_graphs* graphs, const sidestep_tick* tick,
                                                 void* stream);

/* Lets go of all kinds, when something they know by its address has moved or is about to be freed;
 * waits for the graphs that still run. */
SIDESTEP_API sidestep_status sidestep_graphs_forget(sidestep_graphs* graphs);

SIDESTEP_API sidestep_status sidestep_graphs_count(sidestep_graphs* graphs,
                                                   sidestep_graphs_counts* counts);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_GRAPHS_H_ */
