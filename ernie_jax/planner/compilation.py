"""Compile the steps of a plan for a TPU slice that is not here, and read what the compiler says of them."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jax

from ernie_jax.chips import GIB
from ernie_jax.planner.hlo import Collective, collectives


@dataclasses.dataclass(frozen=True)
class Program:
    """What a device needs to run a compiled step.

    Attributes:
      arguments: bytes of everything that goes in: weights, cache, and the step's numbers.
      temporaries: bytes beyond, outputs that are no donated arguments included.
      collectives: as the compiled text has them.
      seconds: that lowering and compiling took, or loading it from the compilation cache.
    """

    arguments: int
    temporaries: int
    collectives: tuple[Collective, ...]
    seconds: float


class TooLarge(Exception):
    """The compiler found that a program does not fit the memory; the message is a clause that says so.

    Attributes:
      needed: bytes that the program needs in all, if the compiler tells.
    """

    def __init__(self, name: str, message: str):
        self.needed = None
        if found := re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message):
            self.needed = int(float(found[1]) * GIB)
            message = f"{found[1]} GiB of HBM are needed and {found[2]} are there"
        super().__init__(f"the compiler refuses {name}: {message}")


def compile_all(lowerings: dict[str, jax.stages.Lowered]) -> dict[str, Program]:
    """Compile programs side by side.

    Raises:
      TooLarge: if one of them does not fit.
    """
    with ThreadPoolExecutor(len(lowerings)) as pool:
        futures = {name: pool.submit(_compile, name, lowered) for name, lowered in lowerings.items()}
        return {name: future.result() for name, future in futures.items()}


def _compile(name: str, lowered: jax.stages.Lowered) -> Program:
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        if not (message.startswith("RESOURCE_EXHAUSTED") and re.search("hbm", message, re.IGNORECASE)):
            raise
        raise TooLarge(name, message) from None
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes + outputs,
        tuple(collectives(compiled.as_text())),
        time.monotonic() - start,
    )
