/* The engine: requests go in, batches for the model come out, and it never calls the model itself.
 *
 *     submit     a request: rows of one plan
 *     next       the next model call: rows of many requests, at many steps; x and t are written
 *     (the host calls its model)
 *     complete   takes the model's outputs; the rows step, and those that skip run on
 *     result     the requests that have ended, one by one
 *
 * It owns the registers of the rows in flight. With D elements in a latent, R registers, G branches
 * and e bytes an element of the model's dtype, it holds capacity * D * (4 (R + 1) + G e) bytes (the
 * last term with skips only) and small change, from its creation on: sidestep_engine_memory tells.
 * A row's result has the same bits whatever rows share its calls, and on the CPU and on CUDA, as
 * far as the model's output for an entry does not depend on the others.
 *
 * Memory. "In the engine's memory" means host memory for SIDESTEP_CPU, and memory of the CUDA
 * device that was current when the engine was made for SIDESTEP_CUDA; that device must be current
 * in every call. Everything else is host memory. `stream` is a cudaStream_t, NULL the default
 * stream, and is not looked at for SIDESTEP_CPU. What a call does on the device is ordered on the
 * stream that it is given; who gives another one orders the two. Nothing waits for the device, but
 * for requests that skip (one read a step) and for what sidestep_engine_create allocates.
 *
 * The functions of one engine may be called from several threads; several batches may be out at
 * once, and come back in any order. sidestep_engine_destroy is the last call of all.
 */
#ifndef SIDESTEP_ENGINE_H_
#define SIDESTEP_ENGINE_H_

#include "sidestep/plan.h"
#include "sidestep/scheduler.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sidestep_engine sidestep_engine;

typedef enum sidestep_device { SIDESTEP_CPU = 0, SIDESTEP_CUDA = 1 } sidestep_device;

typedef struct sidestep_engine_options {
  int64_t dim;            /* D: elements of one latent */
  int64_t capacity;       /* rows in flight at most: slots */
  int64_t queue;          /* requests that may wait for slots */
  const int64_t* buckets; /* [num_buckets] sizes of a model call in entries, ascending */
  int64_t num_buckets;
  int64_t table_steps;   /* steps of all plans in use together */
  int32_t num_registers; /* R: most registers of a plan, 1..SIDESTEP_MAX_REGISTERS */
  int32_t num_branches;  /* G: most guidance branches, 1..SIDESTEP_MAX_BRANCHES */
  int32_t dtype;         /* a sidestep_dtype: of the model's inputs and outputs */
  int32_t device;        /* a sidestep_device */
  int32_t skips;         /* 1: requests may skip model calls, for G * capacity kept outputs */
  void* memory;          /* sidestep_engine_memory() bytes in the engine's memory, divisible by */
  int64_t memory_bytes;  /* 256, the caller's until the engine is destroyed; or NULL and 0: the */
                         /* library allocates */
} sidestep_engine_options;

/* A request: rows of one plan that are sampled side by side. The arrays are the caller's, and must
 * stay as they are until the request has ended. */
typedef struct sidestep_request {
  const sidestep_plan* plan; /* may be destroyed after submit */
  float* latents;            /* [rows, dim] in the engine's memory: unit noise times */
                             /* initial_scale; when the request is done, its result */
  const float* noise;        /* [K, J, rows, dim] there: unit normal draws; NULL without */
  const float* guidance;  /* [guidance_steps, branches] weights: u = sum_g w_g u_g. For a scale */
                          /* s over [unconditional; conditional]: 1 - s, s */
  int64_t guidance_steps; /* 1: the same at every step; or K */
  int64_t rows;           /* 1..capacity */
  int64_t dim;            /* D */
  int64_t group;          /* rows of one group may share a model call */
  int32_t branches;       /* 1..G */
  int32_t max_skip;       /* 0: every step calls the model. Else AdaptiveDiffusion as published */
  float skip_threshold;   /* (Ye et al. 2024): the last output is reused while */
                          /* |(d_k + d_{k-2}) / 2 - d_{k-1}| <= skip_threshold * d_{k-1}, */
                          /* d = mean |x' - x|, at most max_skip times in a row; per row */
  void* tag;              /* comes back with every entry and with the result */
} sidestep_request;

/* One line of a model call: a branch of a row. */
typedef struct sidestep_call_entry {
  void* tag;
  int64_t request;
  int64_t row;    /* its index in the request */
  int64_t branch; /* of the guidance */
  int64_t step;   /* of its plan */
  double time;    /* the model's own time at this step */
} sidestep_call_entry;

/* Entries come branch by branch: branch 0 of all rows, then branch 1 of the rows that have one; the
 * entries from num_entries on repeat entry 0, and their outputs are not looked at. */
typedef struct sidestep_call {
  void* x;                      /* the caller's [room, dim] of the dtype, in the engine's memory: */
                                /* input_scale * latent */
  float* t;                     /* the caller's [room] there: the times; or NULL */
  sidestep_call_entry* entries; /* the caller's [room] */
  int64_t room;                 /* at least the largest bucket */
  int64_t size;                 /* written: N, a bucket; 0: nothing needs the model now */
  int64_t num_entries;          /* written: without padding */
  int64_t ticket;               /* written: the batch's number, never used again */
} sidestep_call;

typedef enum sidestep_outcome {
  SIDESTEP_REQUEST_DONE = 0,
  SIDESTEP_REQUEST_CANCELLED = 1,
  SIDESTEP_REQUEST_FAILED = 2
} sidestep_outcome;

typedef struct sidestep_result {
  void* tag;
  int64_t request;
  int64_t calls;       /* model calls that it had a row in */
  int64_t evaluations; /* of the model, over all rows; the branches of a row count once */
  int32_t outcome;     /* a sidestep_outcome; the latents are the result where it is done */
  char error[220];     /* why it failed, in one sentence; else "" */
} sidestep_result;

/* Bytes that an engine with these options holds; memory and memory_bytes are not looked at. */
SIDESTEP_API sidestep_status sidestep_engine_memory(const sidestep_engine_options* options,
                                                    int64_t* bytes);

SIDESTEP_API sidestep_status sidestep_engine_create(const sidestep_engine_options* options,
                                                    sidestep_engine** engine);

/* The device must have finished what the engine was asked for. NULL is allowed. */
SIDESTEP_API void sidestep_engine_destroy(sidestep_engine* engine);

/* Queues a request; its id counts from 0. SIDESTEP_FULL: the queue is, or the table of plans is
 * full of those in use; nothing was changed. */
SIDESTEP_API sidestep_status sidestep_engine_submit(sidestep_engine* engine,
                                                    const sidestep_request* request, int64_t* id);

/* Fills *call. SIDESTEP_FAILED: the device refused; the requests in that call have failed. */
SIDESTEP_API sidestep_status sidestep_engine_next(sidestep_engine* engine, sidestep_call* call,
                                                  void* stream);

/* Takes the outputs of a call, [size, dim] of the dtype in the engine's memory, entry by entry;
 * they must stay until the stream has passed. Rows of requests that have ended meanwhile are left
 * out; a batch that was completed or failed before, or has no other rows, changes nothing, whatever
 * outputs and size are. SIDESTEP_FAILED as above. */
SIDESTEP_API sidestep_status sidestep_engine_complete(sidestep_engine* engine, int64_t ticket,
                                                      const void* outputs, int64_t size,
                                                      void* stream);

/* The model call failed, and with it the requests that have rows in it. reason may be NULL. */
SIDESTEP_API sidestep_status sidestep_engine_fail(sidestep_engine* engine, int64_t ticket,
                                                  const char* reason);

/* Ends a request wherever it is. *ended: whether it had not ended before. After this call (and, on
 * CUDA, what was queued on the stream before it) its arrays are not touched any more. */
SIDESTEP_API sidestep_status sidestep_engine_cancel(sidestep_engine* engine, int64_t id,
                                                    int32_t* ended);

/* The request that ended longest ago and was not asked for yet. *any: whether there is one. On CUDA
 * its latents are ready when the stream of the call that ended it has passed. */
SIDESTEP_API sidestep_status sidestep_engine_result(sidestep_engine* engine,
                                                    sidestep_result* result, int32_t* any);

SIDESTEP_API sidestep_status sidestep_engine_count(sidestep_engine* engine,
                                                   sidestep_scheduler_counts* counts);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_ENGINE_H_ */
