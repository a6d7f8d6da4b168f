"""main.py with small chunks, and a pause before each of SECONDS: convert_slowly.py SECONDS convert --source=..."""

import sys
import time

from convert import chunks, converter
from ernie_jax import cli

chunks.CHUNK_BYTES = 20_000
converter.GROUP_BYTES = 100_000
fill = chunks.Chunk.fill


def slow(*arguments):
    time.sleep(float(sys.argv[1]))
    return fill(*arguments)


chunks.Chunk.fill = slow
cli.main(["main.py", *sys.argv[2:]])
