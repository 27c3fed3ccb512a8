/* The row scheduler: which rows of which requests go into the next model call.
 *
 * It works on numbers only; the host owns all tensors. A request is n rows that take `steps` steps.
 * Each row occupies one slot (an index into the host's state) from its admission to its last step:
 *
 *     submit -> waiting -> [admit] -> needs the model -> [next] -> in flight -> [complete]
 *         -> stepping -> [advance] -> needs the model, or skips, or is done
 *         skips       -> [advance] -> needs the model, or skips, or is done
 *
 * and a request leaves at any of these points when it is dropped. One turn of the host's loop:
 *
 *     admit      load the latents of the admitted rows into their slots
 *     next       gather the rows of the batch, call the model
 *     complete   take the solver's step for the rows it returns, then advance them
 *     skipping   while there are such rows: step them with their kept outputs, then advance them
 *
 * Requests are admitted in the order in which they came, all rows of one at once. The row that has
 * needed the model longest goes first, with all that can share its call (one group) and fit.
 * Several batches may be in flight, and be completed in any order.
 *
 * A request may grow: extend adds a row that is known only now, such as the next chain of an SRDS
 * sample. It waits for a slot in a queue of its own, first come first served, and is admitted
 * before the requests that wait (not before its own request, though). The host extends before it
 * advances the row whose step made the new one possible, so that the request does not end in
 * between; it ends with its last row, grown or not.
 *
 * The functions of one scheduler may be called from several threads. Only submit and extend may
 * allocate: the extensions that wait are as many as the host asks for.
 */
#ifndef SIDESTEP_SCHEDULER_H_
#define SIDESTEP_SCHEDULER_H_

#include "sidestep/sidestep.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sidestep_scheduler sidestep_scheduler;

typedef struct sidestep_scheduler_options {
  int64_t capacity;       /* slots: rows in flight at most */
  int64_t queue;          /* requests that may wait for slots */
  const int64_t* buckets; /* [num_buckets] sizes of a model call, ascending */
  int64_t num_buckets;
} sidestep_scheduler_options;

typedef struct sidestep_scheduler_request {
  int64_t rows;     /* 1..capacity */
  int64_t steps;    /* 0 is done at once and takes no slot */
  int64_t branches; /* entries that a row has in a model call, 1..largest bucket */
  int64_t group;    /* rows of one group can share a model call */
} sidestep_scheduler_request;

typedef struct sidestep_scheduler_extension {
  int64_t request; /* that has not ended */
  int64_t row;     /* any index; several rows of a request may have the same one */
  int64_t steps;   /* 1 or more */
} sidestep_scheduler_extension;

typedef struct sidestep_row {
  int64_t request;
  int64_t row; /* its index in the request, or what extend was given */
  int64_t slot;
  int64_t step;     /* the step it takes next, counted from 0 */
  int64_t position; /* its index in its batch; -1 when it is in none */
  int64_t branches;
  int64_t extension; /* the number that extend gave it; -1 for the rows of submit */
} sidestep_row;

/* One line of a model call: a branch of a row of the batch. */
typedef struct sidestep_entry {
  int64_t position;
  int64_t branch;
} sidestep_entry;

/* Entries come branch by branch: branch 0 of all rows, then branch 1 of the rows that have one, and
 * so on; rows with more branches come first, so a branch's entries are rows 0, 1, 2, ... of the
 * batch. Entries from num_entries on repeat entry 0, up to the size of the bucket. */
typedef struct sidestep_batch {
  sidestep_row* rows;      /* the caller's, at least [capacity] */
  sidestep_entry* entries; /* the caller's, at least [largest bucket] */
  int64_t num_rows;
  int64_t num_entries;
  int64_t size;   /* the bucket: num_entries and the padding */
  int64_t ticket; /* the batch's number, never used again */
} sidestep_batch;

typedef enum sidestep_row_state {
  SIDESTEP_ROW_READY = 0,    /* needs the model */
  SIDESTEP_ROW_SKIPPING = 1, /* takes its next step without it */
  SIDESTEP_ROW_DONE = 2,     /* its slot is free, and is not given away before the next admit */
  SIDESTEP_ROW_LAST = 3      /* done, and its request with it */
} sidestep_row_state;

typedef struct sidestep_scheduler_counts {
  int64_t waiting;   /* requests without slots */
  int64_t running;   /* requests with slots */
  int64_t free;      /* slots */
  int64_t ready;     /* rows that need the model */
  int64_t in_flight; /* rows in a batch that is not completed */
  int64_t submitted; /* requests so far, and what became of them: */
  int64_t done;
  int64_t cancelled;
  int64_t failed;
  int64_t extensions; /* rows of extend that wait for a slot */
} sidestep_scheduler_counts;

SIDESTEP_API sidestep_status sidestep_scheduler_create(const sidestep_scheduler_options* options,
                                                       sidestep_scheduler** scheduler);
SIDESTEP_API void sidestep_scheduler_destroy(sidestep_scheduler* scheduler);

/* Queues a request; its id counts from 0. SIDESTEP_FULL: the queue is, nothing was changed. */
SIDESTEP_API sidestep_status sidestep_scheduler_submit(sidestep_scheduler* scheduler,
                                                       const sidestep_scheduler_request* request,
                                                       int64_t* id);

/* Adds a row to a request; its number counts from 0 over all requests. */
SIDESTEP_API sidestep_status sidestep_scheduler_extend(
    sidestep_scheduler* scheduler, const sidestep_scheduler_extension* extension, int64_t* number);

/* Gives free slots to the extensions, then to the requests that wait. rows: [capacity] written,
 * *count of them. */
SIDESTEP_API sidestep_status sidestep_scheduler_admit(sidestep_scheduler* scheduler,
                                                      sidestep_row* rows, int64_t* count);

/* Fills *batch; its size is 0 when no row needs the model now. */
SIDESTEP_API sidestep_status sidestep_scheduler_next(sidestep_scheduler* scheduler,
                                                     sidestep_batch* batch);

/* The batch's outputs are there. rows: [capacity] written, the rows of the batch that are still in
 * it, in its order: none where its requests were dropped or it was completed before. */
SIDESTEP_API sidestep_status sidestep_scheduler_complete(sidestep_scheduler* scheduler,
                                                         int64_t ticket, sidestep_row* rows,
                                                         int64_t* count);

/* The batch failed, and with it every request that has a row in it. ids: [capacity] written. */
SIDESTEP_API sidestep_status sidestep_scheduler_fail(sidestep_scheduler* scheduler, int64_t ticket,
                                                     int64_t* ids, int64_t* count);

/* The rows that skip. rows: [capacity] written. */
SIDESTEP_API sidestep_status sidestep_scheduler_skipping(sidestep_scheduler* scheduler,
                                                         sidestep_row* rows, int64_t* count);

/* The rows in slots [count], stepping or skipping, have taken their step. compute: [count] 1 where
 * the next one needs the model. states: [count] written, a sidestep_row_state each. */
SIDESTEP_API sidestep_status sidestep_scheduler_advance(sidestep_scheduler* scheduler,
                                                        const int64_t* slots,
                                                        const uint8_t* compute, int64_t count,
                                                        int32_t* states);

/* Ends a request wherever it is, as failed (1) or cancelled (0). *ended: whether it had not ended
 * before. */
SIDESTEP_API sidestep_status sidestep_scheduler_drop(sidestep_scheduler* scheduler, int64_t id,
                                                     int32_t failed, int32_t* ended);

/* Ends all rows of a running request that have this index, wherever they are, extensions that wait
 * included; batches stay valid without them. *ended: whether the request is done by it, having no
 * other rows. */
SIDESTEP_API sidestep_status sidestep_scheduler_drop_row(sidestep_scheduler* scheduler, int64_t id,
                                                         int64_t row, int32_t* ended);

SIDESTEP_API sidestep_status sidestep_scheduler_count(sidestep_scheduler* scheduler,
                                                      sidestep_scheduler_counts* counts);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_SCHEDULER_H_ */
