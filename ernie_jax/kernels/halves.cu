// Half a decoder layer in one call, for up to 16 tokens of a decode step: its kernels follow one another without a gap,
// each with its weights on their way before the one in front of it is done.
#include "attention_step.cuh"
#include "experts.cuh"
#include "linear.cuh"
#include "router.cuh"
#include "stream.cuh"

namespace ernie {
namespace {

// out[t] = RMSNorm of row t of x [T, K], by a block.
__global__ void __launch_bounds__(kThreads) norm_kernel(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                                                        bf16* __restrict__ out, int k, float epsilon) {
  bf16* row = dynamic_shared<bf16>();
  launch_next();
  if (threadIdx.x < k / 64) prefetch(weight + threadIdx.x * 64);
  wait_for_previous();
  bring_row(x + (int64_t)blockIdx.x * k, weight, epsilon, row, k);
  auto* to = reinterpret_cast<uint4*>(out + (int64_t)blockIdx.x * k);
  for (int i = threadIdx.x; i < k / 8; i += kThreads) to[i] = reinterpret_cast<const uint4*>(row)[i];
}

void run_norm(cudaStream_t stream, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight, bf16* out, float epsilon) {
  const int tokens = x.dimensions()[0], width = x.dimensions()[1];
  launch(stream, norm_kernel, {tokens, kThreads, width * sizeof(bf16), 1, true}, data<bf16>(x), data<bf16>(weight), out, width, epsilon);
}

// out = attention(norm(x)), or x + that; see ops/halves.py.
ffi::Error attention_half(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer qkv_weight,
                          ffi::AnyBuffer qkv_scales, ffi::AnyBuffer out_weight, ffi::AnyBuffer out_scales,
                          ffi::AnyBuffer rotation, ffi::AnyBuffer positions, ffi::AnyBuffer rows, ffi::AnyBuffer table,
                          ffi::AnyBuffer, ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::AnyBuffer> normalised, ffi::Result<ffi::AnyBuffer> qkv,
                          ffi::Result<ffi::AnyBuffer> heads, ffi::Result<ffi::AnyBuffer> partials,
                          ffi::Result<ffi::AnyBuffer> pages, ffi::RemainingRets scales, float epsilon,
                          int64_t residual) {
  const int tokens = x.dimensions()[0], width = x.dimensions()[1];
  const int kv_heads = qkv_weight.dimensions()[0], lines = qkv_weight.dimensions()[1], dim = qkv_weight.dimensions()[2];
  const bool one = tokens == 1;  // whose norm every block of the product computes for itself
  if (!one) run_norm(stream, x, norm, data<bf16>(*normalised), epsilon);
  const Product project{one ? data<bf16>(x) : data<bf16>(*normalised), one ? data<bf16>(norm) : nullptr,
                        weight_of(qkv_weight, qkv_scales), nullptr, data<bf16>(*qkv), tokens, kv_heads * lines * dim,
                        width, epsilon};
  run_linear(stream, form_of(qkv_weight), project, true);
  attention::Step step =
      attention::describe(data<bf16>(*qkv), qkv->dimensions(), rotation, *pages, scales, positions, rows, table);
  step.out = data<bf16>(*heads), step.partials = data<float>(*partials);
  attention::run(stream, step, partials->dimensions()[0], true);
  const Product back{data<bf16>(*heads), nullptr, weight_of(out_weight, out_scales), residual ? data<bf16>(x) : nullptr,
                     data<bf16>(*out), tokens, width, kv_heads * (lines - 2) * dim, 0};
  run_linear(stream, form_of(out_weight), back, true);
  return launch_status("attention half");
}

// out = experts(norm(x)), or x + that, of a single token; see ops/halves.py.
ffi::Error experts_half(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer norm, ffi::AnyBuffer router,
                        ffi::AnyBuffer bias, ffi::AnyBuffer gate_up, ffi::AnyBuffer gate_up_scales, ffi::AnyBuffer down,
                        ffi::AnyBuffer down_scales, ffi::AnyBuffer first, ffi::AnyBuffer shared_gate_up,
                        ffi::AnyBuffer shared_gate_up_scales, ffi::AnyBuffer shared_down,
                        ffi::AnyBuffer shared_down_scales, ffi::Result<ffi::AnyBuffer> out,
                        ffi::Result<ffi::AnyBuffer> chosen, ffi::Result<ffi::AnyBuffer> weights,
                        ffi::Result<ffi::AnyBuffer> probabilities, ffi::Result<ffi::AnyBuffer> normalised,
                        ffi::Result<ffi::AnyBuffer> sums, ffi::Result<ffi::AnyBuffer> hidden,
                        ffi::Result<ffi::AnyBuffer> shared_hidden, float norm_min, float epsilon, int64_t residual) {
  const auto shape = gate_up.dimensions();  // [E, 2, F, bytes or numbers of a row]
  const int k = chosen->dimensions()[1], width = x.dimensions()[1];
  const router::Problem problem = {data<bf16>(x),
                                   data<bf16>(norm),
                                   data<float>(router),
                                   data<float>(bias),
                                   data<bf16>(*normalised),
                                   data<int>(*chosen),
                                   data<bf16>(*weights),
                                   data<float>(*probabilities),
                                   data<float>(*sums),
                                   1,
                                   width,
                                   (int)router.dimensions()[0],
                                   k,
                                   norm_min,
                                   epsilon};
  router::run(stream, problem, true, true);
  const experts::Sizes z{1, k, (int)shape[0], width, (int)shape[2], (int)shared_gate_up.dimensions()[1]};
  const experts::Operands o{problem.x,
                            problem.experts,
                            data<int>(first),
                            problem.weights,
                            weight_of(gate_up, gate_up_scales),
                            weight_of(down, down_scales),
                            weight_of(shared_gate_up, shared_gate_up_scales),
                            weight_of(shared_down, shared_down_scales),
                            residual ? data<bf16>(x) : nullptr,
                            data<bf16>(*out),
                            data<bf16>(*hidden),
                            data<bf16>(*shared_hidden),
                            nullptr,
                            nullptr};
  experts::run_one(stream, form_of(gate_up), o, z, {data<bf16>(norm), epsilon}, true);
  return launch_status("experts half");
}

}  // namespace
}  // namespace ernie

ERNIE_HANDLER(ernie_attention_half, ernie::attention_half,
              ernie::rets<6>(ernie::args<11>(ernie::on_stream()).RemainingArgs()).RemainingRets()
                  .Attr<float>("epsilon").Attr<int64_t>("residual"));

ERNIE_HANDLER(ernie_experts_half, ernie::experts_half,
              ernie::rets<8>(ernie::args<13>(ernie::on_stream()))
                  .Attr<float>("norm_min").Attr<float>("epsilon").Attr<int64_t>("residual"));
