// out[T, N] = x[T, K] w[N, K]^T for few tokens.
#include "stream.cuh"

namespace ernie {
namespace {

template <int NT, int STAGES>
__global__ void __launch_bounds__(kThreads) linear_kernel(const bf16* __restrict__ x, const bf16* __restrict__ w,
                                                          bf16* __restrict__ out, int tokens, int n, int k) {
  __shared__ Room<NT, STAGES> room;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  const int steps = k / (32 * kWarps), offset = warp * steps * 32 + lane % 4 * 8;
  const int first = blockIdx.x * 8 * NT;
  const bf16* rows[NT];
  const bf16* lines[1][2];
#pragma unroll
  for (int i = 0; i < NT; ++i) rows[i] = w + (int64_t)(first + 8 * i + row) * k + offset;
#pragma unroll
  for (int h = 0; h < 2; ++h) lines[0][h] = row + 8 * h < tokens ? x + (int64_t)(row + 8 * h) * k + offset : nullptr;
  float acc[1][NT][4] = {};
  accumulate<NT, 1, STAGES>(room, acc, rows, lines, steps, 1);
  reduce(room, acc[0], 8 * NT, [&](int r, int c, auto sum) {
    if (r < tokens) out[(int64_t)r * n + first + c] = __float2bfloat16(sum(c));
  });
}

ffi::Error linear(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> out) {
  const int tokens = x.dimensions()[0], k = x.dimensions()[1], n = w.dimensions()[0];
  auto* xp = static_cast<const bf16*>(x.untyped_data());
  auto* wp = static_cast<const bf16*>(w.untyped_data());
  auto* op = static_cast<bf16*>(out->untyped_data());
  if (n >= 16384)
    launch(stream, linear_kernel<2, 5>, {n / 16, kThreads}, xp, wp, op, tokens, n, k);
  else
    launch(stream, linear_kernel<1, 5>, {n / 8, kThreads}, xp, wp, op, tokens, n, k);
  return launch_status("linear");
}

}  // namespace
}  // namespace ernie

XLA_FFI_DEFINE_HANDLER_SYMBOL(ernie_linear, ernie::linear,
                              ernie::ffi::Ffi::Bind()
                                  .Ctx<ernie::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Arg<ernie::ffi::AnyBuffer>()
                                  .Ret<ernie::ffi::AnyBuffer>(),
                              {ernie::ffi::Traits::kCmdBufferCompatible});
