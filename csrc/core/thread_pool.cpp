// The thread pool: see thread_pool.h.
#include "core/thread_pool.h"

#include <algorithm>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#define SIDESTEP_POSIX 1
#endif

namespace sidestep {
namespace {

std::atomic<int> g_threads{0};  // 0: not chosen, use the number of cores
std::atomic<ThreadPool*> g_pool{nullptr};

#ifdef SIDESTEP_POSIX
// Threads do not survive fork(), and a lock may be held: the child leaves the old pool where it is.
void forget_pool() { g_pool.store(nullptr, std::memory_order_release); }

const bool g_fork_handler = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
#endif

}  // namespace

int num_threads() {
  const int chosen = g_threads.load(std::memory_order_relaxed);
  if (chosen > 0) return chosen;
  static const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return cores;
}

void set_num_threads(int n) { g_threads.store(std::max(1, n), std::memory_order_relaxed); }

ThreadPool& ThreadPool::instance() {
  ThreadPool* pool = g_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return *pool;
  auto* fresh = new ThreadPool;
  if (g_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *pool;
}

void ThreadPool::drain(Loop* loop) {
  for (;;) {
    const int64_t begin = loop->next.fetch_add(loop->grain, std::memory_order_relaxed);
    if (begin >= loop->count) return;
    loop->body(loop->context, begin, std::min(begin + loop->grain, loop->count));
  }
}

void ThreadPool::parallel_for(int64_t count, int64_t grain, int threads, Body body, void* context) {
  std::unique_lock<std::mutex> caller(caller_, std::defer_lock);
  const int64_t pieces = (count + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, pieces)) - 1;
  if (helpers < 1 || !caller.try_lock()) {
    if (count > 0) body(context, 0, count);
    return;
  }
  start_workers(helpers);
  Loop loop{body, context, count, grain, {0}};
  {
    std::lock_guard<std::mutex> lock(mutex_);
    loop_ = &loop;
    ++generation_;
    wanted_ = helpers;
  }
  wake_.notify_all();
  drain(&loop);
  // A worker that has not joined by now never sees the loop, so a late wake-up costs nothing.
  std::unique_lock<std::mutex> lock(mutex_);
  loop_ = nullptr;
  idle_.wait(lock, [this] { return active_ == 0; });
}

void ThreadPool::start_workers(int count) {
  if (started_ >= count) return;
#ifdef SIDESTEP_POSIX
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
  try {
    for (; started_ < count; ++started_) std::thread([this] { work(); }).detach();
  } catch (const std::system_error&) {
    // The system gives no more threads: the loop runs on those there are.
  }
#ifdef SIDESTEP_POSIX
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
}

void ThreadPool::work() {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return loop_ != nullptr && generation_ != seen && wanted_ > 0; });
    seen = generation_;
    --wanted_;
    ++active_;
    Loop* loop = loop_;
    lock.unlock();
    drain(loop);
    lock.lock();
    if (--active_ == 0) idle_.notify_one();
  }
}

}  // namespace sidestep
