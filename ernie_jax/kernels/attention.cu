// XLA's calls of decode attention, and of what makes bfloat16 pages of others.
#include "attention.cuh"

namespace ernie {

void attention::run(cudaStream_t stream, const Step& step, int64_t blocks_at_most, bool early) {
  const auto launch = step.form == Form::kInt8  ? launch_for<pages::Int8>
                      : step.form == Form::kFp8 ? launch_for<pages::Fp8>
                                                : launch_for<pages::Bf16>;
  launch(stream, step, blocks_at_most, early);
}

namespace {

ffi::Error decode(cudaStream_t stream, ffi::AnyBuffer qkv, ffi::AnyBuffer rotation, ffi::AnyBuffer positions,
                  ffi::AnyBuffer rows, ffi::AnyBuffer table, ffi::AnyBuffer, ffi::RemainingArgs,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> partials,
                  ffi::Result<ffi::AnyBuffer> pages, ffi::RemainingRets scales) {
  attention::Step step =
      attention::describe(data<bf16>(qkv), qkv.dimensions(), rotation, *pages, scales, positions, rows, table);
  step.out = data<bf16>(*out), step.partials = data<float>(*partials);
  attention::run(stream, step, partials->dimensions()[0]);
  return launch_status("decode attention");
}

// Write the pages of sequences that are in use, one at least, to `out` [.., page_size, 2K, H]: page i of row b to page
// b * width + i, or, where there is a page for each, to its own.
template <typename C>
__global__ void widen_kernel(const uint4* pages, const float* scales, const int* table, const int* lengths, uint4* out,
                             int page_size, int heads, int in_place) {
  constexpr int kNumbers = 16, kPieces = attention::kHeadDim / kNumbers;
  const int index = blockIdx.y * gridDim.x + blockIdx.x, page = table[index];
  if (blockIdx.x && blockIdx.x * page_size >= lengths[blockIdx.y]) return;
  const int64_t size = (int64_t)page_size * heads * kPieces;
  pages += page * size, out += (in_place ? page : index) * size * 2;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    uint4 eights[2];
    C::widen(pages[i], eights);
    if constexpr (C::kScaled) {
      const int head = i / kPieces % heads, position = i / kPieces / heads;
      const float scale = scales[((int64_t)page * heads + head) * page_size + position];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float x[8];
        pages::unpack(eights[u], x);
        eights[u] = make_uint4(pack(x[0] * scale, x[1] * scale), pack(x[2] * scale, x[3] * scale),
                               pack(x[4] * scale, x[5] * scale), pack(x[6] * scale, x[7] * scale));
      }
    }
    out[2 * i] = eights[0], out[2 * i + 1] = eights[1];
  }
}

ffi::Error widen(cudaStream_t stream, ffi::AnyBuffer table, ffi::AnyBuffer lengths, ffi::AnyBuffer pages,
                 ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = pages.dimensions();
  const int rows = table.dimensions()[0], width = table.dimensions()[1];
  const float* s = scales.size() ? data<float>(*scales.get<ffi::AnyBuffer>(0)) : nullptr;
  const auto kernel = attention::form_of(pages) == attention::Form::kInt8 ? widen_kernel<pages::Int8> : widen_kernel<pages::Fp8>;
  launch(stream, kernel, {dim3(width, rows), 256}, data<uint4>(pages), s, data<int>(table), data<int>(lengths),
         data<uint4>(*out), (int)shape[1], (int)shape[2], int(out->dimensions()[0] == shape[0]));
  return launch_status("widen pages");
}

}  // namespace
}  // namespace ernie

ERNIE_HANDLER(ernie_decode_attention, ernie::decode,
              ernie::rets<3>(ernie::args<6>(ernie::on_stream()).RemainingArgs()).RemainingRets());

ERNIE_HANDLER(ernie_widen_pages, ernie::widen, ernie::rets<1>(ernie::args<3>(ernie::on_stream()).RemainingArgs()));
