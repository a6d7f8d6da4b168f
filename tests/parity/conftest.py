"""Read the cases that `write_fixtures.py` wrote: the committed ones, or fresh ones for `make parity`."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from convert import convert
from ernie_jax import checkpoint
from ernie_jax.sharding import single

FIXTURES = pathlib.Path(os.environ.get("ERNIE_PARITY_FIXTURES") or pathlib.Path(__file__).parent / "fixtures")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A prompt with its greedy continuation, and what transformers computed along it (see write_fixtures.py)."""

    length: int
    tokens: list[int]  # prompt + continuation; the last one was never fed
    logits: np.ndarray  # [tokens - 1, V] float32
    experts: np.ndarray  # [MoE layers, tokens - 1, k]

    @property
    def prompt(self) -> list[int]:
        return self.tokens[: self.length]

    @property
    def continuation(self) -> list[int]:
        return self.tokens[self.length :]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    arrays: dict[str, np.ndarray]
    sequences: list[Sequence]

    @property
    def source(self) -> pathlib.Path:
        return FIXTURES / self.name / "checkpoint"

    @property
    def detailed(self) -> Sequence:
        return self.sequences[int(self.arrays["detailed"])]

    def states(self, kind: str) -> dict[str, np.ndarray]:
        """Return the detailed prompt's states, [length, D] by name; kind is float32, bfloat16 or exact."""
        found = {n.removeprefix(f"{kind}."): x for n, x in self.arrays.items() if n.startswith(f"{kind}.")}
        return {n: x.view(ml_dtypes.bfloat16) for n, x in found.items()} if kind == "bfloat16" else found


def read_case(name: str) -> Case:
    with np.load(FIXTURES / name / "expected.npz") as file:
        arrays = dict(file)
    sequences = []
    while f"tokens_{len(sequences)}" in arrays:
        length, tokens, logits, experts = (
            arrays[f"{what}_{len(sequences)}"] for what in ("length", "tokens", "logits", "experts")
        )
        sequences.append(Sequence(int(length), tokens.tolist(), logits, experts))
    return Case(name, arrays, sequences)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cases(kind): take only 'small' cases, those of 'full_width', or with 'gradients'"
    )


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    names = list(json.loads((FIXTURES / "summary.json").read_text())["cases"])
    for marker in metafunc.definition.iter_markers("cases"):
        if marker.args[0] == "gradients":
            names = [name for name in names if (FIXTURES / name / "gradients").exists()]
        else:
            names = [name for name in names if name.startswith("full_width") == (marker.args[0] == "full_width")]
    metafunc.parametrize("case", names, indirect=True, scope="session")


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass


@pytest.fixture(scope="session")
def mesh():
    return single(jax.devices("cpu")[0])


@pytest.fixture(scope="session")
def case(request):
    return read_case(request.param)


@pytest.fixture(scope="session")
def converted(case, tmp_path_factory):
    """The case as an ernie_jax checkpoint, in the dtype it is stored in."""
    target = tmp_path_factory.mktemp("converted") / case.name
    convert(str(case.source), str(target))
    return target


@pytest.fixture(scope="session")
def gradients(case, mesh, tmp_path_factory):
    """Transformers' gradients of the case's training loss, in the places of a model's weights: all maps are linear."""
    target = tmp_path_factory.mktemp("gradients") / case.name
    convert(str(case.source.parent / "gradients"), str(target))
    return checkpoint.restore(target, mesh, np.dtype("float32"))


@pytest.fixture(scope="session")
def float32_model(converted, mesh):
    return checkpoint.restore(converted, mesh, np.dtype("float32"))


@pytest.fixture(scope="session")
def bfloat16_model(converted, mesh):
    return checkpoint.restore(converted, mesh, np.dtype(ml_dtypes.bfloat16))
