// XLA's calls of the router.
#include "router.cuh"

namespace ernie {
namespace {

// Normalises x, where `norm` is not empty.
ffi::Error route(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer weight, ffi::AnyBuffer bias,
                 ffi::Result<ffi::AnyBuffer> experts, ffi::Result<ffi::AnyBuffer> weights,
                 ffi::Result<ffi::AnyBuffer> probabilities, ffi::Result<ffi::AnyBuffer> normalised,
                 ffi::Result<ffi::AnyBuffer> scratch, float norm_min, float epsilon, int64_t clusters) {
  const router::Problem p = {data<bf16>(x),
                     norm.dimensions()[0] ? data<bf16>(norm) : nullptr,
                     data<float>(weight),
                     data<float>(bias),
                     data<bf16>(*normalised),
                     data<int>(*experts),
                     data<bf16>(*weights),
                     data<float>(*probabilities),
                     data<float>(*scratch),
                     (int)x.dimensions()[0],
                     (int)x.dimensions()[1],
                     (int)weight.dimensions()[0],
                     (int)experts->dimensions()[1],
                     norm_min,
                     epsilon};
  router::run(stream, p, clusters);
  return launch_status("router");
}

}  // namespace
}  // namespace ernie

ERNIE_HANDLER(ernie_route, ernie::route,
              ernie::rets<5>(ernie::args<4>(ernie::on_stream()))
                  .Attr<float>("norm_min").Attr<float>("epsilon").Attr<int64_t>("clusters"));
