// The parareal operators for AVX2 (compiled with -mavx2, run only where it is present).
#define SIDESTEP_ISA avx2
#define SIDESTEP_WIDTH 8
#include "kernels/cpu/parareal_block.h"
