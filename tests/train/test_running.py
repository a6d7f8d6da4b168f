"""Runs that are killed, told to end, moved to other devices; losses that go wrong; what runs write beside weights."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from ernie_jax import chips, distributed
from ernie_jax.errors import UserError
from ernie_jax.llm import LLM
from ernie_jax.sharding import single
from ernie_jax.text import Tokenizer
from ernie_jax.train import run
from ernie_jax.train.data import PreferenceBatch, TrainingData
from ernie_jax.train.metrics import Metrics
from ernie_jax.train.watch import Guard, Pace

pytestmark = pytest.mark.usefixtures("quick_compiling")
ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("seconds", "tokens_per_second")


def rows(output) -> list[dict]:
    lines = (pathlib.Path(output) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def start(recipe) -> subprocess.Popen:
    """Run a recipe in a process of its own."""
    fields = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    code = f"from ernie_jax.train import Recipe, run; run(Recipe(**{fields!r}), progress=False)"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def end(process: subprocess.Popen, output: pathlib.Path, step: int, number: int) -> str:
    """Send a signal once a step is logged; returns what the process wrote."""
    file = output / "metrics.jsonl"
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) >= step):
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate()[1].decode()


def test_killed_at_any_step_it_goes_on_bit_by_bit(started, tmp_path, rng):
    change = {"steps": 150, "save_every": 7, "log_every": 1, "evaluate_every": 50, "keep_last": 2, "keep_every": 70}
    whole = dataclasses.replace(started, output=str(tmp_path / "whole"), **change)
    perplexities = run(whole, progress=False)
    told, killed = sorted(rng.integers(3, 100, 2).tolist())
    output = tmp_path / "killed"
    recipe = dataclasses.replace(whole, output=str(output))
    process = start(recipe)
    assert "KeyboardInterrupt" in end(process, output, told, signal.SIGTERM)
    saved = max(int(entry.name) for entry in (output / "state").iterdir())
    assert told <= saved == rows(output)[-1]["step"]  # it ended at the step that it saved
    process = start(recipe)
    end(process, output, killed, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert run(recipe, progress=False) == perplexities
    assert rows(output) == rows(tmp_path / "whole")
    states = sorted(int(entry.name) for entry in (tmp_path / "whole" / "state").iterdir())
    assert states == [70, 140, 147, 150]
    shutil.rmtree(output / "checkpoint")  # as if it had been killed once more, before that was written
    assert run(recipe, progress=False) == perplexities


def test_on_another_mesh_it_goes_on_within_rounding(started, tmp_path, monkeypatch):
    change = {"steps": 4, "save_every": 2, "log_every": 1}
    whole = dataclasses.replace(started, output=str(tmp_path / "whole"), **change)
    run(whole, progress=False)
    moved = dataclasses.replace(whole, output=str(tmp_path / "moved"))
    read = TrainingData.batch

    def break_off(data, step):
        if step == 2:
            raise KeyboardInterrupt
        return read(data, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingData, "batch", break_off)
        run(moved, progress=False)
    run(moved, progress=False, sharding="expert")
    for one, other in zip(rows(moved.output), rows(whole.output), strict=True):
        np.testing.assert_allclose(one["train_loss"], other["train_loss"], rtol=1e-5)


def test_several_processes_must_say_how_they_share_the_work(started, monkeypatch):
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    with pytest.raises(UserError, match="say how, as with --sharding=fsdp"):
        run(started, progress=False)


def test_samples_are_what_the_model_says(started, config, tmp_path):
    embedded = ROOT / "models" / "ernie-embedded"
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(embedded / name, model / name)
    vocab = json.loads((embedded / "config.json").read_text())["vocab_size"]
    config = dataclasses.replace(config, vocab_size=vocab)
    (model / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    prompts = ("In the beginning", "He said")
    change = {"model": str(model), "checkpoint": "", "steps": 2, "init_scale": 0.1, "sample_prompts": prompts}
    recipe = dataclasses.replace(started, output=str(tmp_path / "out"), sample_tokens=8, **change)
    with pytest.raises(UserError, match="make 3. tokens, more than sequence_length, 32"):
        run(dataclasses.replace(recipe, output=str(tmp_path / "no"), sample_tokens=31), progress=False)
    run(recipe, progress=False)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(2, prompt) for prompt in prompts]
    llm = LLM.load(tmp_path / "out" / "checkpoint", cache_tokens=256, max_sequences=2)
    answers = llm.generate(list(prompts), llm.sampling_params(temperature=0.0, max_new_tokens=8))
    decode = Tokenizer.load(model).decode
    assert [sample["text"] for sample in samples] == [decode(answer.token_ids) for answer in answers]


def test_losses_that_go_wrong_stop_the_run_with_their_batch(tmp_path, batch):
    pairs = PreferenceBatch(batch, batch, batch.segments, (batch.positions, batch.targets))

    def follow(*losses, spike=5.0):
        guard = Guard(spike, tmp_path, lambda step: batch if step < 10 else pairs)
        for step, loss in enumerate(losses, 1):
            guard.follow(step, {"train_loss": loss, "gradient_norm": 1.0})
        guard.settle()

    with pytest.raises(UserError, match="the loss is nan and the gradient's norm 1.0 at step 3; its batch is saved"):
        follow(1.0, 2.0, float("nan"))
    with np.load(tmp_path / "batch-3.npz") as saved:
        np.testing.assert_array_equal(saved["targets"], batch.targets)
    with pytest.raises(UserError, match="the loss jumped from 2.000 to 7.500 at step 10"):
        follow(*[2.0] * 9, 7.5)
    with np.load(tmp_path / "batch-10.npz") as saved:
        np.testing.assert_array_equal(saved["rejected.targets"], batch.targets)
        np.testing.assert_array_equal(saved["reference.0"], batch.positions)
    follow(*[2.0] * 9, 6.5)
    follow(*[2.0] * 9, 7.5, spike=0.0)
    follow(2.0, 9.0)  # too early to know


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 5):
        metrics.add({"step": step, "train_loss": 5.0 / step})
    metrics.draw()
    assert (tmp_path / "curve.svg").read_text().startswith("<svg")
    Metrics(tmp_path, 2).add({"step": 3, "train_loss": 1.0})
    assert [row["train_loss"] for row in rows(tmp_path)] == [5.0, 2.5, 1.0]


def read_events(folder: pathlib.Path) -> list:
    """Return what TensorBoard would read: records of a length, a checksum, the message, and a checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events, (file,) = [], folder.iterdir()
    data = file.read_bytes()
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12:end]))
        data = data[end + 4 :]
    return events


def test_what_people_look_at(tmp_path, monkeypatch):
    found = []
    for resumed in (0, 2):
        metrics = Metrics(tmp_path, resumed, tensorboard=True)
        for step in range(resumed + 1, 4):
            metrics.add({"step": step, "train_loss": step / 4, "dead_experts": 1.0, "expert_load": [[3, 5], [8, 0]]})
        metrics.finish()
        found.append(read_events(tmp_path / "tensorboard"))
        shutil.rmtree(tmp_path / "tensorboard")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    first, then = (
        {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
        for events in found
    )
    names = "train_loss", "dead_experts", "expert_load"
    assert first.keys() == {(step, name) for step in (1, 2, 3) for name in names}
    assert [first[step, "train_loss"] for step in (1, 2, 3)] == [0.25, 0.5, 0.75]
    assert {step for step, _ in then} == {3}
    assert [event.step for event in found[1] if event.HasField("session_log")] == [3]  # hides what it replaces
    with pytest.raises(UserError, match="local folders only, and the recipe's output is gs://"):
        Metrics("gs://bucket/out", 0, tensorboard=True)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="tensorboardX, which is missing"):
        Metrics(tmp_path, 0, tensorboard=True)


def test_pace(config, batch):
    sizes = {"embed.weight": 100, "layers.1.mlp.experts.down.weight": 800, "norm.weight": 10, "mtp.0.proj.weight": 9}
    pace = Pace(config, single(), sizes, adapters=False)
    pace.count(batch)
    seen = 8 * sum(range(1, 17))
    assert pace.operations == 6 * 128 * (100 + 800 * 2 / 8 + 10) + 12 * 2 * 8 * 16 * seen
    sizes["layers.1.mlp.experts.down.lora_a"] = 40
    frozen = Pace(config, single(), sizes, adapters=True)
    frozen.count(batch)
    assert frozen.operations == 128 * (4 * (100 + 200 + 10) + 6 * 10) + 12 * 2 * 8 * 16 * seen
    deep = dataclasses.replace(config, num_nextn_predict_layers=1)  # which takes the embedding, its head, once more
    ahead = Pace(deep, single(), sizes, adapters=False, ahead=True)
    ahead.count(batch, batch)
    assert ahead.operations == 2 * (6 * 128 * (2 * 100 + 200 + 10 + 9 + 10) + 12 * 3 * 8 * 16 * seen)
    assert pace.measure().keys() == {"tokens_per_second"}  # nothing is known of CPUs
    assert chips.find("NVIDIA H100 80GB HBM3") is chips.CHIPS["h100"]
    assert chips.find("TPU v5 lite") is chips.CHIPS["v5e"] and chips.find("cpu") is None
