// out[T, N] = x[T, K] w[N, K]^T for few tokens; if wanted of the normalised x, and added to a residual.
#pragma once

#include "stream.cuh"

namespace ernie {

constexpr int kMostRows = 16;  // tokens of a tensor-core tile

// 1 / root mean square of each row of x [tokens, K], by a block: scales[16], after a barrier.
__device__ __forceinline__ void inverse_rms(const bf16* x, int tokens, int k, float epsilon, float (&scales)[kMostRows]) {
  __shared__ float sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto square = [](const uint4& v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __uint_as_float(words[i] << 16), high = __uint_as_float(words[i] & 0xffff0000u);
      sum = fmaf(low, low, fmaf(high, high, sum));
    }
    return sum;
  };
  if (tokens == 1) {  // all warps share the row
    float sum = 0;
    for (int i = threadIdx.x; i < k / 8; i += kThreads) sum += square(__ldg(reinterpret_cast<const uint4*>(x) + i));
    sum = sum_of_warp(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      sum = sum_of_warp(lane < kWarps ? sums[lane] : 0);
      if (lane == 0) scales[0] = rsqrtf(sum / k + epsilon);
    }
  } else {
    for (int t = warp; t < tokens; t += kWarps) {
      float sum = 0;
#pragma unroll 5
      for (int i = lane; i < k / 8; i += 32) sum += square(__ldg(reinterpret_cast<const uint4*>(x + (int64_t)t * k) + i));
      sum = sum_of_warp(sum);
      if (lane == 0) scales[t] = rsqrtf(sum / k + epsilon);
    }
  }
  __syncthreads();
}

// Eight of a row, rounded where the model's RMSNorm does: before the product with the weight and after it.
__device__ __forceinline__ uint4 normalise(const uint4& v, float scale, const uint4& weight) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w}, weights[4] = {weight.x, weight.y, weight.z, weight.w};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = round_bf16(__uint_as_float(words[i] << 16) * scale);
    const float high = round_bf16(__uint_as_float(words[i] & 0xffff0000u) * scale);
    out[i] = pack(low * __uint_as_float(weights[i] << 16), high * __uint_as_float(weights[i] & 0xffff0000u));
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// A launch's operands; norm [K] and residual [T, N] may be null.
struct Product {
  const bf16 *x, *norm, *w, *residual;
  bf16* out;
  int tokens, n, k;
  float epsilon;
};

template <int NT, int STAGES, bool NORM>
__global__ void __launch_bounds__(kThreads) linear_kernel(const Product p) {
  __shared__ Room<NT, STAGES> room;
  __shared__ float scales[kMostRows];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = p.k / (32 * kWarps), offset = warp * steps * 32 + lane % 4 * 8;
  const int first = blockIdx.x * 8 * NT;
  launch_next();
  const bf16* rows[NT];
  const bf16* lines[1][2];
#pragma unroll
  for (int i = 0; i < NT; ++i) rows[i] = p.w + (int64_t)(first + 8 * i + row) * p.k + offset;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    lines[0][h] = row + 8 * h < p.tokens ? p.x + (int64_t)(row + 8 * h) * p.k + offset : nullptr;
  float acc[1][NT][4] = {};
  float scale[2];
  const auto ready = [&] {  // weights are on their way
    wait_for_previous();
    if (NORM) {
      inverse_rms(p.x, p.tokens, p.k, p.epsilon, scales);
#pragma unroll
      for (int h = 0; h < 2; ++h) scale[h] = row + 8 * h < p.tokens ? scales[row + 8 * h] : 0;
    }
  };
  const auto adjust = [&](Lines& line, int at) {
    if (!NORM) return;
    const uint4 weight = __ldg(reinterpret_cast<const uint4*>(p.norm + offset + at));
    line.low = normalise(line.low, scale[0], weight);
    line.high = normalise(line.high, scale[1], weight);
  };
  accumulate<NT, 1, STAGES>(room, acc, rows, lines, steps, 1, ready, adjust);
  reduce(room, acc[0], 8 * NT, [&](int r, int c, auto sum) {
    if (r >= p.tokens) return;
    const int64_t at = (int64_t)r * p.n + first + c;
    const float value = round_bf16(sum(c));
    p.out[at] = __float2bfloat16(p.residual ? __bfloat162float(p.residual[at]) + value : value);
  });
}

inline void run_linear(cudaStream_t stream, const Product& p, bool early = false) {
  if (p.n >= 16384)
    launch(stream, p.norm ? linear_kernel<2, 5, true> : linear_kernel<2, 5, false>,
           {p.n / 16, kThreads, 0, 1, early}, p);
  else
    launch(stream, p.norm ? linear_kernel<1, 5, true> : linear_kernel<1, 5, false>, {p.n / 8, kThreads, 0, 1, early}, p);
}

}  // namespace ernie
