// out[T, N] = x[T, K] w[N, K]^T for few tokens, if wanted added to a residual; of a single token also of its RMSNorm.
#pragma once

#include "forms.cuh"

namespace ernie {

// A launch's operands; norm [K], where it is no null that of a single token, and residual [T, N] may be null.
struct Product {
  const bf16 *x, *norm;
  Weight w;
  const bf16* residual;
  bf16* out;
  int tokens, n, k;
  float epsilon;
};

// Launch the kernel. `early`: the kernel before is of the same call.
void run_linear(cudaStream_t stream, Form form, const Product& p, bool early);

}  // namespace ernie
