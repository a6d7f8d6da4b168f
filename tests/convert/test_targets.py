"""What may be written where; resuming; a full disk; memory."""

import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import convert
from convert import chunks, converter, target
from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from tests.convert.foreign import BF16, MOE, Model

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def source(rng, tmp_path):
    return Model(MOE, rng, mtp=1).save(tmp_path / "hf", 3)


@pytest.fixture
def ours(tmp_path):
    return tmp_path / "ours"


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(converter, "GROUP_BYTES", 8000)


def interrupt(monkeypatch, after: int, error: BaseException) -> None:
    """Let the commit of a group of chunks fail once `after` have been committed."""
    commit, done = target.Target.commit, []

    def failing(self, written):
        if len(done) == after:
            raise error
        done.append(written)
        commit(self, written)

    monkeypatch.setattr(target.Target, "commit", failing)


def chunk_times(directory) -> dict[str, int]:
    state = directory / "params" / "state"
    return {str(f.relative_to(directory)): f.stat().st_mtime_ns for f in state.rglob("[0-9]*") if f.is_file()}


def journaled(directory) -> set[str]:
    groups = (directory / ".conversion").glob("group-*.json")
    return {name for group in groups for name in json.loads(group.read_text())}


def test_finished_target(source, ours):
    convert.convert(str(source), str(ours))
    before = chunk_times(ours)
    with pytest.raises(UserError, match="ours: exists, a finished checkpoint; pass --overwrite"):
        convert.convert(str(source), str(ours))
    assert chunk_times(ours) == before


def test_overwrite_replaces_a_checkpoint_whole(source, ours, rng, tmp_path):
    convert.convert(str(source), str(ours))
    (ours / "chat_template.jinja").write_text("of the old one")
    other = Model(MOE, rng).save(tmp_path / "other")
    convert.convert(str(other), str(ours), overwrite=True)
    assert convert.verify(str(other), str(ours)) == []
    assert not (ours / "chat_template.jinja").exists()
    assert not list(ours.glob("params/state/mtp*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_directory_is_never_touched(source, ours, overwrite):
    ours.mkdir()
    (ours / "thesis.tex").write_text("years of work")
    (ours / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="ours: exists and is not an ernie_jax checkpoint"):
        convert.convert(str(source), str(ours), overwrite=overwrite)
    assert {entry.name for entry in ours.iterdir()} == {"thesis.tex", "manifest.json"}


def test_source_as_target(source):
    with pytest.raises(UserError, match="not an ernie_jax checkpoint"):
        convert.convert(str(source), str(source), overwrite=True)


def test_file_as_target(source, ours):
    ours.write_text("a file")
    with pytest.raises(UserError, match="not a directory"):
        convert.convert(str(source), str(ours), overwrite=True)


def test_empty_directory_as_target(source, ours):
    ours.mkdir()
    convert.convert(str(source), str(ours))
    assert convert.verify(str(source), str(ours)) == []


@pytest.mark.parametrize("after", [0, 1, 5])
def test_resume(source, ours, after, small_groups, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        interrupt(broken, after, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours))
    assert not checkpoint.is_checkpoint(ours)
    with pytest.raises(UserError, match="again"):
        checkpoint.read_manifest(ours)
    done, before = journaled(ours), chunk_times(ours)
    assert bool(done) == (after > 0)

    convert.convert(str(source), str(ours))
    assert ("resuming at" in capsys.readouterr().err) == (after > 0)
    assert convert.verify(str(source), str(ours)) == []
    times = chunk_times(ours)
    assert all(times[name] == before[name] for name in done)
    assert not (ours / ".conversion").exists()


def test_killed_before_the_manifest(source, ours, small_groups, monkeypatch):
    """Everything is journaled, Orbax's metadata even there: still no checkpoint, and finished without rewriting."""
    with monkeypatch.context() as broken:
        write = target._write
        broken.setattr(
            target, "_write", lambda path, content: 1 / 0 if "manifest" in path.name else write(path, content)
        )
        with pytest.raises(ZeroDivisionError):
            convert.convert(str(source), str(ours))
    assert not checkpoint.is_checkpoint(ours)
    before = chunk_times(ours)
    convert.convert(str(source), str(ours))
    assert chunk_times(ours) == before
    assert convert.verify(str(source), str(ours)) == []


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_unfinished_target_of_something_else(source, ours, change, small_groups, rng, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        interrupt(broken, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours))
    options = {"dtype": "float32"} if change == "dtype" else {}
    if change == "source":
        source = Model(MOE, rng, mtp=1).save(tmp_path / "retrained", 3)
    before = chunk_times(ours)
    with pytest.raises(UserError, match="ours: holds an unfinished conversion of .*hf with other files or options"):
        convert.convert(str(source), str(ours), **options)
    assert chunk_times(ours) == before
    convert.convert(str(source), str(ours), overwrite=True, **options)
    assert convert.verify(str(source), str(ours)) == []


def test_source_that_changed_in_place(source, ours, small_groups, monkeypatch):
    with monkeypatch.context() as broken:
        interrupt(broken, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours))
    shard = source / "model-00001-of-00003.safetensors"
    os.utime(shard, (time.time() + 100, time.time() + 100))
    with pytest.raises(UserError, match="unfinished conversion"):
        convert.convert(str(source), str(ours))


def test_another_spelling_of_the_source(source, ours, small_groups, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        interrupt(broken, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(source), str(ours))
    monkeypatch.chdir(source)
    convert.convert(".", str(ours))
    assert "resuming at" in capsys.readouterr().err


def test_no_permission(source, ours, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(ours))

    monkeypatch.setattr(target.Target, "begin", refuse)
    with pytest.raises(UserError, match="ours: Permission denied"):
        convert.convert(str(source), str(ours))


def test_two_at_once(source, ours, small_groups, monkeypatch):
    commit = target.Target.commit

    def second(self, written):
        with pytest.raises(UserError, match="another process is converting to it"):
            convert.convert(str(source), str(ours))
        commit(self, written)

    monkeypatch.setattr(target.Target, "commit", second)
    convert.convert(str(source), str(ours))
    assert convert.verify(str(source), str(ours)) == []


def test_disk_too_small_from_the_start(source, ours, monkeypatch):
    usage = shutil.disk_usage(ours.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(UserError, match=r"ours: the checkpoint needs 0\.\d\d GB of disk, 0.00 GB are free"):
        convert.convert(str(source), str(ours))
    assert not ours.exists()


def test_disk_full_in_the_middle(source, ours, small_groups, monkeypatch):
    with monkeypatch.context() as broken:
        interrupt(broken, 3, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(UserError, match="ours: the disk is full; make room and repeat the command: it goes on"):
            convert.convert(str(source), str(ours))
    done = journaled(ours)
    before = chunk_times(ours)
    assert done
    convert.convert(str(source), str(ours))
    times = chunk_times(ours)
    assert all(times[name] == before[name] for name in done)
    assert convert.verify(str(source), str(ours)) == []


CHILD = """
import sys, time
from convert import chunks, converter
chunks.CHUNK_BYTES = 20_000
converter.GROUP_BYTES = 100_000
fill = chunks.Chunk.fill
def slow(*arguments):
    time.sleep(0.02)  # 160 chunks in 4 threads: longer than three starts are given
    return fill(*arguments)
chunks.Chunk.fill = slow
import convert
convert.convert(sys.argv[1], sys.argv[2])
"""


def test_kill_at_any_moment(rng, tmp_path, ours):
    """A process that is killed again and again gets there; each start rewrites at most two groups of chunks."""
    larger = {"vocab_size": 2000, "hidden_size": 96, "moe_num_experts": 16, "moe_intermediate_size": 64}
    source = Model(MOE | larger, rng).save(tmp_path / "hf", 3)
    command = [sys.executable, "-c", CHILD, str(source), str(ours)]
    kills = 0
    while not checkpoint.is_checkpoint(ours):
        before, done = chunk_times(ours), journaled(ours)
        groups = len(list(ours.glob(".conversion/group-*")))
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(ours.glob(".conversion/group-*"))) <= groups:
            time.sleep(0.005)  # until this start has done something: the test shall come to an end
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        code = process.wait()
        assert code in (0, -signal.SIGKILL), "it has failed by itself"
        kills += code == -signal.SIGKILL
        after = chunk_times(ours)
        assert all(after[name] == before[name] for name in done), "a journaled chunk was written again"
        again = [name for name in before if after[name] != before[name]]
        assert sum((ours / name).stat().st_size for name in again) <= 2 * (100_000 + 20_000)
    assert kills >= 3
    assert convert.verify(str(source), str(ours)) == []


def test_memory(rng, tmp_path, ours):
    """A conversion stays under --host_memory_gb, also of arrays that are larger, cast or not."""
    cap = 0.4
    fields = MOE | {"hidden_size": 1024, "moe_intermediate_size": 1024, "moe_num_experts": 72, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 8}
    model = Model(fields, SameNumbers(), dtype=BF16)
    source = model.save(tmp_path / "hf")
    del model
    assert (source / "model.safetensors").stat().st_size > 1.1 * cap * 1e9
    for options in ([], ["--dtype=float32"]):
        flags = [f"--source={source}", f"--target={ours}", f"--host_memory_gb={cap}", "--overwrite", *options]
        process = subprocess.Popen([sys.executable, "-m", "convert", *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if "RssAnon" in line)])
            time.sleep(0.01)
        assert process.returncode == 0
        assert 0.05e9 < peak < cap * 1e9


class SameNumbers:
    """Stands in for a generator where a test needs bulk, not values."""

    def standard_normal(self, shape):
        return np.broadcast_to(np.float32(1), shape)
