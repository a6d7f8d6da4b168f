// Decode attention over a paged cache: one launch writes each token's new key and value and attends over its sequence.
//
// Work is counted in tiles of 16 cached positions of one key/value head, 8 KB, or 4 KB of 8-bit pages. A warp has room for
// one tile; it refills the keys' half while it works on the values and the other way round, so all warps of an SM keep
// some 100 KB on their way, or half of that. Lanes copy pieces of 16 bytes, and eight lanes that follow each other whole
// lines of 128: were they parts of several positions' lines, memory would deliver an eighth less. A piece is a part of a
// tensor-core fragment as it lies in memory: keys contiguous along the product's inner dimension, values by pairs of
// positions that a byte permutation turns. So nothing but a warp's own barrier stands between memory and use. Scores
// [query, position] leave the first product in the layout in which the second, out^T [dim, query] = values^T weights^T,
// takes its weights.
//
// Bytes become bfloat16 in registers, two instructions a number, exactly: a position's scale multiplies its scores, and
// its weights before the second product.
//
// Which block attends over what is decided on the device, from this step's lengths, by every block alike (`Plan`).
#pragma once

#include <algorithm>

#include "attention_step.cuh"
#include "pages.cuh"

namespace ernie::attention {
namespace {

constexpr int kHeadDim = 128;
constexpr int kTile = 16;  // positions
constexpr int kLeastTiles = 16;  // of a range: below this a merge of blocks costs more than it saves
constexpr int kMostTokens = 2048;  // of a step: ops/decode_attention.py asks for no more
constexpr int kMostBlocks = 512;  // of a launch: there is room for so many partial results
// Floats of a query's partial result; at kHeadDim follow its maximum and sum.
constexpr int kPitch = kHeadDim + 4;

// Blocks of W warps on a multiprocessor. Two tiles of 8 queries need twice the registers of one.
template <int NT, int W>
constexpr int kBlocksPerSm = 16 / (NT * W);

// How many blocks have left a partial result of what began in a block's range. The last to come makes it 0 again, and
// XLA runs a device's launches one after the other, so every launch finds zeros.
__device__ unsigned arrivals[kMostBlocks];

// Rotate eight dims from `dim` on, in pairs of neighbours, by the angles of a token.
__device__ __forceinline__ uint4 rotate(const uint4& v, const float* rotation, int dim) {
  const float4 cos = __ldg(reinterpret_cast<const float4*>(rotation + dim / 2));
  const float4 sin = __ldg(reinterpret_cast<const float4*>(rotation + kHeadDim / 2 + dim / 2));
  const auto pair = [](uint32_t word, float cos, float sin) {
    const float even = __uint_as_float(word << 16), odd = __uint_as_float(word & 0xffff0000u);
    return pack(even * cos - odd * sin, odd * cos + even * sin);
  };
  return make_uint4(pair(v.x, cos.x, sin.x), pair(v.y, cos.y, sin.y), pair(v.z, cos.z, sin.z),
                    pair(v.w, cos.w, sin.w));
}

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

// Where a tile lies, and its last position that is in use: that one stands in for those behind it, which are masked but
// might not be finite.
template <typename C>
struct Source {
  const typename C::Number* pages;  // of the head
  const float* scales;              // of the tile's keys; those of values lie a page's positions further on
  int slot, last, stride, page_size;

  __device__ __forceinline__ const typename C::Number* key(int at) const {
    return pages + (int64_t)(slot + min(at, last)) * stride;
  }
  __device__ __forceinline__ const typename C::Number* value(int at) const { return key(at) + kHeadDim; }
};

// A warp's tile, in pieces of 16 bytes, D dims. A lane multiplies the keys of positions lane / 4 + 8 h, the dims from
// 4 D j + D (lane % 4) on, and the values of positions 2 (lane % 4) + i % 2 + 8 (i / 2), from 8 D j + D (lane / 4) on.
// Pieces of a position change places so that the eight that are read together lie in different banks.
template <typename C>
struct Tile {
  static constexpr int kDims = 16 / sizeof(typename C::Number), kPieces = kHeadDim / kDims;  // of a position
  static constexpr int kCopies = kTile * kPieces / 32;  // of a lane
  uint4 keys[kTile][kPieces], values[kTile][kPieces];

  // The dims of the i-th eight of a lane's keys, and of a lane's values.
  __device__ __forceinline__ static int key_dim(int i, int lane) {
    return i * 8 / kDims * kDims * 4 + lane % 4 * kDims + i * 8 % kDims;
  }
  __device__ __forceinline__ static int value_dim(int i, int lane) {
    return i * 8 / kDims * kDims * 8 + lane / 4 * kDims + i * 8 % kDims;
  }

  // Where a position's piece lies.
  __device__ __forceinline__ static int key_place(int at, int piece) { return piece ^ at % 2 * 4; }
  __device__ __forceinline__ static int value_place(int at, int piece) { return piece ^ at % 8 / 2 * 2; }

  // What a lane multiplies.
  __device__ __forceinline__ const uint4& key(int h, int j, int lane) const {
    const int at = lane / 4 + 8 * h;
    return keys[at][key_place(at, 4 * j + lane % 4)];
  }
  __device__ __forceinline__ const uint4& value(int i, int j, int lane) const {
    const int at = lane % 4 * 2 + i % 2 + i / 2 * 8;
    return values[at][value_place(at, 8 * j + lane / 4)];
  }

  __device__ __forceinline__ void fetch_keys(const Source<C>& source, int lane) {
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int at = (32 * n + lane) / kPieces, piece = lane % kPieces;
      copy_async(&keys[at][key_place(at, piece)], source.key(at) + piece * kDims);
    }
    commit_copies();
  }

  __device__ __forceinline__ void fetch_values(const Source<C>& source, int lane) {
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int at = (32 * n + lane) / kPieces, piece = lane % kPieces;
      copy_async(&values[at][value_place(at, piece)], source.value(at) + piece * kDims);
    }
    commit_copies();
  }
};

// Scales of a lane's positions 2 (lane % 4) + i % 2 + 8 (i / 2), by i.
template <typename C>
struct Scales {
  float keys[4], values[4];

  __device__ __forceinline__ void fetch(const Source<C>& source, int lane) {
    if constexpr (C::kScaled) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* p = source.scales + lane % 4 * 2 + 8 * h;
        const float2 k = __ldcg(reinterpret_cast<const float2*>(p));
        const float2 v = __ldcg(reinterpret_cast<const float2*>(p + source.page_size));
        keys[2 * h] = k.x, keys[2 * h + 1] = k.y, values[2 * h] = v.x, values[2 * h + 1] = v.y;
      }
    }
  }
};

// What a warp keeps in shared memory: its tile, and when it is done what it found, [query][dim] and at kHeadDim the
// maximum and the sum.
template <int NT, typename C>
union Room {
  Tile<C> tile;
  float found[8 * NT][kPitch];
};

// acc += values^T weights^T. Row g of product i is the i-th dim of a lane's first eight, row g + 8 of its second.
template <int NT, typename C>
__device__ __forceinline__ void add_values(float (&acc)[NT][8][4], const Tile<C>& tile, const uint32_t (&weights)[NT][2],
                                           int lane) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {  // half of a lane's eights at a time: there are not the registers for all
    uint2 v[4][2];
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      if constexpr (sizeof(typename C::Number) == 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) v[at][j] = reinterpret_cast<const uint2*>(&tile.value(at, j, lane))[i / 4];
      } else {
        const uint4 piece = tile.value(at, 0, lane);
        v[at][0] = C::widen(i ? piece.y : piece.x), v[at][1] = C::widen(i ? piece.w : piece.z);
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      uint32_t a[2][2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint2 even = v[2 * h][j], odd = v[2 * h + 1][j];
          a[h][j] = __byte_perm(u < 2 ? even.x : even.y, u < 2 ? odd.x : odd.y, u % 2 ? 0x7632 : 0x5410);
        }
#pragma unroll
      for (int n = 0; n < NT; ++n)
        mma(acc[n][i + u], a[0][0], a[0][1], a[1][0], a[1][1], weights[n][0], weights[n][1]);
    }
  }
}

// A warp's online softmax over its tiles.
template <int NT>
struct Softmax {
  float peak[NT], sum[NT];  // of query lane / 4 + 8 n, in units of log 2; the sum is of this lane's positions
  float acc[NT][8][4] = {};

  // Turn scores [n-tile of positions][4] into weights, and bring what was added so far to the new maximum.
  template <typename C>
  __device__ __forceinline__ void weigh(float (&scores)[2][4], const Scales<C>& scales, uint32_t (&weights)[NT][2],
                                        int lane) {
    constexpr float kScale = 0.08838834764831845f * 1.4426950408889634f;  // H^-0.5 / ln 2
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float* const s[4] = {&scores[0][2 * n], &scores[0][2 * n + 1], &scores[1][2 * n], &scores[1][2 * n + 1]};
      float most = fmaxf(fmaxf(*s[0], *s[1]), fmaxf(*s[2], *s[3]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      most = fmaxf(peak[n], most * kScale);
      const float rescale = exp2f(peak[n] - most);
      peak[n] = most;
      sum[n] *= rescale;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *s[i] = exp2f(*s[i] * kScale - most);
        sum[n] += *s[i];
        if constexpr (C::kScaled) *s[i] *= scales.values[i];
      }
      weights[n][0] = pack(*s[0], *s[1]);
      weights[n][1] = pack(*s[2], *s[3]);
      const float even = __shfl_sync(~0u, rescale, lane % 4 * 8), odd = __shfl_sync(~0u, rescale, lane % 4 * 8 + 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        acc[n][i][0] *= even, acc[n][i][2] *= even;
        acc[n][i][1] *= odd, acc[n][i][3] *= odd;
      }
    }
  }
};

// Attend with the queries of a token's head over its tiles [begin, end), each warp over its share.
template <int NT, int W, typename C>
__device__ __forceinline__ void attend(const Step& step, int t, int head, int begin, int end, Room<NT, C>* rooms) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int tile = begin + warp;
  if (tile >= end) return;
  const int line = t * step.kv_heads + head;
  const float* rotation = step.rotation ? step.rotation + t * kHeadDim : nullptr;
  const int position = step.positions[t], page_tiles = step.page_size / kTile, stride = 2 * step.kv_heads * kHeadDim;
  const int table = step.rows[t] * step.width;
  auto* pages = static_cast<typename C::Number*>(step.pages) + 2 * head * kHeadDim;
  const auto scale_of = [&](int page, int at) {  // of the head's key at a position of a page
    return step.scales + ((int64_t)page * step.kv_heads + head) * 2 * step.page_size + at;
  };
  const auto source = [&](int tile, int page) {
    return Source<C>{pages, scale_of(page, tile % page_tiles * kTile), (page * page_tiles + tile % page_tiles) * kTile,
                     position - tile * kTile, stride, step.page_size};
  };

  int page = step.table[table + tile / page_tiles];
  const int newest = position / kTile;
  if (newest < end && (newest - begin) % W == warp) {  // the warp that will read the new key and value writes them
    const int target = step.table[table + newest / page_tiles], at = position % step.page_size;
    auto* to = pages + ((int64_t)target * step.page_size + at) * stride;
    const int dim = lane % 16 * 8;
    uint4 eight = *reinterpret_cast<const uint4*>((lane < 16 ? step.k : step.v) + (int64_t)line * step.line + dim);
    if (rotation && lane < 16) eight = rotate(eight, rotation, dim);
    C::store(eight, to + lane * 8, scale_of(target, at) + lane / 16 * step.page_size, lane);
    __syncwarp();
  }
  Tile<C>& room = rooms[warp].tile;
  Scales<C> scales = {}, next_scales = {};
  room.fetch_keys(source(tile, page), lane);
  room.fetch_values(source(tile, page), lane);
  scales.fetch(source(tile, page), lane);
  if (tile + W < end) page = step.table[table + (tile + W) / page_tiles];
  uint4 queries[NT][4];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int query = lane / 4 + 8 * n;
    const bf16* p = step.q + (int64_t)line * step.line + query * kHeadDim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int dim = Tile<C>::key_dim(i, lane);
      queries[n][i] = query < step.group ? *reinterpret_cast<const uint4*>(p + dim) : make_uint4(0, 0, 0, 0);
      if (rotation) queries[n][i] = rotate(queries[n][i], rotation, dim);
    }
  }

  Softmax<NT> softmax;
#pragma unroll
  for (int n = 0; n < NT; ++n) softmax.peak[n] = -INFINITY, softmax.sum[n] = 0;
  for (; tile < end; tile += W) {
    const bool more = tile + W < end;
    const Source<C> next = source(tile + W, page);
    if (tile + 2 * W < end) page = step.table[table + (tile + 2 * W) / page_tiles];
    wait_for_copies<1>();
    __syncwarp();  // all lanes' copies are here
    float scores[2][4] = {};
#pragma unroll
    for (int j = 0; j < Tile<C>::kPieces / 4; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        constexpr int kEights = Tile<C>::kDims / 8;
        uint4 eights[kEights];
        C::widen(room.key(h, j, lane), eights);
#pragma unroll
        for (int u = 0; u < kEights; ++u) {
          const int i = kEights * j + u;
          mma32(scores[h], queries[0][i], NT == 2 ? queries[NT - 1][i] : make_uint4(0, 0, 0, 0), eights[u]);
        }
      }
    __syncwarp();  // all lanes are done with the keys
    if (more) {
      room.fetch_keys(next, lane);
      next_scales.fetch(next, lane);
    } else {
      commit_copies();
    }
    if constexpr (C::kScaled) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[h][i] *= scales.keys[2 * h + i % 2];
    }
    if (tile == newest) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (tile * kTile + 8 * h + lane % 4 * 2 + i % 2 > position)
            scores[h][i] = -INFINITY, scales.values[2 * h + i % 2] = 0;
        }
    }
    uint32_t weights[NT][2];
    softmax.weigh(scores, scales, weights, lane);
    wait_for_copies<1>();
    __syncwarp();
    add_values(softmax.acc, room, weights, lane);
    __syncwarp();
    more ? room.fetch_values(next, lane) : commit_copies();
    scales = next_scales;
  }

  float(*found)[kPitch] = rooms[warp].found;
  __syncwarp();  // all lanes are done with the tile
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    float sum = softmax.sum[n];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    float* end_of_row = &found[lane / 4 + 8 * n][kHeadDim];
    if (lane % 4 == 0) end_of_row[0] = softmax.peak[n], end_of_row[1] = sum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // query 2 c + i % 2, eight dims
      float4* row = reinterpret_cast<float4*>(&found[lane % 4 * 2 + i % 2 + 8 * n][Tile<C>::value_dim(i / 2, lane)]);
      const auto& a = softmax.acc[n];
      row[0] = make_float4(a[0][i], a[1][i], a[2][i], a[3][i]);
      row[1] = make_float4(a[4][i], a[5][i], a[6][i], a[7][i]);
    }
  }
}

// A sum of partial results of one query and four of its dims.
struct Merge {
  float peak = -INFINITY, sum = 0;
  float4 out = make_float4(0, 0, 0, 0);

  // Add N partial results; those to be left out have a maximum of minus infinity.
  template <int N>
  __device__ __forceinline__ void add(const float2 (&ends)[N], const float4 (&outs)[N]) {
    float most = peak;
#pragma unroll
    for (int i = 0; i < N; ++i) most = fmaxf(most, ends[i].x);
    scale(exp2f(peak - most));
    peak = most;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float weight = exp2f(ends[i].x - most);
      sum += weight * ends[i].y;
      out.x += weight * outs[i].x, out.y += weight * outs[i].y;
      out.z += weight * outs[i].z, out.w += weight * outs[i].w;
    }
  }

  __device__ __forceinline__ void scale(float by) {
    sum *= by;
    out.x *= by, out.y *= by, out.z *= by, out.w *= by;
  }

  __device__ __forceinline__ void finish(bf16* to) {
    scale(1 / sum);
    *reinterpret_cast<uint2*>(to) = make_uint2(pack(out.x, out.y), pack(out.z, out.w));
  }
};

// Call use(query, dim) for four dims at a time of a token's head.
template <typename Use>
__device__ __forceinline__ void each_result(int group, Use use) {
  constexpr int kPieces = kHeadDim / 4;
  for (int i = threadIdx.x; i < group * kPieces; i += blockDim.x) use(i / kPieces, i % kPieces * 4);
}

// Sum what the first `used` warps of the block found.
template <int NT, int W, typename C>
__device__ __forceinline__ Merge merge_warps(const Room<NT, C>* rooms, int used, int query, int dim) {
  float2 ends[W];
  float4 outs[W];
#pragma unroll
  for (int w = 0; w < W; ++w) {
    const float* row = rooms[w].found[query];
    ends[w] = w < used ? *reinterpret_cast<const float2*>(row + kHeadDim) : make_float2(-INFINITY, 0);
    outs[w] = w < used ? *reinterpret_cast<const float4*>(row + dim) : make_float4(0, 0, 0, 0);
  }
  Merge merge;
  merge.add(ends, outs);
  return merge;
}

// Where the partial result of a range lies: that of a token that began before it, or of one that goes on behind it.
__device__ __forceinline__ float* partial(const Step& step, int range, int head, bool begins) {
  return step.partials + ((range * step.kv_heads + head) * 2 + begins) * step.group * kPitch;
}

// Sum the partial results of ranges [from, to], in the first of which the token begins.
__device__ __forceinline__ void merge_ranges(const Step& step, int head, int from, int to, bf16* out) {
  constexpr int N = 8;
  each_result(step.group, [&](int query, int dim) {
    Merge merge;
    for (int range = from; range <= to; range += N) {
      float2 ends[N];
      float4 outs[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        ends[i] = make_float2(-INFINITY, 0), outs[i] = make_float4(0, 0, 0, 0);
        if (range + i > to) continue;
        const float* row = partial(step, range + i, head, range + i == from) + query * kPitch;
        ends[i] = __ldcg(reinterpret_cast<const float2*>(row + kHeadDim));
        outs[i] = __ldcg(reinterpret_cast<const float4*>(row + dim));
      }
      merge.add(ends, outs);
    }
    merge.finish(out + query * kHeadDim + dim);
  });
}

template <int NT, int W, typename C>
__global__ void __launch_bounds__(32 * W, kBlocksPerSm<NT, W>) decode_kernel(const Step step) {
  __shared__ int first[kMostTokens + 1];
  __shared__ Plan plan;
  __shared__ bool last;
  Room<NT, C>* rooms = dynamic_shared<Room<NT, C>>();
  const int longest = count_tiles<W>(step, first);
  if (threadIdx.x == 0) plan = make_plan(step, first[step.tokens], longest);
  launch_next();
  wait_for_previous();
  __syncthreads();

  const int head_size = step.group * kHeadDim, token_size = step.kv_heads * head_size;
  for (int t = blockIdx.x; t < step.tokens; t += gridDim.x) {  // padding
    if (first[t] != first[t + 1]) continue;
    uint4* out = reinterpret_cast<uint4*>(step.out + (int64_t)t * token_size);
    for (int i = threadIdx.x; i < token_size / 8; i += blockDim.x) out[i] = make_uint4(0, 0, 0, 0);
  }

  const int head = blockIdx.x % step.kv_heads;
  for (int range = blockIdx.x / step.kv_heads; range < plan.count; range += plan.ranges) {
    const int range_end = plan.end(range, first);
    for (int at = plan.begin(range, first), end; at < range_end; at = end) {
      const int t = find(first, step.tokens, at), begin = first[t];
      end = min(range_end, first[t + 1]);
      attend<NT, W, C>(step, t, head, at - begin, end - begin, rooms);
      __syncthreads();
      const int used = min(end - at, W);
      bf16* out = step.out + (t * step.kv_heads + head) * head_size;
      if (at == begin && end == first[t + 1]) {
        each_result(step.group, [&](int query, int dim) {
          merge_warps<NT, W, C>(rooms, used, query, dim).finish(out + query * kHeadDim + dim);
        });
      } else {
        float* mine = partial(step, range, head, at == begin);
        each_result(step.group, [&](int query, int dim) {
          const Merge merge = merge_warps<NT, W, C>(rooms, used, query, dim);
          *reinterpret_cast<float4*>(mine + query * kPitch + dim) = merge.out;
          if (dim == 0)
            *reinterpret_cast<float2*>(mine + query * kPitch + kHeadDim) = make_float2(merge.peak, merge.sum);
        });
        const int from = begin / plan.length, to = (first[t + 1] - 1) / plan.length;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {  // wraps round to 0 with the last
          last = atomicInc(&arrivals[from * step.kv_heads + head], to - from) == to - from;
          __threadfence();
        }
        __syncthreads();
        if (last) merge_ranges(step, head, from, to, out);
      }
      __syncthreads();
    }
  }
}

template <int NT, int W, typename C>
void launch_with(cudaStream_t stream, const Step& step, int64_t blocks_at_most, bool early) {
  // As many ranges as run at a time, but no more than the longest sequences that the tables have room for could fill.
  const int64_t at_a_time = kBlocksPerSm<NT, W> * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t most = std::min<int64_t>({kMostBlocks, blocks_at_most, at_a_time});
  const int64_t pieces = (step.width * (step.page_size / kTile) + kLeastTiles - 1) / kLeastTiles;
  const int64_t ranges = std::min<int64_t>(step.tokens * pieces, most / step.kv_heads);
  const int blocks = std::max<int64_t>(ranges, 1) * step.kv_heads;
  launch(stream, decode_kernel<NT, W, C>, {blocks, 32 * W, W * sizeof(Room<NT, C>), 1, early}, step);
}

template <typename C>
void launch_for(cudaStream_t stream, const Step& step, int64_t blocks_at_most, bool early) {
  // Of many tokens each has few warps, and more of them run at a time: a short sequence has no work for eight.
  const int at_a_time = kBlocksPerSm<1, 8> * device_attribute(cudaDevAttrMultiProcessorCount);
  if (step.group > 8)
    launch_with<2, 4, C>(stream, step, blocks_at_most, early);
  else if (step.tokens * step.kv_heads <= at_a_time)
    launch_with<1, 8, C>(stream, step, blocks_at_most, early);
  else
    launch_with<1, 4, C>(stream, step, blocks_at_most, early);
}

}  // namespace
}  // namespace ernie::attention
