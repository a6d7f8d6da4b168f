"""Draw measurements of `main.py bench --json` as an SVG: a decode step's time over the batch, with the floor; of
prefill, or of decode at several contexts (`--kind=shares`), what part of the floor each series reaches.

    python -m benchmarks.plot --series='ernie_jax=bench.json,another=peer.json' --output=docs/decode.svg

A file of another program's figures has the same form; {"rows": [{"kind", "batch", "context", "tokens_per_second"}]}
is enough, and is held against the floors of the first series: they must come from the same kind of machine.
"""

from __future__ import annotations

import html
import itertools
import json
import math
import pathlib

from absl import app, flags

_SERIES = flags.DEFINE_list("series", None, "NAME=FILE pairs", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "the SVG to write", required=True)
_KIND = flags.DEFINE_enum("kind", "decode", ["decode", "shares", "prefill"], "which drawing")

_WIDTH, _HEIGHT, _MARGIN, _TOP, _BAR, _GAP = 640, 360, 48, 56, 44, 28
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")

Rows = dict[tuple[int, int], dict]  # by batch and context


def main(_) -> None:
    series = {}
    for pair in _SERIES.value:
        name, _, file = pair.partition("=")
        rows = json.loads(pathlib.Path(file).read_text())["rows"]
        kind = "prefill" if _KIND.value == "prefill" else "decode"
        series[name] = {(row["batch"], row["context"]): row for row in rows if row["kind"] == kind}
    draw = draw_steps if _KIND.value == "decode" else draw_shares
    pathlib.Path(_OUTPUT.value).write_text(draw(series))


def draw_steps(series: dict[str, Rows]) -> str:
    """Return the SVG: a line a series, milliseconds of a step over the batch, and the first one's floor.

    Of each series those rows that have the first one's shortest context.
    """
    first = {case: row for case, row in next(iter(series.values())).items() if "seconds" in row}
    context = min(context for _, context in first)
    lines = {
        name: {batch: _seconds(row) for (batch, of), row in sorted(rows.items()) if of == context and _seconds(row)}
        for name, rows in series.items()
    }
    floors = {batch: row["floor_seconds"] for (batch, of), row in sorted(first.items()) if of == context}
    batches = sorted({batch for line in lines.values() for batch in line})
    most = 1.1e3 * max(seconds for line in lines.values() for seconds in line.values())
    scale = math.log2(max(batches)) or 1

    def place(batch: int, seconds: float) -> tuple[float, float]:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * math.log2(batch) / scale, _y(seconds * 1e3 / most)

    parts = _begin(_WIDTH, f"milliseconds of a decode step over the batch, {context} tokens of context", series)
    step = 10.0 ** math.ceil(math.log10(most / 8)) / 2
    for at in range(int(most / step) + 1):
        parts += _line_across(_WIDTH, at * step / most, f"{at * step:g}")
    for batch in batches:
        parts.append(_text(place(batch, 0)[0], _HEIGHT - _MARGIN + 16, str(batch), "middle"))
    drawn = [(floors, "#444", ' stroke-dasharray="4 3"')]
    drawn += [(line, _COLOURS[index % len(_COLOURS)], "") for index, line in enumerate(lines.values())]
    for line, colour, dashes in drawn:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in itertools.starmap(place, line.items()))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>')
    x, y = place(*max(floors.items()))
    parts.append(_text(x, y + 14, "floor", "end"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_shares(series: dict[str, Rows]) -> str:
    """Return the SVG: a group of bars for each case that the first series has measured."""
    first = next(iter(series.values()))
    measured = {case: row for case, row in first.items() if "seconds" in row}
    bars = {case: _bars(row, series, case) for case, row in measured.items()}
    width = 2 * _MARGIN + sum(_BAR * len(found) + _GAP for found in bars.values())
    title = "part of the floor (the least bytes or operations at the machine's own rates), tokens/s above"
    parts = _begin(width, title, series)
    for percent in range(0, 101, 25):
        parts += _line_across(width, percent / 100, f"{percent} %")
    x = _MARGIN + _GAP / 2
    for (batch, context), found in bars.items():
        parts.append(_text(x + _BAR * len(found) / 2, _HEIGHT - _MARGIN + 16, f"{batch} x {context:,}", "middle"))
        for index, rate, part in found:
            y = _y(min(part, 1.0))
            parts.append(
                f'<rect x="{x + 2:.1f}" y="{y:.1f}" width="{_BAR - 4}" height="{_y(0) - y:.1f}" '
                f'fill="{_COLOURS[index % len(_COLOURS)]}"/>'
            )
            parts.append(_text(x + _BAR / 2, y - 4, f"{rate:,.0f}", "middle"))
            x += _BAR
        x += _GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def _seconds(row: dict) -> float | None:
    """Return a step's seconds, of a peer from its rate; None of a case that failed."""
    rate = row.get("tokens_per_second")
    return row.get("seconds", row["batch"] / rate if rate else None)


def _bars(row: dict, series: dict[str, Rows], case: tuple[int, int]) -> list[tuple[int, float, float]]:
    """Return (index of the series, tokens/s, part of the floor) of each series that has the case."""
    best = row["tokens_per_second"] / row["of_floor"]
    found = []
    for index, rows in enumerate(series.values()):
        if rate := rows.get(case, {}).get("tokens_per_second"):
            found.append((index, rate, rows[case].get("of_floor", rate / best)))
    return found


def _begin(width: float, title: str, names: dict[str, Rows]) -> list[str]:
    style = 'font-family="sans-serif" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" {style}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(_MARGIN, 18, title, "start"),
    ]
    for index, name in enumerate(names):
        parts.append(_text(_MARGIN + 130 * index, 36, html.escape(name), "start", _COLOURS[index % len(_COLOURS)]))
    return parts


def _line_across(width: float, part: float, label: str) -> list[str]:
    y = _y(part)
    line = f'<polyline points="{_MARGIN},{y:.1f} {width - _MARGIN},{y:.1f}" fill="none" stroke="#ddd"/>'
    return [line, _text(_MARGIN - 6, y + 4, label, "end")]


def _y(part: float) -> float:
    return _HEIGHT - _MARGIN - part * (_HEIGHT - _MARGIN - _TOP)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    app.run(main)
