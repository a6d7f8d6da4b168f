// The MLP of the chosen experts, and of the shared ones beside them, for up to some hundreds of tokens: each chosen
// expert's weights are read once.
//
// Three stages. `plan` sorts the pairs of a token and one of its experts (a single token needs none). `up` computes every
// pair's hidden row, scaled by its router weight. For few tokens `walk` keeps all tokens' sums of a few output columns
// while it passes through all experts; for more, `down` writes each pair's row and `combine` adds up those of a token.
#pragma once

#include "forms.cuh"

namespace ernie::experts {

struct Sizes {
  int tokens, k, experts, width, inner, shared;  // T, k, E, D, F, and the shared experts' F or 0
};

// RMSNorm that a single token's kernel is to compute; its weight [D] is null for none.
struct Norm {
  const bf16* weight = nullptr;
  float epsilon = 0;
};

// A launch's operands: those of the kernels, and room for what passes between them.
struct Operands {
  const bf16* x;
  const int *chosen, *first;
  const bf16* weights;
  Weight gate_up, down, shared_gate_up, shared_down;
  const bf16* residual;
  bf16 *out, *hidden, *shared_hidden;
  float* rows;
  int* scratch;
};

// Launch the kernels of a single token. `early`: the kernel before is of the same call.
void run_one(cudaStream_t stream, Form form, const Operands& o, const Sizes& z, Norm norm, bool early);

}  // namespace ernie::experts
