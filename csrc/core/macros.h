// How code that host and device share is marked.
#pragma once

// Inlined everywhere, always: the CPU files are compiled for different instruction sets, and the
// linker must never pick one file's copy of a function for another.
#if defined(__CUDACC__)
#define SIDESTEP_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SIDESTEP_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SIDESTEP_HOST_DEVICE inline
#endif

// Loops over registers, columns and lines are unrolled, so that their arrays live in processor
// registers. (nvcc hands the host half of a .cu file to a compiler that does not know `unroll`.)
#if defined(__CUDA_ARCH__) || (defined(__clang__) && !defined(__CUDACC__))
#define SIDESTEP_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define SIDESTEP_UNROLL _Pragma("GCC unroll 8")
#else
#define SIDESTEP_UNROLL
#endif

#if defined(__GNUC__)
#define SIDESTEP_LIKELY(condition) __builtin_expect(static_cast<bool>(condition), true)
#else
#define SIDESTEP_LIKELY(condition) (condition)
#endif
