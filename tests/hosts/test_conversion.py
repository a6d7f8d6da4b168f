"""Several processes convert one model: what one process would write, also after kills."""

import json
import pathlib
import signal
import time

import pytest

import convert
from convert import chunks, converter
from ernie_jax import checkpoint
from tests.convert.foreign import MOE, Model
from tests.hosts.conftest import ROOT, Processes, flags, free_port

SCRIPT = pathlib.Path(__file__).parent / "convert_slowly.py"
SHAPES = {"vocab_size": 2000, "hidden_size": 96, "moe_num_experts": 16, "moe_intermediate_size": 64}


@pytest.fixture
def source(rng, tmp_path) -> pathlib.Path:
    return Model(MOE | SHAPES, rng).save(tmp_path / "hf", 5, shuffled=False)


@pytest.fixture
def alone(source, tmp_path, monkeypatch) -> pathlib.Path:
    """What one process makes of the source."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 20_000)
    convert.convert(str(source), str(tmp_path / "alone"))
    return tmp_path / "alone"


@pytest.fixture
def start(processes, port, source, tmp_path):
    """Start a conversion in some processes."""

    def call(count, *options, pause=0.0, running=processes, at=port, cwds=()):
        for index in range(count):
            command = ["convert", f"--source={source}", f"--target={tmp_path / 'ours'}", *options]
            cwd = cwds[index] if cwds else ROOT
            running.start(index, [SCRIPT, pause, *command, *flags(index, count, at)], cwd)

    return call


def files(directory: pathlib.Path) -> dict[str, bytes]:
    """Return the files of a checkpoint, without the times in Orbax's."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    times = json.loads(found["params/_CHECKPOINT_METADATA"])
    found["params/_CHECKPOINT_METADATA"] = {k: v for k, v in times.items() if "timestamp" not in k}
    return found


def journaled(directory: pathlib.Path) -> dict[int, set[str]]:
    """Return the names of the chunks that each process has journaled."""
    found: dict[int, set[str]] = {}
    for group in (directory / ".conversion").glob("group-*.json"):
        found.setdefault(int(group.stem.split("-")[1]), set()).update(json.loads(group.read_text()))
    return found


def wait_for_journals(directory: pathlib.Path, count: int) -> None:
    """Wait until so many processes have journaled something."""
    deadline = time.monotonic() + 60
    while len(journaled(directory)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("count", [2, 4])
def test_same_bytes_as_alone(start, processes, alone, tmp_path, count):
    start(count)
    results = processes.wait()
    assert [result.code for result in results] == [0] * count, results
    assert files(tmp_path / "ours") == files(alone)
    size = sum(p["bytes"] for p in checkpoint.read_manifest(alone)["parameters"].values())
    assert "100%" in results[0].err and f"{size / 1e6:.2f}M/{size / 1e6:.2f}M" in results[0].err
    assert results[0].err.endswith(f"wrote {tmp_path / 'ours'}\n")
    assert all((result.out, result.err) == ("", "") for result in results[1:])


@pytest.mark.parametrize("victims, then", [([1], 4), ([0], 2), ([0, 1, 2], 1)])
def test_killed_and_resumed(start, processes, alone, tmp_path, victims, then):
    """Whoever is killed, all end; as many as there are then go on, and rewrite nothing that was journaled."""
    ours = tmp_path / "ours"
    start(3, pause=0.02)
    wait_for_journals(ours, 3)
    assert not checkpoint.is_checkpoint(ours)
    for victim in victims:
        processes.kill(victim)
    for index, result in enumerate(processes.wait()):
        if index not in victims:
            assert result.code == 1
            assert f"error: process {victims[0]} of 3 (on" in result.err and "Traceback" not in result.err
    done = set().union(*journaled(ours).values())
    before = {name: (ours / name).stat().st_mtime_ns for name in done}
    start(then)
    results = processes.wait()
    assert all(result.code == 0 for result in results[:then]), results
    assert "resuming at" in results[0].err
    assert {name: (ours / name).stat().st_mtime_ns for name in done} == before
    assert files(ours) == files(alone)


def test_a_second_team_is_refused(start, processes, tmp_path):
    start(2, pause=0.1)
    wait_for_journals(tmp_path / "ours", 2)
    for index in range(2):
        processes.signal(index, signal.SIGSTOP)
    assert not checkpoint.is_checkpoint(tmp_path / "ours")
    (tmp_path / "second").mkdir()
    second = Processes(tmp_path / "second")
    start(2, running=second, at=free_port())
    for result in second.wait():
        assert result.code == 1
        assert f"{tmp_path / 'ours'}: another process is converting to it" in result.err


def test_a_target_that_is_not_shared(start, processes, tmp_path):
    """Each host has a directory of this name, but not the same one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    start(2, "--target=checkpoint", cwds=[tmp_path / "a", tmp_path / "b"])
    for result in processes.wait():
        assert result.code == 1
        assert "checkpoint is not the same directory here and in process 0; --target must be one that" in result.err
    assert not (tmp_path / "b" / "checkpoint").exists()


def test_sources_that_differ(start, processes, source, rng, tmp_path):
    (tmp_path / "a").mkdir()
    source.rename(tmp_path / "a" / "model")
    Model(MOE | SHAPES | {"vocab_size": 100}, rng).save(tmp_path / "b" / "model", 5)
    start(2, "--source=model", cwds=[tmp_path / "a", tmp_path / "b"])
    for result in processes.wait():
        assert result.code == 1
        assert "the content of --source=model" in result.err
    assert not (tmp_path / "ours").exists()


def test_bad_input_ends_all(start, processes, source, tmp_path):
    (source / "model-00003-of-00005.safetensors").unlink()
    start(3)
    for result in processes.wait():
        assert result.code == 1
        assert "missing shard model-00003-of-00005.safetensors" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts(source, rng, monkeypatch, count):
    """Each chunk has one process; the parts are about equal, and few processes need the same shard."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    origin = converter.Source(str(source))
    model = converter.read_model(origin)
    placements, _ = model.place(model.config)
    shapes = {path: spec.shape for path, spec in converter.parameter_specs(model.config).items()}
    dtypes = converter.parameter_dtypes(model.config, placements, None)
    listed = [c for parameter in chunks.plan_parameters(placements, shapes, dtypes) for c in parameter.chunks()]
    listed.sort(key=lambda chunk: max(chunk.sources()))
    parts = []
    monkeypatch.setattr(converter.distributed, "process_count", lambda: count)
    for index in range(count):
        monkeypatch.setattr(converter.distributed, "process_index", lambda index=index: index)
        parts.append(converter._part(listed))
    assert [chunk for part in parts for chunk in part] == listed
    sizes = [sum(chunk.nbytes for chunk in part) for part in parts]
    assert max(sizes) - min(sizes) <= 2 * max(chunk.nbytes for chunk in listed)
    fetches = sum(len(set().union(*(chunk.sources() for chunk in part))) for part in parts)
    assert fetches <= 5 + 2 * (count - 1)
    assert converter._part([]) == []
