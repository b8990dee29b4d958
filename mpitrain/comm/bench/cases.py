"""Our own ways to call a collective: a table with an entry for each, and the arrays that it is called on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mpitrain._typing import Array, Shape
from mpitrain.comm.algorithms import names

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

Call: TypeAlias = Callable[[], Any]
"""Performs a collective once; returns its result, or nothing where it was handed an array for that."""

Pair: TypeAlias = tuple[Array, Array]
"""What a rank hands in, and where its result goes; `Variant.in_place` leaves the second alone."""


@dataclass(frozen=True)
class Contender:
    """One participant of a race.

    Parameters
    ----------
    name : str
        What it is called in the results.
    calls : list of callable
        One per pair of arrays.
    inputs : list of array
        What the calls read.
    outputs : list of array
        Where else they may write.
    overwrites : bool
        Whether they write there too.
    """

    name: str
    calls: list[Call]
    inputs: list[Array]
    outputs: list[Array]
    overwrites: bool

    def results(self) -> Iterator[Array]:
        """Perform the calls one after the other, and yield what each gives."""
        for call, own in zip(self.calls, self.inputs if self.overwrites else self.outputs, strict=True):
            found = call()
            yield own if found is None else np.asarray(found)


@dataclass(frozen=True)
class Variant:
    """One of our ways to call a collective.

    Parameters
    ----------
    operation, name : str
        What it is called in the results.
    bind : callable
        From a communicator and a pair of arrays to the call.  Collective.
    in_place : bool
        The result replaces the input; it is then compared with rivals that do so too.
    node_memory : bool
        The input is from `Communicator.empty`.
    transports : tuple of str
        On which it differs from the other variants.
    leading : bool
        Compared with all rivals, in every launch.
    """

    operation: str
    name: str
    bind: Callable[[Communicator, Array, Array], Call]
    in_place: bool = False
    node_memory: bool = False
    transports: tuple[str, ...] = ("host",)
    leading: bool = False


_EACH = ("host", "shared", "network")

_VALUES = 7
"""Different ones that an array holds, in turn: small, so that sums over many ranks are exact; no power of two."""


def _waiting(begin: Callable[[], Any]) -> Call:
    return lambda: begin().wait()


def _own(operation: str) -> list[Variant]:
    """Return a variant per algorithm of our own, which sends messages whatever the transport."""
    binds: dict[str, Callable[[str, Communicator, Array, Array], Call]] = {
        "allreduce": lambda name, c, x, y: partial(c.allreduce, x, out=y, algorithm=name),
        "broadcast": lambda name, c, x, y: partial(c.broadcast, x, out=x, algorithm=name),
        "reduce_scatter": lambda name, c, x, y: partial(c.reduce_scatter, x, out=y, algorithm=name),
        "allgather": lambda name, c, x, y: partial(c.allgather, x, out=y, algorithm=name),
    }
    in_place = operation == "broadcast"
    return [Variant(operation, name, partial(binds[operation], name), in_place) for name in names(operation)]


# Checked calls are bound by position: a partial with keywords adds some 0.1 µs, which no loop that calls them has.
# fmt: off
VARIANTS: tuple[Variant, ...] = (
    Variant("allreduce", "checked", lambda c, x, y: partial(c.allreduce, x, "sum", y), transports=_EACH, leading=True),
    Variant("allreduce", "checked in place", lambda c, x, y: partial(c.allreduce, x, "sum", x),
            in_place=True, transports=_EACH, leading=True),
    Variant("allreduce", "in place on comm.empty", lambda c, x, y: partial(c.allreduce, x, "sum", x),
            in_place=True, node_memory=True, transports=("shared",), leading=True),
    Variant("allreduce", "plan", lambda c, x, y: c.allreduce_plan(x), node_memory=True, transports=_EACH, leading=True),
    Variant("allreduce", "plan in place", lambda c, x, y: c.allreduce_plan(x, in_place=True),
            in_place=True, node_memory=True, transports=_EACH, leading=True),
    Variant("allreduce", "nonblocking", lambda c, x, y: _waiting(partial(c.iallreduce, x, out=y))),
    Variant("allreduce", "reproducible", lambda c, x, y: partial(c.allreduce, x, out=y, reproducible=True),
            transports=_EACH),
    *_own("allreduce"),
    Variant("broadcast", "checked", lambda c, x, y: partial(c.broadcast, x, 0, x), in_place=True, leading=True),
    Variant("broadcast", "nonblocking", lambda c, x, y: _waiting(partial(c.ibroadcast, x, out=x)), in_place=True),
    *_own("broadcast"),
    Variant("reduce_scatter", "checked", lambda c, x, y: partial(c.reduce_scatter, x, "sum", None, y), leading=True),
    Variant("reduce_scatter", "nonblocking", lambda c, x, y: _waiting(partial(c.ireduce_scatter, x, out=y))),
    Variant("reduce_scatter", "reproducible", lambda c, x, y: partial(c.reduce_scatter, x, out=y, reproducible=True)),
    *_own("reduce_scatter"),
    Variant("allgather", "checked", lambda c, x, y: partial(c.allgather, x, None, y), leading=True),
    Variant("allgather", "nonblocking", lambda c, x, y: _waiting(partial(c.iallgather, x, out=y))),
    *_own("allgather"),
)
# fmt: on
"""One more way to call is one more entry."""


def shapes(operation: str, elements: int, ranks: int) -> tuple[Shape, Shape]:
    """Return the shapes of what a rank hands in and gets, for a whole array of that many elements.

    Shares are equal: the elements are rounded down to a multiple of the ranks, but to one each at least.
    """
    share = max(1, elements // ranks)
    match operation:
        case "reduce_scatter":
            return (ranks, share), (share,)
        case "allgather":
            return (share,), (ranks, share)
        case _:
            return (elements,), (elements,)


def handed_in(shape: Shape, dtype: str) -> Array:
    """Return what rank 0 hands in, other at each place nearby; rank r hands in r + 1 times as much."""
    return (np.arange(prod(shape), dtype=np.int32) % _VALUES + 1).astype(dtype).reshape(shape)


def correct(operation: str, rank: int, ranks: int, first: Array, result: Array) -> bool:
    """Tell whether a result is right, where ranks handed in multiples of ``first``, what rank 0 did."""
    total = ranks * (ranks + 1) // 2
    match operation:
        case "allreduce":
            return np.array_equal(result, first * total)
        case "reduce_scatter":
            return np.array_equal(result, first[rank] * total)
        case "allgather":
            return np.array_equal(result, np.stack([first * number for number in range(1, ranks + 1)]))
        case _:
            return np.array_equal(result, first)
