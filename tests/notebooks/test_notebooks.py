"""The notebooks run from top to bottom with the embedded models, and what they print is so."""

import json
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(name: str, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Execute a notebook in a checkout of no more than it needs; raises if a cell fails."""
    (folder / "notebooks").mkdir()
    for part in ("models", "main.py"):
        (folder / part).symlink_to(ROOT / part)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    NotebookClient(notebook, timeout=300, coalesce_streams=True, resources=resources).execute()
    return notebook


@pytest.fixture
def surroundings(quick_compiling, monkeypatch):
    """Have the kernel and its subprocesses import this checkout, on one CPU."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")


def code_cells(notebook) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    """Return all that cells printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "\n".join(output.text for output in outputs if output.output_type == "stream")


def count_plots(notebook) -> int:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def check_router(notebook):
    text = printed(notebook)
    assert "5 layers with experts, 2 of 8 a token" in text
    tokens = int(re.search(r"([\d,]+) tokens in \d+ texts", text)[1].replace(",", ""))
    load = re.search(r"choices in each layer: \[(.*)\] = (\d+) tokens x 2", text)
    assert set(map(int, load[1].split())) == {2 * tokens} and int(load[2]) == tokens
    assert 1 < int(re.search(r"changes the experts of (\d+)%", text)[1]) < 50
    assert count_plots(notebook) == 6
    [page] = [
        output.data["text/html"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    assert page.count("<span") > 160 and "春" in page


def check_answers_and_server(notebook):
    text = printed(notebook)
    assert "wrote 3 lines to out/quickstart/answers.jsonl, 0 with an error" in text
    for question in ("What is 47 + 385?", "How do you spell river?"):
        usage, answer = re.search(rf">>> {re.escape(question)}  (\{{.*\}})\n(.*)", text).groups()
        assert json.loads(usage.replace("'", '"'))["completion_tokens"] > 10 and answer.strip()
    assert "is ready" in text and "exit code 0" in text
    # A stream's reasoning is in brackets, its answer below.
    assert len(re.findall(r"^\[.+\]\n.+", text, re.MULTILINE)) == 4
    prompt, generated = (int(re.search(rf"^{part} (\d+)", text, re.MULTILINE)[1]) for part in ("prompt", "answer"))
    name, requests, unfinished, prompts, _, answers = re.search(r"^anonymous.*", text, re.MULTILINE)[0].split()
    assert (name, requests, unfinished) == ("anonymous", "4", "0")
    assert int(prompts) > prompt and int(answers) > generated


def check_gpu(notebook):
    check_answers_and_server(notebook)
    assert len(re.findall(r"\? -> \d+ tokens, stop", printed(notebook))) == 3


def check_tpu(notebook):
    check_answers_and_server(notebook)
    text = printed(notebook)
    assert "cpu: cpu" in text
    assert re.search(r"^bfloat16: 0\.0\d+ GB, fits$", text, re.MULTILINE)  # a CPU has room for it


@pytest.mark.parametrize(
    "name, check",
    [
        ("inside_the_router.ipynb", check_router),
        ("quickstart_gpu.ipynb", check_gpu),
        ("quickstart_tpu.ipynb", check_tpu),
    ],
)
def test_runs(surroundings, tmp_path, name, check):
    check(run(name, tmp_path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_is_committed_with_its_outputs_and_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 500_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    shown = printed(notebook) + str([output.get("data", {}).get("text/html") for output in outputs])
    assert not re.search(r"/(?:home|root|tmp|usr|opt|work|var)/|Traceback|Warning", shown)
    badge = f"colab.research.google.com/github/OWNER/ernie_jax/blob/main/notebooks/{path.name}"
    assert badge in notebook.cells[0].source


def test_all_are_run():
    names = ["inside_the_router.ipynb", "quickstart_gpu.ipynb", "quickstart_tpu.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names
