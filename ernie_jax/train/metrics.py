"""The record of a run: metrics.jsonl, curves to look at, and TensorBoard's files for those who ask for them."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os

import numpy as np
from etils import epath

from ernie_jax.errors import UserError
from ernie_jax.paths import is_local

_WIDTH, _HEIGHT, _MARGIN = 720, 400, 48
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


class Metrics:
    """Rows of named numbers, one a logged step.

    A resumed run drops the rows after the step it resumes from.

    Args:
      tensorboard: write them for TensorBoard too, in a folder of that name.

    Raises:
      UserError: if that is asked for and can't be.
    """

    def __init__(self, directory: str | os.PathLike, resumed_step: int, tensorboard: bool = False):
        self._directory = epath.Path(directory)
        self._board = _open_board(self._directory / "tensorboard", resumed_step) if tensorboard else None
        self._rows: list[dict] = []
        self._file = self._directory / "metrics.jsonl"
        if resumed_step and self._file.exists():
            rows = map(json.loads, self._file.read_text().splitlines())
            self._rows = [row for row in rows if row["step"] <= resumed_step]
        self._rewrite()

    def add(self, row: dict) -> None:
        """Append a row."""
        self._rows.append(row)
        if self._board:
            for name, value in row.items():
                if name != "step":
                    write = self._board.add_histogram if isinstance(value, list) else self._board.add_scalar
                    write(name, np.asarray(value), row["step"])
            self._board.flush()
        if is_local(self._file):
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        self._file.write_text("".join(json.dumps(row) + "\n" for row in self._rows))

    def draw(self) -> None:
        """Write the curves of all losses."""
        if series := self._losses():
            (self._directory / "curve.svg").write_text(draw(series))

    def finish(self) -> None:
        """Close the files; where matplotlib is installed, write the curves as a PNG too."""
        if self._board:
            self._board.close()
        if series := self._losses():
            with contextlib.suppress(ImportError):
                (self._directory / "curve.png").write_bytes(_paint(series))

    def _losses(self) -> dict[str, list[tuple[int, float]]]:
        names = dict.fromkeys(name for row in self._rows for name in row if name.endswith("loss"))
        return {name: [(row["step"], row[name]) for row in self._rows if name in row] for name in names}


def _open_board(directory: epath.Path, resumed_step: int):
    if not is_local(directory):
        raise UserError(f"--tensorboard writes to local folders only, and the recipe's output is {directory.parent}")
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard writes with tensorboardX, which is missing: pip install 'ernie-jax[tensorboard]'"
        ) from None
    # What an earlier run has written of later steps is hidden.
    return SummaryWriter(str(directory), purge_step=resumed_step + 1 if resumed_step else None)


def _paint(series: dict[str, list[tuple[int, float]]]) -> bytes:
    """Return a PNG of the curves.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure([9, 5], layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, points) in zip(itertools.cycle(_COLOURS), series.items(), strict=False):
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), color=colour, linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.grid(color="#ddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


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
