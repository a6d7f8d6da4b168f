// The MLP of the chosen experts, and of the shared ones beside them, for up to some hundreds of tokens: each chosen
// expert's weights are read once.
//
// Three stages. `plan` sorts the pairs of a token and one of its experts (a single token needs none). `up` computes every
// pair's hidden row, scaled by its router weight. For few tokens `walk` keeps all tokens' sums of a few output columns
// while it passes through all experts; for more, `down` writes each pair's row and `combine` adds up those of a token.
#pragma once

#include "stream.cuh"

namespace ernie::experts {
namespace {

constexpr int kMaxExperts = 256;
constexpr int kUpBlocks = 4;  // of `up_one_kernel` on a multiprocessor

// What `plan` finds out, as int32 in one buffer.
struct Plan {
  int* count;    // [1] chosen experts that are here
  int* experts;  // [E] their ids
  int* starts;   // [E + 1] of each expert, by id, the first pair in `pairs`
  int* pairs;    // [T k] pairs (token * k + slot) by expert
  int* inverse;  // [E, T] the pair of an expert and a token, or -1; only where `walk` needs it

  __host__ __device__ Plan(int* p, int experts_here, int pairs_all)
      : count(p), experts(p + 1), starts(p + 1 + experts_here), pairs(p + 2 + 2 * experts_here),
        inverse(p + 2 + 2 * experts_here + pairs_all) {}
};

__global__ void __launch_bounds__(1024) plan_kernel(const int* __restrict__ chosen, const int* __restrict__ first,
                                                    Plan plan, int tokens, int k, int experts, bool walks) {
  __shared__ int sizes[kMaxExperts + 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, pairs = tokens * k;
  const int base = *first;
  for (int e = warp; e < experts; e += warps) {
    int size = 0;
    for (int p = lane; p < (pairs + 31) / 32 * 32; p += 32)
      size += __popc(__ballot_sync(~0u, p < pairs && chosen[p] - base == e));
    if (lane == 0) sizes[e] = size;
  }
  if (walks)
    for (int i = threadIdx.x; i < experts * tokens; i += blockDim.x) plan.inverse[i] = -1;
  __syncthreads();
  if (warp == 0) {
    int start = 0, live = 0;
    for (int at = 0; at < experts; at += 32) {
      const int e = at + lane, size = e < experts ? sizes[e] : 0;
      int sum = size;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      const unsigned used = __ballot_sync(~0u, size > 0);
      if (size > 0) plan.experts[live + __popc(used & ((1u << lane) - 1))] = e;
      if (e < experts) plan.starts[e] = sizes[e] = start + sum - size;
      start += __shfl_sync(~0u, sum, 31);
      live += __popc(used);
    }
    if (lane == 0) {
      *plan.count = live;
      plan.starts[experts] = start;
    }
  }
  __syncthreads();
  for (int e = warp; e < experts; e += warps) {
    int at = sizes[e];
    for (int p = lane; p < (pairs + 31) / 32 * 32; p += 32) {
      const bool mine = p < pairs && chosen[p] - base == e;
      const unsigned all = __ballot_sync(~0u, mine);
      if (mine) {
        plan.pairs[at + __popc(all & ((1u << lane) - 1))] = p;
        if (walks) plan.inverse[e * tokens + p / k] = p;
      }
      at += __popc(all);
    }
  }
}

struct Sizes {
  int tokens, k, experts, width, inner, shared;  // T, k, E, D, F, and the shared experts' F or 0
};

// hidden[pair, F] = weight * swiglu(x gate^T, x up^T); a block computes 8 NP columns of one expert's pairs.
template <int NP, int MT, int STAGES>
__global__ void __launch_bounds__(kThreads, NP == 1 ? 3 : 1)
    up_kernel(const bf16* __restrict__ x, const bf16* __restrict__ weights, const bf16* __restrict__ gate_up,
              const bf16* __restrict__ shared_gate_up, bf16* __restrict__ hidden, bf16* __restrict__ shared_hidden,
              Plan plan, Sizes z) {
  constexpr int NT = 2 * NP;
  __shared__ Room<NT, STAGES> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.width / (32 * kWarps), offset = warp * steps * 32 + lane % 4 * 8;
  const int shared_tiles = z.shared / (8 * NP), tiles = z.inner / (8 * NP);
  const bool shared = blockIdx.x < shared_tiles;
  int inner = z.shared, rows = z.tokens, column = blockIdx.x * 8 * NP;
  const int* pairs = nullptr;
  const bf16* matrix = shared_gate_up;
  if (!shared) {
    const int group = (blockIdx.x - shared_tiles) / tiles;
    if (group >= *plan.count) return;
    const int expert = plan.experts[group];
    pairs = plan.pairs + plan.starts[expert];
    rows = plan.starts[expert + 1] - plan.starts[expert];
    inner = z.inner;
    column = (blockIdx.x - shared_tiles) % tiles * 8 * NP;
    matrix = gate_up + (int64_t)expert * 2 * z.inner * z.width;
  }
  const bf16* w[NT];
#pragma unroll
  for (int i = 0; i < NP; ++i) {
    w[i] = matrix + (int64_t)(column + 8 * i + row) * z.width + offset;
    w[NP + i] = w[i] + (int64_t)inner * z.width;
  }
  for (int from = 0; from < rows; from += 16 * MT) {
    const bf16* lines[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = from + 16 * m + 8 * h + row;
        lines[m][h] = r < rows ? x + (int64_t)(shared ? r : pairs[r] / z.k) * z.width + offset : nullptr;
      }
    if (from) __syncthreads();
    float acc[MT][NT][4] = {};
    const int live = min(MT, (rows - from + 15) / 16);
    accumulate<NT, MT, STAGES>(room, acc, w, lines, steps, live, [] {});
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if (m >= live) break;
      reduce(room, acc[m], 8 * NP, [&](int r, int c, auto sum) {
        r += from + 16 * m;
        if (r >= rows) return;
        const float value = swiglu(sum(c), sum(8 * NP + c));
        if (shared) {
          shared_hidden[(int64_t)r * inner + column + c] = __float2bfloat16(value);
        } else {
          const int pair = pairs[r];
          hidden[(int64_t)pair * inner + column + c] = __float2bfloat16(value * __bfloat162float(weights[pair]));
        }
      });
    }
  }
}

// RMSNorm that a single token's kernel is to compute; its weight [D] is null for none.
struct Norm {
  const bf16* weight = nullptr;
  float epsilon = 0;
};

// As `up_kernel` for a single token, whose pairs are its slots. A block takes every so many of the tiles of 8 columns, the
// shared experts' first; while it sums up one, the weights of its next are on their way. Launched early, it begins before
// the others are chosen: x is older than that.
template <int STAGES>
__global__ void __launch_bounds__(kThreads, kUpBlocks)
    up_one_kernel(const bf16* __restrict__ x, const int* __restrict__ chosen, const int* __restrict__ first,
                  const bf16* __restrict__ weights, const bf16* __restrict__ gate_up,
                  const bf16* __restrict__ shared_gate_up, bf16* __restrict__ hidden, bf16* __restrict__ shared_hidden,
                  Norm norm, Sizes z) {
  __shared__ uint4 rings[kWarps][STAGES][2][32];
  __shared__ float partial[2][kWarps][16];  // of a tile and the next: 8 columns of gates, 8 of ups
  bf16* xs = dynamic_shared<bf16>();        // [D]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.width / (32 * kWarps), offset = warp * steps * 32 + lane % 4 * 8;
  const int shared_tiles = z.shared / 8, per_expert = z.inner / 8, all = shared_tiles + z.k * per_expert;
  uint4(*ring)[2][32] = rings[warp];
  launch_next();
  const auto slot_of = [&](int tile) { return (tile - shared_tiles) / per_expert; };
  const auto expert_of = [&](int tile) { return chosen[slot_of(tile)] - *first; };
  // The first of this block's tiles from `tile` on whose expert is here.
  const auto next = [&](int tile) {
    for (; tile < all && tile >= shared_tiles; tile += gridDim.x) {
      wait_for_previous();
      const int expert = expert_of(tile);
      if (expert >= 0 && expert < z.experts) break;
    }
    return tile;
  };
  const bf16* gate = nullptr;  // this lane's row of the tile that is fetched
  int64_t to_up = 0;
  int coming = blockIdx.x, at = 0, slot = 0;  // the tile that is fetched, the step in it, and where that goes
  const auto enter = [&](int tile) {
    coming = next(tile);
    if (coming >= all) return;
    const bool shared = coming < shared_tiles;
    const int column = shared ? coming * 8 : (coming - shared_tiles) % per_expert * 8;
    to_up = (int64_t)(shared ? z.shared : z.inner) * z.width;
    gate = (shared ? shared_gate_up : gate_up + expert_of(coming) * 2 * to_up) + (int64_t)(column + row) * z.width + offset;
  };
  const auto fetch = [&] {
    if (coming < all) {
      copy_async(&ring[slot][0][lane], gate + at * 32);
      copy_async(&ring[slot][1][lane], gate + to_up + at * 32);
      if (++at == steps) at = 0, enter(coming + gridDim.x);
    }
    commit_copies();
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  };
  enter(coming);
  int tile = coming;
  for (int s = 0; s < STAGES; ++s) fetch();
  rely_on_previous_wait();
  bring_row(x, norm.weight, norm.epsilon, xs, z.width);
  const uint4 none = make_uint4(0, 0, 0, 0);
  for (int parity = 0; tile < all; tile = next(tile + gridDim.x), parity ^= 1) {
    float acc[2][4] = {};
    for (int s = 0; s < steps; ++s) {
      wait_for_copies<STAGES - 1>();
      const uint4 line = row == 0 ? *reinterpret_cast<const uint4*>(xs + offset + s * 32) : none;
      mma32(acc[0], line, none, ring[slot][0][lane]);
      mma32(acc[1], line, none, ring[slot][1][lane]);
      fetch();
    }
    if (row == 0)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        *reinterpret_cast<float2*>(&partial[parity][warp][8 * n + lane * 2]) = make_float2(acc[n][0], acc[n][1]);
    __syncthreads();
    if (threadIdx.x < 8) {
      float sums[2] = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w)
#pragma unroll
        for (int n = 0; n < 2; ++n) sums[n] += partial[parity][w][8 * n + threadIdx.x];
      const float value = swiglu(sums[0], sums[1]);
      if (tile < shared_tiles) {
        shared_hidden[tile * 8 + threadIdx.x] = __float2bfloat16(value);
      } else {
        const int pair = slot_of(tile), column = (tile - shared_tiles) % per_expert * 8 + threadIdx.x;
        hidden[(int64_t)pair * z.inner + column] = __float2bfloat16(value * __bfloat162float(weights[pair]));
      }
    }
  }
}

// out[t, D] = sum over its pairs of hidden down^T, plus the shared experts', for up to 16 tokens. A block has 8 columns of
// all tokens; its warps take turns at pieces of 256 of K, over all experts. While a warp multiplies one piece, the
// weights and the hidden rows of its next are on their way. A residual [T, D] is added last, unless it is null.
template <bool ONE>
__global__ void __launch_bounds__(kThreads)
    walk_kernel(const bf16* __restrict__ hidden, const bf16* __restrict__ shared_hidden,
                const int* __restrict__ chosen, const int* __restrict__ first, const bf16* __restrict__ down,
                const bf16* __restrict__ shared_down, const bf16* __restrict__ residual, bf16* __restrict__ out,
                Plan plan, Sizes z) {
  constexpr int kSteps = 8;  // of a piece
  __shared__ Room<1, kSteps> room;
  __shared__ int experts[kMaxExperts], slots[32], count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4 * 8;
  const int column = blockIdx.x * 8, per_expert = z.inner / 256, beside = z.shared / 256;
  uint4(*ring)[1][32] = room.ring[warp];
  auto weights = [&](int piece) {
    if (piece < beside) return shared_down + (int64_t)(column + row) * z.shared + piece * 256 + place;
    piece -= beside;
    const int64_t expert = experts[piece / per_expert];
    return down + (expert * z.width + column + row) * z.inner + piece % per_expert * 256 + place;
  };
  launch_next();
  auto fetch_first = [&] {
    const bf16* w = weights(warp);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      copy_async(&ring[s][0][lane], w + 32 * s);
      commit_copies();
    }
  };
  if (warp < beside) fetch_first();  // the shared experts' come first: they are known before the others are chosen
  wait_for_previous();
  if (ONE) {
    if (warp == 0) {
      const int expert = lane < z.k ? chosen[lane] - *first : -1;
      const unsigned here = __ballot_sync(~0u, expert >= 0 && expert < z.experts);
      if (here >> lane & 1) {
        const int at = __popc(here & ((1u << lane) - 1));
        experts[at] = expert;
        slots[at] = lane;
      }
      if (lane == 0) count = __popc(here);
    }
  } else {
    if (threadIdx.x == 0) count = *plan.count;
    if (threadIdx.x < z.experts) experts[threadIdx.x] = plan.experts[threadIdx.x];
  }
  __syncthreads();
  const int all = beside + count * per_expert;
  auto pair_of = [&](int piece, int t) {
    if (t >= z.tokens || piece >= all) return -1;
    if (piece < beside) return t;
    const int at = (piece - beside) / per_expert;
    return ONE ? slots[at] : plan.inverse[experts[at] * z.tokens + t];
  };
  auto line = [&](int piece, int pair) -> const bf16* {
    if (pair < 0) return nullptr;
    if (piece < beside) return shared_hidden + (int64_t)pair * z.shared + piece * 256 + place;
    return hidden + (int64_t)pair * z.inner + (piece - beside) % per_expert * 256 + place;
  };
  float acc[1][4] = {};
  Lines a[kSteps];
  int pairs[2] = {};  // of the next piece
  if (warp < all) {
    if (warp >= beside) fetch_first();
    const bf16* const x[2] = {line(warp, pair_of(warp, row)), ONE ? nullptr : line(warp, pair_of(warp, row + 8))};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) a[s].load(x, 32 * s);
    for (int h = 0; h < 2; ++h) pairs[h] = pair_of(warp + kWarps, row + 8 * h);
  }
  for (int piece = warp; piece < all; piece += kWarps) {
    const int following = piece + kWarps;
    const bool more = following < all;
    const bf16* w = more ? weights(following) : nullptr;
    const bf16* const x[2] = {line(following, pairs[0]), ONE ? nullptr : line(following, pairs[1])};
    for (int h = 0; h < 2; ++h) pairs[h] = pair_of(following + kWarps, row + 8 * h);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      wait_for_copies<kSteps - 1>();
      mma32(acc[0], a[s].low, a[s].high, ring[s][0][lane]);
      if (more) {
        copy_async(&ring[s][0][lane], w + 32 * s);
        a[s].load(x, 32 * s);
      }
      commit_copies();
    }
  }
  reduce(room, acc, 8, [&](int r, int c, auto sum) {
    if (r >= z.tokens) return;
    const int64_t at = (int64_t)r * z.width + column + c;
    out[at] = __float2bfloat16(residual ? __bfloat162float(residual[at]) + round_bf16(sum(c)) : sum(c));
  });
}

// rows[pair, D] = hidden[pair] down^T; a block computes 8 NT columns of one expert's pairs.
template <int NT, int MT, int STAGES>
__global__ void __launch_bounds__(kThreads) down_kernel(const bf16* __restrict__ hidden, const bf16* __restrict__ down,
                                                        float* __restrict__ out, Plan plan, Sizes z) {
  __shared__ Room<NT, STAGES> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.inner / (32 * kWarps), offset = warp * steps * 32 + lane % 4 * 8;
  const int tiles = z.width / (8 * NT), group = blockIdx.x / tiles, column = blockIdx.x % tiles * 8 * NT;
  if (group >= *plan.count) return;
  const int expert = plan.experts[group];
  const int* pairs = plan.pairs + plan.starts[expert];
  const int rows = plan.starts[expert + 1] - plan.starts[expert];
  const bf16* w[NT];
#pragma unroll
  for (int i = 0; i < NT; ++i)
    w[i] = down + (int64_t)expert * z.width * z.inner + (int64_t)(column + 8 * i + row) * z.inner + offset;
  for (int from = 0; from < rows; from += 16 * MT) {
    const bf16* lines[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = from + 16 * m + 8 * h + row;
        lines[m][h] = r < rows ? hidden + (int64_t)pairs[r] * z.inner + offset : nullptr;
      }
    if (from) __syncthreads();
    float acc[MT][NT][4] = {};
    const int live = min(MT, (rows - from + 15) / 16);
    accumulate<NT, MT, STAGES>(room, acc, w, lines, steps, live, [] {});
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if (m >= live) break;
      reduce(room, acc[m], 8 * NT, [&](int r, int c, auto sum) {
        r += from + 16 * m;
        if (r < rows) out[(int64_t)pairs[r] * z.width + column + c] = sum(c);
      });
    }
  }
}

// out[t] = the sum of the rows of t's pairs that are here.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const float* __restrict__ rows, const int* __restrict__ chosen, const int* __restrict__ first,
                   bf16* __restrict__ out, Sizes z) {
  const int t = blockIdx.y, column = (blockIdx.x * kThreads + threadIdx.x) * 4, base = *first;
  if (column >= z.width) return;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int slot = 0; slot < z.k; ++slot) {
    const int pair = t * z.k + slot, expert = chosen[pair] - base;
    if (expert < 0 || expert >= z.experts) continue;
    const float4 row = *reinterpret_cast<const float4*>(rows + (int64_t)pair * z.width + column);
    sum.x += row.x, sum.y += row.y, sum.z += row.z, sum.w += row.w;
  }
  auto* to = reinterpret_cast<__nv_bfloat162*>(out + (int64_t)t * z.width + column);
  to[0] = __floats2bfloat162_rn(sum.x, sum.y);
  to[1] = __floats2bfloat162_rn(sum.z, sum.w);
}

constexpr int kWalks = 16;  // up to so many tokens `down` walks through the experts

// A launch's operands: those of the kernels, and room for what passes between them.
struct Operands {
  const bf16* x;
  const int *chosen, *first;
  const bf16 *weights, *gate_up, *down, *shared_gate_up, *shared_down, *residual;
  bf16 *out, *hidden, *shared_hidden;
  float* rows;
  int* scratch;
};

// Launch the kernels; a norm and a residual are for a single token. `early`: the kernel before is of the same call.
inline void run(cudaStream_t stream, const Operands& o, const Sizes& z, Norm norm = {}, bool early = false) {
  const Plan plan(o.scratch, z.experts, z.tokens * z.k);
  const bool walks = z.tokens <= kWalks;
  if (z.tokens > 1) launch(stream, plan_kernel, {1, 1024}, o.chosen, o.first, plan, z.tokens, z.k, z.experts, walks);
  const int groups = z.tokens * z.k < z.experts ? z.tokens * z.k : z.experts;
  auto up = [&](auto kernel, int columns) {
    const int blocks = z.shared / columns + groups * (z.inner / columns);
    launch(stream, kernel, {blocks, kThreads}, o.x, o.weights, o.gate_up, o.shared_gate_up, o.hidden, o.shared_hidden, plan,
           z);
  };
  auto walk = [&](auto kernel) {
    launch(stream, kernel, {z.width / 8, kThreads, 0, 1, early}, o.hidden, o.shared_hidden, o.chosen, o.first, o.down,
           o.shared_down, o.residual, o.out, plan, z);
  };
  if (z.tokens == 1) {
    const int tiles = z.shared / 8 + z.k * (z.inner / 8), most = kUpBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
    launch(stream, up_one_kernel<5>, {tiles < most ? tiles : most, kThreads, z.width * sizeof(bf16), 1, early}, o.x,
           o.chosen, o.first, o.weights, o.gate_up, o.shared_gate_up, o.hidden, o.shared_hidden,
           norm, z);
    walk(walk_kernel<true>);
  } else if (walks) {
    up(up_kernel<1, 1, 5>, 8);
    walk(walk_kernel<false>);
  } else {
    if (z.tokens <= 64)
      up(up_kernel<2, 1, 3>, 16);
    else
      up(up_kernel<2, 2, 3>, 16);
    launch(stream, down_kernel<4, 2, 3>, {groups * (z.width / 32), kThreads}, o.hidden, o.down, o.rows, plan, z);
    const dim3 grid((z.width / 4 + kThreads - 1) / kThreads, z.tokens);
    launch(stream, combine_kernel, {grid, kThreads}, o.rows, o.chosen, o.first, o.out, z);
  }
}

}  // namespace
}  // namespace ernie::experts
