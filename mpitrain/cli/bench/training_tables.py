"""What the benchmark of training steps found, as tables for people; numbers are made to strings here."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from mpitrain.cli.checks.world import plural
from mpitrain.comm.bench.results import Quantiles
from mpitrain.train.bench.memory import KINDS, Memory
from mpitrain.train.bench.ranks import COMPARED
from mpitrain.train.bench.results import Contestant, Trained, TrainingReport


def show(report: TrainingReport, console: Console) -> None:
    """Print the head, and two tables for each model."""
    for line in header(report):
        console.print(line, highlight=False, markup=False)
    for trained in report.models:
        _show(console, title(trained, report.product_flops_per_s), columns(trained), rows(trained))
        _show(console, "MB a rank, measured (predicted)", ("", *KINDS), memory_rows(trained))


def _show(console: Console, title: str, names: tuple[str, ...], found: list[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for row in found:
        table.add_row(*row)
    console.print()
    console.print(table, highlight=False)


def header(report: TrainingReport) -> Iterator[str]:
    """Yield what all models have in common."""
    about = report.about
    library = about["mpi_library"].split(",")[0]
    yield f"{plural(about['ranks'], 'rank')}, {library}, {about['transport']}, {about['machine']['cpu']}"
    yield ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    adam = "compiled Adam" if about["compiled_adam"] else "Adam in NumPy"
    yield f"one BLAS thread a rank, products at {report.product_flops_per_s / 1e9:.0f} GFLOP/s each, {adam}"
    yield from report.notes


def title(trained: Trained, product_flops_per_s: float) -> str:
    """Return what a model is, and what a step of it is made of."""
    products_ms = trained.flops / product_flops_per_s * 1e3
    return (
        f"{trained.title}: {trained.parameters:,} parameters, {trained.units} {trained.unit} a rank, "
        f"{trained.flops / 1e9:.2f} GFLOP a rank and step ({products_ms:.1f} ms of products)"
    )


def columns(trained: Trained) -> tuple[str, ...]:
    """Return the head of a model's table."""
    compared = (f"to {name}" for name in _compared(trained))
    return ("", "ms a step", "p10–p90", f"{trained.unit}/s", "of products", "communicating", *compared)


def rows(trained: Trained) -> list[tuple[str, ...]]:
    """Return a row for each contestant."""
    return [(*_row(each), *(_ratio(each.ratios.get(name)) for name in _compared(trained)))
            for each in trained.contestants]  # fmt: skip


def memory_rows(trained: Trained) -> list[tuple[str, ...]]:
    """Return the memory of each method of ours."""
    return [
        (each.name, *(megabytes(each.memory[kind]) for kind in KINDS)) for each in trained.contestants if each.memory
    ]


def _compared(trained: Trained) -> list[str]:
    names = {each.name for each in trained.contestants}
    return [name for name in COMPARED if name in names]


def _row(found: Contestant) -> tuple[str, ...]:
    share = found.communication_share
    return (
        found.name,
        f"{found.seconds.p50 * 1e3:.2f}",
        f"{found.seconds.p10 * 1e3:.2f}–{found.seconds.p90 * 1e3:.2f}",
        f"{found.per_s:,.0f}",
        f"{found.share_of_products:.0%}",
        "" if share is None else f"{share:.0%}",
    )


def _ratio(found: Quantiles | None) -> str:
    return "" if found is None else f"{found.p50:.2f}"


def megabytes(found: Memory) -> str:
    """Return what is measured, and in brackets what is predicted, in MB."""
    predicted = "" if found.predicted_bytes is None else f" ({found.predicted_bytes / 1e6:.2f})"
    return f"{found.measured_bytes / 1e6:.2f}{predicted}"
