"""The pictures of a run, as PNG: curves over the steps, and the confusion matrix.  Needs matplotlib (extra ``plot``).

Figures are made without pyplot, so that neither a display nor its global state is touched.
"""

from __future__ import annotations

import io
import warnings
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

_COLOURS = {"train": "#1f5f99", "valid": "#c2571a", "test": "#1b7f5c"}
_INK = "#333333"
_DECADES_FOR_LOG = 2.0
_MANY_POINTS = 40
_THOUSAND = 1000.0
_DPI = 144


def curve(
    title: str, series: Mapping[str, Series], *, smooth: bool = False, log: bool = False, from_zero: bool = False
) -> bytes:
    """Draw values over the steps of training.

    Parameters
    ----------
    title : str
        What is drawn, with its unit.
    series : mapping of {"train", "valid", "test"} to series
        One line each.
    smooth : bool
        Where training has many points, draw their running mean over them.
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
        if smooth and kind == "train" and len(steps) > _MANY_POINTS:
            _mean(axes, steps, values)
    axes.set_title(_literal(title), loc="left", color=_INK, fontsize=11)
    axes.set_xlabel("step")
    axes.margins(x=0.02)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _scale(axes, [value for _, values in series.values() for value in values], log, from_zero)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if set(series) != {"train"} or len(axes.lines) > 1:
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
        A PNG; cells are shaded by their share of the row, and hold the number.  Of more than some thirty classes nobody
        could read it.
    """
    count = len(classes)
    side = min(2.4 + 0.36 * count, 9.0)
    figure, axes = _blank(side, side)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), number in np.ndenumerate(matrix):
        colour = "white" if share[row, column] > 0.5 else _INK
        faint = "#bbbbbb" if number == 0 else colour
        axes.text(column, row, f"{number:g}", ha="center", va="center", color=faint, fontsize=8 if count <= 24 else 6.5)
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


def _scale(axes: Axes, values: Sequence[float], log: bool, from_zero: bool) -> None:
    """Choose the axis of the values, and how its ticks are written."""
    if log and values and min(values) > 0 and max(values) / min(values) > 10**_DECADES_FOR_LOG:
        axes.set_yscale("log")
        return
    if from_zero:
        axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] - axes.get_ylim()[0] >= _THOUSAND:  # between such limits ticks are whole numbers
        axes.yaxis.set_major_formatter("{x:,.0f}")


def _line(axes: Axes, kind: str, steps: Sequence[int], values: Sequence[float]) -> None:
    marker = "o" if len(steps) <= _MANY_POINTS else None
    axes.plot(steps, values, color=_COLOURS[kind], linewidth=1.4, marker=marker, markersize=3.5, label=kind)


def _mean(axes: Axes, steps: Sequence[int], values: Sequence[float]) -> None:
    """Draw the running mean of the line drawn last, and make that line fainter; windows are centred on their steps."""
    axes.lines[-1].set(linewidth=0.7, alpha=0.5)
    width = 2 * (len(values) // (2 * _MANY_POINTS)) + 1
    total = np.cumsum([0.0, *values])
    mean = (total[width:] - total[:-width]) / width
    middle = steps[width // 2 : len(steps) - width // 2]
    axes.plot(middle, mean, color=_COLOURS["train"], linewidth=1.6, label=f"train, mean of {width}")


def _literal(text: str) -> str:
    """Keep a name as it is: matplotlib takes what stands between dollar signs for mathematics."""
    return text.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from font"
        )  # a line for each character, and again each time
        figure.savefig(stream, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
