"""The command line: one word per job.

`main` imports a command's module only when it runs, so that `help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys

from absl import logging

from ernie_jax import distributed
from ernie_jax.cli.command import Command, UsageError
from ernie_jax.errors import UserError

# word -> (module of ernie_jax.cli that holds it, summary)
COMMANDS = {
    "demo": ("generate", "run the embedded model: convert it and stream a few continuations"),
    "convert": ("conversion", "make an Orbax checkpoint from a Hugging Face (or Paddle) directory or hub id"),
    "export": ("conversion", "give the Hugging Face safetensors back from a checkpoint"),
    "verify": ("conversion", "compare a checkpoint with its source, tensor by tensor"),
    "info": ("info", "show a model's configuration, parameters, bytes and what it fits on"),
    "plan": ("plan", "say what fits a TPU slice or GPU host, and how fast it can be there"),
    "generate": ("generate", "continue a prompt, or a file of prompts"),
    "score": ("score", "log-probabilities of given texts, and their perplexity"),
    "experts": ("experts", "how often each expert is chosen over given texts, also as a picture"),
    "chat": ("chat", "talk with a model"),
    "serve": ("serve", "serve a model over HTTP, as OpenAI's API"),
    "bench": ("bench", "measure decoding and prefill here against what the machine allows"),
    "usage": ("usage", "sum up a server's ledger: tokens and cost by API key"),
    "data": ("data", "show what a recipe trains on, and every line that is bad"),
    "train": ("train", "train a model by a recipe, or adapters for it"),
    "merge": ("merge", "add an adapter to the weights that it was trained on"),
}


def main(argv: list[str] | None = None) -> None:
    """Run a command and exit: 0 when all went well, 1 on bad input, 2 on bad usage, 130 when interrupted."""
    argv = sys.argv if argv is None else argv
    # JAX takes 75 % of a GPU's memory unless told otherwise; the 21B model alone needs more than half of 80 GB.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is none of the user's business
    word = argv[1] if len(argv) > 1 else "help"
    try:
        if word in ("help", "--help", "-h") and len(argv) <= 2:
            print(_overview())
            code = 0
        else:
            word, arguments = (argv[2], ["--help"]) if word == "help" else (word, argv[2:])
            code = _find(word).main(arguments)
        distributed.finish()
    except UsageError as error:
        distributed.stop(f"error: {error}", 2)
    except UserError as error:
        distributed.stop(f"error: {error}", 1)
    except KeyboardInterrupt:
        distributed.stop("interrupted", 130)
    except BrokenPipeError:  # `| head`: what was asked for has been read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        distributed.stop("", 0)
    except Exception as error:
        if distributed.process_count() == 1:
            raise
        distributed.crash(error)
    sys.exit(code)


def _find(word: str) -> Command:
    if word not in COMMANDS:
        raise UsageError(f"unknown command {word!r}; the commands are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"ernie_jax.cli.{COMMANDS[word][0]}")
    return getattr(module, word.upper())


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {word:<{width}}  {summary}" for word, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "ERNIE 4.5 in JAX.",
            "",
            "usage: main.py COMMAND [--flag=value ...]",
            "",
            *lines,
            "",
            "`main.py COMMAND --help` shows a command's flags and examples.",
        ]
    )
