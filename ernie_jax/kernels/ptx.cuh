// What stands in PTX, and shared memory of a launch's size. tests/emulator/include/ptx_emulated.h says the same in C++.
#pragma once

#include <cstdint>

namespace ernie {

// The dynamic shared memory of this block, aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Copy 16, 8 or 4 bytes to shared memory without waiting: 16 are not kept in L1.
template <int BYTES = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global.L2::256B [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
}

// Ask for the cache line of an address, to have it in L2 later.
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// End a group of copies; `wait_for_copies<N>` waits until at most the last N groups are still under way.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// c[16, 8] += a[16, 16] b[16, 8], float32 accumulation.
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// In a kernel launched early (`Shape::early`): wait until the kernel before it is done and what it wrote is here. Before
// this a kernel may read only what no kernel of the step writes, and write nothing to global memory. Every kernel
// launched early must call it in some block, so that the one behind it waits for all that went before.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In a kernel launched early: rely on the one before it having said `launch_next` only after its own wait, so that
// whatever was before that one is done. What it wrote itself needs a `wait_for_previous` still.
__device__ __forceinline__ void rely_on_previous_wait() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// Let the next kernel start where it is launched early, once all blocks have said so or are done.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ernie
