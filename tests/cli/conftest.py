"""The command line, called in this process: what it prints, what it writes, how it exits."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from convert import convert
from ernie_jax import checkpoint, cli

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass


@pytest.fixture
def run(capsys) -> Callable[..., Result]:
    """Run a command line and return how it went."""

    def call(*arguments) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.main(["main.py", *map(str, arguments)])
        return Result(exit.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def embedded_source() -> pathlib.Path:
    return ROOT / "models" / "ernie-embedded"


@pytest.fixture(scope="session")
def embedded(tmp_path_factory, embedded_source) -> pathlib.Path:
    """The embedded model, converted: it has a tokenizer."""
    directory = tmp_path_factory.mktemp("embedded") / "checkpoint"
    convert(str(embedded_source), str(directory))
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tiny_model, tiny_config) -> pathlib.Path:
    """A checkpoint without a tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    config = json.dumps(dataclasses.asdict(tiny_config)).encode()
    checkpoint.save(directory, tiny_model, {"config.json": config}, "test")
    return directory


def write_lines(path: pathlib.Path, records: Sequence[dict | str]) -> pathlib.Path:
    """Write a JSONL file; a str is taken as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
