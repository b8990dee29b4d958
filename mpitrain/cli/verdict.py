"""What ``mpitrain verify`` found, for people: lines and a table of differences, and a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from math import isnan

from rich.console import Console
from rich.table import Table

from mpitrain.train.comparison import Comparison, Difference, worst
from mpitrain.train.record import Record


def show(console: Console, title: str, tolerance: float, expected: Record, compared: Comparison) -> None:
    """Print everything."""
    for line in _header(title, tolerance, expected, compared):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(_table(expected, compared))
    console.print(verdict(compared), highlight=False, markup=False, soft_wrap=True)


def verdict(compared: Comparison) -> str:
    """Return a sentence: that all is equal, or what differs first, where and by how much."""
    first = compared.first
    if first is None:
        return "equal"
    whose = f"{first.what} of {first.tensor}" if first.tensor else f"{first.what} (of all tensors none differs)"
    if isnan(first.size):
        amount = "the ranks do not agree among themselves, or a value is not a number"
    else:
        amount = f"off by {first.size:.3g}, {first.relative:.3g} of the norm"
    return f"DIFFERS first at step {first.step} in the {whose}: {amount}"


def _header(title: str, tolerance: float, expected: Record, compared: Comparison) -> Iterator[str]:
    dtype = next(iter(expected.weights.values())).dtype.name
    bound = f"within {tolerance:.0e} of the norm" if tolerance else "to the bit"
    yield f"{title}: {len(expected.losses)} steps in {dtype}, equal if {bound}"
    for name, series in (("loss", compared.losses), ("norm of the gradient", compared.totals)):
        largest = worst(series)
        yield f"{name}: largest difference {_cell(largest)}, at step {largest.step}"


def _table(expected: Record, compared: Comparison) -> Table:
    found = Table(header_style="bold")
    found.add_column("tensor", no_wrap=True)
    found.add_column("shape", no_wrap=True)
    found.add_column("gradient of step 1", justify="right")
    found.add_column(f"weights after step {len(expected.losses)}", justify="right")
    for gradient, weights in zip(compared.gradients, compared.weights, strict=True):
        shape = " × ".join(map(str, expected.weights[gradient.tensor].shape))
        found.add_row(gradient.tensor, shape, _cell(gradient), _cell(weights))
    return found


def _cell(each: Difference) -> str:
    """Return a relative difference; one that counts is marked."""
    amount = "0" if each.relative == 0 else f"{each.relative:.1e}"
    return amount if each.within else f"{amount} ✗"
