// Shared by the kernels: bfloat16 tensor-core products on operands that lie K-contiguous in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace ernie {

namespace ffi = xla::ffi;
using bf16 = __nv_bfloat16;

inline ffi::Error launch_status(const char* what) {
  cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(what) + ": " + cudaGetErrorString(status));
}

// Copy 16 bytes to shared memory without waiting: not kept in L1.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

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

// Two products over 32 of K. Each lane brings 8 neighbours of K: a0 of row lane / 4, a1 of row lane / 4 + 8 and b of
// column lane / 4, all from K offset 8 * (lane % 4). The order in which K is summed does not matter as long as both
// operands share it, so 16-byte loads serve as fragments without a shuffle.
__device__ __forceinline__ void mma32(float (&c)[4], const uint4& a0, const uint4& a1, const uint4& b) {
  mma(c, a0.x, a1.x, a0.y, a1.y, b.x, b.y);
  mma(c, a0.z, a1.z, a0.w, a1.w, b.z, b.w);
}

__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16(x)); }

}  // namespace ernie
