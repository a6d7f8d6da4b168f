"""The load of experts as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie_jax.errors import UserError

_CELL = 0.24  # inches
_MARGINS = 2.2, 1.5  # inches beside and around the cells: labels, colour bar, title
_LEAST = 7.5, 2.6
_TICKS = 16  # at most, along the experts
_LEGEND_TICKS = 8
_DEAD = "#ffd60a"


def check() -> None:
    """Check that pictures can be drawn.

    Raises:
      UserError: if matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--output draws with matplotlib, which is missing: pip install 'ernie-jax[plots]'") from None


def draw(path: str, load: np.ndarray, layers: Sequence[int], title: str, about: str) -> None:
    """Write a PNG: a row for each layer, a column for each expert, white where the load is the layer's mean.

    Args:
      load: [L, E], how many tokens chose each expert.
      layers: the layers' numbers.
      title, about: what stands above, large and small.

    Raises:
      UserError: if the file cannot be written.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    rows, columns = load.shape
    ratios = load / load.mean(axis=1, keepdims=True)
    sizes = zip((columns, rows), _MARGINS, _LEAST, strict=True)
    figure = Figure([max(count * _CELL + margin, least) for count, margin, least in sizes], layout="constrained")
    axes = figure.add_subplot()
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, ratios.max()))
    image = axes.imshow(ratios, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    dead = np.argwhere(load == 0)
    if len(dead):
        marks = axes.scatter(dead[:, 1], dead[:, 0], marker="x", c=_DEAD, s=40, linewidths=1.8, label="never chosen")
        figure.legend(handles=[marks], loc="upper right", fontsize=9, frameon=False, handletextpad=0)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_xticks(range(0, columns, -(-columns // _TICKS)))
    axes.set_yticks(range(rows), list(map(str, layers)))
    axes.set_xticks(np.arange(columns - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(rows - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(about, loc="left", fontsize=9, color="#444")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    bar = figure.colorbar(image, ax=axes, label="times the layer's mean", pad=0.02)
    bar.set_ticks([0, 0.5, *range(1, int(norm.vmax) + 1, -(-int(norm.vmax) // _LEGEND_TICKS))])
    bar.outline.set_visible(False)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise UserError(f"--output={path}: {error.strerror}") from None
