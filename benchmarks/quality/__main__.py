"""Measure what a form of weights, or of the KV cache, costs in quality: perplexity, KL, how long greedy answers agree.

    python -m benchmarks.quality --reference=CHECKPOINT --models=CHECKPOINT,... --data=out/quality-corpus [--json=FILE]
    python -m benchmarks.quality --reference=CHECKPOINT --kv_dtypes=int8,fp8 --data=out/quality-corpus
    python -m benchmarks.quality --reference=CHECKPOINT --models=FP8 --fp8_tokens=experts,all --data=out/quality-corpus

All checkpoints are converted ones of the same model. They run in float32, so that all that differs is their weights, or
that keys and values are rounded, or the rows that meet fp8 weights, as our kernels for Hopper GPUs round them in steps
of many tokens: those of the experts' products, or of all.
--data holds NAME.heldout.npy as scripts/embedded_corpus.py writes them; every token is predicted once, in documents cut
at 1,024 tokens. `train.toml`, beside this file, makes a model of 31 million parameters to judge by.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import math
import pathlib
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ernie_jax.engine import SamplingParams
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.model import Ernie
from ernie_jax.ops import Quantized, batched, blocks, experts, packed_attention, precision
from ernie_jax.ops.mosaic import to_fp8
from ernie_jax.ops.pages import as_cached
from ernie_jax.train.data import Batch, Part, TrainingData
from ernie_jax.train.documents import Documents, read_documents
from ernie_jax.train.losses import IGNORED

ROWS, LENGTH = 4, 1024
PROMPTS, PROMPT, ANSWER = 32, 64, 256  # of the greedy answers


def round_rows(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Round to fp8 what a product contracts along some axes, each row by a factor of its own."""
    rows = jnp.moveaxis(x, axes, range(-len(axes), 0))
    values, factors = to_fp8(rows.reshape(-1, math.prod(rows.shape[-len(axes) :])))
    rows = (values.astype(jnp.float32) * factors[:, None]).astype(x.dtype).reshape(rows.shape)
    return jnp.moveaxis(rows, range(-len(axes), 0), axes)


@contextlib.contextmanager
def fp8_tokens(which: str | None):
    """Round what meets fp8 weights in what is traced meanwhile: of "experts", of "all" products, or None."""

    def rounding(product):
        def run(subscripts, x, weight, *more):
            if isinstance(weight, Quantized) and weight.form == "fp8":
                inputs, output = subscripts.replace("...", "").split("->")
                left, right = inputs.split(",")
                contracted = set(right) - set(output)
                x = round_rows(x, tuple(i - len(left) for i, label in enumerate(left) if label in contracted))
            return product(subscripts, x, weight, *more)

        return run

    with contextlib.ExitStack() as patches:
        for module in (experts, blocks, batched) if which else ():
            patches.enter_context(mock.patch.object(module, "einsum", rounding(module.einsum)))
        if which == "all":
            xla = rounding(precision.LINEAR_BACKENDS["xla"])
            patches.enter_context(mock.patch.dict(precision.LINEAR_BACKENDS, xla=xla))
        yield


@functools.partial(jax.jit, static_argnames=("kv_dtype", "tokens"))
def log_probabilities(model: Ernie, batch: Batch, kv_dtype: jnp.dtype, tokens: str | None = None) -> jax.Array:
    """Return float32 [B, T, V]; `tokens` that become fp8 too, as in `fp8_tokens`."""

    def attend(q, k, v, cache):
        k, v = as_cached(k, kv_dtype), as_cached(v, kv_dtype)
        return packed_attention(q, k, v, batch.segments), cache

    with fp8_tokens(tokens):
        hidden = model(batch.tokens, batch.positions, attend).hidden
    return jax.nn.log_softmax(model.logits(hidden).astype(jnp.float32))


@jax.jit
def compare(reference: jax.Array, other: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Return, of each token [B, T]: both losses, KL(reference || other), and whether both think the same likeliest."""

    def loss(logprobs):
        return -jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]

    divergence = jnp.sum(jnp.exp(reference) * (reference - other), axis=-1)
    same = jnp.argmax(reference, axis=-1) == jnp.argmax(other, axis=-1)
    return loss(reference), loss(other), divergence, same


def on_text(reference: LLM, others: list[tuple[LLM, str | None]], batches: list[Batch]) -> list[dict[str, float]]:
    """Compare models, each with tokens of `fp8_tokens`, with the reference, which runs once, on every target."""
    found = [collections.defaultdict(list) for _ in others]
    for batch in tqdm(batches, unit="batch", leave=False):
        expected, *logprobs = (
            log_probabilities(llm.model, batch, llm.engine.kv_dtype, tokens)
            for llm, tokens in ((reference, None), *others)
        )
        counted = batch.targets != IGNORED
        for parts, theirs in zip(found, logprobs, strict=True):
            figures = compare(expected, theirs, batch.targets)
            for key, values in zip(("loss", "other", "kl", "same"), figures, strict=True):
                parts[key].append(np.asarray(values)[counted])
    return [summarize(parts) for parts in found]


def summarize(found: dict[str, list[np.ndarray]]) -> dict[str, float]:
    """Bring what `compare` found, in nats a token, to the figures of a row."""
    loss, theirs, kl, same = (np.concatenate(found[key]).astype(np.float64) for key in ("loss", "other", "kl", "same"))
    worse = theirs - loss
    return {
        "tokens": len(loss),
        "perplexity": math.exp(loss.mean()),
        "perplexity_change": math.expm1(worse.mean()),
        "standard_error": worse.std() / math.sqrt(len(worse)),
        "kl_mean": kl.mean(),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.percentile(kl, 99)),
        "same_likeliest": same.mean(),
    }


def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_new_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    return [completion.token_ids for completion in llm.generate(prompts, params)]


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Tell how long answers are the same, and how many of them are to the end."""
    until = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), ANSWER) for pair in
             zip(ours, theirs, strict=True)]  # fmt: skip
    return {"greedy_same_tokens": float(np.mean(until)), "greedy_same_whole": float(np.mean(np.equal(until, ANSWER)))}


def heldout(directory: pathlib.Path, llm: LLM) -> list[Documents]:
    """Read the held-out documents of every language."""
    if not (files := sorted(directory.glob("*.heldout.npy"))):
        raise UserError(f"--data={directory}: has no NAME.heldout.npy; scripts/embedded_corpus.py writes them")
    return [read_documents(file, llm.config.eos_token_id, llm.config.vocab_size) for file in files]


def draw_prompts(documents: list[Documents]) -> list[list[int]]:
    """Return the beginnings of documents that are long enough, evenly from all of them."""
    found = [
        language.tokens[start : start + PROMPT].tolist()
        for language in documents
        for start in language.starts[language.lengths >= PROMPT]
    ]
    return found[:: max(1, len(found) // PROMPTS)][:PROMPTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="converted checkpoint, usually bfloat16")
    parser.add_argument("--models", default="", help="converted checkpoints to compare with it, by commas")
    parser.add_argument("--kv_dtypes", default="", help="its KV cache in these dtypes too, by commas")
    parser.add_argument("--fp8_tokens", default="", help="experts, all: fp8 --models so too, by commas")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with NAME.heldout.npy")
    parser.add_argument("--json", type=pathlib.Path, help="file for the figures")
    flags = parser.parse_args()
    if not flags.models + flags.kv_dtypes:
        parser.error("nothing to compare: give --models or --kv_dtypes")
    rounded = [name for name in flags.fp8_tokens.split(",") if name]
    if not {"experts", "all"}.issuperset(rounded):
        parser.error(f"--fp8_tokens={flags.fp8_tokens}: takes experts and all")

    options = {"cache_tokens": PROMPTS * (PROMPT + ANSWER), "max_sequences": PROMPTS}
    reference = LLM.load(flags.reference, "float32", **options)
    documents = heldout(flags.data, reference)
    batches = TrainingData([Part((language,)) for language in documents], ROWS, LENGTH, None).first_epoch()
    prompts = draw_prompts(documents)
    expected = greedy(reference, prompts)
    print(f"{reference.describe()}\n{'':24s} {'perplexity':>10} {'change':>16} {'KL mean':>9} {'median':>9} {'p99':>8} "
          f"{'likeliest':>9} {'greedy':>7} {'whole':>6}", flush=True)  # fmt: skip
    cases = [(directory, None) for directory in flags.models.split(",") if directory]
    cases += [(flags.reference, kv_dtype) for kv_dtype in flags.kv_dtypes.split(",") if kv_dtype]
    models = [LLM.load(directory, "float32", **options, kv_dtype=kv_dtype) for directory, kv_dtype in cases]
    others = [
        (index, tokens)
        for index, model in enumerate(models)
        for tokens in (None, *(rounded if model.config.quantize == "fp8" else ()))
    ]
    rows, compared = [], on_text(reference, [(models[index], tokens) for index, tokens in others], batches)
    for (index, tokens), found in zip(others, compared, strict=True):
        (directory, kv_dtype), other = cases[index], models[index]
        name = f"{kv_dtype} KV cache" if kv_dtype else other.config.forms or "bfloat16"
        name += f", tokens of {tokens}" if tokens else ""
        row, answers = {"model": directory, "form": name, **found}, ""
        if not tokens:  # of a few sequences they are not rounded
            row |= agreement(expected, greedy(other, prompts))
            answers = f" {row['greedy_same_tokens']:7.1f} {row['greedy_same_whole']:6.0%}"
        rows.append(row)
        print(f"{name:24s} {row['perplexity'] * (1 + row['perplexity_change']):10.3f} "
              f"{row['perplexity_change']:+8.3%} ± {row['standard_error']:.3%} {row['kl_mean']:9.5f} "
              f"{row['kl_median']:9.6f} {row['kl_p99']:8.4f} {row['same_likeliest']:9.2%}{answers}",
              flush=True)  # fmt: skip
    print(f"{rows[0]['tokens']:,} tokens; greedy: tokens until one differs, of {ANSWER}, {len(prompts)} answers")
    if flags.json:
        flags.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
