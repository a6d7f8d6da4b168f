"""Command: a word, its own absl flags, and what it does."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable

from absl import flags

from ernie_jax.errors import UserError


class UsageError(UserError):
    """The command line itself is wrong."""


@dataclasses.dataclass(frozen=True)
class Command:
    """Describe one word of the command line.

    Attributes:
      name: the word.
      about: what it does, a paragraph.
      examples: whole command lines, shown by --help.
      define: adds the command's flags to a FlagValues of its own.
      run: does the work; returns the exit code, None for 0.
    """

    name: str
    about: str
    examples: tuple[str, ...]
    define: Callable[[flags.FlagValues], None]
    run: Callable[[flags.FlagValues], int | None]

    def main(self, arguments: list[str]) -> int:
        """Parse the arguments after the word and run.

        Raises:
          UsageError: on an unknown or malformed flag or a stray argument.
          UserError: on bad input.
        """
        values = flags.FlagValues()
        self.define(values)
        if any(argument in ("--help", "-h", "-help") for argument in arguments):
            print(self._help(values))
            return 0
        try:
            rest = values([self.name, *arguments])
        except flags.Error as error:
            raise UsageError(f"{str(error).splitlines()[0].rstrip('. ')}; see `main.py {self.name} --help`") from None
        if len(rest) > 1:
            raise UsageError(f"unexpected argument {rest[1]!r}; flags are written --name=value")
        return self.run(values) or 0

    def _help(self, values: flags.FlagValues) -> str:
        lines = [f"usage: main.py {self.name} [--flag=value ...]", "", *textwrap.wrap(self.about, 100), "", "flags:"]
        for name in sorted(values):
            flag = values[name]
            default = "" if flag.default in (None, False, []) else f" (default: {flag.default})"
            sign = f"--[no]{name}" if flag.boolean else f"--{name}="
            text = f"{sign:<22} {' '.join(flag.help.split())}{default}"
            lines += textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent=" " * 25)
        return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in self.examples)])


def require(values: flags.FlagValues, *names: str) -> None:
    """Check that flags were given.

    Raises:
      UsageError: naming those that were not.
    """
    if missing := [name for name in names if values[name].value in (None, "")]:
        raise UsageError("; ".join(f"give --{name}: {values[name].help}" for name in missing))
