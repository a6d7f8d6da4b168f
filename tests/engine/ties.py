"""What an engine says, held to what another says token for token, though a tie may fall either way.

Engines that batch otherwise sum in another order. One token in some ten thousands is chosen, or has its experts
chosen, by less than what that moves.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ernie_jax.engine import SamplingParams
from ernie_jax.ops import packed_attention

# Leads of a token's logit and of an expert's score that count as ties. The second is tight, since of the tokens of a
# long text one comes near: a wrong engine must not be excused by it.
LOGIT, SCORE = 1e-4, 2e-6


def forward_with_leads(model, tokens):
    """Return logits [B, T, V], by how much the last chosen score led the next [L, B * T], the experts [L, B * T, k]."""

    def attend(q, k, v, cache):
        return packed_attention(q, k, v, jnp.zeros_like(tokens)), cache

    out = model(tokens, jnp.arange(tokens.shape[1])[None], attend)
    routers = [layer.mlp.router for layer in model.layers if hasattr(layer.mlp, "router")]
    leads = []
    for router, routed in zip(routers, out.routing, strict=True):
        scores = jnp.sort(routed.probabilities + router.correction_bias[...], axis=-1)
        leads.append(scores[:, -router.k] - scores[:, -router.k - 1])
    return model.logits(out.hidden), jnp.stack(leads), jnp.stack([routed.experts for routed in out.routing])


def least_lead(model, tokens: list[int]) -> float:
    """Return by how much the last chosen expert of any token led the next."""
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, tokens: forward_with_leads(nnx.merge(graphdef, state), tokens)[1])
    return float(run(state, jnp.asarray([tokens])).min())


def collect(engine, events):
    """Run a step, and add its events to those of their requests."""
    for event in engine.step():
        events.setdefault(event.request, []).append(event)


def drain(engine, events=None):
    """Run to the end; returns request -> its events."""
    events = {} if events is None else events
    while engine.has_work:
        collect(engine, events)
    return events


def single_run(engine, prompt: list[int], params: SamplingParams, **options) -> list[int]:
    """Return the tokens of a request that has the engine for itself."""
    request = engine.submit(prompt, params, **options)
    return [event.token for event in drain(engine)[request]]


def expected_run(engine, model, prompt, params, found, grammar=lambda: None) -> list[int]:
    """Return what a request says alone, going `found`'s way at ties.

    Args:
      grammar: makes one for every run.
    """
    bias = dict(params.logit_bias)
    while True:
        expected = single_run(engine, prompt, dataclasses.replace(params, logit_bias=bias), grammar=grammar())
        turn = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
        if turn is None:
            return expected
        if found[turn] in bias:  # no tie of logits
            return found if least_lead(model, prompt + found[:turn]) < SCORE else expected
        bias[found[turn]] = LOGIT  # turns the choice where it is a tie, and else nothing
