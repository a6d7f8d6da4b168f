// Shared by the kernels: launches, and bfloat16 tensor-core products on operands that lie K-contiguous in memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

#ifdef ERNIE_EMULATED
#include "ptx_emulated.h"
#else
#include "ptx.cuh"
#endif

namespace ernie {

namespace ffi = xla::ffi;
using bf16 = __nv_bfloat16;

// How many threads a launch has, and with what.
struct Shape {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  unsigned cluster = 1;  // neighbouring blocks that run together; more than one from compute capability 9.0 on
  bool early = false;  // may start when the kernel before it allows: see `wait_for_previous`; of no effect before 9.0
};

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, found = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&found, attribute, device);
  return found;
}

// The major compute capability of this process's GPUs, which are alike.
inline int capability() {
  static const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  return major;
}

// Launch a kernel; `launch_status` tells whether that went well.
template <typename... Parameters, typename... Arguments>
void launch(cudaStream_t stream, void (*kernel)(Parameters...), const Shape& shape, Arguments&&... arguments) {
  // Granted unasked are 48 KiB with what the kernel itself declares, which is not known here.
  if (shape.shared > 0 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared) != cudaSuccess)
    return;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared;
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = shape.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  if (shape.early && capability() >= 9) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// A handler's binding begins with the stream that it launches on; then come `n` arguments and `n` results. It can be
// neither copied nor moved, so each call returns what the last step of the chain made.
inline auto on_stream() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>(); }

template <int n, typename Binding>
auto args(Binding&& binding) {
  if constexpr (n == 1) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  } else {
    return args<n - 1>(std::move(binding).template Arg<ffi::AnyBuffer>());
  }
}

template <int n, typename Binding>
auto rets(Binding&& binding) {
  if constexpr (n == 1) {
    return std::move(binding).template Ret<ffi::AnyBuffer>();
  } else {
    return rets<n - 1>(std::move(binding).template Ret<ffi::AnyBuffer>());
  }
}

// Make `function` a handler that XLA calls by `name`, and may record into a graph.
#define ERNIE_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function, binding, {ernie::ffi::Traits::kCmdBufferCompatible})

inline ffi::Error launch_status(const char* what) {
  cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(what) + ": " + cudaGetErrorString(status));
}

// Two products over 32 of K. Each lane brings 8 neighbours of K: a0 of row lane / 4, a1 of row lane / 4 + 8 and b of
// column lane / 4, all from K offset 8 * (lane % 4). The order in which K is summed does not matter as long as both
// operands share it, so 16-byte loads serve as fragments without a shuffle.
__device__ __forceinline__ void mma32(float (&c)[4], const uint4& a0, const uint4& a1, const uint4& b) {
  mma(c, a0.x, a1.x, a0.y, a1.y, b.x, b.y);
  mma(c, a0.z, a1.z, a0.w, a1.w, b.z, b.w);
}

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float sum_of_warp(float v) {
#pragma unroll
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

__device__ __forceinline__ float round_bf16(float x) { return __bfloat162float(__float2bfloat16(x)); }

}  // namespace ernie
