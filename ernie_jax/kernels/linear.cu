// XLA's call of a linear layer.
#include "linear.cuh"

namespace ernie {
namespace {

ffi::Error linear(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scales,
                  ffi::Result<ffi::AnyBuffer> out) {
  const Product p{data<bf16>(x), nullptr, weight_of(w, scales), nullptr, data<bf16>(*out), (int)x.dimensions()[0],
                  (int)w.dimensions()[0], (int)x.dimensions()[1], 0};
  with_form(w, [&](auto form) { run_linear<decltype(form)::value>(stream, p, false); });
  return launch_status("linear");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_linear, ernie::linear,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>(),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
