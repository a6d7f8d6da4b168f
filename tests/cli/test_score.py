"""score."""

import math

import jax
import numpy as np
import pytest

import ernie_jax
from tests.cli.conftest import read_lines, write_lines


def test_logprobs_and_perplexity(run, tiny, tmp_path, rng):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [rng.integers(3, 320, length).tolist() for length in (9, 1, 140)]
    write_lines(source, [{"token_ids": ids} for ids in texts])
    result = run("score", f"--model={tiny}", f"--input={source}", f"--output={target}", "--cache_tokens=1024")
    assert result.code == 0
    llm = ernie_jax.load(tiny, cache_tokens=128)
    nats = []
    for ids, record in zip(texts, read_lines(target), strict=True):
        assert list(record) == ["token_ids", "logprobs"] and record["token_ids"] == ids
        table = np.asarray(jax.nn.log_softmax(llm.logits(ids)))
        expected = table[np.arange(len(ids) - 1), ids[1:]]
        assert record["logprobs"][0] is None
        np.testing.assert_allclose(record["logprobs"][1:], expected, atol=2e-4)
        nats += expected.tolist()
    perplexity = float(result.out.split()[1])
    assert perplexity == pytest.approx(math.exp(-np.mean(nats)), rel=1e-3)
    assert f"over {len(nats)} tokens" in result.out


def test_bad_lines_get_an_error_in_their_place(run, embedded, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = {
        '{"text": "In the beginning"}': None,
        "{oops": "not valid JSON",
        '{"prompt": "x"}': "unknown field prompt",
        '{"text": "x", "token_ids": [5]}': "exactly one of text, token_ids",
        '{"text": 5}': "field text must be text",
        '{"text": ""}': "empty",
        '{"token_ids": ["x"]}': "field token_ids must be a list of integers",
        '{"token_ids": [9999]}': "outside the vocabulary",
        '{"token_ids": %s}' % ([5] * 4097): "context",
        '{"text": "And it came to pass"}': None,
    }
    write_lines(source, list(lines))
    result = run("score", f"--model={embedded}", f"--input={source}", f"--output={target}", "--cache_tokens=8192")
    assert result.code == 1 and result.out.startswith("perplexity ")
    for number, (record, words) in enumerate(zip(read_lines(target), lines.values(), strict=True), 1):
        if words is None:
            assert record["logprobs"][0] is None and all(value < 0 for value in record["logprobs"][1:])
        else:
            assert record["error"].startswith(f"line {number}: ") and words in record["error"], record
