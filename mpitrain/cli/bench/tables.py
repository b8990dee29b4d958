"""What a benchmark found, as tables for people; numbers are made to strings here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from rich.console import Console
from rich.table import Table

from mpitrain.cli.checks.world import plural
from mpitrain.comm.bench.cases import VARIANTS
from mpitrain.comm.bench.components import DEFAULT
from mpitrain.comm.bench.ranks import MAIN
from mpitrain.comm.bench.results import Copy, Measurement, Report, Rivalry, bus_bandwidth, bus_factor, geometric_mean

Cells: TypeAlias = tuple[str, ...]

COLUMNS = (
    "size",
    "mpitrain",
    "transport",
    "median µs",
    "p10–p90 µs",
    "bus GB/s",
    "of copy",
    "mpi4py µs",
    "ratio",
    "Δ µs",
)
SUMMARY = ("size", "best rival", "its µs", "our µs", "to default", "to best", "to gloo")

_FORMULAS = {
    "allreduce": "2(p−1)/p · n / t",
    "broadcast": "n / t",
    "reduce_scatter": "(p−1)/p · n / t",
    "allgather": "(p−1)/p · n / t",
}


@dataclass(frozen=True)
class Best:
    """The fastest of all rivals beside one of our ways to call, at one size.

    Parameters
    ----------
    name : str
        The set-up of the MPI library, or ``gloo``.
    rivalry : Rivalry
        Its times, and ours of the same turns.
    """

    name: str
    rivalry: Rivalry


def size_text(count: int) -> str:
    """Return a number of bytes as options take it: ``4``, ``256K``, ``16M``."""
    for unit, letter in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return str(count)


def measured_rows(report: Report, operation: str) -> list[Cells]:
    """Return the cells of an operation's table, as the library is by default; in order of size."""
    copies = report.copies(DEFAULT.name)
    ranks = _ranks(report)
    found = [each for each in report.measurements(DEFAULT.name).values() if each.operation == operation]
    return [_row(each, ranks, copies.get(each.size_bytes)) for each in sorted(found, key=lambda each: each.size_bytes)]


def summary_rows(report: Report, operation: str, variant: str, transport: str) -> list[Cells]:
    """Return the cells of the comparison with all rivals, and a last row of geometric means; none without figures."""
    own = {
        key: each for key, each in sorted(report.measurements(DEFAULT.name).items(), key=lambda item: item[0][3])
        if key[:3] == (operation, variant, transport) and MAIN in each.rivals
    }  # fmt: skip
    bests = {key: best_rival(report, key) for key in own}
    ratios = [
        (own[key].rivals[MAIN].ratio.p50, best.rivalry.ratio.p50, _ratio(own[key], "gloo"))
        for key, best in bests.items()
    ]
    rows = [
        (size_text(key[3]), best.name, _us(best.rivalry.seconds.p50), _us(own[key].seconds.p50), *map(_times, row))
        for (key, best), row in zip(bests.items(), ratios, strict=True)
    ]
    means = (geometric_mean(value for value in column if value is not None) for column in zip(*ratios, strict=True))
    return [*rows, ("mean", "", "", "", *map(_times, means))] if rows else []


def best_rival(report: Report, key: tuple[str, str, str, int]) -> Best:
    """Return the rival that one of our ways to call is least ahead of, turn by turn, over all set-ups and gloo.

    By the ratio, not the time: a launch may have met another state of the machine than the rest.
    """
    found = [
        Best(name if rival == MAIN else rival, rivalry)
        for name in report.components()
        if (measurement := report.measurements(name).get(key))
        for rival, rivalry in measurement.rivals.items()
    ]
    return min(found, key=lambda best: best.rivalry.ratio.p50)


def show(report: Report, console: Console) -> None:
    """Print all tables."""
    for line in header(report):
        console.print(line, highlight=False, markup=False)
    for operation in dict.fromkeys(key[0] for key in report.measurements(DEFAULT.name)):
        console.print(
            _table(f"{operation}: bus bandwidth = {_FORMULAS[operation]}", COLUMNS, measured_rows(report, operation))
        )
    for title, rows in _summaries(report) if _has_rivals(report) else ():
        console.print(_table(title, SUMMARY, rows))
    for note in dict.fromkeys(note for launch in report.launches for note in launch.notes):
        console.print(f"note: {note}", highlight=False, markup=False)
    for failure in report.failures:
        console.print(f"left out: {failure}", highlight=False, markup=False)


def header(report: Report) -> Iterator[str]:
    """Yield what the tables were measured on, and how to read them."""
    about = report.launches[0].about
    machine, cache = about["machine"], about["machine"]["last_level_cache_bytes"]
    part = about.get("ranks_per_node")
    cut = "" if part is None else f" (MPITRAIN_RANKS_PER_NODE={part})"
    where = f"{plural(about['ranks'], 'rank')} on {plural(len(about['ranks_of_nodes']), 'node')}{cut}"
    yield f"{where}, {about['mpi_library']}"
    yield f"{machine['cpu']}, {plural(machine['cpus'], 'CPU')}, last cache {size_text(cache)}"
    copies = report.copies(DEFAULT.name).values()
    pairs = ", ".join(_pairs(copy, cache) for copy in copies)
    if about["buffers"] == "rotating":
        yield f"{about['dtype']}, buffers rotating through pairs of arrays per rank: {pairs}"
    else:
        anew = ", written anew before each turn" if about["buffers"] == "rewritten" else ""
        yield f"{about['dtype']}, buffers resident: one pair of arrays per rank{anew}"
    yield "tuning table: " + ("; ".join(about["tuning"]) or "none")
    yield "times are of the slowest rank; ratio = median over turns of mpi4py's time / ours: above 1 mpitrain is faster"
    speeds = ", ".join(
        f"{size_text(copy.size_bytes)}: {_gigabytes(copy.size_bytes / copy.seconds.p50)}" for copy in copies
    )
    yield f"of copy: bus bandwidth by that of a copy of n bytes on each rank, all at once (GB/s per rank: {speeds})"


def _has_rivals(report: Report) -> bool:
    """Tell whether there is more to compare with than mpi4py on the library as it is."""
    return len(report.components()) > 1 or any(len(each.rivals) > 1 for each in report.launches[0].measurements)


def _summaries(report: Report) -> Iterator[tuple[str, list[Cells]]]:
    for variant in VARIANTS:
        for transport in variant.transports if variant.leading else ():
            rows = summary_rows(report, variant.operation, variant.name, transport)
            if rows:
                yield f"{variant.operation}, {variant.name} ({transport}): ratio to the rivals", rows


def _row(measured: Measurement, ranks: int, copy: Copy | None) -> Cells:
    seconds = measured.seconds
    bus = bus_bandwidth(measured.operation, ranks, measured.total_bytes, seconds.p50)
    rival = measured.rivals.get(MAIN)
    meaningful = bus_factor(measured.operation, ranks) > 0
    share = f"{bus * copy.seconds.p50 / copy.size_bytes:.0%}" if copy and meaningful else ""
    return (
        size_text(measured.size_bytes), measured.variant, measured.transport, _us(seconds.p50),
        f"{_us(seconds.p10)}–{_us(seconds.p90)}", _gigabytes(bus) if meaningful else "", share,
        _us(rival.seconds.p50) if rival else "", _times(rival.ratio.p50 if rival else None),
        f"{rival.behind_s.p50 * 1e6:+.2f}" if rival else "",
    )  # fmt: skip


def _table(title: str, columns: Cells, rows: list[Cells]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        text = column in ("mpitrain", "transport", "best rival")
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    for above, row in zip([None, *rows], rows, strict=False):
        if above and above[0] != row[0] and len(rows) > 2 * len({each[0] for each in rows}):
            table.add_section()
        table.add_row(*row)
    return table


def _pairs(copy: Copy, cache_bytes: int) -> str:
    fits = " (in the cache)" if 2 * copy.size_bytes * copy.buffers < cache_bytes else ""
    return f"{size_text(copy.size_bytes)}: {copy.buffers}{fits}"


def _ranks(report: Report) -> int:
    return int(report.launches[0].about["ranks"])


def _ratio(measured: Measurement, rival: str) -> float | None:
    found = measured.rivals.get(rival)
    return found.ratio.p50 if found else None


def _us(seconds: float) -> str:
    micro = seconds * 1e6
    return f"{micro:,.0f}" if micro >= 1000 else f"{micro:.3g}" if micro >= 100 else f"{micro:.2f}"


def _gigabytes(rate: float) -> str:
    return f"{rate / 1e9:.3g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None or ratio != ratio else f"{ratio:.2f}"
