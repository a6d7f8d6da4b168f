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

// 16 bytes that are read once: not kept in L1.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// 16 bytes that other threads read too.
__device__ __forceinline__ uint4 load_shared_by_many(const void* p) { return *reinterpret_cast<const uint4*>(p); }

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
