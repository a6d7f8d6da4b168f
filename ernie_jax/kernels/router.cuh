// Which experts a token goes to: float32 logits, softmax, the k best of probability + bias; if wanted, RMSNorm before.
//
// Eight blocks split D between them and each multiplies its slice for a few tokens. They form a cluster where the GPU
// has those (compute capability 9 and later): sums meet in shared memory, and one launch does it all without a counter
// or a flag that outlives it. Elsewhere sums meet in memory, and a second kernel chooses.
#pragma once

#include <cooperative_groups.h>

#include "common.cuh"

namespace ernie::router {
namespace {

namespace cg = cooperative_groups;

constexpr int kSplits = 8;  // of D
constexpr int kWarps = 8;   // of a block; they split its slice again
constexpr int kThreads = 32 * kWarps;
constexpr int kExperts = 64;  // at a time
constexpr int kMaxExperts = 256;
constexpr int kPiece = 320;           // of D that lies in shared memory at a time: all of the slice where D is 2560
constexpr int kStride = kPiece + 4;   // of its rows: eight of them then differ in their banks
constexpr int kPartial = kExperts + 8;  // row of partial sums, likewise

struct Problem {
  const bf16* x;          // [T, D]
  const bf16* norm;       // [D], or null: x is normalised already
  const float* weight;    // [E, D]
  const float* bias;      // [E]
  bf16* normalised;       // [T, D]
  int* experts;           // [T, k]
  bf16* weights;          // [T, k]
  float* probabilities;   // [T, E]
  float* scratch;         // [T, kSplits, E]
  int tokens, width, count, k;  // T, D, E, k
  float norm_min, epsilon;
};

__device__ __forceinline__ uint2 load4(const bf16* p) { return *reinterpret_cast<const uint2*>(p); }

__device__ __forceinline__ float4 widen4(const uint2& v) {
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
                     __uint_as_float(v.y & 0xffff0000u));
}

__device__ __forceinline__ void store4(bf16* p, const float4& v) {
  reinterpret_cast<__nv_bfloat162*>(p)[0] = __floats2bfloat162_rn(v.x, v.y);
  reinterpret_cast<__nv_bfloat162*>(p)[1] = __floats2bfloat162_rn(v.z, v.w);
}

__device__ __forceinline__ void add_product(float& sum, const float4& a, const float4& b) {
  sum = fmaf(a.x, b.x, sum);
  sum = fmaf(a.y, b.y, sum);
  sum = fmaf(a.z, b.z, sum);
  sum = fmaf(a.w, b.w, sum);
}

// 1 / root mean square of N rows, by a warp, all of whose loads are under way together.
template <int N>
__device__ __forceinline__ void inverse_rms(const bf16* const (&rows)[N], int width, float epsilon, float (&scale)[N]) {
  float sum[N] = {};
#pragma unroll(N == 1 ? 10 : 5)
  for (int i = threadIdx.x % 32 * 8; i < width; i += 256)
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const uint4 v = *reinterpret_cast<const uint4*>(rows[n] + i);
      const float4 low = widen4({v.x, v.y}), high = widen4({v.z, v.w});
      add_product(sum[n], low, low);
      add_product(sum[n], high, high);
    }
#pragma unroll
  for (int n = 0; n < N; ++n) scale[n] = rsqrtf(sum_of_warp(sum[n]) / width + epsilon);
}

// Round where the model's RMSNorm does: before the product with the weight and after it.
__device__ __forceinline__ float4 normalise(const float4& v, float scale, const float4& w) {
  return make_float4(round_bf16(round_bf16(v.x * scale) * w.x), round_bf16(round_bf16(v.y * scale) * w.y),
                     round_bf16(round_bf16(v.z * scale) * w.z), round_bf16(round_bf16(v.w * scale) * w.w));
}

// Bytes of shared memory that `partial_logits` takes for M tokens.
template <int M>
constexpr int kSharedBytes = 4 * (M * kStride + (M == 1 ? kWarps * kPartial : kExperts * kStride));

// Multiply one slice of D for tokens `first` to first + M - 1; place(t, e, sum) is called for each of them and expert.
//
// A single token's weights go straight to registers; those of several through shared memory, once for all.
// `meanwhile` is called once, by all threads, when the first weights are on their way.
template <int M, typename Meanwhile, typename Place>
__device__ __forceinline__ void partial_logits(const Problem& p, int split, int first, float* shared,
                                               Meanwhile meanwhile, Place place) {
  // Lanes of a warp: 8 lines of experts, each lane with 8 of them, times 4 that share tokens or a place in D.
  constexpr int kGroups = M < 4 ? M : 4, kTokens = M / kGroups, kPlaces = 4 / kGroups;
  constexpr int kStep = kWarps * kPlaces, kSteps = (kPiece / 4 + kStep - 1) / kStep;
  constexpr int kRows = (M + kWarps - 1) / kWarps;    // of x that a warp brings
  constexpr int kFours = (kPiece / 4 + 31) / 32;      // of each, that a lane does
  static_assert(kExperts == 64 && 8 * kWarps * M * kPartial <= 8 * kExperts * kStride);
  float* xs = shared;                // [M, kStride]
  float* ws = shared + M * kStride;  // [kExperts, kStride], then sums [kWarps, M, kPartial]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, line = lane % 8;
  const int group = lane / 8 % kGroups, place_in_d = warp * kPlaces + lane / 8 / kGroups;
  const int slice = p.width / kSplits, pieces = (slice + kPiece - 1) / kPiece;
  const int piece = (slice / 4 + pieces - 1) / pieces * 4;
  float scale[kRows];
  for (int e0 = 0; e0 < p.count; e0 += kExperts) {
    float acc[kTokens][8] = {};
    for (int at = 0; at < slice; at += piece) {
      const int fours = min(piece, slice - at) / 4, base = split * slice + at;
      const bool start = e0 == 0 && at == 0;
      const float* weight = p.weight + (int64_t)e0 * p.width + base;
      float4 held[M == 1 ? kSteps : 1][8];
      if constexpr (M == 1) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int e = line + 8 * j, f = place_in_d + s * kStep;
            held[s][j] = e0 + e < p.count && f < fours
                             ? __ldg(reinterpret_cast<const float4*>(weight + (int64_t)e * p.width + 4 * f))
                             : make_float4(0, 0, 0, 0);
          }
      } else {
        for (int e = warp; e < min(kExperts, p.count - e0); e += kWarps)
          for (int f = lane; f < fours; f += 32)
            copy_async(ws + e * kStride + 4 * f, weight + (int64_t)e * p.width + 4 * f);
        commit_copies();
      }
      if (start) {
        if (p.norm && threadIdx.x < p.width / 64) prefetch(p.norm + threadIdx.x * 64);
        wait_for_previous();
        launch_next();  // not before, so that the next kernel may rely on this wait
      }
      if (warp < M) {
        // All that is read of x comes at once.
        const bf16* rows[kRows];
        uint2 values[kRows][kFours], weights[kFours];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          rows[i] = p.x + (int64_t)min(first + warp + kWarps * i, p.tokens - 1) * p.width;
#pragma unroll
          for (int j = 0; j < kFours; ++j)
            if (lane + 32 * j < fours) values[i][j] = load4(rows[i] + base + 4 * (lane + 32 * j));
        }
        if (p.norm) {
#pragma unroll
          for (int j = 0; j < kFours; ++j)
            if (lane + 32 * j < fours) weights[j] = load4(p.norm + base + 4 * (lane + 32 * j));
          if (start) inverse_rms<kRows>(rows, p.width, p.epsilon, scale);
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const int t = warp + kWarps * i;
          const bool live = first + t < p.tokens;
#pragma unroll
          for (int j = 0; j < kFours; ++j) {
            const int f = lane + 32 * j;
            if (f >= fours) break;
            float4 v = live ? widen4(values[i][j]) : make_float4(0, 0, 0, 0);
            if (live && p.norm) {
              v = normalise(v, scale[i], widen4(weights[j]));
              if (e0 == 0) store4(p.normalised + (int64_t)(first + t) * p.width + base + 4 * f, v);
            }
            *reinterpret_cast<float4*>(xs + t * kStride + 4 * f) = v;
          }
        }
      }
      if (start) meanwhile();
      if constexpr (M > 1) wait_for_copies<0>();
      __syncthreads();
#pragma unroll(M == 1 ? kSteps : 2)
      for (int s = 0; s < kSteps; ++s) {
        const int f = place_in_d + s * kStep;
        if (f >= fours) break;
        float4 w[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          if constexpr (M == 1)
            w[j] = held[s][j];
          else
            w[j] = *reinterpret_cast<const float4*>(ws + (line + 8 * j) * kStride + 4 * f);
        }
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const float4 v = *reinterpret_cast<const float4*>(xs + (group + kGroups * i) * kStride + 4 * f);
#pragma unroll
          for (int j = 0; j < 8; ++j) add_product(acc[i][j], v, w[j]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int d = 8 * kGroups; d < 32; d *= 2) acc[i][j] += __shfl_xor_sync(~0u, acc[i][j], d);
        if (lane < 8 * kGroups) ws[(warp * M + group + kGroups * i) * kPartial + line + 8 * j] = acc[i][j];
      }
    __syncthreads();
    for (int i = threadIdx.x; i < M * kExperts; i += kThreads) {
      const int t = i / kExperts, e = i % kExperts;
      if (first + t >= p.tokens || e0 + e >= p.count) continue;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += ws[(w * M + t) * kPartial + e];
      place(t, e0 + e, sum);
    }
    __syncthreads();
  }
}

// Whole numbers in the order of the floats. 0 comes before all of them.
__device__ __forceinline__ unsigned ordered(float v) {
  const unsigned bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A warp's work: from a token's logits (`logit(e)`, `bias(e)`) to its experts. A lane holds up to N experts.
template <int N, typename Logit, typename Bias>
__device__ __forceinline__ void choose_of(const Problem& p, int token, Logit logit, Bias bias) {
  const int lane = threadIdx.x % 32;
  float value[N];
  unsigned key[N];
  float top = -INFINITY, total = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int e = lane + 32 * j;
    value[j] = e < p.count ? logit(e) : -INFINITY;
    top = fmaxf(top, value[j]);
  }
#pragma unroll
  for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
#pragma unroll
  for (int j = 0; j < N; ++j) total += value[j] = expf(value[j] - top);
  total = sum_of_warp(total);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int e = lane + 32 * j;
    value[j] /= total;
    key[j] = 0;
    if (e >= p.count) continue;
    p.probabilities[(int64_t)token * p.count + e] = value[j];
    key[j] = ordered(__fadd_rn(value[j], bias(e)));
  }
  int mine = 0;
  float weight = 0, sum = 0;
  for (int slot = 0; slot < p.k; ++slot) {
    unsigned best = 0, at = kMaxExperts;
#pragma unroll
    for (int j = 0; j < N; ++j) best = max(best, key[j]);
    best = __reduce_max_sync(~0u, best);
#pragma unroll
    for (int j = N - 1; j >= 0; --j)
      if (key[j] == best) at = lane + 32 * j;
    at = __reduce_min_sync(~0u, at);  // of equals the first, as lax.top_k has it
    float found = 0;
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (at == lane + 32 * j) {
        found = value[j];
        key[j] = 0;
      }
    found = __shfl_sync(~0u, found, at % 32);
    sum += found;
    if (lane == slot) {
      mine = at;
      weight = found;
    }
  }
  if (lane < p.k) {
    p.experts[(int64_t)token * p.k + lane] = mine;
    p.weights[(int64_t)token * p.k + lane] = __float2bfloat16(weight / fmaxf(sum, p.norm_min));
  }
}

template <typename Logit, typename Bias>
__device__ __forceinline__ void choose(const Problem& p, int token, Logit logit, Bias bias) {
  if (p.count <= 64)
    choose_of<2>(p, token, logit, bias);
  else
    choose_of<kMaxExperts / 32>(p, token, logit, bias);
}

// Each block of a cluster chooses for every eighth token: the others bring it their sums.
template <int M>
constexpr int kOwned = (M + kSplits - 1) / kSplits;

template <int M>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(Problem p) {
#if __CUDA_ARCH__ >= 900
  float* shared = dynamic_shared<float>();
  float* inbox = shared + kSharedBytes<M> / 4;                // [kOwned, kSplits, E]
  float* bias = inbox + kOwned<M> * kSplits * p.count;  // [E]
  auto cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), first = blockIdx.x / kSplits * M;
  const float held = threadIdx.x < p.count ? __ldg(p.bias + threadIdx.x) : 0;  // on its way before anything is waited for
  __cluster_barrier_arrive_relaxed();
  partial_logits<M>(
      p, rank, first, shared,
      [&] {
        if (threadIdx.x < p.count) bias[threadIdx.x] = held;
        __cluster_barrier_wait();  // a block that has not started has no shared memory to write to
      },
      [&](int t, int e, float sum) {
        *cluster.map_shared_rank(inbox + (t / kSplits * kSplits + rank) * p.count + e, t % kSplits) = sum;
      });
  cluster.sync();
  const int warp = threadIdx.x / 32, token = first + warp * kSplits + rank;
  if (warp >= kOwned<M> || warp * kSplits + rank >= M || token >= p.tokens) return;
  choose(
      p, token,
      [&](int e) {
        float sum = 0;
#pragma unroll
        for (int s = 0; s < kSplits; ++s) sum += inbox[(warp * kSplits + s) * p.count + e];
        return sum;
      },
      [&](int e) { return bias[e]; });
#endif
}

template <int M>
__global__ void __launch_bounds__(kThreads, 1) partial_kernel(Problem p) {
  const int rank = blockIdx.x % kSplits, first = blockIdx.x / kSplits * M;
  partial_logits<M>(
      p, rank, first, dynamic_shared<float>(), [] {},
      [&](int t, int e, float sum) { p.scratch[((int64_t)(first + t) * kSplits + rank) * p.count + e] = sum; });
}

constexpr int kChoosers = 4;  // warps of a block

__global__ void __launch_bounds__(32 * kChoosers) choose_kernel(Problem p) {
  const int token = blockIdx.x * kChoosers + threadIdx.x / 32;
  if (token >= p.tokens) return;
  choose(
      p, token,
      [&](int e) {
        float sum = 0;
#pragma unroll
        for (int s = 0; s < kSplits; ++s) sum += p.scratch[((int64_t)token * kSplits + s) * p.count + e];
        return sum;
      },
      [&](int e) { return p.bias[e]; });
}

template <int M>
constexpr size_t shared_bytes(int experts) {
  return kSharedBytes<M> + 4 * (kOwned<M> * kSplits + 1) * experts;
}

template <int M>
void run(cudaStream_t stream, const Problem& p, bool clusters, bool early) {
  const int blocks = kSplits * ((p.tokens + M - 1) / M);
  if (clusters) {
    launch(stream, cluster_kernel<M>, {blocks, kThreads, shared_bytes<M>(p.count), kSplits, early}, p);
    return;
  }
  launch(stream, partial_kernel<M>, {blocks, kThreads, kSharedBytes<M>}, p);
  launch(stream, choose_kernel, {(p.tokens + kChoosers - 1) / kChoosers, 32 * kChoosers}, p);
}

// Tokens of a cluster: as few as keep at most eight clusters busy, since a GPU's processors come in about as many
// neighbourhoods and each reads all the weights anyway.
inline void run(cudaStream_t stream, const Problem& p, bool may_cluster, bool early = false) {
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const bool clusters = may_cluster && capability() >= 9;
  if (p.tokens <= 8)
    run<1>(stream, p, clusters, early);
  else if (p.tokens <= 16)
    run<2>(stream, p, clusters, early);
  else if (p.tokens <= 32)
    run<4>(stream, p, clusters, early);
  else if (p.tokens <= 64 || room < shared_bytes<16>(p.count))
    run<8>(stream, p, clusters, early);
  else
    run<16>(stream, p, clusters, early);
}

}  // namespace
}  // namespace ernie::router
