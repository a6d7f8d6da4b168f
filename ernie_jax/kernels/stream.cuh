// The heart of products with few rows: weights stream from memory to registers once, at full width.
#pragma once

#include "common.cuh"

namespace ernie {

constexpr int kWarps = 8;  // of a block; they split K between them
constexpr int kThreads = 32 * kWarps;

// Add to acc[m][n] the product of 16 MT rows of x and 8 NT rows of weights over `steps` times 32 of K.
//
// w[n] points at this lane's place in weight row 8 n + lane / 4, x[m][h] at its place in row 16 m + 8 h + lane / 4 of x
// or is null where there is no such row. U steps are loaded before the first is used: that many bytes are in flight.
template <int NT, int MT, int U>
__device__ __forceinline__ void accumulate(float (&acc)[MT][NT][4], const bf16* const (&w)[NT],
                                           const bf16* const (&x)[MT][2], int steps) {
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int s = 0; s < steps; s += U) {
    uint4 b[U][NT];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int n = 0; n < NT; ++n) b[u][n] = s + u < steps ? load_once(w[n] + (s + u) * 32) : zero;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (s + u >= steps) break;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const uint4 a0 = x[m][0] ? load_shared_by_many(x[m][0] + (s + u) * 32) : zero;
        const uint4 a1 = x[m][1] ? load_shared_by_many(x[m][1] + (s + u) * 32) : zero;
#pragma unroll
        for (int n = 0; n < NT; ++n) mma32(acc[m][n], a0, a1, b[u][n]);
      }
    }
  }
}

// Where one m-tile's partial sums of all warps meet.
template <int NT>
using Partials = float[kWarps][16][8 * NT + 4];

// Sum an m-tile over the warps; `use(row, column, read)` is called for 16 rows and `columns` columns, where read(c) is
// the sum at column c of that row. All threads must call this.
template <int NT, typename Use>
__device__ __forceinline__ void reduce(Partials<NT>& partial, const float (&acc)[NT][4], int columns, Use use) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    *reinterpret_cast<float2*>(&partial[warp][row][8 * n + column]) = make_float2(acc[n][0], acc[n][1]);
    *reinterpret_cast<float2*>(&partial[warp][row + 8][8 * n + column]) = make_float2(acc[n][2], acc[n][3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * columns; i += kThreads) {
    const int r = i / columns, c = i % columns;
    use(r, c, [&](int at) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) sum += partial[k][r][at];
      return sum;
    });
  }
  __syncthreads();
}

// silu(gate) * up with the roundings of ops.swiglu: each factor in bfloat16.
__device__ __forceinline__ float swiglu(float gate, float up) {
  const float g = round_bf16(gate);
  return round_bf16(round_bf16(g / (1.0f + __expf(-g))) * round_bf16(up));
}

}  // namespace ernie
