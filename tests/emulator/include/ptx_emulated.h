// kernels/ptx.cuh in C++.
#pragma once

#include "cuda_runtime.h"

namespace emulator {

// What a lane brings to a product of tensor cores.
struct Fragments {
  uint32_t a[4], b[2];
  float* c;  // [4]
};

// c[16, 8] += a[16, 16] b[16, 8] of a warp.
void multiply(void* const* fragments, unsigned lanes);

}  // namespace emulator

namespace ernie {

template <typename T>
inline T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::view->shared);
}

template <int BYTES = 16>
__forceinline__ void copy_async(void* shared, const void* global, emulator::Site site = emulator::Site::here()) {
  emulator::copy_async(shared, global, BYTES, site);
}

inline void prefetch(const void*) {}

inline void commit_copies() { emulator::commit_copies(); }

template <int N>
inline void wait_for_copies() {
  emulator::wait_for_copies(N);
}

inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                emulator::Site site = emulator::Site::here()) {
  emulator::Fragments fragments = {{a0, a1, a2, a3}, {b0, b1}, c};
  emulator::meet(~0u, "mma", site, &fragments, &emulator::multiply);
}

inline void wait_for_previous() { emulator::wait_for_previous(); }
inline void rely_on_previous_wait() { emulator::rely_on_previous_wait(); }
inline void launch_next() { emulator::launch_next(); }

}  // namespace ernie
