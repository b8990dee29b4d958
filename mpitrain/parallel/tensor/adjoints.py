"""What tensor-parallel layers exchange, forward and backward: a table of adjoint pairs, and nothing else.

An array that ranks divide the work on is, at each place of a model, one of three things:

- *same*: every rank holds the same values; it is one array;
- *own*: every rank holds a whole array with values of its own: an input that each uses for another purpose, or terms of
  a sum.  All together they are one vector, p times as long;
- *parts*: every rank holds its part along one axis; together they are one array.

An exchange is a linear map between such spaces.  The backward pass applies its adjoint: ⟨f(x), y⟩ = ⟨x, f*(y)⟩ in the
inner products of the spaces, where what is the same on all ranks counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mpitrain._typing import Array
from mpitrain.nn import Context
from mpitrain.parallel.tensor.call import PeerCall
from mpitrain.parallel.tensor.portion import Span, spans

Space = Literal["same", "own", "parts"]


@dataclass(frozen=True)
class Cut:
    """Where parts begin and end.

    Parameters
    ----------
    axis : int
        Along which axis arrays are cut.
    size : int
        Length of the whole along it; the parts are near-equal blocks.
    """

    axis: int
    size: int


Exchange = Callable[[Array, Cut, Context, PeerCall], Array]
"""Gives what an array becomes, in memory of the context, or in the array itself."""


def identity(x: Array, cut: Cut, context: Context, call: PeerCall) -> Array:
    """Return ``x``; nothing is sent."""
    return x


def allreduce(x: Array, cut: Cut, context: Context, call: PeerCall) -> Array:
    """Return the sum over the ranks, in place."""
    call.ranks.allreduce(x, out=x)
    return x


def own_part(x: Array, cut: Cut, context: Context, call: PeerCall) -> Array:
    """Return this rank's part of ``x``; nothing is sent."""
    start, stop = spans(cut.size, call.ranks.size)[call.ranks.rank]
    return _copied(x[_along(cut.axis, (start, stop), x)], context)


def allgather(x: Array, cut: Cut, context: Context, call: PeerCall) -> Array:
    """Return the parts of all ranks, one after the other."""
    rows = _copied(x.swapaxes(0, cut.axis), context)
    counts = [stop - start for start, stop in spans(cut.size, call.ranks.size)]
    whole = context.take((cut.size, *rows.shape[1:]), x.dtype)
    call.ranks.allgather(rows, counts=counts, out=whole)
    return _copied(whole.swapaxes(0, cut.axis), context)


def reduce_scatter(x: Array, cut: Cut, context: Context, call: PeerCall) -> Array:
    """Return this rank's part of the sum over the ranks."""
    rows = _copied(x.swapaxes(0, cut.axis), context)
    counts = [stop - start for start, stop in spans(cut.size, call.ranks.size)]
    part = context.take((counts[call.ranks.rank], *rows.shape[1:]), x.dtype)
    call.ranks.reduce_scatter(rows, counts=counts, out=part)
    return _copied(part.swapaxes(0, cut.axis), context)


@dataclass(frozen=True)
class Pair:
    """An exchange and its adjoint.

    Parameters
    ----------
    name : str
        What it does to the forward pass.
    forward, backward : callable
        What is exchanged on the way there, and on the way back.
    source, target : {"same", "own", "parts"}
        What it takes and what it gives.
    """

    name: str
    forward: Exchange
    backward: Exchange
    source: Space
    target: Space


COPY = Pair("copy", identity, allreduce, "same", "own")
SUM = Pair("sum", allreduce, identity, "own", "same")
SPLIT = Pair("split", own_part, allgather, "same", "parts")
GATHER = Pair("gather", allgather, own_part, "parts", "same")
SPREAD = Pair("spread", allgather, reduce_scatter, "parts", "own")
COLLECT = Pair("collect", reduce_scatter, allgather, "own", "parts")

ADJOINTS = {COPY: SUM, SUM: COPY, SPLIT: GATHER, GATHER: SPLIT, SPREAD: COLLECT, COLLECT: SPREAD}
"""Every pair, and the one that does forward what it does backward."""


def _along(axis: int, span: Span, x: Array) -> tuple[slice, ...]:
    return tuple(slice(*span) if number == axis % x.ndim else slice(None) for number in range(x.ndim))


def _copied(x: Array, context: Context) -> Array:
    """Return ``x`` if it is contiguous, else a copy that is."""
    if x.flags.c_contiguous:
        return x
    copy = context.take(x.shape, x.dtype)
    copy[...] = x
    return copy
