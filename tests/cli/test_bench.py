"""bench: the protocol by a clock that counts steps, what it prints, one case that fails, bad input."""

import importlib
import json
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ernie_jax import ops
from ernie_jax.bench import drive, measure, profile, routing
from ernie_jax.bench.machine import Machine, measure_machine, process_age
from ernie_jax.bench.ops import TracedOps
from ernie_jax.engine import Engine, EngineOptions
from ernie_jax.errors import UserError
from ernie_jax.model import Ernie, initialize
from ernie_jax.planner.costs import decode_load, step_cost
from ernie_jax.sharding import make_layout, single

ROOT = pathlib.Path(__file__).parents[2]
MACHINE = Machine(copy=1e9, read=2e9, matmul=1e12)


@pytest.fixture
def step_clock(monkeypatch):
    """Let an engine's step take a millisecond, and nothing else any time; returns the batch of each step."""
    sizes = []
    real = Engine.step

    def step(engine):
        sizes.append(engine.stats().running + engine.stats().waiting)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(drive, "clock", lambda: len(sizes) * 1e-3)
    return sizes


def test_people_get_a_table(run, tiny, step_clock, tmp_path):
    arguments = ("--batch=1,2x32", "--context=16", "--prefill=2x24", "--lengths=4,12", "--repeats=1")
    result = run("bench", f"--model={tiny}", *arguments, "--cache_tokens=2048", f"--profile={tmp_path}")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    for words in ("float32", "sharding single", "prefill chunks of 512", "KV room for 2,048 tokens"):
        assert words in lines[0]
    assert lines[1].startswith("a device here: copy ") and "matmul" in lines[1]
    assert lines[2].startswith("start ") and "weights" in lines[2]
    rows = {" ".join(line.split()[:4]): line.split() for line in lines if line.startswith(("decode", "prefill"))}
    assert list(rows) == ["decode 1 x 16", "decode 2 x 32", "prefill 2 x 24"]
    assert rows["decode 1 x 16"][4:6] == ["1.00", "1,000"] and rows["decode 2 x 32"][4:6] == ["1.00", "2,000"]
    for row in rows.values():
        assert "attention: xla · expert: " in " ".join(row)
    assert sum("distinct experts a layer and step: " in line for line in lines) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode1x16", "decode2x32", "prefill2x24"]
    assert sum(" us " in line for line in lines) > 10


def test_programs_get_one_object_and_a_failing_case_is_survived(run, tiny, step_clock, monkeypatch):
    real = drive.random_prompts

    def break_at_48(engine, rng, lengths):
        if lengths == [48]:
            engine.submit([5] * 5, drive.greedy(3))
            engine.step()
            for pages in engine._devices.pages:
                pages.delete()
            raise ValueError("the kernel\ndoes not compile")
        return real(engine, rng, lengths)

    monkeypatch.setattr(drive, "random_prompts", break_at_48)
    arguments = ("--batch=2x16,1x48,64x900,2", "--context=16", "--prefill=", "--lengths=4,12", "--repeats=1")
    result = run("bench", f"--model={tiny}", *arguments, "--cache_tokens=2048", "--json")
    assert result.code == 1 and result.out.count("\n") == 1
    found = json.loads(result.out)
    good, broken, large, again = found["rows"]
    assert broken["problem"] == "failed: ValueError: the kernel" and broken["context"] == 48
    assert large["problem"].startswith("failed: needs 65,536 tokens of KV cache, and there is room for 2,048")
    assert good["kind"] == "decode" and [good["seconds"], again["seconds"]] == pytest.approx([1e-3, 1e-3])
    assert good["tokens_per_second"] == pytest.approx(2000)
    assert good["of_floor"] == pytest.approx(good["floor_seconds"] / good["seconds"])
    assert good["bytes"] > 0 and good["flops"] > 0 and 1 <= good["experts"] <= 4
    assert good["even_experts"] == pytest.approx(8 * (1 - (6 / 8) ** 2))
    assert found["cache_tokens"] == 2048 and found["sharding"] == "single" and not found["random_weights"]
    assert found["start"]["seconds"] > found["start"]["weights_seconds"] > 0
    assert set(found["machine"]) == {"copy", "read", "matmul"}
    assert "decode 2 x 16" in result.err


def test_time_limit_leaves_rows_out(run, tiny):
    result = run("bench", f"--model={tiny}", "--time_limit=0", "--cache_tokens=2048", "--batch=1", "--prefill=1x8")
    assert result.code == 0
    assert result.out.count("left out: --time_limit is over") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch=x"], "--batch=x: write a whole number from 1 on, or SEQUENCESxTOKENS"),
        (["--batch=0"], "--batch=0"),
        (["--batch=1x2x3"], "--batch=1x2x3"),
        (["--context=-5"], "--context=-5"),
        (["--context=900"], "--context=900 with 512 new tokens (--lengths) exceeds the model's context of 1024"),
        (["--prefill=2048"], "--prefill=2048: write SEQUENCESxTOKENS"),
        (["--prefill=1x1024"], "--prefill=1x1024: the prompts and a new token exceed the model's context of 1024"),
        (["--lengths=5"], "--lengths=5: write a short and a longer one"),
        (["--lengths=9,5"], "--lengths=9,5"),
        (["--repeats=0"], "--repeats=0"),
        (["--spread=2"], "--spread=2"),
        (["--batch=", "--prefill="], "nothing to measure"),
        (["--profile=pyproject.toml"], "--profile=pyproject.toml is a file"),
        (["--ops=attention=fast"], "attention backend 'fast'"),
        (["--dtype=int3"], "int3"),
        (["--model=ernie-4.5-0.3b"], "preset without weights"),
    ],
)
def test_bad_input_is_one_sentence(run, tiny, arguments, words):
    result = run("bench", f"--model={tiny}", *arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert words in result.err


@pytest.fixture
def engine(tiny_model):
    return Engine(tiny_model, single(), valid_vocab=320)


def test_a_decode_step_is_a_difference_held_against_the_counted_bytes(engine, step_clock, rng):
    case = measure.Decode(batch=3, context=20, short=4, long=10)
    row = measure.measure(engine, single(), case, MACHINE, TracedOps(), rng, repeats=2, spread=0.5)
    assert row.runs == pytest.approx([1e-3, 1e-3])
    cost = step_cost(engine.config, jnp.dtype(jnp.float32), single(), decode_load(single(), 3, 27))
    assert row.moved == cost.weights + cost.cache and row.flops == cost.flops
    assert row.floor == pytest.approx(max(row.moved / 1e9, row.flops / 1e12)) and row.bound == "memory"
    lengths = [len(sequence) - 10 for sequence in row.sequences]
    assert all(10 <= length <= 30 for length in lengths)
    assert len({tuple(sequence) for sequence in row.sequences}) == 3
    assert max(step_clock) == 3
    assert not engine.has_work and engine.free_tokens == engine.cache_tokens


@pytest.mark.parametrize("case", [measure.Decode(batch=10, context=40, short=1, long=6), measure.Prefill(3, 40)])
def test_nothing_is_compiled_while_time_counts(engine, step_clock, rng, monkeypatch, case):
    real, programs, lengths = drive.run, [], set()

    def run(engine, prompts, new):
        out = real(engine, prompts, new)
        programs.append((engine._step.traces, engine._step._sample._cache_size()))
        lengths.add(tuple(map(len, prompts)))
        return out

    monkeypatch.setattr(drive, "run", run)
    measure.measure(engine, single(), case, MACHINE, TracedOps(), rng, repeats=3, spread=0.9)
    assert len(programs) == 4 * len(case.runs) and len(lengths) == 1
    assert min(programs[0]) > 0 and set(programs[len(case.runs) :]) == {programs[len(case.runs) - 1]}


def test_prefill_counts_every_prompt_token_once(tiny_model, step_clock, rng):
    engine = Engine(tiny_model, single(), EngineOptions(prefill_chunk=16))
    row = measure.measure(engine, single(), measure.Prefill(2, 40), MACHINE, TracedOps(), rng, repeats=1)
    assert row.tokens_per_second == pytest.approx(80 / row.seconds)
    steps = 5  # 80 tokens in chunks of 16
    assert row.seconds >= steps * 1e-3
    one = step_cost(engine.config, engine.dtype, single(), measure.Load(40, 40, 1, 40, 40 * 41 // 2))
    assert row.flops == pytest.approx(2 * one.flops)


def test_pages_are_in_no_order(engine, rng):
    drive.shuffle_pages(engine, rng)
    for _ in range(2):  # of one's few pages the order happens to be that of their numbers now and then
        engine.submit([5] * 1000, drive.greedy(1))
    engine.step()
    pages = [page for sequence in engine._scheduler.running for page in sequence.pages]
    assert len(pages) == 16 and pages != sorted(pages) and pages != sorted(pages, reverse=True)
    while engine.has_work:
        engine.step()


def test_noise_is_no_measurement(engine, rng, monkeypatch):
    monkeypatch.setattr(drive, "clock", lambda: 0.0)
    with pytest.raises(UserError, match="took no longer than 2"):
        measure.measure(engine, single(), measure.Decode(1, 8, 2, 4), MACHINE, TracedOps(), rng, repeats=1)


def test_backends_are_those_that_were_traced(engine, rng):
    before = dict(ops.EXPERT_BACKENDS)
    traced = TracedOps()
    with traced.noting():
        drive.run(engine, drive.random_prompts(engine, rng, [64]), 2)
    assert before == ops.EXPERT_BACKENDS
    assert "expert: gather" in traced.describe(1) and "expert: dense" in traced.describe(64)
    assert "attention: xla" in traced.describe(1)


def test_distinct_experts_are_those_of_the_model(tiny_model, rng):
    sequences = rng.integers(0, 320, (9, 20)).tolist()
    found = routing.distinct_experts(tiny_model, single(), sequences)
    expected = []
    for layer in range(2):
        chosen = [_experts(tiny_model, sequence)[layer] for sequence in sequences]  # [B][T, k]
        expected += [len({e for rows in chosen for e in rows[t].tolist()}) for t in range(4, 20)]
    assert found == pytest.approx(np.mean(expected))


def test_distinct_experts_of_a_sharded_model(tiny_config, rng):
    sequences = rng.integers(0, 320, (5, 40)).tolist()
    found = []
    for layout in (single(), make_layout(tiny_config, jax.devices()[:4], None, "expert")):
        model = Ernie(tiny_config, jnp.float32)
        initialize(model, layout, seed=3, scale=0.1)
        found.append(routing.distinct_experts(model, layout, sequences))
    assert found[0] == pytest.approx(found[1], rel=0.02)


def _experts(model, sequence):
    tokens = jnp.array([sequence])

    def attend(q, k, v, cache):
        return ops.packed_attention(q, k, v, jnp.zeros_like(tokens)), cache

    out = model(tokens, jnp.arange(len(sequence))[None], attend)
    return [np.asarray(routing.experts) for routing in out.routing]


def test_even_routing(tiny_config):
    assert routing.even_experts(tiny_config, 1) == 2
    assert routing.even_experts(tiny_config, 1000) == pytest.approx(8)


def test_kernels_of_a_trace():
    def event(pid, tid, ts, dur, name, **args):
        return {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": args}

    def names(kind, pid, name, **more):
        return {"ph": "M", "name": f"{kind}_name", "pid": pid, "args": {"name": name}, **more}

    events = [
        names("process", 1, "/device:GPU:0"), names("process", 2, "/device:GPU:1"), names("process", 9, "/host:CPU"),
        names("thread", 1, "Stream #13(Compute)", tid=1), names("thread", 1, "XLA Modules", tid=2),
        event(1, 1, 0, 30, "gemm_1", tf_op="jit(call)/layer_0/mlp/experts/dot"), event(1, 1, 30, 10, "gemm_12.3"),
        event(1, 1, 50, 20, "ncclDevKernel_AllReduce"), event(1, 2, 0, 70, "jit_call"),
        event(2, 1, 0, 500, "gemm_1"), event(9, 1, 0, 900, "python", hlo_op="x"),
    ]  # fmt: skip
    (gemm, nccl), span = found, _ = profile.read(events)
    assert span == pytest.approx(70e-6)
    assert (gemm.name, gemm.scope, gemm.count) == ("gemm", "experts", 2)
    assert (gemm.seconds, gemm.share) == pytest.approx((40e-6, 40 / 60))
    assert profile.collective_seconds(found) == nccl.seconds == pytest.approx(20e-6)
    # A kernel that was launched early waits, and other streams run beside: no time counts twice.
    events = [
        *events[:4], names("thread", 1, "Stream #14(MemcpyD2H)", tid=3),
        event(1, 1, 0, 30, "first"), event(1, 1, 10, 40, "early"), event(1, 1, 12, 78, "earlier"),
        event(1, 3, 20, 60, "copy"), event(1, 3, 100, 10, "late"), event(1, 1, 105, 5, "beside"),
    ]  # fmt: skip
    found = profile.read(events)
    assert {kernel.name: kernel.seconds for kernel in found.kernels} == pytest.approx(
        {"first": 30e-6, "early": 20e-6, "copy": 30e-6, "earlier": 10e-6, "late": 10e-6, "beside": 0}
    )
    assert (found.busy, found.span) == pytest.approx((100e-6, 110e-6))
    # A loop's own time is what its body leaves; a host alone shows XLA's ops.
    host = [names("process", 9, "/host:CPU"), event(9, 1, 0, 100, "while", hlo_op="while"),
            event(9, 1, 10, 80, "dot", hlo_op="dot"), event(9, 2, 0, 70, "wait")]  # fmt: skip
    assert {kernel.name: kernel.seconds for kernel in profile.read(host).kernels} == pytest.approx(
        {"while": 20e-6, "dot": 80e-6}
    )


def test_the_machine_is_measured():
    machine = measure_machine(jax.devices()[0])
    assert min(machine.copy, machine.read, machine.matmul) > 1e7
    assert 0 < process_age() < 1e5


def texts_of(drawn):
    root = xml.etree.ElementTree.fromstring(drawn)
    return root, [element.text for element in root.iter() if element.tag.endswith("text")]


def test_steps_are_drawn_over_the_batch():
    plot = importlib.import_module("benchmarks.plot")

    def row(batch, seconds):
        return {"batch": batch, "seconds": seconds, "floor_seconds": seconds / 2, "tokens_per_second": batch / seconds}

    ours = {(1, 128): row(1, 0.004), (8, 128): row(8, 0.01), (1, 32768): row(1, 0.1)}
    theirs = {(8, 128): {"batch": 8, "tokens_per_second": 400}, (64, 128): {"batch": 64, "problem": "failed"}}
    root, texts = texts_of(plot.draw_steps({"ours": ours, "theirs": theirs}))
    assert {"1", "8", "ours", "theirs", "floor", "20"} <= set(texts) and "64" not in texts
    lines = [element for element in root.iter() if element.tag.endswith("polyline") and element.get("stroke") != "#ddd"]
    floor, ours, theirs = ([float(y) for y in re.findall(r",([\d.]+)", line.get("points"))] for line in lines)
    bottom = 360 - 48
    assert [bottom - y for y in ours] == pytest.approx([2 * (bottom - y) for y in floor], abs=0.3)
    assert bottom - theirs[0] == pytest.approx(2 * (bottom - ours[1]), abs=0.3)


def test_shares_are_drawn():
    plot = importlib.import_module("benchmarks.plot")
    row = {"seconds": 0.004, "tokens_per_second": 250.0, "of_floor": 0.5}
    ours = {(1, 128): row, (8, 128): {"problem": "failed"}}
    series = {"ours": ours, "theirs": {(1, 128): {"tokens_per_second": 375}}}
    root, texts = texts_of(plot.draw_shares(series))
    assert {"250", "375", "1 x 128", "ours", "theirs"} <= set(texts) and "8 x 128" not in texts
    _, *bars = (element for element in root.iter() if element.tag.endswith("rect"))
    heights = [float(bar.get("height")) for bar in bars]
    assert heights[1] / heights[0] == pytest.approx(1.5, rel=0.01)


def test_benchmarks_find_what_they_import():
    """Most need a GPU to run. A process apart, as some define flags that commands have too, or another of them."""
    names = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("*.py"))] + [
        "benchmarks.quality.__main__"
    ]
    code = """
import importlib, sys
from absl import flags
for name in sys.argv[1:]:
    known = set(flags.FLAGS)
    importlib.import_module(name)
    for flag in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, flag)
"""
    assert len(names) > 10
    subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, check=True)
