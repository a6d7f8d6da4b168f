"""Write what Baidu's own code computes for some random inputs: the router losses, and preferences with all variants.

    python tests/train/published/write.py --source=DIR

DIR holds the unpacked wheel of paddleformers 1.2.0; of it only the functions named below are run, as they stand. This
needs paddlepaddle (3.2.2 wrote the committed file) and NumPy alone, and imports nothing of this project.
"""

from __future__ import annotations

import argparse
import ast
import pathlib
import types

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.nn.clip import _squared_l2_norm

HERE = pathlib.Path(__file__).resolve().parent
GATE = "paddleformers/nn/moe/topk_gate.py"
PREFERENCE = "paddleformers/nn/criterion/dpo_loss.py"
TOKENS, WIDTH, EXPERTS, K = 30, 12, 8, 3
VOCAB = 11
# The row of each pair's tokens, and where its chosen answer begins, its rejected one begins, and that ends.
PAIRS = np.array([[0, 2, 7, 10], [0, 12, 13, 19], [0, 20, 26, 32]])
VARIANTS = {  # name of a case -> settings beside the defaults of ERNIEKit
    "sigmoid": {},
    "sigmoid_smoothed": {"label_smoothing": 0.1},
    "sigmoid_sums": {"normalize_logps": False},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "label_smoothing": 0.1},
    "dpop": {"loss_type": "dpop"},
}
DEFAULTS = {
    "loss_type": "sigmoid",
    "beta": 0.1,
    "label_smoothing": 0.0,
    "normalize_logps": True,
    "simpo_gamma": 0.5,
    "dpop_lambda": 50.0,
    "offset_alpha": 0.0,
    "pref_loss_ratio": 1.0,
    "sft_loss_ratio": 0.25,
    "ignore_eos_token": False,
}


def functions(source: pathlib.Path, file: str, *names: str) -> types.SimpleNamespace:
    """Take some functions, or methods, out of a file of which not all can be imported."""
    tree = ast.parse((source / file).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in found) == sorted(names)
    parts = ast.Module([ast.parse("from __future__ import annotations").body[0], *found], [])
    space = {
        "paddle": paddle,
        "nn": paddle.nn,
        "F": F,
        "_squared_l2_norm": _squared_l2_norm,
        "int_bincount": lambda x, low, high, dtype: paddle.bincount(x, minlength=high),  # theirs is for GPUs
        "CausalLMOutputWithPast": types.SimpleNamespace,
    }
    exec(compile(parts, file, "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in names})


def parameter(rng, *shape):
    tensor = paddle.to_tensor(rng.normal(size=shape).astype(np.float32))
    tensor.stop_gradient = False
    return tensor


def gradient(value, of):
    (found,) = paddle.grad(value, of, retain_graph=True)
    return found.numpy()


def router_losses(source: pathlib.Path, rng) -> dict[str, np.ndarray]:
    gate = functions(source, GATE, "_cal_aux_loss", "_cal_z_loss", "_cal_orthogonal_loss_opt_each_weight")
    config = types.SimpleNamespace(moe_k=K, moe_group_experts=False)
    myself = types.SimpleNamespace(
        act=F.softmax,
        use_correction_bias=True,
        config=config,
        num_experts_tensor=EXPERTS,
        global_aux_loss=False,
        eps=paddle.to_tensor([1e-12]),
    )
    logits, weight = parameter(rng, EXPERTS - 1, EXPERTS), parameter(rng, WIDTH, EXPERTS)  # more would take a GPU's op
    probabilities = F.softmax(logits, axis=-1)
    mask = paddle.to_tensor(rng.random(EXPERTS - 1) < 0.7)
    balance = gate._cal_aux_loss(myself, probabilities, None)
    z = gate._cal_z_loss(myself, logits, mask)
    orthogonality = gate._cal_orthogonal_loss_opt_each_weight(myself, weight, False)
    return {
        "logits": logits.numpy(),
        "real": mask.numpy(),
        "k": np.array(K),
        "weight": weight.numpy().T,
        "balance": balance.numpy(),
        "balance_gradient": gradient(balance, logits),
        "z": z.numpy(),
        "z_gradient": gradient(z, logits),
        "orthogonality": orthogonality.numpy(),
        # what ortho_loss_callback.py subtracts 1e-3 times
        "orthogonality_gradient": gradient(orthogonality, weight).T,
    }


def preferences(source: pathlib.Path, rng) -> dict[str, np.ndarray]:
    theirs = functions(source, PREFERENCE, "loss_impl", "dpo_logps", "cal_dpo_loss")
    length = int(PAIRS.max())
    logits = parameter(rng, 1, length, VOCAB)
    labels = paddle.to_tensor(rng.integers(0, VOCAB, (1, length)))
    pairs = paddle.to_tensor(PAIRS)
    arrays = {"preference_logits": logits.numpy()[0], "labels": labels.numpy()[0], "pairs": PAIRS}
    references = parameter(rng, 1, length, VOCAB)
    arrays["reference_logits"] = references.numpy()[0]
    for name, settings in VARIANTS.items():
        config = types.SimpleNamespace(**DEFAULTS | settings)
        myself = types.SimpleNamespace(
            tie_word_embeddings=True,
            use_filtered_label_loss=False,
            use_fused_head_and_loss_fn=False,
            use_subbatch=False,
            config=types.SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False),
            dpo_config=config,
            loss_func=paddle.nn.CrossEntropyLoss(reduction="none"),
        )
        average = config.loss_type in ("ipo", "or", "simpo")
        *reference, _ = theirs.dpo_logps(myself, references, labels, pairs, average)
        if config.loss_type == "simpo":  # reference_free
            reference = [paddle.zeros_like(x) for x in reference]
        *policy, sft = theirs.dpo_logps(myself, logits, labels, pairs, average)
        total = theirs.cal_dpo_loss(myself, *policy, *reference, None) + sft
        arrays |= {name: total.numpy(), f"{name}_gradient": gradient(total, logits)[0]}
    return arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, required=True)
    source = parser.parse_args().source
    rng = np.random.default_rng(7)
    np.savez_compressed(HERE / "expected.npz", **router_losses(source, rng), **preferences(source, rng))


if __name__ == "__main__":
    main()
