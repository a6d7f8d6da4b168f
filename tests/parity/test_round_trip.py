"""convert, verify, export: what transformers wrote comes back byte for byte."""

from __future__ import annotations

import filecmp
import json
import os
import pathlib
import subprocess

import pytest

from convert import export, verify


@pytest.fixture(scope="session")
def exported(case, converted, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / case.name
    export(str(converted), str(target))
    return target


def test_verify(case, converted):
    assert verify(str(case.source), str(converted)) == []


def test_export(case, exported):
    names = sorted(path.name for path in case.source.iterdir())
    assert sorted(path.name for path in exported.iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 1
    for name in names:
        if name.endswith(".index.json"):  # transformers counts parameters in it, too
            ours, theirs = (json.loads((folder / name).read_text()) for folder in (exported, case.source))
            assert ours["weight_map"] == theirs["weight_map"]
        else:
            assert filecmp.cmp(case.source / name, exported / name, shallow=False), name


@pytest.mark.cases("full_width")
@pytest.mark.skipif("ERNIE_PARITY_PYTHON" not in os.environ, reason="needs transformers: make parity")
def test_transformers_loads_export(case, exported):
    writer = pathlib.Path(__file__).with_name("write_fixtures.py")
    subprocess.run([os.environ["ERNIE_PARITY_PYTHON"], writer, f"--load={exported}"], check=True)
