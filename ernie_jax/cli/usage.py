"""usage."""

from __future__ import annotations

import dataclasses
import datetime
import json

from absl import flags

from ernie_jax.cli.command import Command, UsageError, require
from ernie_jax.server.ledger import Prices, Total, totals

_HEADINGS = ("key", "day", "requests", "unfinished", "prompt", "cached", "generated", "cost")
_SUM = "total"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("ledger", None, "the file that `main.py serve --ledger` writes", flag_values=values)
    flags.DEFINE_string("since", None, "the first day, as 2026-11-01 (UTC)", flag_values=values)
    flags.DEFINE_string("until", None, "the last day, as 2026-11-30 (UTC)", flag_values=values)
    flags.DEFINE_bool("by_day", False, "a row for each day", flag_values=values)
    flags.DEFINE_float("price_input", None, "of a million prompt tokens", lower_bound=0, flag_values=values)
    flags.DEFINE_float(
        "price_cached",
        None,
        "of a million prompt tokens found in the prefix cache; default: --price_input",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_float("price_output", None, "of a million generated tokens", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("json", False, "one JSON object a row, with the ledger's field names", flag_values=values)


def _usage(values: flags.FlagValues) -> None:
    require(values, "ledger")
    since, until = (_day(name, values[name].value) for name in ("since", "until"))
    prices = None
    if any(values[name].value is not None for name in ("price_input", "price_cached", "price_output")):
        prices = Prices(values.price_input or 0.0, values.price_output or 0.0, values.price_cached)
    rows = totals(values.ledger, since, until, values.by_day)
    print(_lines(rows, prices) if values.json else _table(rows, prices), end="")


def _day(name: str, value: str | None) -> datetime.date | None:
    try:
        return None if value is None else datetime.date.fromisoformat(value)
    except ValueError:
        raise UsageError(f"--{name}={value}: write a day as 2026-11-01") from None


def _lines(rows: list[Total], prices: Prices | None) -> str:
    lines = []
    for row in rows:
        record = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
        lines.append(json.dumps(record | ({"cost": row.cost(prices)} if prices else {})) + "\n")
    return "".join(lines)


def _table(rows: list[Total], prices: Prices | None) -> str:
    if not rows:
        return "no requests\n"
    by_day = rows[0].day is not None
    counts = ("requests", "unfinished", "prompt_tokens", "cached_tokens", "generated_tokens")
    whole = Total(_SUM, "" if by_day else None, *(sum(getattr(row, name) for row in rows) for name in counts))
    shown = [tuple(name for name in _HEADINGS if (by_day or name != "day") and (prices or name != "cost"))]
    for row in [*rows, whole] if len(rows) > 1 else rows:
        cells = [row.key, *([row.day] if by_day else []), *(f"{getattr(row, name):,}" for name in counts)]
        shown.append((*cells, *([f"{row.cost(prices):,.4f}"] if prices else [])))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    left = 1 + by_day  # words stand left, numbers right
    lines = []
    for cells in shown:
        pairs = enumerate(zip(cells, widths, strict=True))
        lines.append("  ".join(f"{cell:{'<' if i < left else '>'}{width}}" for i, (cell, width) in pairs) + "\n")
    return "".join(lines)


USAGE = Command(
    "usage",
    "Sum up what each API key used of a server, from the server's ledger, and its cost; also while the server runs. "
    "Unfinished requests are running, or were interrupted when a server was killed: of these the prompts count.",
    (
        "main.py usage --ledger=ledger.sqlite",
        "main.py usage --ledger=ledger.sqlite --since=2026-11-01 --until=2026-11-30 --by_day "
        "--price_input=0.07 --price_output=0.28",
        "main.py usage --ledger=ledger.sqlite --json",
    ),
    _define,
    _usage,
)
