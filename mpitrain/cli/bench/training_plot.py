"""The figure of the benchmark of training steps: throughput of all contestants, model by model.  Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mpitrain.cli.bench.plot import RIVAL_COLOUR
from mpitrain.train.bench.results import Trained, TrainingReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _SERIAL, _SERIAL_RIVAL, _DPI = "#1f5f99", "#9dbbd6", "#aaaaaa", 144
_SPREAD = "#e08a3c"
_COLUMN_INCHES, _ROW_INCHES = 7.5, 0.34


def draw(report: TrainingReport, path: Path) -> None:
    """Draw a report; the format is that of the file's name."""
    figure(report).savefig(path, dpi=_DPI, facecolor="white")


def figure(report: TrainingReport) -> Figure:
    """Return the figure of a report, made without pyplot: a row of bars for each model."""
    from matplotlib.figure import Figure

    bars = [len(each.contestants) for each in report.models]
    made = Figure(figsize=(_COLUMN_INCHES, 0.8 + sum(_ROW_INCHES * n + 0.75 for n in bars)), layout="constrained")
    axes = made.subplots(len(bars), 1, squeeze=False, height_ratios=bars)[:, 0]
    for each, trained in zip(axes, report.models, strict=True):
        _bars(each, trained)
    about = report.about
    made.suptitle(f"{about['ranks']} ranks, {about['mpi_library'].split(',')[0]}, {about['transport']}", fontsize=11)
    return made


def _bars(axes: Axes, trained: Trained) -> None:
    """Draw how much each contestant trains in a second, the fastest quantile and the slowest as a line."""
    names = [each.name for each in trained.contestants]
    values = [each.per_s for each in trained.contestants]
    spread = [
        [value - value * each.seconds.p50 / each.seconds.p90, value * each.seconds.p50 / each.seconds.p10 - value]
        for value, each in zip(values, trained.contestants, strict=True)
    ]
    colours = [_colour(name) for name in names]
    axes.barh(
        names,
        values,
        color=colours,
        xerr=list(zip(*spread, strict=True)),
        error_kw={"elinewidth": 0.9, "ecolor": _SPREAD},
    )
    for row, (value, (_, more)) in enumerate(zip(values, spread, strict=True)):
        axes.annotate(f" {value:,.0f}", (value + more, row), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_title(f"{trained.title}, {trained.units} {trained.unit} a rank", loc="left", fontsize=9)
    axes.set_xlabel(f"{trained.unit} a second, all ranks", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(name: str) -> str:
    """Return dark for what communicates, pale for serial runs; blue for ours, grey for rivals."""
    theirs, serial = "PyTorch" in name or "DDP" in name, name.endswith("serial runs")
    if theirs:
        return _SERIAL_RIVAL if serial else RIVAL_COLOUR
    return _SERIAL if serial else _OURS
