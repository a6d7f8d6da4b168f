// XLA's calls of the router.
#include "router.cuh"

namespace ernie {
namespace {

ffi::Error route(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                 ffi::Result<ffi::AnyBuffer> experts, ffi::Result<ffi::AnyBuffer> weights,
                 ffi::Result<ffi::AnyBuffer> probabilities, ffi::Result<ffi::AnyBuffer> scratch, float norm_min,
                 int64_t clusters) {
  const router::Problem p = {data<bf16>(x),
                     nullptr,
                     data<float>(weight),
                     data<float>(bias),
                     nullptr,
                     data<int>(*experts),
                     data<bf16>(*weights),
                     data<float>(*probabilities),
                     data<float>(*scratch),
                     (int)x.dimensions()[0],
                     (int)x.dimensions()[1],
                     (int)weight.dimensions()[0],
                     (int)experts->dimensions()[1],
                     norm_min,
                     0};
  router::run(stream, p, clusters);
  return launch_status("router");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_route, ernie::route,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Attr<float>("norm_min")
                                  .Attr<int64_t>("clusters"),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
