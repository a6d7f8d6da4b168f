// The heart of products with few rows: weights stream from memory to registers once, at full width.
#pragma once

#include "forms.cuh"

namespace ernie {

constexpr int kWarps = 8;  // of a block; they split K between them
constexpr int kThreads = 32 * kWarps;

// What a block of eight warps keeps in shared memory: first the weights on their way, then the warps' partial sums.
//
// Each lane copies the weights that it needs itself into slots of its own, so that no barrier stands between memory and
// use; registers could not hold as much, and the compiler would move the loads next to their use.
template <int NT, int STAGES, Form F = Form::kBf16>
union Room {
  Ring<NT, STAGES, F> rings[kWarps];
  float partial[kWarps][16][8 * NT + 4];
};

// Round where the model's RMSNorm does: before the product with the weight and after it.
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

// Bring the RMSNorm of a row x [width], or where `norm` is null the row itself, to shared memory. All threads call this.
__device__ __forceinline__ void bring_row(const bf16* x, const bf16* norm, float epsilon, bf16* row, int width) {
  __shared__ float sums[kWarps];
  const auto* from = reinterpret_cast<const uint4*>(x);
  const auto* weights = reinterpret_cast<const uint4*>(norm);
  auto* to = reinterpret_cast<uint4*>(row);
  float sum = 0;
  for (int i = threadIdx.x; i < width / 8; i += kThreads) {
    const uint4 v = from[i];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float low = __uint_as_float(words[w] << 16), high = __uint_as_float(words[w] & 0xffff0000u);
      sum = fmaf(low, low, fmaf(high, high, sum));
    }
    to[i] = v;
  }
  if (norm) {
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w];
    const float scale = rsqrtf(sum / width + epsilon);
    for (int i = threadIdx.x; i < width / 8; i += kThreads) to[i] = normalise(to[i], scale, __ldg(weights + i));
  }
  __syncthreads();
}

// The 16 bytes of x that a lane brings to a step: row lane / 4 and the row 8 below, zero where there is none.
struct Lines {
  uint4 low, high;

  __device__ __forceinline__ void load(const bf16* const (&x)[2], int at) {
    low = x[0] ? *reinterpret_cast<const uint4*>(x[0] + at) : make_uint4(0, 0, 0, 0);
    high = x[1] ? *reinterpret_cast<const uint4*>(x[1] + at) : make_uint4(0, 0, 0, 0);
  }
};

// Add to acc[m][n] the product of 16 MT rows of x and 8 NT rows of weights over `steps` steps of K from `first` on.
//
// w[n] points at this lane's place in weight row 8 n + lane / 4, x[m][h] at its place in row 16 m + 8 h + lane / 4 of x
// or is null where there is no such row; m-tiles from `live` on have none. STAGES steps of weights are on their way.
// `ready` is called once, before x is read.
template <int NT, int MT, int STAGES, Form F = Form::kBf16, typename Ready>
__device__ __forceinline__ void accumulate(Room<NT, STAGES, F>& room, float (&acc)[MT][NT][4], const Row<F> (&w)[NT],
                                           const bf16* const (&x)[MT][2], int first, int steps, int live, Ready ready) {
  // Rows of x come as early as weights, but not where that takes more registers than there are.
  constexpr int kParts = Layout<F>::kParts, kAhead = F == Form::kBf16 ? STAGES : 2;
  static_assert(STAGES % kAhead == 0);
  auto& ring = room.rings[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  Lines a[kAhead][MT][kParts];
  auto fetch = [&](int step, int stage) {
    if (step < steps) {
#pragma unroll
      for (int n = 0; n < NT; ++n) ring.fetch(stage, n, lane, w[n], first + step);
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < STAGES; ++s) fetch(s, s);
  ready();
  const auto load = [&](int m, int step, int stage) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) a[stage][m][p].load(x[m], input_of<F>(first + step, p));
  };
#pragma unroll
  for (int s = 0; s < kAhead; ++s)
#pragma unroll
    for (int m = 0; m < MT; ++m) load(m, max(min(s, steps - 1), 0), s);
  for (int from = 0; from < steps; from += STAGES) {
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
      wait_for_copies<STAGES - 1>();
      if (from + s < steps) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const Piece<F> piece = ring.weights[s][n][lane];
          const uint32_t scale = ring.scale(s, n, lane, first + from + s);
#pragma unroll
          for (int p = 0; p < kParts; ++p) {
            const uint4 b = widen<F>(piece, p, scale);
#pragma unroll
            for (int m = 0; m < MT; ++m)
              if (m < live) mma32(acc[m][n], a[s % kAhead][m][p].low, a[s % kAhead][m][p].high, b);
          }
        }
        if (from + s + kAhead < steps) {
#pragma unroll
          for (int m = 0; m < MT; ++m) load(m, from + s + kAhead, s % kAhead);
        }
      }
      fetch(from + s + STAGES, s);
    }
  }
}

// Sum an m-tile over the warps; `use(row, column, sum)` is called for 16 rows and `columns` columns, where sum(c) is the
// total at column c of that row. All threads must call this, after their last use of the ring.
template <int NT, int STAGES, Form F, typename Use>
__device__ __forceinline__ void reduce(Room<NT, STAGES, F>& room, const float (&acc)[NT][4], int columns, Use use) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    *reinterpret_cast<float2*>(&room.partial[warp][row][8 * n + column]) = make_float2(acc[n][0], acc[n][1]);
    *reinterpret_cast<float2*>(&room.partial[warp][row + 8][8 * n + column]) = make_float2(acc[n][2], acc[n][3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * columns; i += kThreads) {
    const int r = i / columns, c = i % columns;
    use(r, c, [&](int at) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) sum += room.partial[k][r][at];
      return sum;
    });
  }
}

// silu(gate) * up with the roundings of ops.swiglu: each factor in bfloat16.
__device__ __forceinline__ float swiglu(float gate, float up) {
  const float g = round_bf16(gate);
  return round_bf16(round_bf16(g / (1.0f + __expf(-g))) * round_bf16(up));
}

}  // namespace ernie
