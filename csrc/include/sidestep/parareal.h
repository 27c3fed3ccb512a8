/* The dependency schedule of SRDS (Selvam et al. 2024): parareal over the blocks of one trajectory.
 *
 * It works on numbers only; the host owns all tensors and integrates. The steps of a trajectory are
 * split into blocks i = 1..B, block i over steps [bounds[i-1], bounds[i]), m_i of them. x_i^p is
 * boundary i, the state after block i, in iterate p; x_0^p is the start. Blocks count from 1,
 * because boundary 0 is the start; iterates count from 0.
 *
 * A chain (i, q) integrates block i from x_{i-1}^q. Its first evaluation of the model serves twice:
 * the coarse solver of iterate q and the first fine step need it at the same state. After m_i
 * evaluations the chain ends at F_i^{q+1}. Block i has chains q = 0..min(i-1, K), where K is the
 * most iterations; those of the last iterate, q = K, take one evaluation, for the coarse solver.
 *
 *     x_i^0 = coarse solver from x_{i-1}^0              after the first evaluation of (i, 0)
 *     x_i^p = F_i^p + (G_i^p - G_i^{p-1}),  1 <= p < i  after the end of (i, p-1), and the first
 *                                                       evaluation of (i, p)
 *     x_i^i = F_i^i, exact                              after the end of (i, i-1)
 *
 * for p <= K, and x_i^p after x_i^{p-1}. There is no x_i^p for p > i, because it would be x_i^i: so
 * nothing is ever evaluated from an input that did not change. Forming x_i^p starts chain
 * (i+1, p). In the language of the host's loop:
 *
 *     begin        start the chain that it returns, from x_0
 *     coarse       the first evaluation of a chain is there: form the boundaries it returns, in
 *                  their order, and start the chain of each from it
 *     ended        a chain has taken its last step: the same
 *     limit        stop early: no more iterations than that
 *
 * With room for all chains at once, x_i^p is there after T(i, p) = max(T(i-1, p-1) + m_i,
 * T(i-1, p) + 1) model calls in a row, T(i, 0) = i; in equal blocks x_B^K after K(m-1) + B, and
 * m(KB - K(K-1)/2) + B - K evaluations. K = B takes as many calls as there are steps.
 *
 * The functions of one schedule may be called from several threads.
 */
#ifndef SIDESTEP_PARAREAL_H_
#define SIDESTEP_PARAREAL_H_

#include "sidestep/sidestep.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SIDESTEP_MAX_BLOCKS 4096

typedef struct sidestep_parareal sidestep_parareal;

typedef struct sidestep_parareal_options {
  const int64_t* bounds; /* [blocks + 1] steps, strictly ascending; the first may be any step */
  int64_t blocks;        /* B, 1..SIDESTEP_MAX_BLOCKS */
  int64_t iterations;    /* K, 0..B; 0 is the coarse solver alone */
} sidestep_parareal_options;

typedef struct sidestep_chain {
  int64_t block;       /* i, 1..B */
  int64_t iterate;     /* q: of the boundary i-1 that it starts from */
  int64_t first;       /* its first step, bounds[i-1] */
  int64_t evaluations; /* it takes this many; 0: there is no chain */
} sidestep_chain;

typedef struct sidestep_boundary {
  int64_t block;        /* i: the state after this block */
  int64_t iterate;      /* p */
  int64_t exact;        /* 1 where it is F_i^i, the serial sampler's state */
  sidestep_chain chain; /* that it starts; its evaluations are 0 where it starts none */
} sidestep_boundary;

SIDESTEP_API sidestep_status sidestep_parareal_create(const sidestep_parareal_options* options,
                                                      sidestep_parareal** schedule);
SIDESTEP_API void sidestep_parareal_destroy(sidestep_parareal* schedule);

/* Once, before all else: the chain that starts from x_0. */
SIDESTEP_API sidestep_status sidestep_parareal_begin(sidestep_parareal* schedule,
                                                     sidestep_chain* chain);

/* The first evaluation of a chain is there. boundaries: [iterations + 1] written, *count of them,
 * what has become possible; all of that block, iterates ascending. */
SIDESTEP_API sidestep_status sidestep_parareal_coarse(sidestep_parareal* schedule, int64_t block,
                                                      int64_t iterate,
                                                      sidestep_boundary* boundaries,
                                                      int64_t* count);

/* A chain has taken its last step, after its first evaluation was reported. The same. (The end of a
 * chain of the last iterate tells nothing, and may be left out.) */
SIDESTEP_API sidestep_status sidestep_parareal_ended(sidestep_parareal* schedule, int64_t block,
                                                     int64_t iterate, sidestep_boundary* boundaries,
                                                     int64_t* count);

/* Lowers the most iterations: boundaries and chains of higher iterates come no more. Chains that
 * have started may be reported, or be given up where sidestep_parareal_chain asks for less. */
SIDESTEP_API sidestep_status sidestep_parareal_limit(sidestep_parareal* schedule,
                                                     int64_t iterations);

/* A chain under the present limit, started or not: the evaluations that are of use, none above the
 * limit. */
SIDESTEP_API sidestep_status sidestep_parareal_chain(sidestep_parareal* schedule, int64_t block,
                                                     int64_t iterate, sidestep_chain* chain);

/* *finished: whether the last boundary is there in its last iterate. */
SIDESTEP_API sidestep_status sidestep_parareal_finished(sidestep_parareal* schedule,
                                                        int32_t* finished);

/* ---- planning ---- */

typedef struct sidestep_evaluation {
  int64_t tick;    /* the model call that it is in, counted from 0 */
  int64_t block;   /* of its chain */
  int64_t iterate; /* of its chain */
  int64_t step;    /* of the trajectory */
} sidestep_evaluation;

typedef struct sidestep_wavefront {
  sidestep_evaluation* evaluations; /* the caller's, or NULL: sidestep_parareal_cost tells [E] */
  int64_t* formed;                  /* the caller's [K + 1], or NULL: x_B^p is there after */
                                    /* formed[p] ticks */
  int64_t num_evaluations;          /* E */
  int64_t ticks;                    /* T(B, K) where the width does not matter */
} sidestep_wavefront;

/* Evaluations without an early stop: the sum over all chains. */
SIDESTEP_API sidestep_status sidestep_parareal_cost(const sidestep_parareal_options* options,
                                                    int64_t* evaluations);

/* Fills *wavefront: the schedule with at most `width` evaluations in a model call, 0: any number.
 * Those with the most calls between them and the end go first, so that a few too few do least harm;
 * evaluations are written in order of ticks. */
SIDESTEP_API sidestep_status sidestep_parareal_simulate(const sidestep_parareal_options* options,
                                                        int64_t width,
                                                        sidestep_wavefront* wavefront);

#ifdef __cplusplus
}
#endif

#endif /* SIDESTEP_PARAREAL_H_ */
