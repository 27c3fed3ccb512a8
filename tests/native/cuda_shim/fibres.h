// How a grid runs on the CPU: every CUDA thread is a fibre, and what a sanitizer must know of it.
//
// A block's threads take turns on one processor thread, so a test repeats to the last bit. What
// orders them is told to ThreadSanitizer and nothing else is: a barrier, a fence with an atomic,
// the launch and its end. Two accesses without such an order are a race, however the turns fell.
#pragma once

#include <cstdint>
#include <functional>

namespace cuda_shim {

struct Index3 {
  unsigned int x, y, z;
};

// Where a CUDA thread stands.
struct Place {
  Index3 thread, block;
  Index3 threads, blocks;  // of a block, of the grid
};
const Place& place();
int lane();

// Runs `thread` once for every thread of the grid, and returns when all have ended.
void run_grid(Index3 blocks, Index3 threads, const std::function<void()>& thread);

// __syncthreads: waits for every thread of the block that has not ended.
void sync_block();

// Waits for the lanes of `mask` and returns what `source` gave. It orders no memory, as on a GPU.
uint64_t shuffle(unsigned int mask, uint64_t value, int source);

// __threadfence, and what stands before and after every atomic access: a write before a fence
// before an atomic is seen by who reads after a fence after an atomic of the same address.
void fence();
void before_atomic(void* address);
void after_atomic(void* address);

}  // namespace cuda_shim
