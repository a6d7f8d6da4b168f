"""convert --quantize: right numbers in every layout and chunking; resuming; verify; what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorstore as ts

import convert
from convert import chunks, converter
from ernie_jax import checkpoint
from ernie_jax.cli.models import embedded_model
from ernie_jax.config import QUANTIZED_FORMS
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.ops import form_of, quantize
from tests.convert.foreign import DENSE, MOE, Model, as_paddle, write
from tests.convert.test_targets import chunk_times, interrupt, journaled


def read(directory) -> dict[str, np.ndarray]:
    """Read every array of a checkpoint."""
    opened = {
        folder.name: ts.open({"driver": "zarr", "kvstore": f"file://{folder}/"}, read=True).result()
        for folder in (directory / "params/state").iterdir()
        if (folder / ".zarray").exists()
    }
    return {name: array.read().result() for name, array in opened.items()}


# Widths that int4 can cut into groups: several of them, of 32 and 16.
SMALL = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 48}
WIDE, NARROW = MOE | SMALL, DENSE | {"hidden_size": 64, "intermediate_size": 48}
FORMS = pytest.mark.parametrize("form", QUANTIZED_FORMS)


def expected(model: Model, form: str, embedding: bool = False) -> dict[str, np.ndarray]:
    """Return what must be stored of a model, with each weight rounded whole."""
    found = {}
    for name, value in model.parameters.items():
        outputs = {"qkv": 3, "out": 1, "gate_up": value.ndim - 1, "down": value.ndim - 1}.get(name.split(".")[-2])
        if embedding and name in ("embed.weight", "head.weight"):
            weight = quantize(value)
            found |= {name: weight.values, name.removesuffix("weight") + "scale": weight.scales}
        elif outputs and name.endswith("weight"):
            weight = quantize(value, outputs, form)
            found |= {name: weight.values, name.removesuffix("weight") + "scale": weight.scales}
        else:
            found[name] = value
    return found


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name].view(np.uint8), np.ascontiguousarray(value).view(np.uint8), name)


@pytest.fixture
def model(rng):
    return Model(WIDE, rng, mtp=1)


@pytest.fixture
def source(model, tmp_path):
    return model.save(tmp_path / "hf", 3)


@pytest.fixture
def ours(tmp_path):
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("fields", "chunk_bytes"),
    [(WIDE, None), (WIDE | {"use_bias": True}, 5000), (NARROW, 64)],
    ids=["moe", "biases", "dense"],
)
@FORMS
def test_parameters(form, fields, chunk_bytes, rng, tmp_path, ours, monkeypatch):
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    model = Model(fields, rng)
    source = model.save(tmp_path / "hf", 2)
    convert.convert(str(source), str(ours), quantize=form)
    assert_equal(read(ours), expected(model, form))
    assert convert.verify(str(source), str(ours)) == []
    assert checkpoint.read_config(ours).quantize == json.loads((ours / "manifest.json").read_text())["quantize"] == form


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_head(tied, rng, tmp_path, ours, monkeypatch, capsys):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    model = Model(NARROW | {"tie_word_embeddings": tied, "num_hidden_layers": 1}, rng)
    source, exact = model.save(tmp_path / "hf", 2), tmp_path / "exact"
    options = {"quantize": "int4", "quantize_embedding": True}
    with pytest.raises(UserError, match="--quantize_embedding goes with --quantize"):
        convert.convert(str(source), str(ours), quantize_embedding=True)
    monkeypatch.setattr(converter, "GROUP_BYTES", 4000)
    with monkeypatch.context() as broken:
        interrupt(broken, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours), **options)
    with pytest.raises(UserError, match="other files or options"):
        convert.convert(str(source), str(ours), quantize="int4")
    convert.convert(str(source), str(ours), **options)
    assert "resuming at" in capsys.readouterr().err
    assert_equal(read(ours), expected(model, "int4", embedding=True))
    assert convert.verify(str(source), str(ours)) == []
    told = capsys.readouterr().err
    assert "embed.weight: relative error 0." in told and ("head.weight: relative error 0." in told) == (not tied)
    assert json.loads((ours / "manifest.json").read_text())["dtype"] == "bfloat16"
    config = checkpoint.read_config(ours)
    assert config.quantize_embedding and config.forms == "int4 (int8 embedding)"
    convert.convert(str(source), str(exact))
    convert.convert(str(exact), str(tmp_path / "again"), **options)
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (ours, tmp_path / "again")]
    assert manifests[0] == manifests[1]
    file = ours / "params/state/embed.weight/0.0"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    _, error = convert.verify(str(source), str(ours))
    assert error.startswith("model.embed_tokens.weight: relative error ") and error.endswith("at most 5%")


@pytest.mark.parametrize(("form", "grouped"), [("int8", True), ("fp8", False), ("int4", False), ("int4", True)])
def test_paddle_layouts(form, grouped, model, tmp_path, ours, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    write(tmp_path / "paddle", WIDE, as_paddle(model, grouped), shards=2)
    convert.convert(str(tmp_path / "paddle"), str(ours), quantize=form)
    assert_equal(read(ours), expected(model, form))
    assert convert.verify(str(tmp_path / "paddle"), str(ours)) == []


@FORMS
def test_other_parameters_take_the_dtype_asked_for(form, rng, tmp_path, ours):
    model = Model(WIDE, rng, dtype=np.float32)
    source = model.save(tmp_path / "hf")
    convert.convert(str(source), str(ours), dtype="float16", quantize=form)
    wanted = expected(model, form)
    kept = {name for name in wanted if ".router." in name or name.endswith(".scale") or form_of(wanted[name].dtype)}
    assert_equal(read(ours), {name: x if name in kept else x.astype(np.float16) for name, x in wanted.items()})
    assert convert.verify(str(source), str(ours)) == []


@pytest.mark.parametrize(("form", "after"), [("int8", 1), ("int4", 5)])
def test_resume(form, after, model, source, ours, monkeypatch, capsys):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(converter, "GROUP_BYTES", 4000)
    with monkeypatch.context() as broken:
        interrupt(broken, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours), quantize=form)
    done, before = journaled(ours), chunk_times(ours)
    for options in ({}, {"quantize": form, "dtype": "float32"}):
        with pytest.raises(UserError, match="other files or options"):
            convert.convert(str(source), str(ours), **options)
    convert.convert(str(source), str(ours), quantize=form)
    assert "resuming at" in capsys.readouterr().err
    times = chunk_times(ours)
    assert done and all(times[name] == before[name] for name in done)
    assert_equal(read(ours), expected(model, form))


@pytest.mark.parametrize(("form", "least", "most"), [("int8", 0.2, 1.5), ("fp8", 2, 3), ("int4", 5, 11)])
def test_verify_tells_the_error_of_each_group(form, least, most, source, ours, capsys):
    convert.convert(str(source), str(ours), quantize=form)
    assert convert.verify(str(source), str(ours)) == []
    told = [line for line in capsys.readouterr().err.splitlines() if "relative error" in line]
    assert len({line.split(":")[0] for line in told}) == len(told) >= 8
    errors = [float(line.split()[-1].removesuffix("%")) for line in told]
    assert least < min(errors) <= max(errors) < most


@pytest.mark.parametrize("what", ["weight", "scale"])
@pytest.mark.parametrize(("form", "most"), [("int8", 5), ("fp8", 5), ("int4", 20)])
def test_verify_finds_wrong_numbers(form, most, what, source, ours):
    convert.convert(str(source), str(ours), quantize=form)
    name = f"layers.1.mlp.experts.down.{what}"
    file = ours / f"params/state/{name}" / ("2.0" if what == "scale" and form != "int4" else "2.0.0")
    numbers = np.fromfile(file, read(ours)[name].dtype)
    half = numbers[len(numbers) // 2 :].copy()
    numbers[len(numbers) // 2 :] = np.roll(half, 1) if what == "weight" else half * np.asarray(2, half.dtype)
    numbers.tofile(file)
    checksum, error = convert.verify(str(source), str(ours))
    assert checksum.endswith("checksum differs")
    assert error.startswith("model.layers.1.mlp.experts.2.down_proj.weight: relative error ")
    assert error.endswith(f"% in layers.1.mlp.experts.down.weight, at most {most}%")


def test_a_quantised_checkpoint_is_not_exported(source, ours, tmp_path):
    convert.convert(str(source), str(ours), quantize="int8")
    with pytest.raises(UserError, match="ours: its weights are rounded to int8; export a checkpoint that is not"):
        convert.export(str(ours), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("form", "chunk_bytes"), [("int8", None), ("fp8", None), ("int4", 5000)])
def test_a_checkpoint_of_ours_is_a_source(form, chunk_bytes, model, source, ours, tmp_path, monkeypatch):
    """What comes of it is what comes of the checkpoint that it was converted from, the manifest included."""
    if chunk_bytes:
        monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    exact, direct = tmp_path / "exact", tmp_path / "direct"
    convert.convert(str(source), str(exact))
    convert.convert(str(exact), str(ours), quantize=form)
    convert.convert(str(source), str(direct), quantize=form)
    assert_equal(read(ours), expected(model, form))
    assert json.loads((ours / "manifest.json").read_text()) == json.loads((direct / "manifest.json").read_text())
    for other in (source, exact):
        assert convert.verify(str(other), str(ours)) == []
    file = exact / "params/state/layers.0.attention.out.weight/0.0.0.0"
    file.write_bytes(bytes(file.stat().st_size))
    differences = convert.verify(str(exact), str(ours))
    assert differences and all("layers.0.attention.out.weight" in difference for difference in differences)


def test_a_checkpoint_that_was_trained_here_is_a_source(tiny_config, tiny_model, ours, tmp_path):
    saved = tmp_path / "trained"
    fields = json.dumps(dataclasses.asdict(tiny_config)).encode()
    checkpoint.save(saved, tiny_model, {"config.json": fields}, "a test")
    convert.convert(str(saved), str(ours), quantize="int4", quantize_embedding=True)
    stored = read(saved)["layers.1.mlp.experts.down.weight"]
    weight = quantize(stored, 2, "int4")
    found = read(ours)
    np.testing.assert_array_equal(found["layers.1.mlp.experts.down.weight"], weight.values)
    np.testing.assert_array_equal(found["layers.1.mlp.experts.down.scale"], weight.scales)
    assert convert.verify(str(saved), str(ours)) == []
    llm, exact = (LLM.load(folder, cache_tokens=256, max_sequences=1) for folder in (ours, saved))
    (answer,) = llm.generate([[5, 6, 7]], llm.sampling_params(temperature=0.0, max_new_tokens=3, ignore_eos=True))
    assert llm.engine.dtype == np.float32 and len(answer.token_ids) == 3
    assert answer.token_ids[0] == llm.logits([5, 6, 7])[-1].argmax()
    found, wanted = (np.asarray(one.logits(range(3, 60))) for one in (llm, exact))
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.95


def test_sources_of_ours_that_are_refused(source, ours, tmp_path):
    exact = tmp_path / "exact"
    convert.convert(str(source), str(ours), quantize="int8")
    with pytest.raises(UserError, match="ours: its weights are rounded to int8; pass a checkpoint that is not"):
        convert.convert(str(ours), str(tmp_path / "again"), quantize="int4")
    convert.convert(str(source), str(exact))
    with pytest.raises(UserError, match="already converted"):
        convert.convert(str(exact), str(tmp_path / "again"))
    (exact / "params/state/norm.weight/0").unlink()
    with pytest.raises(UserError, match="norm.weight"):
        convert.convert(str(exact), str(tmp_path / "again"), quantize="int4")
    assert not (tmp_path / "again").exists()


def test_bad_input(model, source, ours, tmp_path):
    with pytest.raises(UserError, match="--quantize=int7: unknown; choose int8 or fp8 or int4"):
        convert.convert(str(source), str(ours), quantize="int7")
    assert not ours.exists()
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    model.tensors[name][2, 3] = np.inf
    with pytest.raises(UserError, match="experts.3.up_proj.weight holds values that are not finite"):
        convert.convert(str(model.save(tmp_path / "broken")), str(ours), quantize="int8")
    assert not checkpoint.is_checkpoint(ours)


def test_quality_of_the_embedded_model(tmp_path):
    """On text that the model wrote; docs/quantization.md has its perplexity on held-out documents."""
    # Median and mean of the divergence, and how often the likeliest token stays. The mean is made of a few tokens that
    # go to another expert.
    bounds = {"int8": (1e-3, 1e-2, 0.95), "fp8": (5e-3, 3e-2, 0.9), "int4": (5e-2, 0.2, 0.8)}
    models = {}
    for form in (None, *bounds):
        convert.convert(str(embedded_model()), str(tmp_path / str(form)), quantize=form)
        models[form] = LLM.load(tmp_path / str(form), "float32", cache_tokens=2048)
    exact = models.pop(None)
    prompts = ["And God said", "In the beginning", "春", "The LORD"]
    params = [exact.sampling_params(temperature=1.0, top_p=1.0, max_new_tokens=120, seed=i) for i in range(4)]
    divergences, agreed = ({form: [] for form in models} for _ in range(2))
    for prompt, completion in zip(prompts, exact.generate(prompts, params), strict=True):
        ids = [*exact.encode(prompt), *completion.token_ids]
        wanted = np.asarray(jax.nn.log_softmax(exact.logits(ids)))
        for form, model in models.items():
            found = np.asarray(jax.nn.log_softmax(model.logits(ids)))
            divergences[form] += (np.exp(wanted) * (wanted - found)).sum(-1).tolist()
            agreed[form] += (wanted.argmax(-1) == found.argmax(-1)).tolist()
    for form, (median, mean, same) in bounds.items():
        print(form, np.median(divergences[form]), np.mean(divergences[form]), np.mean(agreed[form]))
        assert np.median(divergences[form]) < median and np.mean(divergences[form]) < mean
        assert np.mean(agreed[form]) > same
