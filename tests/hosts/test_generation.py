"""Several processes run one model: what one process would say, and an end for all when one of them ends."""

import json
import pathlib
import shutil

import pytest

from convert import convert
from ernie_jax import checkpoint, cli
from tests.hosts.conftest import ROOT, flags

PROMPTS = ["In the beginning", "And it came to pass that the king said", "李白\n", "x"]
RECORDS = [{"prompt": text, "max_new_tokens": 3 + 4 * i} for i, text in enumerate(PROMPTS)]
RECORDS.insert(2, {"prompt": 3})


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("model") / "checkpoint"
    convert(str(ROOT / "models" / "ernie-embedded"), str(directory))
    return directory


@pytest.fixture
def start(processes, port, model):
    """Start a command in some processes, with `devices` virtual devices each."""

    def call(count, *command, devices=2, only=None, cwds=()):
        variables = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        for index in range(count) if only is None else only:
            arguments = [ROOT / "main.py", *command, "--dtype=float32", *flags(index, count, port)]
            processes.start(index, arguments, cwds[index] if cwds else ROOT, **variables)

    return call


@pytest.fixture
def alone():
    """Run a command in this process."""

    def call(*command):
        with pytest.raises(SystemExit) as end:
            cli.main(["main.py", *map(str, command), "--dtype=float32"])
        return end.value.code

    return call


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("count, devices, mesh", [(2, 4, "data:8"), (4, 2, "expert:4,tensor:2")])
def test_generate(start, processes, alone, model, tmp_path, count, devices, mesh):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    command = ["generate", f"--model={model}", f"--input={source}", "--temperature=0"]
    assert alone(*command, f"--output={tmp_path / 'alone.jsonl'}") == 1  # one line has an error
    start(count, *command, f"--output={tmp_path / 'out.jsonl'}", f"--mesh={mesh}", devices=devices)
    first, *others = processes.wait()
    assert first.code == 1 and "wrote 5 lines" in first.err, first.err
    assert f"{count * devices} x cpu" in first.err
    assert all((other.code, other.out, other.err) == (1, "", "") for other in others), others
    assert read_lines(tmp_path / "out.jsonl") == read_lines(tmp_path / "alone.jsonl")
    assert {path.name for path in tmp_path.glob("*.jsonl*")} == {"in.jsonl", "alone.jsonl", "out.jsonl"}


def test_sampling_without_a_seed(start, processes, model):
    """All processes must draw the same tokens, though nobody says from which seed."""
    start(2, "generate", f"--model={model}", "--prompt=And", "--temperature=1.5", "--max_new_tokens=12")
    first, other = processes.wait()
    assert (first.code, other.code, other.out, other.err) == (0, 0, "", ""), first.err
    assert first.out.startswith("And") and "Gloo" not in first.out
    assert "12 tokens" in first.err or "tokens · first after" in first.err


def test_score(start, processes, alone, model, tmp_path, capsys):
    texts = [{"text": "In the beginning God made the earth. " * (1 + 4 * i)} for i in range(3)]
    source = write_lines(tmp_path / "in.jsonl", texts)
    command = ["score", f"--model={model}", f"--input={source}"]
    assert alone(*command, f"--output={tmp_path / 'alone.jsonl'}") == 0
    start(2, *command, f"--output={tmp_path / 'out.jsonl'}", "--mesh=expert:4")
    first, other = processes.wait()
    assert (first.code, other.code, other.out, other.err) == (0, 0, "", ""), first.err
    assert first.out.partition(" over ")[0] == capsys.readouterr().out.partition(" over ")[0]
    for ours, theirs in zip(read_lines(tmp_path / "out.jsonl"), read_lines(tmp_path / "alone.jsonl"), strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["logprobs"][1:] == pytest.approx(theirs["logprobs"][1:], abs=1e-4)


def test_experts(start, processes, alone, model, tmp_path, capsys):
    """The data groups' counts, two processes with one each, make those of one process."""
    source = write_lines(tmp_path / "in.jsonl", [{"text": "In the beginning God made. " * n} for n in (1, 5, 9)])
    command = ["experts", f"--model={model}", f"--input={source}", "--json"]
    assert alone(*command) == 0
    expected = json.loads(capsys.readouterr().out)
    start(2, *command, "--mesh=expert:4")
    first, other = processes.wait()
    assert (first.code, other.code, other.out, other.err) == (0, 0, "", ""), first.err
    found = json.loads(first.out)
    assert found["tokens"] == expected["tokens"]
    for ours, theirs in zip(found["layers"], expected["layers"], strict=True):
        assert sum(ours["tokens"]) == sum(theirs["tokens"]) == 2 * found["tokens"]
        assert ours["tokens"] == pytest.approx(theirs["tokens"], abs=2)  # a near tie may fall either way


def test_a_killed_run_goes_on(start, processes, alone, model, tmp_path):
    """The other process ends with a sentence while it waits in a collective; one process alone can finish the work."""
    records = [{"prompt": "And", "max_new_tokens": 2}, {"prompt": "And it came to pass", "max_new_tokens": 500}]
    source = write_lines(tmp_path / "in.jsonl", records)
    command = ["generate", f"--model={model}", f"--input={source}", "--temperature=0", "--ignore_eos"]
    start(2, *command, f"--output={tmp_path / 'out.jsonl'}", "--mesh=expert:4")
    processes.wait_for(0, "1/2")
    processes.kill(1)
    survivor = processes.wait()[0]
    assert survivor.code == 1
    assert "error: process 1 of 2 (on " in survivor.err and "ended without a word" in survivor.err
    assert "Traceback" not in survivor.err
    assert not (tmp_path / "out.jsonl").exists()
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    before = read_lines(partial)
    assert len(before) == 1
    write_lines(partial, [before[0] | {"text": "as it was"}])
    assert alone(*command, f"--output={tmp_path / 'out.jsonl'}") == 0
    after = read_lines(tmp_path / "out.jsonl")
    assert after[0]["text"] == "as it was" and len(after[1]["token_ids"]) == 500


def test_different_flags(start, processes, model):
    command = ["generate", f"--model={model}", "--prompt=And"]
    start(3, *command, "--max_new_tokens=64", only=[0, 1])
    start(3, *command, "--max_new_tokens=32", only=[2])
    for result in processes.wait():
        assert result.code == 1
        assert "--max_new_tokens is 32 in process 2 and 64 in process 0" in result.err


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("--model=nowhere", "--model=nowhere: no such directory"),
        ("--mesh=expert:3", "a mesh of 3 devices and there are 4"),
        ("--sharding=single", "sharding single takes 1 of 4 devices and none of process 1's"),
        ("--input=nowhere.jsonl", "--input=nowhere.jsonl: No such file"),
    ],
)
def test_bad_input_ends_all(start, processes, model, tmp_path, flag, sentence):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    files = [f"--input={source}", f"--output={tmp_path / 'out.jsonl'}"]
    start(2, "generate", f"--model={model}", *files, flag)
    first, other = processes.wait()
    assert (first.code, other.code) == (1, 1)
    assert sentence in first.err and sentence in other.err
    assert "Traceback" not in first.err + other.err


def test_a_checkpoint_that_differs(start, processes, model, tmp_path):
    """Each host has a checkpoint of this name, but not the same one."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint").symlink_to(model)
    (tmp_path / "b" / "checkpoint").unlink()
    (tmp_path / "b" / "checkpoint").mkdir()
    for file in model.iterdir():
        (tmp_path / "b" / "checkpoint" / file.name).symlink_to(file)
    manifest = checkpoint.read_manifest(model) | {"source": "another"}
    (tmp_path / "b" / "checkpoint" / "manifest.json").unlink()
    (tmp_path / "b" / "checkpoint" / "manifest.json").write_text(json.dumps(manifest))
    start(2, "generate", "--model=checkpoint", "--prompt=And", cwds=[tmp_path / "a", tmp_path / "b"])
    for result in processes.wait():
        assert result.code == 1
        assert "the checksum of checkpoint/manifest.json is" in result.err


def test_a_hugging_face_directory_is_converted_by_all(start, processes, cache):
    for converted in cache.glob("checkpoints/ernie-embedded-*"):  # other tests convert it too
        shutil.rmtree(converted)
    start(2, "generate", f"--model={ROOT / 'models' / 'ernie-embedded'}", "--prompt=And", "--max_new_tokens=2")
    first, other = processes.wait()
    assert (first.code, other.code, other.out, other.err) == (0, 0, "", ""), first.err
    assert "converting" in first.err and "convert: 100%" in first.err


@pytest.mark.parametrize("command", ["chat", "demo", "export --source=x --target=y"])
def test_commands_of_one_process(command, monkeypatch, capsys):
    variables = {"JOB_ID": 1, "STEP_NODELIST": "a,b", "NTASKS": 2, "PROCID": 0, "LOCALID": 0}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(SystemExit) as end:
        cli.main(["main.py", *command.split()])
    assert end.value.code == 1
    assert f"{command.split()[0]} runs in one process, and here are 2" in capsys.readouterr().err
