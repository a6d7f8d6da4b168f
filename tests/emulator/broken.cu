// Kernels with the mistakes that the emulator must find, each as a branch of one kernel. The test names them.
#include <cooperative_groups.h>

#include "common.cuh"

namespace ernie {
namespace {

constexpr int kThreads = 64;

enum Mistake {
  kNone,
  kNoBarrier,
  kNoBarrierBeforeReuse,
  kNoSyncwarp,
  kNoWait,
  kWaitForTooFew,
  kNoBarrierAfterWait,
  kSourceChanges,
  kUnwritten,
  kIndexOutOfBounds,
  kDynamicOutOfBounds,
  kGlobalOutOfBounds,
  kWritesArgument,
  kMisaligned,
  kLanesMissing,
  kOtherBarrier,
  kWarpAtOtherPlace,
  kDeadlock,
  kMmaDiverges,
  kNoBarrierAfterAtomic,
  kEarlyTouchesOutput,
  kEarlyNeverWaits,
  kReliesOnHasty,
  kNoClusterBarrier,
  kMapsTooEarly,
  kTooMuchShared,
  kUninitialisedOutput,
};

// out[i] = x[i + 1 mod kThreads], through shared memory: by stores and by asynchronous copies.
__global__ void __launch_bounds__(kThreads) broken_kernel(const float* x, float* out, Mistake mistake) {
  __shared__ __align__(16) float values[kThreads], copied[kThreads];
  __shared__ unsigned sum;
  float* dynamic = dynamic_shared<float>();
  const int i = threadIdx.x, next = (i + 1) % kThreads, lane = i % 32;
  if (mistake == kReliesOnHasty)
    rely_on_previous_wait();
  else if (mistake != kEarlyTouchesOutput && mistake != kEarlyNeverWaits)
    wait_for_previous();
  const bool sparse = mistake == kUnwritten;
  if (!(sparse && i == 5)) values[i] = x[blockIdx.x * kThreads + i];
  if (mistake != kNoBarrier) __syncthreads();
  float value = values[next];
  if (mistake == kNoBarrierBeforeReuse) values[i] = 1;

  if (i < kThreads / 4) copy_async(copied + 4 * i, x + blockIdx.x * kThreads + 4 * i);
  commit_copies();
  if (mistake == kWaitForTooFew) commit_copies();
  if (mistake == kWaitForTooFew)
    wait_for_copies<2>();
  else if (mistake != kNoWait)
    wait_for_copies<0>();
  if (mistake != kNoBarrierAfterWait) __syncthreads();
  value += copied[next];

  switch (mistake) {
    case kNoSyncwarp:
      dynamic[i] = 1;
      value += __shfl_sync(~0u, 0.f, 0);  // orders no memory
      value += dynamic[i ^ 1] - 1;
      break;
    case kSourceChanges:
      if (i == 0) {
        out[0] = 1;
        copy_async(dynamic, out);
        commit_copies();
        out[0] = 2;
        wait_for_copies<0>();
      }
      break;
    case kIndexOutOfBounds:
      value += values[i + 4 * gridDim.x];
      break;
    case kDynamicOutOfBounds:
      dynamic[i + 1] = 1;
      break;
    case kGlobalOutOfBounds:
      value += x[gridDim.x * kThreads + i];
      break;
    case kWritesArgument:
      const_cast<float*>(x)[i] = 1;
      break;
    case kMisaligned:
      value += reinterpret_cast<const float4*>(x + 1)->x;
      break;
    case kLanesMissing:
      if (lane >= 16) return;
      value += __shfl_xor_sync(~0u, value, 16);
      break;
    case kOtherBarrier:
      if (i < 32)
        __syncthreads();
      else
        __syncthreads();
      break;
    case kWarpAtOtherPlace:
      if (lane < 16)
        value += __shfl_sync(~0u, 0.f, 0);
      else
        value += __shfl_sync(~0u, 0.f, 0);
      break;
    case kDeadlock:
      if (i == 7) __syncthreads();
      __syncwarp();
      break;
    case kMmaDiverges: {
      float c[4] = {};
      if (lane != 9) mma(c, 0, 0, 0, 0, 0, 0);
      value += c[0];
      break;
    }
    case kNoBarrierAfterAtomic:
      if (i == 0) sum = 0;
      __syncthreads();
      atomicAdd(&sum, 1u);
      value += sum == 64 ? 0 : 1;
      break;
    default:
      break;
  }
  if (mistake != kUninitialisedOutput) out[blockIdx.x * kThreads + i] = value / 2;
  if (mistake == kEarlyTouchesOutput) wait_for_previous();
}

// Lets the next kernel start before it has waited itself.
__global__ void __launch_bounds__(kThreads) hasty_kernel() {
  launch_next();
  wait_for_previous();
}

// As `broken_kernel`, but by way of the other block of a cluster.
__global__ void __launch_bounds__(kThreads) cluster_kernel(const float* x, float* out, Mistake mistake) {
  __shared__ float values[kThreads];
  auto cluster = cooperative_groups::this_cluster();
  const int i = threadIdx.x, next = (i + 1) % kThreads;
  if (mistake != kMapsTooEarly) cluster.sync();
  const float value = x[blockIdx.x * kThreads + i];
  *cluster.map_shared_rank(values + i, cluster.block_rank() ^ 1) = value;
  if (mistake == kNoClusterBarrier)
    __syncthreads();
  else
    cluster.sync();
  out[(blockIdx.x ^ 1) * kThreads + i] = values[next];
}

ffi::Error broken(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out, int64_t number) {
  const auto mistake = static_cast<Mistake>(number);
  const int blocks = x.element_count() / kThreads;
  const auto* from = static_cast<const float*>(x.untyped_data());
  auto* to = static_cast<float*>(out->untyped_data());
  const bool early = mistake >= kEarlyTouchesOutput && mistake <= kReliesOnHasty;
  const size_t shared = mistake == kTooMuchShared ? 228 << 10 : kThreads * sizeof(float);
  if (mistake == kReliesOnHasty) launch(stream, hasty_kernel, {1, kThreads, 0, 1, true});
  launch(stream, broken_kernel, {blocks, kThreads, shared, 1, early}, from, to, mistake);
  if (mistake == kNone || mistake == kMapsTooEarly || mistake == kNoClusterBarrier)
    launch(stream, cluster_kernel, {blocks, kThreads, 0, 2}, from, to, mistake);
  return launch_status("broken");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_broken, ernie::broken,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Attr<int64_t>("mistake"));
