"""Compare with transformers, live: write fresh random checkpoints and run this folder's tests on them (`make parity`).

    python tests/parity/live.py [--seed=N]

transformers needs torch, which lives in an environment of its own, `.parity`, made here on the first run. Beside small
models, those of the released widths (0.3B and 21B, two layers each) go through: 10 GB of disk, 13 GB of memory.
"""

from __future__ import annotations

import argparse
import glob
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = ROOT / ".parity"
# torch first: its CPU build must be in place before anything asks for "a torch".
REQUIREMENTS = (["torch==2.13.0"], ["transformers==5.23.0", "safetensors>=0.5,<0.9", "numpy>=2.1,<3"])
# Where pip finds a CPU build of torch differs from Python to Python, so they are tried in turn.
PYTHONS = ("python3.11", "~/.pyenv/versions/3.11*/bin/python", "python3.12", "python3.13", sys.executable)


def reference_python() -> pathlib.Path:
    """Return the Python of `.parity`, after making that environment if it is not there or not finished."""
    python, marker = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".requirements"
    wanted = repr(REQUIREMENTS)
    if marker.exists() and marker.read_text() == wanted:
        return python
    for candidate in PYTHONS:
        for path in glob.glob(os.path.expanduser(candidate)) or [candidate]:
            try:
                version = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout
                print(f"making {ENVIRONMENT.name} with {version.strip()} ...", flush=True)
                subprocess.run([path, "-m", "venv", "--clear", ENVIRONMENT], check=True)
                for packages in REQUIREMENTS:
                    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{path}: {error}", file=sys.stderr)
                continue
            marker.write_text(wanted)
            return python
    raise SystemExit(f"no Python could install {REQUIREMENTS[0][0]}; point pip at a CPU build (PIP_EXTRA_INDEX_URL)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="repeat a run; default: a new one")
    seed = parser.parse_args().seed
    seed = secrets.randbits(31) if seed is None else seed
    python = reference_python()
    with tempfile.TemporaryDirectory(prefix="ernie-parity-") as folder:
        fixtures = pathlib.Path(folder) / "fixtures"
        print(f"writing checkpoints with --seed={seed} ...", flush=True)
        writer = [python, HERE / "write_fixtures.py", f"--out={fixtures}", f"--seed={seed}", "--full_width"]
        subprocess.run(writer, check=True)
        variables = {"ERNIE_PARITY_FIXTURES": str(fixtures), "ERNIE_PARITY_PYTHON": str(python)}
        command = [sys.executable, "-m", "pytest", HERE, f"--basetemp={folder}/pytest"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables})
    print(f"seed {seed}: {'equal to' if done.returncode == 0 else 'differs from'} transformers")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
