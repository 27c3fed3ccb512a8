// Fibres on ucontext, and the turns they take. Compiled without sanitizers: what happens here is
// the GPU's business, not the kernel's.
#include "fibres.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

#include "sanitizers.h"

namespace cuda_shim {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{128} << 10;
// Blocks that run at once under ThreadSanitizer, which finds races between them; they are limited
// by its 8128 histories.
constexpr unsigned int kResidentBlocks = 8;

[[noreturn]] void fail(const char* sentence) {
  std::fprintf(stderr, "cuda_shim: %s\n", sentence);
  std::abort();
}

enum class Wait { kNothing, kBlock, kWarp, kEnd };

struct Fibre {
  ucontext_t context;
  Stack stack;
  History history;
  History courier;  // carries what a fence has released to the address of an atomic, and back
  char fenced = 0;  // addresses, like those of a block
  char seen = 0;

  Place place;
  Wait wait;
  unsigned int mask;
  int source;
  uint64_t value;
  int barriers;  // passed
};

struct Block {
  std::vector<Fibre*> fibres;
  const std::function<void()>* thread;
  Fibre* running = nullptr;
  ucontext_t context;
  Stack stack;
  History history;
  char begin = 0;  // addresses that stand for an order
  char end = 0;
  char barrier[2] = {};
};

thread_local Block* g_block = nullptr;

Fibre& self() {
  if (g_block == nullptr) fail("code of a kernel runs outside a kernel");
  return *g_block->running;
}

// glibc's own: AddressSanitizer's would forget the bounds of everything on the stack.
void switch_context(ucontext_t* from, const ucontext_t* to) {
  using Switch = int (*)(ucontext_t*, const ucontext_t*);
  static const auto swap =
      reinterpret_cast<Switch>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "swapcontext"));
  if (swap(from, to) != 0) fail("swapcontext failed");
}

void leave(Fibre& fibre) {
  Block& block = *g_block;
  fibre.stack.leave_for(block.stack, fibre.wait == Wait::kEnd);
  block.history.resume();
  switch_context(&fibre.context, &block.context);
  fibre.stack.arrive(nullptr);
}

void enter() {
  Block& block = *g_block;
  Fibre& fibre = *block.running;
  fibre.stack.arrive(&block.stack);
  acquire(&block.begin);
  (*block.thread)();
  release(&block.end);
  fibre.wait = Wait::kEnd;
  leave(fibre);
}

void resume(Block& block, Fibre& fibre) {
  block.running = &fibre;
  fibre.history.resume();
  block.stack.leave_for(fibre.stack, false);
  switch_context(&block.context, &fibre.context);
  block.stack.arrive(nullptr);
}

// Lets the lanes of a warp go on once all that a mask names have arrived.
bool open_warp(Fibre* const* lanes, int count) {
  bool opened = false;
  for (int i = 0; i < count; ++i) {
    if (lanes[i]->wait != Wait::kWarp) continue;
    const unsigned int mask = lanes[i]->mask;
    bool complete = true;
    uint64_t given[kWarp] = {};
    for (int j = 0; j < kWarp; ++j) {
      if ((mask >> j & 1u) == 0) continue;
      if (j >= count || lanes[j]->wait == Wait::kEnd) fail("a shuffle names a lane that has ended");
      complete = complete && lanes[j]->wait == Wait::kWarp && lanes[j]->mask == mask;
      given[j] = lanes[j]->value;
    }
    if (!complete) continue;
    for (int j = 0; j < count; ++j) {
      if ((mask >> j & 1u) == 0) continue;
      if ((mask >> lanes[j]->source & 1u) == 0) fail("a shuffle reads a lane outside its mask");
      lanes[j]->value = given[lanes[j]->source];
      lanes[j]->wait = Wait::kNothing;
    }
    opened = true;
  }
  return opened;
}

// Lets the block go on once every thread that has not ended waits at the barrier.
bool open_block(Block& block, bool* ended) {
  *ended = true;
  for (const Fibre* fibre : block.fibres) {
    *ended = *ended && fibre->wait == Wait::kEnd;
    if (fibre->wait == Wait::kWarp) return false;
  }
  for (Fibre* fibre : block.fibres) {
    if (fibre->wait == Wait::kBlock) fibre->wait = Wait::kNothing;
  }
  return true;
}

void run_block(Block& block) {
  g_block = &block;
  block.history = History::current();
  release(&block.begin);
  const int count = static_cast<int>(block.fibres.size());
  for (bool ended = false; !ended;) {
    bool progress = false;
    for (int first = 0; first < count; first += kWarp) {
      const int lanes = std::min(kWarp, count - first);
      do {
        for (int i = first; i < first + lanes; ++i) {
          if (block.fibres[i]->wait == Wait::kNothing) {
            resume(block, *block.fibres[i]);
            progress = true;
          }
        }
      } while (open_warp(&block.fibres[first], lanes));
    }
    if (!open_block(block, &ended) && !progress) {
      fail("threads of a block wait at a barrier and others at a shuffle");
    }
  }
  acquire(&block.end);
  g_block = nullptr;
}

// Fibres are made once: ThreadSanitizer takes long to make a history.
std::deque<Fibre> g_fibres;
std::mutex g_device;  // runs one grid at a time

Fibre* fibre_at(size_t index) {
  while (g_fibres.size() <= index) {
    Fibre& fibre = g_fibres.emplace_back();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for a stack");
    fibre.stack.bottom = stack;
    fibre.stack.bytes = kStackBytes;
    fibre.history.create();
  }
  return &g_fibres[index];
}

void prepare(Fibre& fibre, const Place& place) {
  fibre.place = place;
  fibre.wait = Wait::kNothing;
  fibre.barriers = 0;
  fibre.stack.saved = nullptr;
  if (__asan_unpoison_memory_region != nullptr) {
    __asan_unpoison_memory_region(fibre.stack.bottom, fibre.stack.bytes);
  }
  if (getcontext(&fibre.context) != 0) fail("getcontext failed");
  fibre.context.uc_stack.ss_sp = const_cast<void*>(fibre.stack.bottom);
  fibre.context.uc_stack.ss_size = fibre.stack.bytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, enter, 0);
}

Index3 unravel(unsigned int i, Index3 size) {
  return {i % size.x, i / size.x % size.y, i / size.x / size.y};
}

}  // namespace

const Place& place() { return self().place; }

int lane() {
  const Place& p = place();
  return static_cast<int>((p.thread.x + p.threads.x * (p.thread.y + p.threads.y * p.thread.z)) %
                          kWarp);
}

void run_grid(Index3 blocks, Index3 threads, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(g_device);
  const unsigned int count = blocks.x * blocks.y * blocks.z;
  const unsigned int width = threads.x * threads.y * threads.z;
  const bool at_once = __tsan_create_fiber != nullptr;
  const unsigned int resident = at_once ? kResidentBlocks : 1;
  for (unsigned int first = 0; first < count; first += resident) {
    std::vector<Block> wave(std::min(resident, count - first));
    for (unsigned int b = 0; b < wave.size(); ++b) {
      wave[b].thread = &thread;
      for (unsigned int i = 0; i < width; ++i) {
        wave[b].fibres.push_back(fibre_at(size_t{b} * width + i));
        prepare(*wave[b].fibres.back(),
                {unravel(i, threads), unravel(first + b, blocks), threads, blocks});
      }
    }
    if (at_once) {
      // A thread per block, so that each has shared memory of its own (see cuda_runtime.h).
      std::vector<std::thread> workers;
      for (Block& block : wave) workers.emplace_back([&block] { run_block(block); });
      for (std::thread& worker : workers) worker.join();
    } else {
      run_block(wave[0]);
    }
  }
}

void sync_block() {
  Fibre& fibre = self();
  char* order = &g_block->barrier[fibre.barriers++ % 2];
  release(order);
  fibre.wait = Wait::kBlock;
  leave(fibre);
  acquire(order);
}

uint64_t shuffle(unsigned int mask, uint64_t value, int source) {
  Fibre& fibre = self();
  if ((mask >> lane() & 1u) == 0) fail("a lane shuffles that the mask leaves out");
  fibre.mask = mask;
  fibre.value = value;
  fibre.source = source;
  fibre.wait = Wait::kWarp;
  leave(fibre);
  return fibre.value;
}

void fence() {
  release(&self().fenced);
  acquire(&self().seen);
}

void before_atomic(void* address) {
  Fibre& fibre = self();
  if (fibre.courier.fiber == nullptr) {
    g_block->history.resume();  // what is made knows what its maker knows: not this thread
    fibre.courier.create();
  }
  fibre.courier.resume();
  acquire(&fibre.fenced);
  release(address);
  fibre.history.resume();
}

void after_atomic(void* address) {
  Fibre& fibre = self();
  fibre.courier.resume();
  acquire(address);
  release(&fibre.seen);
  fibre.history.resume();
}

}  // namespace cuda_shim
