// The experts' kernels, and XLA's call of them.
#include "experts.cuh"

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

// hidden[pair, F] = weight * swiglu(x gate^T, x up^T); a block computes 8 NP columns of one expert's pairs.
template <int NP, int MT, int STAGES>
__global__ void __launch_bounds__(kThreads, NP == 1 ? 3 : 1)
    up_kernel(const bf16* __restrict__ x, const bf16* __restrict__ weights, const Weight gate_up,
              const Weight shared_gate_up, bf16* __restrict__ hidden, bf16* __restrict__ shared_hidden,
              Plan plan, Sizes z) {
  constexpr int NT = 2 * NP;
  __shared__ Room<NT, STAGES> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.width / (32 * kWarps), offset = lane % 4 * 8;
  const int shared_tiles = z.shared / (8 * NP), tiles = z.inner / (8 * NP);
  const bool shared = blockIdx.x < shared_tiles;
  int inner = z.shared, rows = z.tokens, column = blockIdx.x * 8 * NP;
  const int* pairs = nullptr;
  Weight matrix = shared_gate_up;
  int64_t above = 0;  // rows
  if (!shared) {
    const int group = (blockIdx.x - shared_tiles) / tiles;
    if (group >= *plan.count) return;
    const int expert = plan.experts[group];
    pairs = plan.pairs + plan.starts[expert];
    rows = plan.starts[expert + 1] - plan.starts[expert];
    inner = z.inner;
    column = (blockIdx.x - shared_tiles) % tiles * 8 * NP;
    matrix = gate_up;
    above = (int64_t)expert * 2 * z.inner;
  }
  Row<Form::kBf16> w[NT];
#pragma unroll
  for (int i = 0; i < NT; ++i)
    w[i] = Row<Form::kBf16>(matrix, above + i / NP * inner + column + i % NP * 8 + row, z.width, lane);
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
    accumulate<NT, MT, STAGES>(room, acc, w, lines, warp * steps, steps, live, [] {});
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

// As `up_kernel` for a single token, whose pairs are its slots. A block takes every so many of the tiles of 8 columns, the
// shared experts' first; while it sums up one, the weights of its next are on their way. Launched early, it begins before
// the others are chosen: x is older than that.
template <int STAGES, Form F>
__global__ void __launch_bounds__(kThreads, kUpBlocks)
    up_one_kernel(const bf16* __restrict__ x, const int* __restrict__ chosen, const int* __restrict__ first,
                  const bf16* __restrict__ weights, const Weight gate_up, const Weight shared_gate_up, bf16* __restrict__ hidden, bf16* __restrict__ shared_hidden,
                  Norm norm, Sizes z) {
  __shared__ Ring<2, STAGES, F> rings[kWarps];
  __shared__ float partial[2][kWarps][16];  // of a tile and the next: 8 columns of gates, 8 of ups
  bf16* xs = dynamic_shared<bf16>();        // [D]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.width / (Layout<F>::kStep * kWarps), before = warp * steps;
  const int shared_tiles = z.shared / 8, per_expert = z.inner / 8, all = shared_tiles + z.k * per_expert;
  auto& ring = rings[warp];
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
  // The row of a tile's first gate and of its first up.
  const auto first_row = [&](int tile, int n) {
    if (tile < shared_tiles) return (int64_t)n * z.shared + tile * 8;
    return ((int64_t)expert_of(tile) * 2 + n) * z.inner + (tile - shared_tiles) % per_expert * 8;
  };
  Row<F> rows[2];  // this lane's of the tile that is fetched: a gate's and an up's
  int coming = blockIdx.x, at = 0, slot = 0;  // the tile that is fetched, the step in it, and where that goes
  const auto enter = [&](int tile) {
    coming = next(tile);
    if (coming >= all) return;
    for (int n = 0; n < 2; ++n)
      rows[n] = Row<F>(choose(coming < shared_tiles, shared_gate_up, gate_up), first_row(coming, n) + row, z.width, lane);
  };
  const auto fetch = [&] {
    if (coming < all) {
      for (int n = 0; n < 2; ++n) ring.fetch(slot, n, lane, rows[n], before + at);
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
    float acc[2][4] = {}, scales[2] = {};
    if (threadIdx.x < 8)
      for (int n = 0; n < 2; ++n)
        scales[n] = output_scale<F>(choose(tile < shared_tiles, shared_gate_up, gate_up), first_row(tile, n) + threadIdx.x);
    for (int s = before; s < before + steps; ++s) {
      wait_for_copies<STAGES - 1>();
      Piece<F> pieces[2];
      uint32_t grouped[2];
      for (int n = 0; n < 2; ++n) pieces[n] = ring.weights[slot][n][lane], grouped[n] = ring.scale(slot, n, lane, s);
#pragma unroll
      for (int p = 0; p < Layout<F>::kParts; ++p) {
        const bf16* from = xs + input_of<F>(s, p) + lane % 4 * Layout<F>::kLane;
        const uint4 line = row == 0 ? *reinterpret_cast<const uint4*>(from) : none;
        for (int n = 0; n < 2; ++n) mma32(acc[n], line, none, widen<F>(pieces[n], p, grouped[n]));
      }
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
      const float value = swiglu(sums[0] * scales[0], sums[1] * scales[1]);
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
// all tokens; its warps take turns at pieces of K, of eight steps, over all experts. While a warp multiplies one piece, the
// weights and the hidden rows of its next are on their way. A residual [T, D] is added last, unless it is null.
template <bool ONE, Form F = Form::kBf16>
__global__ void __launch_bounds__(kThreads, ONE ? 3 : 1)
    walk_kernel(const bf16* __restrict__ hidden, const bf16* __restrict__ shared_hidden,
                const int* __restrict__ chosen, const int* __restrict__ first, const Weight down,
                const Weight shared_down, const bf16* __restrict__ residual, bf16* __restrict__ out,
                Plan plan, Sizes z) {
  constexpr int kSteps = 8, kPiece = kSteps * Layout<F>::kStep, kParts = Layout<F>::kParts;
  constexpr int kAhead = kSteps / kParts;  // hidden rows on their way, which take as many registers in every form
  __shared__ Room<1, kSteps, F> room;
  __shared__ int experts[kMaxExperts], slots[32], count;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4 * Layout<F>::kLane;
  const int column = blockIdx.x * 8, per_expert = z.inner / kPiece, beside = z.shared / kPiece;
  auto& ring = room.rings[warp];
  // Of a piece: its expert's first output, and the first step in a row of its weights.
  const auto output_of = [&](int piece) {
    return piece < beside ? 0 : (int64_t)experts[(piece - beside) / per_expert] * z.width;
  };
  const auto step_of = [&](int piece) { return (piece < beside ? piece : (piece - beside) % per_expert) * kSteps; };
  const auto row_of = [&](int piece) {
    const bool shared = piece < beside;
    return Row<F>(choose(shared, shared_down, down), output_of(piece) + column + row, shared ? z.shared : z.inner, lane);
  };
  // What the sums of a piece are to be multiplied by, for this lane's two columns.
  const auto scales_of = [&](int piece) {
    const Weight weight = choose(piece < beside, shared_down, down);
    const int64_t output = output_of(piece) + column + lane % 4 * 2;
    return make_float2(output_scale<F>(weight, output), output_scale<F>(weight, output + 1));
  };
  launch_next();
  auto fetch_first = [&] {
    const Row<F> w = row_of(warp);
    const int step = step_of(warp);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      ring.fetch(s, 0, lane, w, step + s);
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
    return (piece < beside ? shared_hidden + (int64_t)pair * z.shared : hidden + (int64_t)pair * z.inner) + place;
  };
  float acc[1][4] = {};
  Lines a[kAhead][kParts];
  float2 scales = make_float2(1, 1);
  int pairs[2] = {};  // of the next piece
  const bf16* x[2] = {};  // of this piece
  const auto load = [&](int stage, const bf16* const(&from)[2], int step) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) a[stage][p].load(from, input_of<F>(step, p));
  };
  if (warp < all) {
    if (warp >= beside) fetch_first();
    x[0] = line(warp, pair_of(warp, row));
    if (!ONE) x[1] = line(warp, pair_of(warp, row + 8));
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(s, x, step_of(warp) + s);
    scales = scales_of(warp);
    for (int h = 0; h < 2; ++h) pairs[h] = pair_of(warp + kWarps, row + 8 * h);
  }
  for (int piece = warp; piece < all; piece += kWarps) {
    const int following = piece + kWarps;
    const bool more = following < all;
    const Row<F> w = more ? row_of(following) : Row<F>();
    const int step = step_of(piece), coming = more ? step_of(following) : 0;
    const bf16* const next[2] = {line(following, pairs[0]), ONE ? nullptr : line(following, pairs[1])};
    const float2 scales_here = scales;
    if (more) scales = scales_of(following);
    for (int h = 0; h < 2; ++h) pairs[h] = pair_of(following + kWarps, row + 8 * h);
    float sums[4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      wait_for_copies<kSteps - 1>();
      const Piece<F> held = ring.weights[s][0][lane];
      const uint32_t scale = ring.scale(s, 0, lane, step + s);
#pragma unroll
      for (int p = 0; p < kParts; ++p)
        mma32(sums, a[s % kAhead][p].low, a[s % kAhead][p].high, widen<F>(held, p, scale));
      if (s + kAhead < kSteps)
        load(s % kAhead, x, step + s + kAhead);
      else if (more)
        load(s % kAhead, next, coming + s + kAhead - kSteps);
      if (more) ring.fetch(s, 0, lane, w, coming + s);
      commit_copies();
    }
    x[0] = next[0];
    if (!ONE) x[1] = next[1];
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[0][i] = fmaf(sums[i], i % 2 ? scales_here.y : scales_here.x, acc[0][i]);
  }
  reduce(room, acc, 8, [&](int r, int c, auto sum) {
    if (r >= z.tokens) return;
    const int64_t at = (int64_t)r * z.width + column + c;
    out[at] = __float2bfloat16(residual ? __bfloat162float(residual[at]) + round_bf16(sum(c)) : sum(c));
  });
}

// rows[pair, D] = hidden[pair] down^T; a block computes 8 NT columns of one expert's pairs.
template <int NT, int MT, int STAGES>
__global__ void __launch_bounds__(kThreads) down_kernel(const bf16* __restrict__ hidden, const Weight down,
                                                        float* __restrict__ out, Plan plan, Sizes z) {
  __shared__ Room<NT, STAGES> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = z.inner / (32 * kWarps), offset = lane % 4 * 8;
  const int tiles = z.width / (8 * NT), group = blockIdx.x / tiles, column = blockIdx.x % tiles * 8 * NT;
  if (group >= *plan.count) return;
  const int expert = plan.experts[group];
  const int* pairs = plan.pairs + plan.starts[expert];
  const int rows = plan.starts[expert + 1] - plan.starts[expert];
  Row<Form::kBf16> w[NT];
#pragma unroll
  for (int i = 0; i < NT; ++i)
    w[i] = Row<Form::kBf16>(down, (int64_t)expert * z.width + column + 8 * i + row, z.inner, lane);
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
    accumulate<NT, MT, STAGES>(room, acc, w, lines, warp * steps, steps, live, [] {});
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

template <Form F>
void run_one(cudaStream_t stream, const Operands& o, const Sizes& z, Norm norm, bool early) {
  constexpr int kStages = F == Form::kInt4 ? 7 : 5;
  const int tiles = z.shared / 8 + z.k * (z.inner / 8), most = kUpBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  launch(stream, up_one_kernel<kStages, F>, {tiles < most ? tiles : most, kThreads, z.width * sizeof(bf16), 1, early}, o.x,
         o.chosen, o.first, o.weights, o.gate_up, o.shared_gate_up, o.hidden, o.shared_hidden, norm, z);
  launch(stream, walk_kernel<true, F>, {z.width / 8, kThreads, 0, 1, early}, o.hidden, o.shared_hidden, o.chosen, o.first,
         o.down, o.shared_down, o.residual, o.out, Plan(o.scratch, z.experts, z.k), z);
}

// Launch the kernels of several tokens, whose weights are bfloat16.
void run(cudaStream_t stream, const Operands& o, const Sizes& z) {
  const Plan plan(o.scratch, z.experts, z.tokens * z.k);
  const bool walks = z.tokens <= kWalks;
  launch(stream, plan_kernel, {1, 1024}, o.chosen, o.first, plan, z.tokens, z.k, z.experts, walks);
  const int groups = z.tokens * z.k < z.experts ? z.tokens * z.k : z.experts;
  auto up = [&](auto kernel, int columns) {
    const int blocks = z.shared / columns + groups * (z.inner / columns);
    launch(stream, kernel, {blocks, kThreads}, o.x, o.weights, o.gate_up, o.shared_gate_up, o.hidden, o.shared_hidden, plan,
           z);
  };
  if (walks) {
    up(up_kernel<1, 1, 5>, 8);
    launch(stream, walk_kernel<false>, {z.width / 8, kThreads}, o.hidden, o.shared_hidden, o.chosen, o.first, o.down,
           o.shared_down, o.residual, o.out, plan, z);
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

ffi::Error run_experts(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer chosen, ffi::AnyBuffer weights,
                       ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down,
                       ffi::AnyBuffer down_scales, ffi::AnyBuffer first, ffi::AnyBuffer shared_gate_up,
                       ffi::AnyBuffer shared_gate_up_scales, ffi::AnyBuffer shared_down,
                       ffi::AnyBuffer shared_down_scales, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> shared_hidden,
                       ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto shape = gate_up.dimensions();  // [E, 2, F, bytes or numbers of a row]
  const Sizes z{(int)x.dimensions()[0], (int)chosen.dimensions()[1], (int)shape[0], (int)x.dimensions()[1],
                         (int)shape[2], (int)shared_gate_up.dimensions()[1]};
  const Operands o{data<bf16>(x),
                            data<int>(chosen),
                            data<int>(first),
                            data<bf16>(weights),
                            weight_of(gate_up, gate_up_scales),
                            weight_of(down, down_scales),
                            weight_of(shared_gate_up, shared_gate_up_scales),
                            weight_of(shared_down, shared_down_scales),
                            nullptr,
                            data<bf16>(*out),
                            data<bf16>(*hidden),
                            data<bf16>(*shared_hidden),
                            data<float>(*rows),
                            data<int>(*scratch)};
  if (z.tokens == 1)
    experts::run_one(stream, form_of(gate_up), o, z, {}, false);
  else
    run(stream, o, z);
  return launch_status("experts");
}

}  // namespace

void run_one(cudaStream_t stream, Form form, const Operands& o, const Sizes& z, Norm norm, bool early) {
  with_form(form, [&](auto of) { run_one<decltype(of)::value>(stream, o, z, norm, early); });
}

}  // namespace ernie::experts

ERNIE_HANDLER(ernie_experts, ernie::experts::run_experts, ernie::rets<5>(ernie::args<12>(ernie::on_stream())));
