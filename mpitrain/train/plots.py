"""The pictures of a run, as PNG: curves over the steps, and the confusion matrix.  Needs matplotlib (extra ``plot``).

Figures are made without pyplot, so that neither a display nor its global state is touched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mpitrain._errors import MissingExtraError
from mpitrain._typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series: TypeAlias = tuple[Sequence[int], Sequence[float]]
"""Steps, and a value at each."""

_COLOURS = {"train": "#8aa9c9", "valid": "#c2571a", "test": "#1b7f5c"}
_SMOOTH = "#1f5f99"
_INK = "#333333"
_DECADES_FOR_LOG = 2.0
_MANY_POINTS = 40
_DPI = 144


def curve(title: str, series: Mapping[str, Series], *, log: bool = False, from_zero: bool = False) -> bytes:
    """Draw values over the steps of training.

    Parameters
    ----------
    title : str
        What is drawn, with its unit.
    series : mapping of {"train", "valid", "test"} to series
        One line each; where training has many points, its running mean is drawn over them.
    log : bool
        Use a logarithmic axis where the values span more than two decades.
    from_zero : bool
        Let the axis begin at zero.

    Returns
    -------
    bytes
        A PNG.
    """
    figure, axes = _blank(6.4, 3.4)
    for kind, (steps, values) in series.items():
        _line(axes, kind, steps, values)
    axes.set_title(_literal(title), loc="left", color=_INK, fontsize=11)
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    found = [value for _, values in series.values() for value in values]
    if log and found and min(found) > 0 and max(found) / min(found) > 10**_DECADES_FOR_LOG:
        axes.set_yscale("log")
    elif from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def confusion(matrix: Array, classes: Sequence[str]) -> bytes:
    """Draw a confusion matrix.

    Parameters
    ----------
    matrix : array, shape (classes, classes)
        Number of samples of each true class (row) that were taken for each class (column).
    classes : sequence of str
        Names of the classes.

    Returns
    -------
    bytes
        A PNG; cells are shaded by their share of the row, and hold the number where there are few classes.
    """
    count = len(classes)
    side = min(2.4 + 0.36 * count, 9.0)
    figure, axes = _blank(side, side)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if count <= 24:
        for (row, column), number in np.ndenumerate(matrix):
            colour = "white" if share[row, column] > 0.5 else _INK
            faint = "#bbbbbb" if number == 0 else colour
            axes.text(column, row, f"{number:g}", ha="center", va="center", color=faint, fontsize=8)
        names = [_literal(name) for name in classes]
        upright = max(map(len, classes)) > 3
        axes.set_xticks(range(count), names, rotation=45 if upright else 0, ha="right" if upright else "center")
        axes.set_yticks(range(count), names)
    axes.set_title("Confusion matrix (test)", loc="left", color=_INK, fontsize=11)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return _png(figure)


def _blank(width: float, height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "the report's pictures need matplotlib, which cannot be imported",
            operation="report",
            got=str(error),
            remedy="pip install 'mpitrain[plot]'",
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=9, colors=_INK)
    return figure, axes


def _line(axes: Axes, kind: str, steps: Sequence[int], values: Sequence[float]) -> None:
    many = len(steps) > _MANY_POINTS
    marker = "o" if not many and kind != "train" or len(steps) == 1 else None
    colour = _COLOURS[kind] if many or kind != "train" else _SMOOTH
    smoothed = many and kind == "train"
    label = f"{kind}, each step" if smoothed else kind
    axes.plot(
        steps, values, color=colour, linewidth=0.8 if smoothed else 1.6, marker=marker, markersize=3.5, label=label
    )
    if smoothed:
        width = max(2, len(values) // _MANY_POINTS)
        axes.plot(steps[width - 1 :], _running_mean(values, width), color=_SMOOTH, label=f"{kind}, mean of {width}")


def _running_mean(values: Sequence[float], width: int) -> Array:
    total = np.cumsum([0.0, *values])
    mean: Array = (total[width:] - total[:-width]) / width
    return mean


def _literal(text: str) -> str:
    """Keep a name as it is: matplotlib takes what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
