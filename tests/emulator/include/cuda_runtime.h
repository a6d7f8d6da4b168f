// As much of CUDA C++ as our kernels use, for an ordinary compiler. See emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Nothing else is thread_local, so the emulator knows where they lie. A cluster's blocks take turns there.
#define __shared__ static thread_local

#define threadIdx (emulator::view->thread)
#define blockIdx (emulator::view->block)
#define warpSize 32

// No macros: a launch's configuration has members of these names.
inline const dim3 &gridDim = emulator::launched.grid, &blockDim = emulator::launched.block;

// Vectors.

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Arithmetic.

#define ERNIE_MIN_MAX(T)                                  \
  inline T min(T a, T b) { return b < a ? b : a; }        \
  inline T max(T a, T b) { return a < b ? b : a; }
ERNIE_MIN_MAX(int)
ERNIE_MIN_MAX(unsigned)
ERNIE_MIN_MAX(long)
ERNIE_MIN_MAX(unsigned long)
ERNIE_MIN_MAX(long long)
ERNIE_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename To, typename From>
inline To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline int __float2int_rn(float x) { return std::lrint(x); }
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15;
    unsigned byte = bytes >> 8 * (choice & 7) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}

// Memory.

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}

template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}

template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Replace *p by what `next` makes of it and return what it was. A block's threads take turns only at synchronisations.
template <typename T, typename Next>
__attribute__((noinline, no_sanitize("thread"))) T emulator_update(T* p, Next next) {
  emulator::access(p, sizeof(T), emulator::Access::atomic, __builtin_return_address(0));
  const T old = *p;
  *p = next(old);
  return old;
}

#define ERNIE_ATOMIC(name, T, ...)                                                 \
  __forceinline__ T name(T* p, T v) {                                              \
    return emulator_update(p, [v]([[maybe_unused]] T old) -> T { return __VA_ARGS__; }); \
  }
ERNIE_ATOMIC(atomicAdd, int, old + v)
ERNIE_ATOMIC(atomicAdd, unsigned, old + v)
ERNIE_ATOMIC(atomicAdd, float, old + v)
ERNIE_ATOMIC(atomicMax, int, max(old, v))
ERNIE_ATOMIC(atomicMax, unsigned, max(old, v))
ERNIE_ATOMIC(atomicMin, int, min(old, v))
ERNIE_ATOMIC(atomicMin, unsigned, min(old, v))
ERNIE_ATOMIC(atomicOr, unsigned, old | v)
ERNIE_ATOMIC(atomicExch, int, v)
ERNIE_ATOMIC(atomicExch, unsigned, v)
ERNIE_ATOMIC(atomicInc, unsigned, old >= v ? 0 : old + 1)
ERNIE_ATOMIC(atomicDec, unsigned, old == 0 || old > v ? v : old - 1)

// Collectives.

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::sync_block(site); }

inline void __syncwarp(unsigned mask = ~0u, emulator::Site site = emulator::Site::here()) {
  emulator::sync_warp(mask, site);
}

template <typename T>
struct emulator_shuffle {
  T value;
  unsigned from;  // lane
  T found;

  static void act(void* const* slots, unsigned lanes) {
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
      auto* slot = static_cast<emulator_shuffle*>(slots[__builtin_ctz(rest)]);
      if (!(lanes >> slot->from & 1))
        emulator::fail("a shuffle from lane " + std::to_string(slot->from) + ", which takes no part");
      slot->found = static_cast<emulator_shuffle*>(slots[slot->from])->value;
    }
  }

  static T meet(unsigned mask, const char* what, emulator::Site site, T value, unsigned from) {
    emulator_shuffle slot = {value, from, value};
    emulator::meet(mask, what, site, &slot, &act);
    return slot.found;
  }
};

#define ERNIE_SHUFFLE(name, from)                                                                                   \
  template <typename T>                                                                                             \
  inline T name(unsigned mask, T value, unsigned by, int width = 32, emulator::Site site = emulator::Site::here()) { \
    const unsigned lane = emulator::view->lane, first = lane & -width, last = first + width - 1;                    \
    (void)first, (void)last;                                                                                        \
    return emulator_shuffle<T>::meet(mask, #name, site, value, from);                                               \
  }
ERNIE_SHUFFLE(__shfl_sync, first + by % width)
ERNIE_SHUFFLE(__shfl_xor_sync, (lane ^ by) > last ? lane : lane ^ by)
ERNIE_SHUFFLE(__shfl_up_sync, lane < first + by ? lane : lane - by)
ERNIE_SHUFFLE(__shfl_down_sync, lane + by > last ? lane : lane + by)

// A collective that gives all lanes one result: `join` of two of their values.
template <typename T, typename Join>
inline T emulator_reduce(unsigned mask, const char* what, emulator::Site site, T value, Join) {
  emulator::meet(mask, what, site, &value, [](void* const* slots, unsigned lanes) {
    T all = *static_cast<T*>(slots[__builtin_ctz(lanes)]);
    for (unsigned rest = lanes & (lanes - 1); rest; rest &= rest - 1)
      all = Join::of(all, *static_cast<T*>(slots[__builtin_ctz(rest)]));
    for (unsigned rest = lanes; rest; rest &= rest - 1) *static_cast<T*>(slots[__builtin_ctz(rest)]) = all;
  });
  return value;
}

#define ERNIE_REDUCE(name, ...)                                                                        \
  struct emulator##name {                                                                              \
    template <typename T>                                                                              \
    static T of(T a, T b) {                                                                            \
      return __VA_ARGS__;                                                                              \
    }                                                                                                  \
  };                                                                                                   \
  template <typename T>                                                                                \
  inline T name(unsigned mask, T value, emulator::Site site = emulator::Site::here()) {                \
    return emulator_reduce(mask, #name, site, value, emulator##name{});                                \
  }
ERNIE_REDUCE(__reduce_max_sync, max(a, b))
ERNIE_REDUCE(__reduce_min_sync, min(a, b))
ERNIE_REDUCE(__reduce_add_sync, a + b)
ERNIE_REDUCE(__reduce_or_sync, a | b)

inline unsigned __ballot_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return emulator_reduce(mask, "__ballot_sync", site, predicate ? 1u << emulator::view->lane : 0u,
                         emulator__reduce_or_sync{});
}

inline int __any_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate, emulator::Site site = emulator::Site::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

inline void __cluster_barrier_arrive_relaxed(emulator::Site site = emulator::Site::here()) {
  emulator::arrive_at_cluster(true, site);
}

inline void __cluster_barrier_arrive(emulator::Site site = emulator::Site::here()) {
  emulator::arrive_at_cluster(false, site);
}

inline void __cluster_barrier_wait(emulator::Site site = emulator::Site::here()) { emulator::wait_for_cluster(site); }

// The host's side.

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization,
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t status);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

namespace emulator {
cudaError_t grant(const void* kernel, int bytes);
}

template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return emulator::grant(reinterpret_cast<const void*>(kernel), value);
}

template <typename... Parameters, typename... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                      Arguments&&... arguments) {
  using Call = std::tuple<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  emulator::Launch launch;
  launch.grid = config->gridDim, launch.block = config->blockDim, launch.shared = config->dynamicSmemBytes;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension)
      launch.cluster = attribute.val.clusterDim.x;
    else
      launch.early = attribute.val.programmaticStreamSerializationAllowed;
  }
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.invoke = [](const emulator::Launch& it) {
    const Call& call = *static_cast<const Call*>(it.arguments);
    std::apply(std::get<0>(call), std::get<1>(call));
  };
  launch.arguments = &call, launch.arguments_size = sizeof call;
  emulator::run(launch);
  return cudaSuccess;
}

// There is no stream on the CPU.
template <>
struct xla::ffi::CtxDecoding<xla::ffi::PlatformStream<cudaStream_t>> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_InvokeContext*, DiagnosticEngine&) { return Type{}; }
};

#undef XLA_FFI_DEFINE_HANDLER_SYMBOL
#define XLA_FFI_DEFINE_HANDLER_SYMBOL(fn, impl, ...)                                                    \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* fn(XLA_FFI_CallFrame* call_frame) { \
    XLA_FFI_DEFINE_HANDLER(handler, impl, ##__VA_ARGS__);                                               \
    return emulator::call(handler, call_frame);                                                         \
  }
