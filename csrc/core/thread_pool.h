// A small pool of persistent worker threads for loops over independent pieces of work.
//
// Workers sleep between loops (they never spin, so they do not disturb the framework's own
// threads), block all signals, and are started when first needed. After fork() the child starts
// with a new, empty pool. Only one loop uses the workers at a time; a second caller runs its loop
// alone.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace sidestep {

// Threads a loop may use, the caller included; at first the number of cores.
int num_threads();
void set_num_threads(int n);  // n >= 1

class ThreadPool {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);  // must not throw

  // The pool of this process. It lives until the process ends.
  static ThreadPool& instance();

  // Calls body over [0, count) in pieces of `grain`, each piece once, on up to `threads` threads,
  // and returns when all are done. Which thread runs a piece is not fixed: pieces must be
  // independent.
  void parallel_for(int64_t count, int64_t grain, int threads, Body body, void* context);

 private:
  struct Loop {
    Body body;
    void* context;
    int64_t count;
    int64_t grain;
    std::atomic<int64_t> next;
  };

  static void drain(Loop* loop);
  void start_workers(int count);
  void work();

  std::mutex caller_;  // held by the one loop that uses the workers
  std::mutex mutex_;   // guards everything below
  std::condition_variable wake_;
  std::condition_variable idle_;
  Loop* loop_ = nullptr;     // the open loop, null when no worker may join
  uint64_t generation_ = 0;  // of the open loop
  int wanted_ = 0;           // workers that may still join it
  int active_ = 0;           // workers inside it
  int started_ = 0;
};

}  // namespace sidestep
