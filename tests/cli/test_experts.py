"""experts: the counts are those of the bare model, and the picture shows them."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from ernie_jax import checkpoint
from ernie_jax.cli import heatmap
from ernie_jax.model import Ernie, initialize
from ernie_jax.ops import packed_attention
from ernie_jax.sharding import single
from tests.cli.conftest import write_lines

TEXT = "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form.\n"
DEAD = np.array([255, 214, 10]) / 255  # the marks' colour


def count(model, texts):
    """Return how many tokens chose each expert [L, E], by the bare model."""

    def attend(q, k, v, cache):
        return packed_attention(q[None], k[None], v[None], jnp.zeros((1, len(q)), jnp.int32))[0], cache

    total = 0
    for tokens in texts:
        out = model(jnp.asarray(tokens), jnp.arange(len(tokens)), attend)
        total += np.stack([np.bincount(routed.experts.ravel(), minlength=8) for routed in out.routing])
    return total


def test_counts_of_token_ids(run, tiny, tiny_model, tmp_path, rng):
    texts = [rng.integers(3, 320, length).tolist() for length in (90, 90)]
    source = write_lines(tmp_path / "in.jsonl", [{"token_ids": ids} for ids in texts])
    result = run("experts", f"--model={tiny}", f"--input={source}", "--cache_tokens=512", "--json")
    assert result.code == 0
    record = json.loads(result.out)
    assert (record["tokens"], record["experts"], record["experts_per_token"]) == (180, 8, 2)
    expected = count(tiny_model, texts)
    assert [layer["layer"] for layer in record["layers"]] == [1, 2]
    for layer, counts in zip(record["layers"], expected, strict=True):
        assert layer["tokens"] == counts.tolist() and layer["dead"] == np.flatnonzero(counts == 0).tolist()
        assert layer["max_over_mean"] == pytest.approx(counts.max() / 45)


def test_texts_table_and_picture(run, embedded, tmp_path):
    source, target = tmp_path / "book.txt", tmp_path / "load.png"
    source.write_text(TEXT)
    result = run("experts", f"--model={embedded}", f"--input={source}", f"--output={target}", "--cache_tokens=8192")
    assert result.code == 0
    heading, _, titles, *rows, _, silent = result.out.splitlines()
    tokens = int(heading.split()[1])
    assert heading == f"checkpoint: {tokens} tokens of book.txt, 2 of 8 experts a token and layer"
    assert titles.startswith("layer  max/mean") and [row.split()[0] for row in rows] == ["1", "2", "3", "4", "5"]
    for row in rows:
        _, most, least, dead, _, share, *_, bars = row.split()
        assert float(share.rstrip("%")) == pytest.approx(float(most) / 8 * 100, abs=0.1)
        assert len(bars) == 8 and bars.count("·") == int(dead) and (float(least) == 0) == (int(dead) > 0)
    assert silent.startswith("experts that no token chose: ")
    height, width, _ = matplotlib.image.imread(target).shape
    assert width > 1000 and height > 300
    # The same as prompts, beside a chat.
    lines = [{"prompt": TEXT}, {"text": TEXT}, {"messages": [{"role": "user", "content": "Hello"}], "tools": []}]
    source = write_lines(tmp_path / "in.jsonl", lines)
    result = run("experts", f"--model={embedded}", f"--input={source}", "--cache_tokens=8192", "--json")
    record = json.loads(result.out)
    assert record["tokens"] > 2 * tokens and all(sum(row["tokens"]) == 2 * record["tokens"] for row in record["layers"])


@pytest.mark.parametrize("dead", [False, True])
def test_the_picture_marks_dead_experts(tmp_path, dead):
    load = np.arange(1, 17).reshape(2, 8) - dead
    heatmap.draw(str(tmp_path / "load.png"), load, [1, 3], "Load", "of nothing")
    image = matplotlib.image.imread(tmp_path / "load.png")
    assert np.isclose(image[..., :3], DEAD, atol=0.01).all(-1).any() == dead


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("", "in.jsonl: line 2: not valid JSON"),
        ('{"prompt": "x", "text": "x"}', "in.jsonl: line 2: give exactly one of prompt, text, token_ids, messages"),
        ('{"prompt": "x", "temperature": 1}', "in.jsonl: line 2: unknown field temperature"),
        ('{"token_ids": [320]}', "in.jsonl: line 2: token id 320 is outside"),
        ('{"text": "x"}', "in.jsonl: line 2: this checkpoint has no tokenizer"),
    ],
)
def test_bad_lines(run, tiny, tmp_path, line, sentence):
    source = write_lines(tmp_path / "in.jsonl", ['{"token_ids": [5]}', line])
    result = run("experts", f"--model={tiny}", f"--input={source}", "--cache_tokens=512")
    assert result.code == 1 and sentence in result.err and result.out == ""


def test_bad_files_and_models(run, tiny, tiny_config, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", [{"token_ids": [5]}])
    (tmp_path / "empty.txt").write_text("")
    dense = dataclasses.replace(tiny_config, model_type="ernie4_5", moe_num_experts=0, moe_k=0)
    model = Ernie(dense, jnp.float32)
    initialize(model, single())
    checkpoint.save(tmp_path / "dense", model, {"config.json": json.dumps(dataclasses.asdict(dense)).encode()}, "test")

    def refused(*arguments):
        result = run("experts", "--cache_tokens=512", *arguments)
        assert result.code in (1, 2) and result.out == ""
        return result.err

    assert "give --input" in refused(f"--model={tiny}")
    assert "gone.txt: No such file" in refused(f"--model={tiny}", f"--input={tmp_path}/gone.txt")
    assert "empty.txt: it is empty" in refused(f"--model={tiny}", f"--input={tmp_path}/empty.txt")
    assert "has no experts" in refused(f"--model={tmp_path}/dense", f"--input={source}")
    assert "no directory" in refused(f"--model={tiny}", f"--input={source}", f"--output={tmp_path}/no/load.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'ernie-jax[plots]'" in refused(f"--model={tiny}", f"--input={source}", "--output=load.png")
