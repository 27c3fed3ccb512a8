/* Plans: a sampler as a table, read from the file that Python's Plan.save writes (safetensors).
 *
 * Step k calls the model once, on input_scale[k] * x at time t[k], and applies one small matrix to
 * what is known: registers' = M_k . [registers; u; z], x = registers[0]. A plan is immutable; one
 * handle may be used from several threads at once.
 */
#ifndef SIDESTEP_PLAN_H_
#define SIDESTEP_PLAN_H_

#include "sidestep/sidestep.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SIDESTEP_MAX_STEPS 1048576
#define SIDESTEP_MAX_NOISE_COLUMNS 64

typedef struct sidestep_plan sidestep_plan;

typedef struct sidestep_plan_info {
  const char* name;      /* UTF-8 */
  const char* digest;    /* SHA-256 of the contents in hexadecimal, Python's Plan.digest */
  double initial_scale;  /* what unit noise is multiplied by before step 0 */
  int64_t steps;         /* K, model calls; 0 is a plan that changes nothing */
  int32_t num_registers; /* R: latent-sized arrays that a row carries, x included */
  int32_t noise_columns; /* J: noise arrays drawn in one step, at most */
  int32_t stochastic;    /* 1 where noise enters the result */
} sidestep_plan_info;

/* Reads a plan from a file, or from `size` bytes of memory that may be freed afterwards. Every
 * number of it is checked, and its digest: what is refused is refused with the reason, and nothing
 * is allocated for it. Plans with dynamic thresholding, those that use two noise draws in one step,
 * and those with numbers that do not fit in fp32, are no tables of the engine and are refused. */
SIDESTEP_API sidestep_status sidestep_plan_load(const char* path, sidestep_plan** plan);
SIDESTEP_API sidestep_status sidestep_plan_read(const void* data, int64_t size,
                                                sidestep_plan** plan);

/* Engines that use the plan keep what they need of it. NULL is allowed. */
SIDESTEP_API void sidestep_plan_destroy(sidestep_plan* plan);

/* The texts live as long as the plan. */
SIDESTEP_API sidestep_status sidestep_plan_describe(const sidestep_plan* plan,
                                                    sidestep_plan_info* info);

/* Of each call: the model's own time, and what x is multiplied by. Both [steps] written, or NULL.
 */
SIDESTEP_API sidestep_status sidestep_plan_calls(const sidestep_plan* plan, double* times,
                                                 double* input_scales);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_PLAN_H_ */
