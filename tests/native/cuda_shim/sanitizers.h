// The sanitizers' own functions for fibres; null in a build without the sanitizer.
#pragma once

#include <cstddef>

#define CUDA_SHIM_WEAK __attribute__((weak))

extern "C" {
void __asan_unpoison_memory_region(const volatile void* from, size_t bytes) CUDA_SHIM_WEAK;
void __sanitizer_start_switch_fiber(void** save, const void* stack, size_t bytes) CUDA_SHIM_WEAK;
void __sanitizer_finish_switch_fiber(void* saved, const void** stack, size_t* bytes) CUDA_SHIM_WEAK;
void* __tsan_get_current_fiber() CUDA_SHIM_WEAK;
void* __tsan_create_fiber(unsigned int flags) CUDA_SHIM_WEAK;
void __tsan_switch_to_fiber(void* fiber, unsigned int flags) CUDA_SHIM_WEAK;
void __tsan_acquire(void* address) CUDA_SHIM_WEAK;
void __tsan_release(void* address) CUDA_SHIM_WEAK;
}

namespace cuda_shim {

// ThreadSanitizer keeps one history per fibre; a switch by itself orders nothing.
struct History {
  void* fiber = nullptr;

  void create() {
    if (__tsan_create_fiber != nullptr) fiber = __tsan_create_fiber(0);
  }
  static History current() {
    History history;
    if (__tsan_get_current_fiber != nullptr) history.fiber = __tsan_get_current_fiber();
    return history;
  }
  void resume() const {
    constexpr unsigned int kOrdersNothing = 1;
    if (fiber != nullptr) __tsan_switch_to_fiber(fiber, kOrdersNothing);
  }
};

// What happened before release(address) happens before what follows acquire(address).
inline void release(void* address) {
  if (__tsan_release != nullptr) __tsan_release(address);
}
inline void acquire(void* address) {
  if (__tsan_acquire != nullptr) __tsan_acquire(address);
}

// A stack that AddressSanitizer is told of before a switch to it and after.
struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* saved = nullptr;  // by AddressSanitizer, while the stack is left

  void leave_for(const Stack& other, bool for_good) {
    if (__sanitizer_start_switch_fiber == nullptr) return;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &saved, other.bottom, other.bytes);
  }
  // `from` becomes the stack that was left, in full.
  void arrive(Stack* from) const {
    if (__sanitizer_finish_switch_fiber == nullptr) return;
    __sanitizer_finish_switch_fiber(saved, from == nullptr ? nullptr : &from->bottom,
                                    from == nullptr ? nullptr : &from->bytes);
  }
};

}  // namespace cuda_shim
