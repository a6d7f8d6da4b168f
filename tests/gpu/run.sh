#!/usr/bin/env bash
# Run the tests that hold op backends, engine and model to float64 on this machine's GPU.
# Needs pytest and the project's requirements for CUDA; usage: tests/gpu/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- tests/gpu tests/ops tests/engine
JAX_PLATFORMS=cuda,cpu exec python3 -m pytest -q -p no:cacheprovider "$@"
