"""Several processes train together: what one would learn, also when they are killed and go on, and adapters too."""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
import pytest

from ernie_jax import adapter, checkpoint
from ernie_jax.sharding import single
from ernie_jax.train import load_recipe, run
from ernie_jax.train.weights import Plan, read_config
from tests.hosts.conftest import ROOT, flags, free_port

pytestmark = pytest.mark.usefixtures("quick_compiling")
TIMES = ("seconds", "tokens_per_second")
COUNT, DEVICES = 2, 2
STEPS, SAVED = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config) -> pathlib.Path:
    """A recipe, and the model's config and data that it names."""
    folder = tmp_path_factory.mktemp("training")
    config = dataclasses.replace(tiny_config, num_hidden_layers=1, moe_layer_start_index=0, moe_layer_end_index=0)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    tokens = [[*range(start, start + 12), 2] for start in range(3, 300)]
    np.save(folder / "counting.npy", np.concatenate(tokens).astype(np.uint16))
    lines = [
        f'model = "{folder}"\ndata = "{folder}"\noutput = "{folder}/out"',
        'sources = { counting = { train = "counting.npy" } }',
        f"steps = {STEPS}\nsave_every = {SAVED}\nlog_every = 1",
        'batch_size = 4\nsequence_length = 32\nlearning_rate = 1e-2\ndtype = "float32"\nadam_epsilon = 1e-3',
    ]
    (folder / "recipe.toml").write_text("\n".join(lines))
    return folder


@pytest.fixture
def start(processes, folder):
    def call(*more):
        port = free_port()
        variables = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        }
        for index in range(COUNT):
            command = ["train", f"--config={folder / 'recipe.toml'}", *more, *flags(index, COUNT, port)]
            processes.start(index, [ROOT / "main.py", *command], **variables)

    return call


def rows(output: pathlib.Path) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]


def test_killed_and_started_again_they_learn_what_one_process_does(start, processes, folder, rng):
    start("--sharding=fsdp")
    first, other = processes.wait()
    assert (first.code, other.code, other.out, other.err) == (0, 0, "", ""), first.err + other.err
    whole, output = rows(folder / "out"), folder / "killed"
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1))

    start("--sharding=fsdp", f"--set=output={output}")
    step = int(rng.integers(SAVED + 1, STEPS))
    while not ((output / "metrics.jsonl").exists() and len(rows(output)) >= step):
        time.sleep(0.01)
    processes.kill(1)
    first, killed = processes.wait()
    assert first.code == 1 and killed.code == -9 and "process 1 of 2" in first.err
    start("--sharding=fsdp", f"--set=output={output}")
    first, other = processes.wait()
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert rows(output) == whole

    alone = dataclasses.replace(load_recipe(folder / "recipe.toml"), output=str(folder / "alone"))
    devices = jax.devices()[: COUNT * DEVICES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices)
        run(alone, progress=False, sharding="fsdp")
    for one, many in zip(rows(folder / "alone"), whole, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=1e-4, err_msg=name)
    stored = [checkpoint.read_manifest(folder / name / "checkpoint")["parameters"] for name in ("alone", "killed")]
    assert stored[0] == stored[1]


def test_adapters_of_several_processes(start, processes, folder):
    change = {"lora_rank": 4, "steps": 1}
    fields = [f"--set={name}={value}" for name, value in change.items()]
    heldout = f"--set=sources.counting.heldout={folder}/counting.npy"
    start("--sharding=fsdp", *fields, heldout, f"--set=output={folder}/lora")
    first, other = processes.wait()
    assert (first.code, other.code) == (0, 0), first.err + other.err
    assert first.out.startswith("held-out perplexity of counting") and first.out.count("\n") == 1
    found = adapter.load(folder / "lora" / "adapter")
    recipe = dataclasses.replace(load_recipe(folder / "recipe.toml"), **change)
    plan = Plan(recipe, read_config(recipe), single())
    assert found.model == adapter.identity(plan.bind(plan.start()), {})
    assert {name: array.shape for name, array in found.arrays.items()} == {
        name: plan.abstract[name].shape for name in plan.trained
    }
    assert all(array.any() for array in found.arrays.values())
