"""The record of a run: metrics.csv, and curve.svg to look at."""

from __future__ import annotations

import csv
import io
import math
import os

from etils import epath

_WIDTH, _HEIGHT, _MARGIN = 720, 400, 48
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


class Metrics:
    """Rows of named numbers, one a logged step, kept in two files that are rewritten whole.

    A resumed run drops the rows after the step it resumes from.
    """

    def __init__(self, directory: str | os.PathLike, columns: list[str], resumed_step: int):
        self._directory, self._columns = epath.Path(directory), columns
        self._rows: list[dict[str, float]] = []
        file = self._directory / "metrics.csv"
        if resumed_step and file.exists():
            rows = csv.DictReader(io.StringIO(file.read_text()))
            parsed = ({name: float(value) for name, value in row.items() if value} for row in rows)
            self._rows = [row for row in parsed if row["step"] <= resumed_step]

    def add(self, row: dict[str, float]) -> None:
        """Append a row and write both files."""
        self._rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self._rows)
        (self._directory / "metrics.csv").write_text(text.getvalue())
        losses = [name for name in self._columns if name.endswith("loss")]
        series = {name: [(r["step"], r[name]) for r in self._rows if name in r] for name in losses}
        (self._directory / "curve.svg").write_text(draw(series))


def draw(series: dict[str, list[tuple[float, float]]]) -> str:
    """Return an SVG with a line for each non-empty series of (step, loss) points."""
    series = {name: points for name, points in series.items() if points}
    steps, losses = zip(*(point for points in series.values() for point in points), strict=True)
    right, low, high = max(steps), math.floor(min(losses)), math.ceil(max(losses)) or 1

    def place(step: float, loss: float) -> str:
        x = _MARGIN + step / right * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - (loss - low) / max(high - low, 1) * (_HEIGHT - 2 * _MARGIN)
        return f"{x:.1f},{y:.1f}"

    def label(point: str, anchor: str, text: str, colour: str = "#444") -> str:
        x, y = point.split(",")
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{text}</text>'

    size = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="#fff"/>']
    for loss in range(low, high + 1):
        parts.append(f'<polyline points="{place(0, loss)} {place(right, loss)}" fill="none" stroke="#ddd"/>')
        parts.append(label(place(-right / 80, loss), "end", str(loss)))
    for quarter in range(5):
        step = right * quarter / 4
        parts.append(label(f"{place(step, low).split(',')[0]},{_HEIGHT - _MARGIN / 2}", "middle", f"{step:.0f}"))
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        line = " ".join(place(*point) for point in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(label(f"{_WIDTH - _MARGIN},{_MARGIN + 16 * index}", "end", name.replace("_", " "), colour))
    return "\n".join([*parts, "</svg>"]) + "\n"
