// What the pages of a cache hold of keys and values, in each of their forms: read as bfloat16, written from bfloat16.
#pragma once

#include "common.cuh"

namespace ernie::pages {
namespace {

// Eight numbers of bfloat16 as float.
__device__ __forceinline__ void unpack(const uint4& eight, float (&x)[8]) {
  const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
}

__device__ __forceinline__ uint32_t join(const uint32_t (&bytes)[8], int first) {
  return bytes[first] | bytes[first + 1] << 8 | bytes[first + 2] << 16 | bytes[first + 3] << 24;
}

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }

struct Bf16 {
  using Number = bf16;
  static constexpr bool kScaled = false;

  __device__ __forceinline__ static void widen(const uint4& piece, uint4 (&eights)[1]) { eights[0] = piece; }
  __device__ __forceinline__ static void store(const uint4& eight, Number* to, float*, int) {
    *reinterpret_cast<uint4*>(to) = eight;
  }
};

// What the forms of a byte have in common: C turns bytes, each behind the other half's constant, into two numbers.
template <typename C>
struct Bytes {
  using Number = uint8_t;

  __device__ __forceinline__ static uint2 widen(uint32_t four) {
    return make_uint2(C::pair(__byte_perm(four, C::kBeside, C::kLow)), C::pair(__byte_perm(four, C::kBeside, C::kHigh)));
  }

  __device__ __forceinline__ static void widen(const uint4& piece, uint4 (&eights)[2]) {
    const uint2 a = widen(piece.x), b = widen(piece.y), c = widen(piece.z), d = widen(piece.w);
    eights[0] = make_uint4(a.x, a.y, b.x, b.y), eights[1] = make_uint4(c.x, c.y, d.x, d.y);
  }
};

struct Int8 : Bytes<Int8> {
  static constexpr bool kScaled = true;
  static constexpr unsigned kBeside = 0x43434343, kLow = 0x4140, kHigh = 0x4342;  // bytes of 0x43XX

  // 0x43XX is 128 + the low seven bits of XX, in which the sign's bit turns 128 into 256: XX is the difference.
  __device__ __forceinline__ static uint32_t pair(uint32_t both) {
    const __nv_bfloat162 difference = __hsub2(as_pair(both & 0xff7fff7fu), as_pair(both & 0xff80ff80u));
    return *reinterpret_cast<const uint32_t*>(&difference);
  }

  // Store a head's numbers, eight of each of 16 neighbouring lanes, and its scale; ops/pages.py does the same.
  __device__ __forceinline__ static void store(const uint4& eight, Number* to, float* scale, int lane) {
    float x[8], largest = 0;
    unpack(eight, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int d = 8; d; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, d));
    const float steps = largest > 1e-30f ? 127 / largest : 0;
    uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<uint32_t>(__float2int_rn(x[i] * steps)) & 255;
    *reinterpret_cast<uint2*>(to) = make_uint2(join(bytes, 0), join(bytes, 4));
    if (lane % 16 == 0) *scale = largest * (1.0f / 127);
  }
};

struct Fp8 : Bytes<Fp8> {
  static constexpr bool kScaled = false;
  static constexpr unsigned kBeside = 0, kLow = 0x1404, kHigh = 0x3424;  // bytes of 0xXX00

  // With its exponent where bfloat16 has the lower bits of its own, the number is 2^-120 of what it should be.
  __device__ __forceinline__ static uint32_t pair(uint32_t both) {
    const __nv_bfloat162 product =
        __hmul2(as_pair((both & 0x80008000u) | ((both & 0x7f007f00u) >> 4)), as_pair(0x7b807b80u));
    return *reinterpret_cast<const uint32_t*>(&product);
  }

  // Round to the nearest of three bits behind the first, of two the even one, and at most to 448.
  __device__ __forceinline__ static uint32_t round(float x) {
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
    x = fminf(fabsf(x), 448.0f);
    if (x < 0x1p-6f) return sign | static_cast<uint32_t>(__float2int_rn(x * 0x1p9f));
    const uint32_t bits = __float_as_uint(x);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));
  }

  __device__ __forceinline__ static void store(const uint4& eight, Number* to, float*, int) {
    float x[8];
    unpack(eight, x);
    uint32_t bytes[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) bytes[i] = round(x[i]);
    *reinterpret_cast<uint2*>(to) = make_uint2(join(bytes, 0), join(bytes, 4));
  }
};

}  // namespace
}  // namespace ernie::pages
