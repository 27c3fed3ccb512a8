/* The C API of sidestep: everything a C or C++ program needs, without Python and without torch.
 * Here are statuses, kernels and the build; plan.h and engine.h are what a server embeds,
 * scheduler.h and parareal.h the parts that work on numbers only.
 *
 * Every function is safe to call from several threads at once. No exception crosses this boundary
 * and nothing is printed: a function returns a status, and sidestep_error() explains the last
 * failure of the calling thread. A call that fails has changed none of its arguments. A null
 * address where one is needed is an error like any other; a handle that was destroyed is not
 * detected, and neither is an array that is shorter than its comment says. sidestep.hpp is the same
 * for C++17.
 */
#ifndef SIDESTEP_SIDESTEP_H_
#define SIDESTEP_SIDESTEP_H_

#include <stdint.h>

#if defined(SIDESTEP_HIDDEN) || !defined(__GNUC__)
#define SIDESTEP_API
#else
#define SIDESTEP_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Rises when a function or struct of this header changes meaning; see sidestep_abi_version(). */
#define SIDESTEP_ABI_VERSION 1

#define SIDESTEP_MAX_REGISTERS 6
#define SIDESTEP_MAX_BRANCHES 3

typedef enum sidestep_status {
  SIDESTEP_OK = 0,
  SIDESTEP_INVALID_ARGUMENT = 1, /* a shape, value, or overlap the caller can correct */
  SIDESTEP_UNAVAILABLE = 2,      /* this build or this machine lacks it */
  SIDESTEP_FAILED = 3,           /* out of memory, or a CUDA error */
  SIDESTEP_FULL = 4              /* no room now; later there may be */
} sidestep_status;

typedef enum sidestep_dtype {
  SIDESTEP_FLOAT32 = 0,
  SIDESTEP_FLOAT16 = 1,
  SIDESTEP_BFLOAT16 = 2
} sidestep_dtype;

/* The arguments of the fused step. All arrays are contiguous, row-major, and on one device. */
typedef struct sidestep_solver_step_args {
  float* registers;                           /* [slots, R, D] read and written */
  const void* outputs[SIDESTEP_MAX_BRANCHES]; /* G arrays [rows, D] of dtype; the rest NULL */
  const float* weights; /* [rows, G]: u = sum_g weights[row, g] * outputs[g][row] */
  const float* noise;   /* [rows, D] or NULL: noise coefficients count as 0 */
  const float* table;   /* [K, (R+1)*(R+2) + 1]: see csrc/core/table.h */
  const int64_t* step;  /* [rows]: the row's step k, 0 <= k < K */
  const int64_t* slot;  /* [rows] or NULL: row i owns slot i */
  void* model_input;    /* [G, rows, D] of dtype, written, or NULL */
  float* stats;         /* [rows, 2] written: mean |x' - x|, mean |E . [registers; u; z]| */
  int64_t slots;
  int64_t dim; /* D */
  int64_t rows;
  int64_t steps;         /* K */
  int32_t num_registers; /* R, 1..6 */
  int32_t num_branches;  /* G, 1..3 */
  int32_t dtype;         /* a sidestep_dtype: of outputs and model_input */
} sidestep_solver_step_args;

/* registers' = M_k . [registers; u; z] for every row at its own step k, on the CPU. */
SIDESTEP_API sidestep_status sidestep_solver_step(const sidestep_solver_step_args* args);

/* The same on a CUDA stream (a cudaStream_t); nothing waits, nothing is allocated, and a graph may
 * capture it. `workspace` is sidestep_cuda_solver_step_workspace() bytes on the device, zeroed once
 * before its first use and used by one stream at a time; every call leaves it ready for the next.
 * Values of `step` and `slot` cannot be checked here: a row whose step or slot is out of range is
 * left alone and its stats become NaN; a slot owned by two rows is undefined. */
SIDESTEP_API sidestep_status sidestep_cuda_solver_step(const sidestep_solver_step_args* args,
                                                       void* workspace, void* stream);
SIDESTEP_API int64_t sidestep_cuda_solver_step_workspace(int64_t rows, int64_t dim);

/* Parareal (SRDS). A row has V = R + 1 vectors [D] in two versions, `new` and `old`: R registers
 * and the model output at the start of a block, in iterate p and in iterate p - 1. Their
 * differences are d_j = new_j - old_j, exactly 0 where both are equal. All arrays are contiguous
 * float32. A row's results do not depend on the other rows or on how many there are, to the last
 * bit. */
typedef struct sidestep_difference_gram_args {
  const float* new_vectors; /* [rows, V, D] */
  const float* old_vectors; /* [rows, V, D] */
  float* gram;              /* [rows, V, V] written: d_i . d_j, symmetric */
  int64_t dim;              /* D */
  int64_t rows;
  int32_t num_vectors; /* V, 1..7 */
} sidestep_difference_gram_args;

typedef struct sidestep_parareal_correct_args {
  float* boundary;           /* [rows, R, D] x_i^{p-1}, becomes x_i^p = fine + (C . d) */
  const float* fine;         /* [rows, R, D] what the fine solver made of the block */
  const float* new_vectors;  /* [rows, R+1, D] */
  const float* old_vectors;  /* [rows, R+1, D] */
  const float* coefficients; /* [rows, R, R+1]: C; a column of zeros is not read */
  float* residual;           /* [rows, 2] written: mean (x_i^p - x_i^{p-1})^2, mean (x_i^p)^2, of
                                register 0 */
  int64_t dim;               /* D */
  int64_t rows;
  int32_t num_registers; /* R, 1..6 */
} sidestep_parareal_correct_args;

SIDESTEP_API sidestep_status sidestep_difference_gram(const sidestep_difference_gram_args* args);
SIDESTEP_API sidestep_status sidestep_parareal_correct(const sidestep_parareal_correct_args* args);

/* The same on a CUDA stream, as above. The workspace need not be zeroed. */
SIDESTEP_API sidestep_status sidestep_cuda_difference_gram(
    const sidestep_difference_gram_args* args, void* workspace, void* stream);
SIDESTEP_API int64_t sidestep_cuda_difference_gram_workspace(int64_t rows, int64_t dim,
                                                             int32_t num_vectors);
SIDESTEP_API sidestep_status sidestep_cuda_parareal_correct(
    const sidestep_parareal_correct_args* args, void* workspace, void* stream);
SIDESTEP_API int64_t sidestep_cuda_parareal_correct_workspace(int64_t rows, int64_t dim);

/* The last failure of the calling thread, in one sentence; "" before the first. Valid until the
 * thread's next failing call. */
SIDESTEP_API const char* sidestep_error(void);

SIDESTEP_API int32_t sidestep_abi_version(void);
SIDESTEP_API const char* sidestep_version(void);

/* What was built and what runs: key is "version", "compiler", "cuda" or "simd"; NULL if unknown. */
SIDESTEP_API const char* sidestep_build_info(const char* key);

/* Threads a large call may use; at first the number of cores. n < 1 is an invalid argument. The
 * number and the threads, which sleep between calls, are the process's: all engines share them, and
 * a call that finds them busy runs alone on its own thread. */
SIDESTEP_API sidestep_status sidestep_set_num_threads(int32_t n);
SIDESTEP_API int32_t sidestep_num_threads(void);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_SIDESTEP_H_ */
