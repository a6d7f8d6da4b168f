// XLA's call of the experts.
#include "experts.cuh"

namespace ernie {
namespace {

ffi::Error run_experts(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer chosen, ffi::AnyBuffer weights,
                       ffi::AnyBuffer gate_up, ffi::AnyBuffer down, ffi::AnyBuffer first,
                       ffi::AnyBuffer shared_gate_up, ffi::AnyBuffer shared_down, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> shared_hidden,
                       ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto shape = gate_up.dimensions();  // [E, 2, F, D]
  const experts::Sizes z{(int)x.dimensions()[0], (int)chosen.dimensions()[1], (int)shape[0], (int)shape[3],
                         (int)shape[2], (int)shared_gate_up.dimensions()[1]};
  const experts::Operands o{data<bf16>(x),       data<int>(chosen),          data<int>(first),
                            data<bf16>(weights), data<bf16>(gate_up),        data<bf16>(down),
                            data<bf16>(shared_gate_up), data<bf16>(shared_down), nullptr,
                            data<bf16>(*out),    data<bf16>(*hidden),        data<bf16>(*shared_hidden),
                            data<float>(*rows),  data<int>(*scratch)};
  experts::run(stream, o, z);
  return launch_status("experts");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_experts, ernie::run_experts,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>(),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
