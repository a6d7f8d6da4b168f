// XLA's call of the experts.
#include "experts.cuh"

namespace ernie {
namespace {

ffi::Error run_experts(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer chosen, ffi::AnyBuffer weights,
                       ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down,
                       ffi::AnyBuffer down_scales, ffi::AnyBuffer first, ffi::AnyBuffer shared_gate_up,
                       ffi::AnyBuffer shared_gate_up_scales, ffi::AnyBuffer shared_down,
                       ffi::AnyBuffer shared_down_scales, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> hidden, ffi::Result<ffi::AnyBuffer> shared_hidden,
                       ffi::Result<ffi::AnyBuffer> rows, ffi::Result<ffi::AnyBuffer> scratch) {
  const auto shape = gate_up.dimensions();  // [E, 2, F, bytes or numbers of a row]
  const experts::Sizes z{(int)x.dimensions()[0], (int)chosen.dimensions()[1], (int)shape[0], (int)x.dimensions()[1],
                         (int)shape[2], (int)shared_gate_up.dimensions()[1]};
  const experts::Operands o{data<bf16>(x),
                            data<int>(chosen),
                            data<int>(first),
                            data<bf16>(weights),
                            weight_of(gate_up, gate_up_scales),
                            weight_of(down, down_scales),
                            weight_of(shared_gate_up, shared_gate_up_scales),
                            weight_of(shared_down, shared_down_scales),
                            nullptr,
                            data<bf16>(*out),
                            data<bf16>(*hidden),
                            data<bf16>(*shared_hidden),
                            data<float>(*rows),
                            data<int>(*scratch)};
  if (z.tokens == 1)
    with_form(gate_up, [&](auto form) { experts::run_one<decltype(form)::value>(stream, o, z, {}, false); });
  else
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
