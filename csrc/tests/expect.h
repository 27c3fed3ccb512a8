// What the C++ tests share: a count of allocations and a failure that does not stop the test.
// Included by one source file of a program only: it replaces its operator new.
#ifndef SIDESTEP_TESTS_EXPECT_H_
#define SIDESTEP_TESTS_EXPECT_H_

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>

namespace {
std::atomic<int> g_allocations{0};
}  // namespace

// Counts every allocation of the process, the library's included.
void* operator new(size_t size) {
  ++g_allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

int g_failures = 0;

void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  ++g_failures;
}

}  // namespace

#endif  // SIDESTEP_TESTS_EXPECT_H_
