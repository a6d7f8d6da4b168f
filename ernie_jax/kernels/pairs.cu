// Before a grouped product, the pairs of a token and one of its experts sorted by expert, with their tokens' rows in that
// order; after it, the weighted sum of a token's rows.
//
// Every token also goes, with weight 1, through `shared` experts more, which are numbered behind the others. An expert's
// rows begin at a multiple of 8 and are cut into blocks of at most `most` rows.
//
// A row is read once and written to all its places, so work is even however unevenly experts are chosen. To know the
// places a CUDA block needs how many pairs each expert has, before its own tokens and in all: it counts those of its
// chunk of `chosen` itself; the other chunks, if there are any, `count_kernel` has counted.
//
// Rows are bfloat16, or fp8 with a factor each, which is sorted with them.
#include "common.cuh"

namespace ernie {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = kThreads;     // the shared ones included
constexpr int kMaxSlots = 32;             // experts of a token, the shared ones included: a lane for each
constexpr int kAlignment = 8;             // rows
constexpr int kEach = 12;                 // ids of a chunk for each thread, all in flight at once
constexpr int kChunk = kEach * kThreads;  // ids that are counted together
constexpr int kHeld = 5;                  // vectors of a row that a thread holds
constexpr int kFew = 512;                 // tokens of which each has a CUDA block of its own
constexpr int kSumThreads = 128;
constexpr int kTogether = 8;              // rows in flight for a sum
constexpr int kAddends = 2;               // rows more that a sum has at most

struct Here {
  int first, tokens;  // the first expert that is here, and how many tokens there are: those behind go nowhere
};

struct Pairs {
  const int* chosen;  // [T, k]
  const int* here;    // [2] a `Here`
  int tokens, k, experts, shared;

  __host__ __device__ __forceinline__ int ids() const { return tokens * k; }
  __host__ __device__ __forceinline__ int chunks() const { return (ids() + kChunk - 1) / kChunk; }
  __host__ __device__ __forceinline__ int slots() const { return k + shared; }
  __host__ __device__ __forceinline__ int all() const { return experts + shared; }

  __device__ __forceinline__ Here read_here() const {
    const int2 both = *reinterpret_cast<const int2*>(here);
    return {both.x, min(both.y, tokens)};
  }

  // The expert of a token's slot, of which the id is `id` if it is no shared one; or -1 if it is none of those here.
  __device__ __forceinline__ int expert(const Here& there, int token, int slot, int id) const {
    const bool known = slot < k ? (unsigned)(id - there.first) < (unsigned)experts : slot < slots();
    return token < there.tokens && known ? (slot < k ? id - there.first : experts + slot - k) : -1;
  }
};

// Count the ids of a chunk, of which a thread has every kThreads-th from `at` on: those before `split` in sizes[0], the
// others in sizes[1].
__device__ __forceinline__ void count_chunk(const int (&ids)[kEach], int at, int split, const Pairs& pairs,
                                            const Here& here, int (*sizes)[kMaxExperts]) {
  const int end = here.tokens * pairs.k;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = at + j * kThreads, e = ids[j] - here.first;
    if (i < end && (unsigned)e < (unsigned)pairs.experts) atomicAdd(&sizes[i >= split][e], 1);
  }
}

// Load what `count_chunk` counts.
__device__ __forceinline__ void load_chunk(int (&ids)[kEach], int at, const Pairs& pairs) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) ids[j] = at + j * kThreads < pairs.ids() ? pairs.chosen[at + j * kThreads] : 0;
}

// counts[chunk, e]: how many pairs of a chunk an expert has.
__global__ void __launch_bounds__(kThreads) count_kernel(Pairs pairs, int* __restrict__ counts) {
  __shared__ int sizes[1][kMaxExperts];
  const int at = blockIdx.x * kChunk + threadIdx.x;
  const Here here = pairs.read_here();
  int ids[kEach];
  load_chunk(ids, at, pairs);
  if (threadIdx.x < pairs.experts) sizes[0][threadIdx.x] = 0;
  __syncthreads();
  count_chunk(ids, at, pairs.ids(), pairs, here, sizes);
  __syncthreads();
  if (threadIdx.x < pairs.experts) counts[blockIdx.x * pairs.experts + threadIdx.x] = sizes[0][threadIdx.x];
}

// Where each expert's first row and first block are, of those that sizes[e] pairs make; returns how many blocks there
// are. By one warp, of which each lane has some neighbouring experts.
__device__ __forceinline__ int find_firsts(const int (*sizes)[kMaxExperts], const Pairs& pairs, int tokens, int most,
                                           int* first_row, int* first_block) {
  const int lane = threadIdx.x % 32, all = pairs.all(), each = (all + 31) / 32;
  const int from = min(all, lane * each), to = min(all, from + each);
  int rows = 0, blocks = 0;
#pragma unroll 1
  for (int e = from; e < to; ++e) {
    const int size = e < pairs.experts ? sizes[0][e] + sizes[1][e] : tokens;
    first_row[e] = rows, first_block[e] = blocks;
    rows += (size + kAlignment - 1) / kAlignment * kAlignment;
    blocks += (unsigned)(size + most - 1) / (unsigned)most;
  }
  int rows_to = rows, blocks_to = blocks;  // sums up to this lane
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int r = __shfl_up_sync(~0u, rows_to, d), b = __shfl_up_sync(~0u, blocks_to, d);
    if (lane >= d) rows_to += r, blocks_to += b;
  }
#pragma unroll 1
  for (int e = from; e < to; ++e) first_row[e] += rows_to - rows, first_block[e] += blocks_to - blocks;
  return __shfl_sync(~0u, blocks_to, 31);
}

// TOKENS: of a CUDA block, the warps of which share them out, and then each token's columns. A row is `vectors` of 16
// bytes; factors may be null.
template <int TOKENS>
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const uint4* __restrict__ x, const float* __restrict__ factors, Pairs pairs,
                const int* __restrict__ counts, uint4* __restrict__ rows, float* __restrict__ row_factors,
                int* __restrict__ blocks, int* __restrict__ live, int* __restrict__ place_of, int vectors, int most) {
  constexpr int kOfToken = kWarps / TOKENS, kStride = 32 * kOfToken;
  __shared__ int sizes[2][kMaxExperts];  // pairs of each expert: before the first of these tokens, from it on
  __shared__ int first_row[kMaxExperts], first_block[kMaxExperts];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = warp / kOfToken, part = warp % kOfToken;
  const int first = blockIdx.x * TOKENS, token = first + mine, first_id = first * pairs.k;
  const int k = pairs.k, experts = pairs.experts;

  // Everything that is read comes at once.
  const Here here = pairs.read_here();
  uint4 held[kHeld];
  const auto load = [&](int from) {
    const auto* row = x + (int64_t)token * vectors + from;
    const int left = token < pairs.tokens ? vectors - from : 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j)
      if (j * kStride < left) held[j] = __ldg(row + j * kStride);
  };
  load(part * 32 + lane);
  int ids[kEach], slot_ids[TOKENS];
  const int chunk = first_id / kChunk, at = chunk * kChunk + threadIdx.x;
  load_chunk(ids, at, pairs);
#pragma unroll
  for (int n = 0; n < TOKENS; ++n) {
    const bool any = lane < k && first + n < pairs.tokens;
    slot_ids[n] = any ? pairs.chosen[first_id + n * k + lane] : 0;
  }

  if (threadIdx.x < experts) sizes[0][threadIdx.x] = sizes[1][threadIdx.x] = 0;
  __syncthreads();
  count_chunk(ids, at, first_id, pairs, here, sizes);
  int id = 0, same = 0;  // of this lane's slot; pairs of its expert that these tokens have before it
#pragma unroll
  for (int n = 0; n < TOKENS; ++n)
    if (n == mine) id = slot_ids[n];
#pragma unroll 1  // code that is longer takes longer to come than it saves
  for (int slot = 0; slot < k; ++slot) {
#pragma unroll
    for (int n = 0; n < TOKENS; ++n) {
      const bool before = n < mine || (n == mine && slot < lane);
      same += __shfl_sync(~0u, slot_ids[n], slot) == id && before;
    }
  }
  const int chunks = pairs.chunks();
  if (chunks > 1 && threadIdx.x < kThreads / experts * experts) {
    const int e = threadIdx.x % experts;
    int before = 0, after = 0;
#pragma unroll 4
    for (int c = threadIdx.x / experts; c < chunks; c += kThreads / experts) {
      const int size = counts[c * experts + e];
      before += c < chunk ? size : 0;
      after += c > chunk ? size : 0;
    }
    atomicAdd(&sizes[0][e], before);
    atomicAdd(&sizes[1][e], after);
  }
  __syncthreads();
  if (warp == 0) {
    const int found = find_firsts(sizes, pairs, here.tokens, most, first_row, first_block);
    if (blockIdx.x == 0 && lane == 0) *live = found;
  }
  __syncthreads();

  const int e = pairs.expert(here, token, lane, id);
  int place = -1;
  if (e >= 0) {
    const int rank = lane < k ? sizes[0][e] + same : token;
    const int size = lane < k ? sizes[0][e] + sizes[1][e] : here.tokens;
    place = first_row[e] + rank;
    if (part == 0) {
      place_of[token * pairs.slots() + lane] = place;
      if (factors) row_factors[place] = factors[token];
      if (rank % most == 0) {  // a block begins
        int* block = blocks + 3 * (first_block[e] + rank / most);
        block[0] = e, block[1] = place, block[2] = min(most, size - rank);
      }
    }
  }
  for (int from = part * 32 + lane;;) {
#pragma unroll 2
    for (int slot = 0; slot < pairs.slots(); ++slot) {
      const int to = __shfl_sync(~0u, place, slot);
      if (to < 0) continue;
      auto* row = rows + (int64_t)to * vectors + from;
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (j * kStride < vectors - from) row[j * kStride] = held[j];
    }
    from += kHeld * kStride;
    if (from - lane >= vectors) break;
    load(from);
  }
}

struct Addends {
  const bf16* of[kAddends];  // each [T, width], or null
};

// out[t] = sum of weight * rows[place] over t's pairs that are here, and of the addends, in float32; shared experts
// weigh 1.
__global__ void __launch_bounds__(kSumThreads)
    combine_kernel(const bf16* __restrict__ rows, const int* __restrict__ place_of, Pairs pairs,
                   const bf16* __restrict__ weights, Addends addends, bf16* __restrict__ out, int width) {
  const int column = (blockIdx.x * kSumThreads + threadIdx.x) * 8, slots = pairs.slots();
  const int t = blockIdx.y, lane = threadIdx.x % 32;
  // Of the slot of each lane. Nothing here waits for another: places of pairs that are not here are read in vain.
  const Here here = pairs.read_here();
  const int id = lane < pairs.k ? pairs.chosen[t * pairs.k + lane] : 0;
  const int found = lane < slots ? place_of[t * slots + lane] : 0;
  const float weight = lane < pairs.k ? __bfloat162float(weights[t * pairs.k + lane]) : 1.0f;
  const int place = pairs.expert(here, t, lane, id) < 0 ? -1 : found;
  float sum[8] = {};
  const auto add = [&](const uint4& row, float scale) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += scale * __uint_as_float(words[i] << 16);
      sum[2 * i + 1] += scale * __uint_as_float(words[i] & 0xffff0000u);
    }
  };
  uint4 more[kAddends];
#pragma unroll
  for (int i = 0; i < kAddends; ++i)
    if (addends.of[i] && column < width)
      more[i] = __ldg(reinterpret_cast<const uint4*>(addends.of[i] + (int64_t)t * width + column));
  for (int first = 0; first < slots; first += kTogether) {
    uint4 row[kTogether];
    int from[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      from[j] = __shfl_sync(~0u, place, first + j);
      if (from[j] >= 0 && column < width)
        row[j] = __ldg(reinterpret_cast<const uint4*>(rows + (int64_t)from[j] * width + column));
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const float scale = __shfl_sync(~0u, weight, first + j);
      if (from[j] >= 0) add(row[j], scale);
    }
  }
  if (column >= width) return;
#pragma unroll
  for (int i = 0; i < kAddends; ++i)
    if (addends.of[i]) add(more[i], 1);
  auto* to = reinterpret_cast<uint4*>(out + (int64_t)t * width + column);
  *to = make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}

ffi::Error check(const Pairs& pairs, int bytes) {
  if (pairs.slots() <= kMaxSlots && pairs.all() <= kMaxExperts && bytes % 16 == 0) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("pairs: at most 32 experts a token of 256, and rows of a multiple of 16 bytes");
}

ffi::Error sort(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer factors, ffi::AnyBuffer chosen,
                ffi::AnyBuffer here, ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> row_factors,
                ffi::Result<ffi::AnyBuffer> blocks, ffi::Result<ffi::AnyBuffer> live,
                ffi::Result<ffi::AnyBuffer> place, ffi::Result<ffi::AnyBuffer> counts, int64_t experts, int64_t shared,
                int64_t most) {
  const Pairs pairs{data<int>(chosen), data<int>(here), (int)chosen.dimensions()[0], (int)chosen.dimensions()[1],
                    (int)experts,      (int)shared};
  const int bytes = x.size_bytes() / pairs.tokens;  // of a row
  if (auto error = check(pairs, bytes); error.failure()) return error;
  if (pairs.chunks() > 1) launch(stream, count_kernel, {pairs.chunks(), kThreads}, pairs, data<int>(*counts));
  constexpr int kTokens = 4;
  const bool few = pairs.tokens <= kFew;
  launch(stream, few ? sort_kernel<1> : sort_kernel<kTokens>,
         {few ? pairs.tokens : (pairs.tokens + kTokens - 1) / kTokens, kThreads}, data<uint4>(x),
         factors.dimensions()[0] ? data<float>(factors) : nullptr, pairs, data<int>(*counts), data<uint4>(*rows),
         data<float>(*row_factors), data<int>(*blocks), data<int>(*live), data<int>(*place), bytes / 16, (int)most);
  return launch_status("sort pairs");
}

// An addend without rows is none.
ffi::Error combine(cudaStream_t stream, ffi::AnyBuffer first, ffi::AnyBuffer second, ffi::AnyBuffer rows,
                   ffi::AnyBuffer place, ffi::AnyBuffer chosen, ffi::AnyBuffer here, ffi::AnyBuffer weights,
                   ffi::Result<ffi::AnyBuffer> out, int64_t experts, int64_t shared) {
  const Pairs pairs{data<int>(chosen), data<int>(here), (int)chosen.dimensions()[0], (int)chosen.dimensions()[1],
                    (int)experts,      (int)shared};
  const int width = out->dimensions()[1];
  if (auto error = check(pairs, width * sizeof(bf16)); error.failure()) return error;
  const auto addend = [](const ffi::AnyBuffer& of) { return of.dimensions()[0] ? data<bf16>(of) : nullptr; };
  const Addends addends{addend(first), addend(second)};
  const dim3 grid((width / 8 + kSumThreads - 1) / kSumThreads, pairs.tokens);
  launch(stream, combine_kernel, {grid, kSumThreads}, data<bf16>(rows), data<int>(place), pairs,
         data<bf16>(weights), addends, data<bf16>(*out), width);
  return launch_status("combine pairs");
}

}  // namespace
}  // namespace ernie

ERNIE_HANDLER(ernie_sort_pairs, ernie::sort,
              ernie::rets<6>(ernie::args<4>(ernie::on_stream()))
                  .Attr<int64_t>("experts").Attr<int64_t>("shared").Attr<int64_t>("most"));

ERNIE_HANDLER(ernie_combine_pairs, ernie::combine,
              ernie::rets<1>(ernie::args<7>(ernie::on_stream())).Attr<int64_t>("experts").Attr<int64_t>("shared"));
