"""The figure of a benchmark: time over size, and below it how often mpitrain is faster.  Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mpitrain._errors import InputError, MissingExtraError
from mpitrain.cli.bench.tables import best_rival, size_text
from mpitrain.comm.bench.cases import VARIANTS
from mpitrain.comm.bench.components import DEFAULT
from mpitrain.comm.bench.ranks import MAIN
from mpitrain.comm.bench.results import Measurement, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Key: TypeAlias = tuple[str, str, str, int]
Line: TypeAlias = tuple[str, str, list[Measurement]]
"""Variant, transport, and a measurement per size."""

_COLOURS = ("#1f5f99", "#c2571a", "#1b7f5c", "#8a4fa3", "#b3912a", "#4aa3b5", "#a33c5b", "#777777")
RIVAL_COLOUR = "#222222"
_DPI = 144
_SHORT, _LONG = 3, 100  # upper end of an axis by its lower

_FORMATS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Refuse before anything is measured, if the figure could not be drawn afterwards.

    Raises
    ------
    MissingExtraError
        matplotlib cannot be imported.
    InputError
        The file's name ends in nothing that it can draw.
    """
    if path.suffix not in _FORMATS:
        raise InputError(
            "the name tells no format", operation="--plot", got=str(path), expected=f"an end of {', '.join(_FORMATS)}"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "--plot needs matplotlib, which cannot be imported", got=str(error), remedy="pip install 'mpitrain[plot]'"
        ) from error


def draw(report: Report, path: Path) -> None:
    """Draw a report: a column per operation; the format is that of the file's name."""
    figure(report).savefig(path, dpi=_DPI, facecolor="white")


def figure(report: Report) -> Figure:
    """Return the figure of a report, made without pyplot: neither a display nor its global state is touched."""
    from matplotlib.figure import Figure

    operations = list(dict.fromkeys(key[0] for key in report.measurements(DEFAULT.name)))
    made = Figure(figsize=(1.6 + 4.8 * len(operations), 9.0), layout="constrained")
    grid = made.subplots(3, len(operations), squeeze=False, height_ratios=(3, 2, 0.9))
    for column, operation in enumerate(operations):
        above, below, legend = grid[:, column]
        _column(above, below, legend, report, operation)
    about = report.launches[0].about
    made.suptitle(
        f"{about['ranks']} ranks, {about['mpi_library'].split(',')[0]}, {about['buffers']} buffers", fontsize=11
    )
    return made


def _column(above: Axes, below: Axes, legend: Axes, report: Report, operation: str) -> None:
    lines = list(_lines(report.measurements(DEFAULT.name), operation))
    colours = dict(zip(dict.fromkeys(variant for variant, _, _ in lines), _COLOURS, strict=False))
    for variant, transport, measured in lines:
        look = {"color": colours.get(variant, RIVAL_COLOUR), "linewidth": 1.4, "marker": "o", "markersize": 3.5}
        if transport == "host":
            look |= {"markerfacecolor": "white", "linewidth": 0.9}
        _ours(above, below, f"{variant} ({transport})", measured, look)
    for style, (label, value) in zip(("s--", "^:", "x-."), _rivals(report, operation).items(), strict=False):
        points = {each.size_bytes: found for each in lines[0][2] if (found := value(each)) is not None}
        if points:
            micro = [seconds * 1e6 for seconds in points.values()]
            above.plot(list(points), micro, style, color=RIVAL_COLOUR, label=label, linewidth=1.1, markersize=3.5)
    below.axhline(1.0, color=RIVAL_COLOUR, linewidth=1.0, linestyle="--")
    _label(above, below, operation, sorted({each.size_bytes for *_, measured in lines for each in measured}))
    legend.axis("off")
    legend.legend(*above.get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False, fontsize=8)


def _ours(above: Axes, below: Axes, label: str, measured: list[Measurement], style: dict[str, Any]) -> None:
    """Draw one of our ways to call: its time above, how often it is faster below."""
    above.plot(
        [each.size_bytes for each in measured], [each.seconds.p50 * 1e6 for each in measured], label=label, **style
    )
    ratios = {each.size_bytes: each.rivals[MAIN].ratio.p50 for each in measured if MAIN in each.rivals}
    below.plot(list(ratios), list(ratios.values()), **style)


def _lines(own: dict[Key, Measurement], operation: str) -> Iterator[Line]:
    """Yield a line for each leading variant and transport."""
    for variant in VARIANTS:
        for transport in variant.transports if variant.leading and variant.operation == operation else ():
            found = [each for key, each in own.items() if key[:3] == (operation, variant.name, transport)]
            if found:
                yield variant.name, transport, sorted(found, key=lambda each: each.size_bytes)


def _rivals(report: Report, operation: str) -> dict[str, Callable[[Measurement], float | None]]:
    """Return what tells the median time of each rival beside a measurement."""
    found: dict[str, Callable[[Measurement], float | None]] = {
        "mpi4py": lambda each: each.rivals[MAIN].seconds.p50 if MAIN in each.rivals else None,
        "gloo": lambda each: each.rivals["gloo"].seconds.p50 if "gloo" in each.rivals else None,
    }
    if len(report.components()) > 1:
        found["best rival"] = lambda each: best_rival(report, each.key).rivalry.seconds.p50
    return found


def _label(above: Axes, below: Axes, operation: str, sizes: list[int]) -> None:
    above.set_title(operation, loc="left", fontsize=11)
    above.set_ylabel("median time of the slowest rank / µs")
    below.set_ylabel("mpi4py's time / ours")
    below.set_xlabel("size / bytes")
    for axes in (above, below):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [size_text(size) for size in sizes], fontsize=8)
        axes.xaxis.minorticks_off()
        _plain_ticks(axes)
        axes.grid(color="#dddddd", linewidth=0.6, which="major")
        axes.spines[["top", "right"]].set_visible(False)
    below.yaxis.set_major_formatter("{x:g}")


def _plain_ticks(axes: Axes) -> None:
    """Write plain numbers on a vertical axis that shows few powers of ten: on a short one any, else also 2 and 5."""
    from matplotlib.ticker import LogLocator

    low, high = axes.get_ylim()
    is_short = high < _SHORT * low
    if high < _LONG * low:
        axes.yaxis.set_major_formatter("{x:g}")
        if not is_short:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter("{x:g}" if is_short else "")
    axes.tick_params(axis="y", which="both", labelsize=8)
