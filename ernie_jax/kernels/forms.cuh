// The forms in which weights may lie in memory, as ops/quantized.py has them, and how they become bfloat16.
#pragma once

#include "common.cuh"

namespace ernie {

enum class Form { kBf16, kInt8, kFp8, kInt4 };

// A weight, and its scales: none of bfloat16; of int8 and fp8 a float32 for each output; of int4 a bfloat16 for each output
// and kGroup of K.
struct Weight {
  const void *values, *scales;
};

constexpr int kGroup = 128;

inline Form form_of(const ffi::AnyBuffer& values) {
  switch (values.element_type()) {
    case ffi::DataType::S8: return Form::kInt8;
    case ffi::DataType::F8E4M3FN: return Form::kFp8;
    case ffi::DataType::U8: return Form::kInt4;
    default: return Form::kBf16;
  }
}

inline Weight weight_of(const ffi::AnyBuffer& values, const ffi::AnyBuffer& scales) {
  return {values.untyped_data(), scales.untyped_data()};
}

__host__ __device__ __forceinline__ Weight choose(bool first, const Weight& one, const Weight& other) {
  return {first ? one.values : other.values, first ? one.scales : other.scales};
}

template <Form F>
using FormConstant = std::integral_constant<Form, F>;

// Call use(FormConstant<form>()).
template <typename Use>
void with_form(Form form, Use use) {
  switch (form) {
    case Form::kBf16: return use(FormConstant<Form::kBf16>());
    case Form::kInt8: return use(FormConstant<Form::kInt8>());
    case Form::kFp8: return use(FormConstant<Form::kFp8>());
    case Form::kInt4: return use(FormConstant<Form::kInt4>());
  }
}

template <Form F>
struct Layout {
  using Piece = uint4;                                    // what a lane takes in a step
  static constexpr int kParts = F == Form::kBf16 ? 1 : 2;  // of a step: eights of bfloat16 for a lane
  static constexpr int kStep = 32 * kParts;               // of K
  static constexpr int kLane = 8 * kParts;                // of K, from one lane's place to the next's
};

template <>
struct Layout<Form::kInt4> {
  using Piece = uint2;
  static constexpr int kParts = 2, kStep = 64, kLane = 8;
};

template <Form F>
using Piece = typename Layout<F>::Piece;

// Where in K the eight of a step's part begin that the first lane of four takes; the others' follow by Layout::kLane.
template <Form F>
__device__ __forceinline__ int input_of(int step, int part) {
  return F == Form::kInt4 ? step / 2 * kGroup + step % 2 * 32 + part * (kGroup / 2) : step * Layout<F>::kStep + part * 8;
}

// A row of a weight, from the place of one of four lanes on.
template <Form F>
struct Row {
  const Piece<F>* values;
  const bf16* scales;  // of int4

  Row() = default;
  __device__ __forceinline__ Row(const Weight& weight, int64_t row, int k, int lane) {
    constexpr int kBytes = 4 * sizeof(Piece<F>);  // of a step
    const int64_t bytes = row * (k / Layout<F>::kStep) * kBytes;
    values = reinterpret_cast<const Piece<F>*>(static_cast<const char*>(weight.values) + bytes) + lane % 4;
    scales = F == Form::kInt4 ? static_cast<const bf16*>(weight.scales) + row * (k / kGroup) : nullptr;
  }

  __device__ __forceinline__ const Piece<F>* at(int step) const { return values + step * 4; }
};

// Steps of weights on their way: NT rows of each lane. In int4 the scales of two groups come with each.
template <int NT, int STAGES, Form F>
struct Ring {
  Piece<F> weights[STAGES][NT][32];

  __device__ __forceinline__ void fetch(int stage, int n, int lane, const Row<F>& row, int step) {
    copy_async<sizeof(Piece<F>)>(&weights[stage][n][lane], row.at(step));
  }
  __device__ __forceinline__ uint32_t scale(int, int, int, int) const { return 0; }
};

template <int NT, int STAGES>
struct Ring<NT, STAGES, Form::kInt4> {
  uint2 weights[STAGES][NT][32];
  uint32_t scales[STAGES][NT][32];

  __device__ __forceinline__ void fetch(int stage, int n, int lane, const Row<Form::kInt4>& row, int step) {
    copy_async<8>(&weights[stage][n][lane], row.at(step));
    copy_async<4>(&scales[stage][n][lane], row.scales + step / 4 * 2);
  }
  // Twice the scale of a step's group.
  __device__ __forceinline__ uint32_t scale(int stage, int n, int lane, int step) const {
    return __byte_perm(scales[stage][n][lane], 0, step / 2 % 2 ? 0x3232 : 0x1010);
  }
};

__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
  const __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(&a), y = *reinterpret_cast<const __nv_bfloat162*>(&b);
  const __nv_bfloat162 out = __hsub2(x, y);
  return *reinterpret_cast<const uint32_t*>(&out);
}

__device__ __forceinline__ uint32_t multiply(uint32_t a, uint32_t b) {
  const __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(&a), y = *reinterpret_cast<const __nv_bfloat162*>(&b);
  const __nv_bfloat162 out = __hmul2(x, y);
  return *reinterpret_cast<const uint32_t*>(&out);
}

// Two numbers of a word's low or high half in bfloat16; of int4 those in the low or the high four bits of two bytes, times
// a scale, which has it twice.
template <Form F>
__device__ __forceinline__ uint32_t widen_two(uint32_t word, int half, int part, uint32_t scale) {
  if (F == Form::kFp8) {
    // The sign, and below it exponent and fraction where bfloat16 has their last bits: 2^120 times too small.
    const uint32_t bytes = __byte_perm(word, 0, half ? 0x3424 : 0x1404);
    return multiply((bytes & 0x80008000u) | (bytes >> 4 & 0x07f007f0u), 0x7b807b80u);
  }
  const uint32_t bytes = __byte_perm(word, 0x43, half ? 0x4342 : 0x4140);  // 128 plus the lowest seven bits
  // Of int8 the bit above them makes it 256, which is to be subtracted.
  if (F == Form::kInt8) return subtract(bytes & 0xff7fff7fu, bytes & 0xff80ff80u);
  const uint32_t four = (part ? bytes >> 4 & 0x000f000fu : bytes & 0x000f000fu) | 0x43004300u;
  return multiply(subtract(four, 0x43084308u), scale);
}

// The eight numbers of a part of what a lane takes in a step, in bfloat16.
template <Form F>
__device__ __forceinline__ uint4 widen(const Piece<F>& piece, int part, uint32_t scale) {
  if constexpr (F == Form::kBf16) {
    return piece;
  } else {
    uint32_t low, high;
    if constexpr (F == Form::kInt4)
      low = piece.x, high = piece.y;
    else
      low = part ? piece.z : piece.x, high = part ? piece.w : piece.y;
    return make_uint4(widen_two<F>(low, 0, part, scale), widen_two<F>(low, 1, part, scale),
                      widen_two<F>(high, 0, part, scale), widen_two<F>(high, 1, part, scale));
  }
}

// What an output's sum is still to be multiplied by.
template <Form F>
__device__ __forceinline__ float output_scale(const Weight& weight, int64_t output) {
  return F == Form::kInt8 || F == Form::kFp8 ? __ldg(static_cast<const float*>(weight.scales) + output) : 1.0f;
}

}  // namespace ernie
