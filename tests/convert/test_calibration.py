"""convert --calibration: GPTQ against float64, what is stored, resuming, texts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import calibration, chunks, converter
from convert.gptq import factor, gram, round_to
from convert.source import Source, read_model
from ernie_jax import checkpoint, distributed
from ernie_jax.cli.models import embedded_model
from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.errors import UserError
from ernie_jax.model import forward
from ernie_jax.ops import Quantized, dequantize, quantize
from ernie_jax.sharding import single
from tests.convert.foreign import DENSE, MOE, Model
from tests.convert.test_quantized import assert_equal, read
from tests.convert.test_targets import chunk_times, interrupt, journaled

pytestmark = pytest.mark.usefixtures("quick_compiling")
SMALL = {"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 48}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    for name, value in {"LENGTH": 32, "MOST_ROWS": 10, "LEAST_TOKENS": 100, "_TOKENS": 128}.items():
        monkeypatch.setattr(calibration, name, value)


@pytest.fixture
def text(rng, tmp_path):
    """Token ids that fill more rows than are used, the last one in part."""
    tokens = rng.zipf(1.5, 350) % 93 + 3
    tokens[[99, 200, -1]] = 2
    np.save(tmp_path / "text.npy", tokens.astype(np.uint16))
    return str(tmp_path / "text.npy")


@pytest.fixture
def ours(tmp_path):
    return tmp_path / "ours"


def reference(weight, scales, hessian, least, most, rounded):
    """GPTQ in float64 as it is derived: after each input, the best correction of all that follow; returns steps."""
    inputs = len(hessian)
    weight, steps = weight.astype(np.float64), np.empty(weight.shape)
    hessian = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(inputs)
    for i in range(inputs):
        inverse = np.linalg.inv(hessian[i:, i:])
        steps[:, i] = rounded(np.clip(weight[:, i] / scales[:, i], least, most))
        error = (weight[:, i] - steps[:, i] * scales[:, i]) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
    return steps


@pytest.mark.parametrize("form", QUANTIZED_FORMS)
def test_gptq(form, rng):
    """It rounds as the definition in float64 does, and changes the outputs less than rounding to nearest."""
    outputs, inputs, groups = 24, 192, 64 if form == "int4" else 192
    weight = rng.standard_normal((outputs, inputs)).astype(np.float32)
    x = rng.standard_normal((400, 40)) @ rng.standard_normal((40, inputs)) + rng.standard_normal((400, inputs))
    x[:, 5] = 0
    weights = rng.uniform(0, 1, 400)
    x64 = x * weights[:, None]
    hessian = x64.T @ x64
    found = gram(jnp.asarray(x, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, hessian, rtol=1e-4, atol=1e-4 * hessian.max())
    upper = np.asarray(factor(found), np.float64)
    damped = hessian + np.diag((np.diag(hessian) == 0) + 0.01 * np.mean(np.diag(hessian)))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(inputs), atol=0.02)

    nearest = quantize(weight.reshape(-1, groups), form=form)
    rounded = round_to(weight, factor(found), groups, form)
    assert rounded.values.dtype == nearest.values.dtype and rounded.values.shape == nearest.values.shape
    np.testing.assert_array_equal(rounded.scales, nearest.scales.reshape(-1))
    scales = np.repeat(nearest.scales.astype(np.float64), groups).reshape(weight.shape)
    least, most, to_step = {
        "int8": (-127, 127, np.rint),
        "fp8": (-448, 448, lambda x: x.astype(np.float32).astype(rounded.values.dtype).astype(np.float64)),
        "int4": (-8, 7, np.rint),
    }[form]
    wanted = reference(weight, scales, hessian, least, most, to_step) * scales
    flat = [Quantized(one.values, one.scales.reshape(-1, *(1,) * (form == "int4"))) for one in (nearest, rounded)]
    near, ours = (dequantize(one).reshape(weight.shape).astype(np.float64) for one in flat)
    errors = [((value - weight) @ x64.T).std() for value in (near, ours, wanted)]
    print(form, errors, (ours == wanted).mean())
    assert errors[1] < 0.8 * errors[0] and errors[1] < 1.02 * errors[2]
    assert np.isclose(ours, wanted, rtol=1e-5).mean() > 0.8  # a step is up or down as a sum rounds, and others follow
    np.testing.assert_array_equal(ours[:, 5], near[:, 5])  # an input that is always zero


def test_outputs_change_less(tiny_config, tiny_model, text, tmp_path, ours):
    """From a checkpoint of ours, whose tokens are those of the text: the logits on it are nearer to the exact ones."""
    saved = tmp_path / "saved"
    fields = json.dumps(dataclasses.asdict(tiny_config)).encode()
    checkpoint.save(saved, tiny_model, {"config.json": fields}, "a test")
    forms = {"quantize": "int4", "quantize_embedding": True}
    convert.convert(str(saved), str(ours), **forms, calibration=text)
    convert.convert(str(saved), str(tmp_path / "nearest"), **forms)
    assert convert.verify(str(saved), str(ours)) == []
    tokens = np.load(text)[:320].astype(np.int32).reshape(10, 32)
    exact = forward(tiny_model, tokens)
    errors = [
        float(jnp.std(forward(checkpoint.restore(folder, single(), jnp.float32), tokens) - exact))
        for folder in (ours, tmp_path / "nearest")
    ]
    print(errors)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    ("fields", "chunk_bytes"),
    [(MOE | SMALL, None), (DENSE | {"hidden_size": 64, "use_bias": True}, 3000)],
    ids=["moe", "dense"],
)
def test_any_source_and_chunking(fields, chunk_bytes, rng, text, tmp_path, ours, monkeypatch):
    """Stored is the form that is always stored; what needs no text is as without one; every source gives the same."""
    fields = fields if "moe_k" in fields else fields | {"intermediate_size": 48}
    model = Model(fields, rng, mtp=1 if "moe_k" in fields else 0)
    for name, tensor in model.tensors.items():
        model.tensors[name] = tensor if "norm" in name else tensor * tensor.dtype.type(0.1)
    source = model.save(tmp_path / "hf", 3)
    convert.convert(str(source), str(tmp_path / "exact"))
    convert.convert(str(source), str(tmp_path / "nearest"), quantize="int4")
    convert.convert(str(source), str(ours), quantize="int4", calibration=text)
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    convert.convert(str(tmp_path / "exact"), str(tmp_path / "again"), quantize="int4", calibration=text)
    found, nearest = read(ours), read(tmp_path / "nearest")
    assert_equal(read(tmp_path / "again"), found)
    assert convert.verify(str(source), str(ours)) == []
    rounded = {name for name in found if name.startswith("layers.") and f"{name.rpartition('.')[0]}.scale" in found}
    assert_equal(*({name: x for name, x in one.items() if name not in rounded} for one in (found, nearest)))
    for name in rounded:
        assert name.endswith("bias") or name.endswith("scale") == np.array_equal(found[name], nearest[name]), name
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (ours, tmp_path / "nearest")]
    assert manifests[0]["parameters"] == manifests[1]["parameters"]
    assert len(manifests[0]["calibration"]) == 64 and "calibration" not in manifests[1]


def test_resume(rng, text, tmp_path, ours, monkeypatch, capsys):
    source = Model(MOE | SMALL, rng).save(tmp_path / "hf", 3)
    convert.convert(str(source), str(tmp_path / "whole"), quantize="int4", calibration=text)
    monkeypatch.setattr(converter, "GROUP_BYTES", 8000)
    for after in (4, 9):
        with monkeypatch.context() as broken:
            interrupt(broken, after, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                convert.convert(str(source), str(ours), quantize="int4", calibration=text)
    done, before = journaled(ours), chunk_times(ours)
    assert any(name.startswith("params/state/layers.1.attention") for name in done)
    np.save(tmp_path / "other.npy", np.load(text)[::-1][1:])
    for other in (None, str(tmp_path / "other.npy")):
        with pytest.raises(UserError, match="other files or options|closed by the end token"):
            convert.convert(str(source), str(ours), quantize="int4", calibration=other)
    convert.convert(str(source), str(ours), quantize="int4", calibration=text)
    assert "resuming at" in capsys.readouterr().err
    times = chunk_times(ours)
    assert all(times[name] == before[name] for name in done)
    assert_equal(read(ours), read(tmp_path / "whole"))


def test_tokens_of_an_expert(tiny_model):
    """Those that chose it, padding left out; one that too few chose gets others."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((200, 64)).astype(np.float32)
    chosen = np.argsort(rng.uniform(size=(200, 8)) - [0, 0, 0, 0, 0, 0, 0, 0.5])[:, :2]
    weights = rng.uniform(0.1, 1, (200, 2))
    weights[160:] = 0
    tokens = calibration._ExpertTokens(tiny_model.layers[1].mlp.experts, jnp.asarray(h), chosen, weights)
    for expert in range(8):
        mine = np.where(chosen == expert, weights, 0).sum(1)
        count = np.count_nonzero(mine)
        (rows, found), *rest = tokens._take(expert, 10)
        assert not rest and np.count_nonzero(found) == count > 10
        np.testing.assert_array_equal(rows[:count], h[mine > 0])
        np.testing.assert_allclose(found[:count], mine[mine > 0], rtol=1e-6)
        blocks = list(tokens._take(expert, 150))
        assert [x.shape for x, _ in blocks] == [(128, 64)] * 2
        found = np.concatenate([part for _, part in blocks])
        assert np.count_nonzero(found) == 150
        np.testing.assert_allclose(found[count:150], mine[mine > 0].mean(), rtol=1e-5)


@pytest.fixture
def embedded():
    return read_model(Source(str(embedded_model())))


def test_texts(embedded, tmp_path):
    words = "And God said, Let there be light: and there was light. " * 40
    (tmp_path / "text.txt").write_text(words)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": words}) + "\n" for _ in range(2)))
    plain, lines = (calibration.read_text(str(tmp_path / name), embedded) for name in ("text.txt", "lines.jsonl"))
    assert [batch.tokens.shape for batch in plain.batches] == [(4, 32)] * 3  # 10 rows, and two of padding
    assert plain.tokens == 320 and (plain.batches[-1].segments[2:] == -1).all()
    assert lines.tokens > 300 and plain.digest != lines.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", None, "text.txt: No such file"),
        ("lines.jsonl", None, "lines.jsonl: no such file"),
        ("text.txt", b"light \xff", "text.txt: not UTF-8 at byte 6"),
        ("text.txt", b"And God said", r"text.txt: has \d tokens; give a text of at least 100"),
        ("text.txt", b"", "text.txt: has 0 tokens"),
        ("lines.jsonl", b'{"text": "And"}\n{"text": 3}\n', "lines.jsonl, line 2: "),
        ("ids.npy", b"numbers", "ids.npy: not a .npy file"),
    ],
)
def test_bad_texts(name, content, message, tmp_path, ours):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        convert.convert(str(embedded_model()), str(ours), quantize="int4", calibration=str(tmp_path / name))
    assert "\n" not in str(error.value) and not ours.exists()


def test_refused(text, ours, monkeypatch):
    with pytest.raises(UserError, match="--calibration=.*text.npy is for --quantize"):
        convert.convert(str(embedded_model()), str(ours), calibration=text)
    with monkeypatch.context() as several:
        several.setattr(distributed, "process_count", lambda: 2)
        with pytest.raises(UserError, match="--calibration=.*text.npy takes one process.* here are 2"):
            convert.convert(str(embedded_model()), str(ours), quantize="int4", calibration=text)
    with pytest.raises(UserError, match="--host_memory_gb=0.3 is too little"):
        convert.convert(str(embedded_model()), str(ours), quantize="int4", calibration=text, host_memory_gb=0.3)
    assert not ours.exists()
