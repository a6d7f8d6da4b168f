"""Draw measurements of `main.py bench --json` as an SVG: of each case, what part of the floor each series reaches.

    python -m benchmarks.plot --series='ernie_jax=bench.json,another=peer.json' --output=docs/decode.svg

A file of another program's figures has the same form; {"rows": [{"kind", "batch", "context", "tokens_per_second"}]}
is enough, and is held against the floors of the first series: they must come from the same kind of machine.
"""

from __future__ import annotations

import html
import json
import pathlib

from absl import app, flags

_SERIES = flags.DEFINE_list("series", None, "NAME=FILE pairs", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "the SVG to write", required=True)
_KIND = flags.DEFINE_enum("kind", "decode", ["decode", "prefill"], "which rows")

_HEIGHT, _MARGIN, _TOP, _BAR, _GAP = 360, 48, 56, 44, 28
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


def main(_) -> None:
    series = {}
    for pair in _SERIES.value:
        name, _, file = pair.partition("=")
        rows = json.loads(pathlib.Path(file).read_text())["rows"]
        series[name] = {(row["batch"], row["context"]): row for row in rows if row["kind"] == _KIND.value}
    pathlib.Path(_OUTPUT.value).write_text(draw(_KIND.value, series))


def draw(kind: str, series: dict[str, dict[tuple[int, int], dict]]) -> str:
    """Return the SVG: a group of bars for each case that the first series has measured.

    Args:
      series: by name, rows of one kind by (batch, context).
    """
    first = next(iter(series.values()))
    measured = {case: row for case, row in first.items() if "seconds" in row}
    bars = {case: _bars(row, series, case) for case, row in measured.items()}
    width = 2 * _MARGIN + sum(_BAR * len(found) + _GAP for found in bars.values())
    style = 'font-family="sans-serif" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT}" {style}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(_MARGIN, 18, f"{kind}: part of the floor (the least bytes or operations at the machine's own rates), "
              "tokens/s above", "start"),
    ]  # fmt: skip
    for index, name in enumerate(series):
        parts.append(_text(_MARGIN + 130 * index, 36, html.escape(name), "start", _COLOURS[index % len(_COLOURS)]))
    for percent in range(0, 101, 25):
        y = _y(percent / 100)
        parts.append(f'<polyline points="{_MARGIN},{y:.1f} {width - _MARGIN},{y:.1f}" fill="none" stroke="#ddd"/>')
        parts.append(_text(_MARGIN - 6, y + 4, f"{percent} %", "end"))
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


def _bars(row: dict, series: dict, case: tuple[int, int]) -> list[tuple[int, float, float]]:
    """Return (index of the series, tokens/s, part of the floor) of each series that has the case."""
    best = row["tokens_per_second"] / row["of_floor"]
    found = []
    for index, rows in enumerate(series.values()):
        if rate := rows.get(case, {}).get("tokens_per_second"):
            found.append((index, rate, rows[case].get("of_floor", rate / best)))
    return found


def _y(part: float) -> float:
    return _HEIGHT - _MARGIN - part * (_HEIGHT - _MARGIN - _TOP)


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#444") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


if __name__ == "__main__":
    app.run(main)
