// A step of decode attention over a paged cache, as the handlers of XLA's calls describe it to the kernel.
#pragma once

#include "common.cuh"

namespace ernie::attention {

// How a page holds keys and values: int8 has a scale for each token and head, fp8 (e4m3) has none.
enum class Form { kBf16, kInt8, kFp8 };

struct Step {
  const bf16 *q, *k, *v;  // of each token and key/value head: [R, H], [H], [H]
  int line;               // elements from one to the next
  const float* rotation;  // [T, 2, H / 2] cosines and sines to rotate queries and keys by; null: they are already
  Form form;
  void* pages;            // [P, page_size, 2K, H]
  float* scales;          // [P, 2K, page_size] of int8 pages
  const int *positions, *rows, *table;  // [T], [T], [B, width]
  bf16* out;              // [T, K, R, H]
  float* partials;        // [blocks, 2, R, kPitch]
  int tokens, kv_heads, group, sequences, width, page_size;
};

inline Form form_of(const ffi::AnyBuffer& pages) {
  const auto type = pages.element_type();
  return type == ffi::DataType::S8 ? Form::kInt8 : type == ffi::DataType::F8E4M3FN ? Form::kFp8 : Form::kBf16;
}

// Describe a step's heads qkv [T, K, R + 2, H], its pages and tables; `scales` has an array if the pages have any.
inline Step describe(bf16* qkv, ffi::AnyBuffer::Dimensions heads, const ffi::AnyBuffer& rotation,
                     const ffi::AnyBuffer& pages, const ffi::RemainingRets& scales, const ffi::AnyBuffer& positions,
                     const ffi::AnyBuffer& rows, const ffi::AnyBuffer& table) {
  const int dim = heads[3];
  Step step;
  step.tokens = heads[0], step.kv_heads = heads[1], step.group = heads[2] - 2;
  step.q = qkv, step.k = step.q + step.group * dim, step.v = step.k + dim;
  step.line = heads[2] * dim;
  step.rotation = rotation.dimensions()[0] ? data<float>(rotation) : nullptr;
  step.form = form_of(pages), step.pages = data<void>(pages), step.page_size = pages.dimensions()[1];
  step.scales = scales.size() ? data<float>(**scales.get<ffi::AnyBuffer>(0)) : nullptr;
  step.positions = data<int>(positions), step.rows = data<int>(rows), step.table = data<int>(table);
  step.sequences = table.dimensions()[0], step.width = table.dimensions()[1];
  return step;
}

// Launch the kernel for a step; `blocks` is how many partial results there is room for. In attention.cu.
void run(cudaStream_t stream, const Step& step, int64_t blocks_at_most, bool early = false);

}  // namespace ernie::attention
