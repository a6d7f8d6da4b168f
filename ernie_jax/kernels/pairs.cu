// Before a grouped product, the pairs of a token and one of its experts sorted by expert, with their tokens' rows in that
// order; after it, the weighted sum of a token's rows.
//
// Every token also goes, with weight 1, through `shared` experts more, which are numbered behind the others. An expert's
// rows begin at a multiple of 8 and are cut into blocks of at most `most` rows, of which each CUDA block finds and copies
// one. To find them it needs to know how many pairs each expert has: those of a few it counts itself, of many
// `count_kernel` has counted them by chunks.
#include "common.cuh"

namespace ernie {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxExperts = 256;  // the shared ones included
constexpr int kAlignment = 8;    // rows
constexpr int kMost = 256;        // rows of a block
constexpr int kChunk = 1024;      // pairs that are counted together
constexpr int kFew = 3 * kChunk;  // pairs that every block counts for itself

struct Pairs {
  const int* chosen;  // [T, k]
  const int* here;    // [2] the first expert that is here, and how many tokens there are: those behind go nowhere
  int tokens, k, experts, shared;

  __device__ __forceinline__ int count() const { return tokens * (k + shared); }
  __device__ __forceinline__ int token(int pair) const { return pair / (k + shared); }

  // The expert of a pair, or -1 if it is none of those here.
  __device__ __forceinline__ int expert(int pair) const {
    const int slot = pair % (k + shared);
    if (token(pair) >= here[1]) return -1;
    if (slot >= k) return experts + slot - k;
    const int e = chosen[token(pair) * k + slot] - here[0];
    return e >= 0 && e < experts ? e : -1;
  }
};

// counts[chunk, e]: how many pairs of a chunk an expert has.
__global__ void __launch_bounds__(kThreads) count_kernel(Pairs pairs, int* __restrict__ counts) {
  __shared__ int sizes[kMaxExperts];
  const int all = pairs.experts + pairs.shared;
  for (int e = threadIdx.x; e < all; e += kThreads) sizes[e] = 0;
  __syncthreads();
  const int end = min(pairs.count(), (int)(blockIdx.x + 1) * kChunk);
  for (int p = blockIdx.x * kChunk + threadIdx.x; p < end; p += kThreads) {
    const int e = pairs.expert(p);
    if (e >= 0) atomicAdd(&sizes[e], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < all; e += kThreads) counts[blockIdx.x * all + e] = sizes[e];
}

// Where the block of this CUDA block lies.
struct Place {
  int expert, row, rank, rows;  // first row, rank of its pair among the expert's, how many
  int live;                     // blocks in all
};

// Find block `index` of those that sizes[e] pairs of each expert make. By one warp; the result is in all lanes.
__device__ __forceinline__ Place find_block(const int* sizes, int experts, int most, int index) {
  const int lane = threadIdx.x % 32;
  Place place{-1, 0, 0, 0, 0};
  int row = 0;
  for (int at = 0; at < experts; at += 32) {
    const int e = at + lane, size = e < experts ? sizes[e] : 0;
    const int blocks = (size + most - 1) / most, padded = (size + kAlignment - 1) / kAlignment * kAlignment;
    int blocks_to = blocks, rows_to = padded;  // sums up to this expert
    for (int d = 1; d < 32; d *= 2) {
      const int b = __shfl_up_sync(~0u, blocks_to, d), r = __shfl_up_sync(~0u, rows_to, d);
      if (lane >= d) blocks_to += b, rows_to += r;
    }
    const int before = place.live + blocks_to - blocks, rank = (index - before) * most;
    const unsigned found = __ballot_sync(~0u, index >= before && index < before + blocks);
    if (found) {
      const int from = __ffs(found) - 1;
      place.expert = at + from;
      place.rank = __shfl_sync(~0u, rank, from);
      place.row = __shfl_sync(~0u, row + rows_to - padded + rank, from);
      place.rows = __shfl_sync(~0u, min(most, size - rank), from);
    }
    place.live += __shfl_sync(~0u, blocks_to, 31);
    row += __shfl_sync(~0u, rows_to, 31);
  }
  return place;
}

template <bool COUNTED>
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const bf16* __restrict__ x, Pairs pairs, const int* __restrict__ counts, bf16* __restrict__ rows,
                int* __restrict__ blocks, int* __restrict__ live, int* __restrict__ place_of, int width, int most) {
  __shared__ int sizes[kMaxExperts], of_warp[kWarps], list[kMost];
  __shared__ Place place;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, all = pairs.experts + pairs.shared;
  const int count = pairs.count(), chunks = (count + kChunk - 1) / kChunk;
  for (int e = threadIdx.x; e < all; e += kThreads) sizes[e] = 0;
  __syncthreads();
  if (COUNTED) {
    for (int i = threadIdx.x; i < chunks * all; i += kThreads) atomicAdd(&sizes[i % all], counts[i]);
  } else {
    for (int p = threadIdx.x; p < count; p += kThreads) {
      const int e = pairs.expert(p);
      if (e >= 0) atomicAdd(&sizes[e], 1);
    }
  }
  __syncthreads();
  if (warp == 0) {
    const Place found = find_block(sizes, all, most, blockIdx.x);
    if (lane == 0) {
      place = found;
      if (blockIdx.x == 0) *live = found.live;
    }
  }
  __syncthreads();
  if (place.expert < 0) return;
  if (threadIdx.x < 3) {
    const int values[3] = {place.expert, place.row, place.rows};
    blocks[blockIdx.x * 3 + threadIdx.x] = values[threadIdx.x];
  }
  int seen = 0, from = 0;  // pairs of the expert before pair `from`
  if (COUNTED) {  // the chunk in which the block begins
    for (int at = 0; at < chunks; at += 32) {
      const int here = at + lane < chunks ? counts[(at + lane) * all + place.expert] : 0;
      int sum = here;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += other;
      }
      const unsigned beyond = __ballot_sync(~0u, seen + sum > place.rank);
      if (beyond) {
        const int lane_of = __ffs(beyond) - 1;
        from = (at + lane_of) * kChunk;
        seen += __shfl_sync(~0u, sum - here, lane_of);
        break;
      }
      seen += __shfl_sync(~0u, sum, 31);
    }
  }
  const int end = place.rank + place.rows;
  for (; from < count && seen < end; from += kThreads) {
    const int p = from + threadIdx.x;
    const bool mine = p < count && pairs.expert(p) == place.expert;
    const unsigned all_mine = __ballot_sync(~0u, mine);
    if (lane == 0) of_warp[warp] = __popc(all_mine);
    __syncthreads();
    int rank = seen + __popc(all_mine & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += of_warp[w];
      seen += of_warp[w];
    }
    if (mine && rank >= place.rank && rank < end) {
      list[rank - place.rank] = pairs.token(p);
      place_of[p] = place.row + rank - place.rank;
    }
    __syncthreads();
  }
  const int vectors = width / 8;
  auto* target = reinterpret_cast<uint4*>(rows + (int64_t)place.row * width);
#pragma unroll 8
  for (int i = threadIdx.x; i < place.rows * vectors; i += kThreads)
    target[i] = __ldg(reinterpret_cast<const uint4*>(x + (int64_t)list[i / vectors] * width) + i % vectors);
}

// out[t] = sum of weight * rows[place] over t's pairs that are here, in float32; shared experts weigh 1.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const bf16* __restrict__ rows, const int* __restrict__ place_of, Pairs pairs,
                   const bf16* __restrict__ weights, bf16* __restrict__ out, int width) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * 8, slots = pairs.k + pairs.shared;
  if (column >= width) return;
  const int t = blockIdx.y;
  float sum[8] = {};
  for (int slot = 0; slot < slots; ++slot) {
    const int pair = t * slots + slot;
    if (pairs.expert(pair) < 0) continue;
    const float weight = slot < pairs.k ? __bfloat162float(weights[t * pairs.k + slot]) : 1.0f;
    const uint4 found = *reinterpret_cast<const uint4*>(rows + (int64_t)place_of[pair] * width + column);
    const uint32_t words[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += weight * __uint_as_float(words[i] << 16);
      sum[2 * i + 1] += weight * __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  auto* to = reinterpret_cast<__nv_bfloat162*>(out + (int64_t)t * width + column);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
}

ffi::Error sort(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer chosen, ffi::AnyBuffer here,
                ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> blocks, ffi::Result<ffi::AnyBuffer> live,
                ffi::Result<ffi::AnyBuffer> place, ffi::Result<ffi::AnyBuffer> counts, int64_t experts, int64_t shared,
                int64_t most) {
  const Pairs pairs{static_cast<const int*>(chosen.untyped_data()), static_cast<const int*>(here.untyped_data()),
                    (int)chosen.dimensions()[0], (int)chosen.dimensions()[1], (int)experts, (int)shared};
  const int width = x.dimensions()[1], count = pairs.tokens * (pairs.k + pairs.shared);
  auto* counted = static_cast<int*>(counts->untyped_data());
  const bool many = count > kFew;
  if (many) launch(stream, count_kernel, {(count + kChunk - 1) / kChunk, kThreads}, pairs, counted);
  launch(stream, many ? sort_kernel<true> : sort_kernel<false>, {(int)blocks->dimensions()[0], kThreads},
         static_cast<const bf16*>(x.untyped_data()), pairs, counted, static_cast<bf16*>(rows->untyped_data()),
         static_cast<int*>(blocks->untyped_data()), static_cast<int*>(live->untyped_data()),
         static_cast<int*>(place->untyped_data()), width, (int)most);
  return launch_status("sort pairs");
}

ffi::Error combine(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer place, ffi::AnyBuffer chosen,
                   ffi::AnyBuffer here, ffi::AnyBuffer weights, ffi::Result<ffi::AnyBuffer> out, int64_t experts,
                   int64_t shared) {
  const Pairs pairs{static_cast<const int*>(chosen.untyped_data()), static_cast<const int*>(here.untyped_data()),
                    (int)chosen.dimensions()[0], (int)chosen.dimensions()[1], (int)experts, (int)shared};
  const int width = out->dimensions()[1];
  const dim3 grid((width / 8 + kThreads - 1) / kThreads, pairs.tokens);
  launch(stream, combine_kernel, {grid, kThreads}, static_cast<const bf16*>(rows.untyped_data()),
         static_cast<const int*>(place.untyped_data()), pairs, static_cast<const bf16*>(weights.untyped_data()),
         static_cast<bf16*>(out->untyped_data()), width);
  return launch_status("combine pairs");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_sort_pairs, ernie::sort,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("shared")
                                  .Attr<int64_t>("most"),
                              {ernie::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_combine_pairs, ernie::combine,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Attr<int64_t>("experts")
                                  .Attr<int64_t>("shared"),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
