// Which block of decode attention attends over what.
#pragma once

#include "attention_step.cuh"

namespace ernie::attention {
namespace {

constexpr int kTile = 16;  // positions
constexpr int kLeastTiles = 16;  // of a range: below this a merge of blocks costs more than it saves
constexpr int kMostTokens = 2048;  // of a step: ops/decode_attention.py asks for no more

// Every block is for one head and, where it is not idle, for ranges of the tiles of all tokens, laid end to end. Ranges
// are whole tokens where that is nearly as even, or else equal parts, at whose bounds blocks share a token's result.
struct Plan {
  int ranges;  // that run at a time
  int count;   // ranges in all
  int length;  // tiles of a range that is an equal part, or 0
  int total;   // tiles

  __device__ int begin(int range, const int* first) const { return length ? range * length : first[range]; }
  __device__ int end(int range, const int* first) const {
    return length ? min((range + 1) * length, total) : first[range + 1];
  }
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Fill first[t] with the tiles of the tokens before t, and return the longest token's. All threads call this.
template <int W>
__device__ int count_tiles(const Step& step, int (&first)[kMostTokens + 1]) {
  __shared__ int sums[W], longest[W];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0, most = 0;
  for (int base = 0; base < step.tokens; base += 32 * W) {
    const int t = base + threadIdx.x;
    int tiles = 0;
    if (t < step.tokens && step.rows[t] < step.sequences) tiles = step.positions[t] / kTile + 1;
    most = max(most, tiles);
    int sum = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < W; ++w) {
      if (w < warp) sum += sums[w];
    }
    if (t < step.tokens) first[t + 1] = before + sum;
#pragma unroll
    for (int w = 0; w < W; ++w) before += sums[w];
    __syncthreads();
  }
#pragma unroll
  for (int d = 16; d; d /= 2) most = max(most, __shfl_xor_sync(~0u, most, d));
  if (lane == 0) longest[warp] = most;
  if (threadIdx.x == 0) first[0] = 0;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < W; ++w) most = max(most, longest[w]);
  return most;
}

__device__ Plan make_plan(const Step& step, int total, int longest) {
  const int ranges = gridDim.x / step.kv_heads;
  const int length = max(kLeastTiles, divide_up(total, ranges));
  const bool whole = divide_up(step.tokens, ranges) * longest <= length + length / 4 + 8;
  return {ranges, whole ? step.tokens : divide_up(total, length), whole ? 0 : length, total};
}

// The last token with first[t] <= tile: the only one of those that has tiles.
__device__ int find(const int* first, int tokens, int tile) {
  int low = 0, high = tokens;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= tile ? low : high) = middle;
  }
  return low;
}

}  // namespace
}  // namespace ernie::attention
