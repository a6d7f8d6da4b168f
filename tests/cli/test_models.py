"""What --model means; info, convert, export and verify."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from ernie_jax.cli import models

PRESETS = {"ernie-4.5-0.3b", "ernie-4.5-21b-a3b", "ernie-4.5-21b-a3b-thinking", "ernie-4.5-300b-a47b"}
SIZE = ("--cache_tokens=1024", "--max_sequences=1")
GENERATE = ("generate", "--prompt=And", "--max_new_tokens=3", "--temperature=0", *SIZE)


@pytest.fixture
def source(tmp_path, embedded_source):
    """A Hugging Face directory of one's own."""
    return shutil.copytree(embedded_source, tmp_path / "source")


def test_presets():
    assert set(models.presets()) == PRESETS


def test_a_hugging_face_directory_is_converted_once_until_it_changes(run, source, cache):
    first, again = run(*GENERATE, f"--model={source}"), run(*GENERATE, f"--model={source}/")
    assert first.code == again.code == 0 and first.out == again.out
    assert f"converting {source} once into {cache}" in first.err and "converting" not in again.err
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = -weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    changed = run(*GENERATE, f"--model={source}")
    assert changed.code == 0 and "converting" in changed.err and changed.out != first.out


def test_a_preset_needs_random_weights(run):
    result = run(*GENERATE, "--model=ernie-4.5-0.3b")
    assert result.code == 1 and "--random_weights" in result.err


def test_a_preset_with_random_weights_generates(run, tiny, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "presets", lambda: {"tiny-preset": tiny / "config.json"})
    path = tmp_path / "in.jsonl"
    path.write_text('{"token_ids": [5, 6], "ignore_eos": true}\n')
    outputs = []
    for seed in (1, 1, 2):
        out = tmp_path / "out.jsonl"
        arguments = (f"--input={path}", f"--output={out}", "--max_new_tokens=9", "--temperature=0", f"--seed={seed}")
        result = run("generate", "--model=tiny-preset", "--random_weights", "--dtype=float32", *arguments)
        assert result.code == 0, result.err
        assert "float32" in result.err
        outputs.append(json.loads(out.read_text())["token_ids"])
    assert outputs[0] == outputs[1] != outputs[2]


@pytest.mark.parametrize(("form", "error"), [("int8", "0."), ("int4", "")])
def test_quantised_weights(form, error, run, source, tiny, tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    assert run("convert", f"--source={source}", f"--target={ours}", f"--quantize={form}").code == 0
    result = run("verify", f"--source={source}", f"--target={ours}")
    assert (result.code, result.out) == (0, f"equal but for the rounding to {form}\n")
    assert f"experts.down.weight: relative error {error}" in result.err
    result = run(*GENERATE, f"--model={ours}")
    assert result.code == 0 and result.out and f"{form} weights" in result.err
    one_sentence(run("export", f"--source={ours}", f"--target={tmp_path / 'hf'}"), f"rounded to {form}")
    one_sentence(run(*GENERATE, f"--model={ours}", f"--quantize={form}"), "--quantize goes with --random_weights")
    one_sentence(run(*GENERATE, f"--model={ours}", "--quantize_embedding"), "--quantize_embedding goes with --random")
    monkeypatch.setattr(models, "presets", lambda: {"tiny-preset": tiny / "config.json"})
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"token_ids": [5, 6]}\n')
    flags = ("--random_weights", f"--quantize={form}", "--quantize_embedding")
    arguments = (*flags, f"--input={path}", f"--output={out}", "--max_new_tokens=2")
    result = run("generate", "--model=tiny-preset", *arguments, *SIZE)
    assert result.code == 0 and f"{form} (int8 embedding) weights" in result.err


def test_random_weights_go_with_a_preset(run, tiny):
    result = run(*GENERATE, f"--model={tiny}", "--random_weights")
    assert result.code == 1 and "--random_weights goes with a preset" in result.err


def one_sentence(result, *words):
    assert (result.code, result.out) == (1, "")
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), result.err


def test_what_is_no_model(run, tmp_path, source, embedded):
    one_sentence(run(*GENERATE, f"--model={tmp_path / 'missing'}"), "no such directory", "ernie-4.5-0.3b")
    (tmp_path / "empty").mkdir()
    one_sentence(run(*GENERATE, f"--model={tmp_path / 'empty'}"), "not a model directory", "empty")
    one_sentence(run("info", f"--model={tmp_path / 'empty'}"), "not a model directory", "empty")
    one_sentence(run("info", f"--model={tmp_path / 'missing'}"), "missing", "no such directory")
    half = shutil.copytree(embedded, tmp_path / "half")
    (half / "manifest.json").unlink()
    one_sentence(run(*GENERATE, f"--model={half}"), "no manifest.json", "same convert command")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    one_sentence(run(*GENERATE, f"--model={source}"), "llama")
    one_sentence(run("info", f"--model={source}"), "llama")


def test_an_unreachable_hub_is_one_sentence(run, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for arguments in ((*GENERATE, "--model=nobody/nothing"), ("info", "--model=nobody/nothing")):
        one_sentence(run(*arguments), "nobody/nothing", "hub does not answer")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run, embedded_source, tiny, tmp_path):
    directory = shutil.copytree(tiny, tmp_path / "mixed")
    shutil.copy(embedded_source / "tokenizer.model", directory)
    one_sentence(run(*GENERATE, f"--model={directory}"), "tokenizer", "vocab_size")


def test_info_counts_what_there_is(run, embedded, embedded_source):
    result = run("info", f"--model={embedded}")
    assert (result.code, result.err) == (0, "")
    weights = load_file(embedded_source / "model.safetensors")
    count, size = (sum(getattr(array, field) for array in weights.values()) for field in ("size", "nbytes"))
    total = next(line.split() for line in result.out.splitlines() if line.split()[:1] == ["total"])
    assert total == ["total", f"{count:,}", f"{size:,}"]
    assert "hidden_size               192" in result.out
    tables = [run("info", f"--model={name}").out.split("\n\n", 1)[1] for name in (embedded, embedded_source)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("preset", "total"), [("ernie-4.5-0.3b", 360_748_032), ("ernie-4.5-21b-a3b", None)])
def test_info_of_a_preset(run, preset, total):
    result = run("info", f"--model={preset}")
    assert result.code == 0 and "TPU v5e" in result.out
    if total:
        assert f"{total:,}" in result.out


def test_convert_verify_export(run, source, tmp_path):
    converted, exported = tmp_path / "converted", tmp_path / "exported"
    assert run("convert", f"--source={source}", f"--target={converted}").code == 0
    one_sentence(run("convert", f"--source={source}", f"--target={converted}"), "--overwrite")
    assert run("convert", f"--source={source}", f"--target={converted}", "--overwrite").code == 0
    result = run("verify", f"--source={source}", f"--target={converted}")
    assert (result.code, result.out) == (0, "equal\n")
    assert run("export", f"--source={converted}", f"--target={exported}").code == 0
    before, after = (load_file(directory / "model.safetensors") for directory in (source, exported))
    assert {name: array.tobytes() for name, array in before.items()} == {n: a.tobytes() for n, a in after.items()}
    before["model.norm.weight"][3] += 1
    save_file(before, source / "model.safetensors", {"format": "pt"})
    result = run("verify", f"--source={source}", f"--target={converted}")
    assert result.code == 1 and "model.norm.weight" in result.out and "differences: 1" in result.out
    one_sentence(run("verify", f"--source={source}", f"--target={tmp_path / 'missing'}"), "missing")
    one_sentence(run("export", f"--source={source}", f"--target={tmp_path / 'other'}"), "source")
