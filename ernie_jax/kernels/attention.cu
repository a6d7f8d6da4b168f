// XLA's call of decode attention.
#include "attention.cuh"

namespace ernie {
namespace {

ffi::Error decode(cudaStream_t stream, ffi::AnyBuffer qkv, ffi::AnyBuffer rotation, ffi::AnyBuffer,
                  ffi::AnyBuffer positions, ffi::AnyBuffer rows, ffi::AnyBuffer table,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> pages,
                  ffi::Result<ffi::AnyBuffer> partials) {
  const auto heads = qkv.dimensions();  // [T, K, R + 2, H]
  const int dim = heads[3];
  attention::Step step;
  step.tokens = heads[0], step.kv_heads = heads[1], step.group = heads[2] - 2;
  step.q = data<bf16>(qkv), step.k = step.q + step.group * dim, step.v = step.k + dim;
  step.line = heads[2] * dim;
  step.rotation = rotation.dimensions()[0] ? data<float>(rotation) : nullptr;
  step.pages = data<bf16>(*pages), step.page_size = pages->dimensions()[1];
  step.positions = data<int>(positions), step.rows = data<int>(rows), step.table = data<int>(table);
  step.sequences = table.dimensions()[0], step.width = table.dimensions()[1];
  step.out = data<bf16>(*out), step.partials = data<float>(*partials);
  attention::run(stream, step, partials->dimensions()[0]);
  return launch_status("decode attention");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_decode_attention, ernie::decode,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>(),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
