// The linear layer for few tokens, and XLA's call of it.
#include "linear.cuh"

#include "stream.cuh"

namespace ernie {
namespace {

template <int NT, int STAGES, Form F>
__global__ void __launch_bounds__(kThreads, NT == 1 ? 4 : 1) linear_kernel(const Product p) {
  __shared__ Room<NT, STAGES, F> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  // This warp's steps, of all; where a step's place does not depend on which it is, the pointers say where they begin.
  const int all = p.k / Layout<F>::kStep;
  const int begin = all * warp / kWarps, steps = F == Form::kBf16 ? all / kWarps : all * (warp + 1) / kWarps - begin;
  const int ahead = F == Form::kInt4 ? 0 : begin, before = F == Form::kInt4 ? begin : 0;
  const int offset = ahead * Layout<F>::kStep + lane % 4 * Layout<F>::kLane;
  const int first = blockIdx.x * 8 * NT;
  launch_next();
  Row<F> rows[NT];
  const bf16* lines[1][2];
#pragma unroll
  for (int i = 0; i < NT; ++i) {
    rows[i] = Row<F>(p.w, first + 8 * i + row, p.k, lane);
    rows[i].values = rows[i].at(ahead);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h)
    lines[0][h] = row + 8 * h < p.tokens ? p.x + (int64_t)(row + 8 * h) * p.k + offset : nullptr;
  float acc[1][NT][4] = {};
  const auto ready = [&] {  // weights are on their way
    if (p.norm && threadIdx.x < p.k / 64) prefetch(p.norm + threadIdx.x * 64);
    wait_for_previous();
    if (!p.norm) return;
    bf16* normalised = dynamic_shared<bf16>();
    bring_row(p.x, p.norm, p.epsilon, normalised, p.k);
    lines[0][0] = row == 0 ? normalised + offset : nullptr;
  };
  accumulate<NT, 1, STAGES, F>(room, acc, rows, lines, before, steps, 1, ready);
  reduce(room, acc[0], 8 * NT, [&](int r, int c, auto sum) {
    if (r >= p.tokens) return;
    const int64_t at = (int64_t)r * p.n + first + c;
    const float value = round_bf16(sum(c) * output_scale<F>(p.w, first + c));
    p.out[at] = __float2bfloat16(p.residual ? __bfloat162float(p.residual[at]) + value : value);
  });
}

template <Form F>
void run(cudaStream_t stream, const Product& p, bool early) {
  constexpr int kOfMany = F == Form::kBf16 ? 5 : 4, kOfFew = F == Form::kBf16 ? 5 : 6;  // loads in flight
  const size_t shared = p.norm ? p.k * sizeof(bf16) : 0;
  if (p.n >= 16384)
    launch(stream, linear_kernel<2, kOfMany, F>, {p.n / 16, kThreads, shared, 1, early}, p);
  else
    launch(stream, linear_kernel<1, kOfFew, F>, {p.n / 8, kThreads, shared, 1, early}, p);
}

ffi::Error linear(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer scales,
                  ffi::Result<ffi::AnyBuffer> out) {
  const Product p{data<bf16>(x), nullptr, weight_of(w, scales), nullptr, data<bf16>(*out), (int)x.dimensions()[0],
                  (int)w.dimensions()[0], (int)x.dimensions()[1], 0};
  run_linear(stream, form_of(w), p, false);
  return launch_status("linear");
}

}  // namespace

void run_linear(cudaStream_t stream, Form form, const Product& p, bool early) {
  with_form(form, [&](auto of) { run<decltype(of)::value>(stream, p, early); });
}

}  // namespace ernie

ERNIE_HANDLER(ernie_linear, ernie::linear, ernie::rets<1>(ernie::args<3>(ernie::on_stream())));
