"""A reduction on mapped memory as a list of steps, each a function and its arrays: laid out once, performed often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports.shards import pieces

Step: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Combine:
    """What one rank combines between two fences.

    Parameters
    ----------
    sources : list of array
        Equal pieces of several ranks' arrays, in order.
    targets : list of array
        Where the result goes, which may be sources.
    divisor : int
        What a mean divides by; 0: nothing.
    past_cache : bool
        The result is too large to be kept in caches until it is read.
    """

    sources: list[Array]
    targets: list[Array]
    divisor: int = 0
    past_cache: bool = False

    def steps(self, op: str, piece_bytes: int) -> Iterator[Step]:
        """Yield how NumPy does it, piece by piece."""
        first = self.targets[0]
        for cut in pieces(0, first.size, max(1, piece_bytes // first.itemsize)):
            yield from fold(op, [source[cut] for source in self.sources], first[cut], self.divisor)
            for target in self.targets[1:]:
                yield np.copyto, (target[cut], first[cut])


def fold(op: str, parts: Sequence[Array], out: Array, ranks: int) -> Iterator[Step]:
    """Yield the steps that combine equal pieces of all local ranks' arrays, in rank order.

    Parameters
    ----------
    op : str
        A reduction; ``mean`` divides by ``ranks``.
    parts : sequence of array
        The pieces, one per local rank, two or more.
    out : array
        Where the result goes; may be one of the pieces.
    ranks : int
        What a mean divides by; 0 leaves the division to a later step.

    Notes
    -----
    16-bit floats are combined in float32 and rounded once.
    """
    held = accumulator(out.dtype)
    combine = partial(_combine, UFUNCS["sum" if op == "mean" else op], held)
    read_late = any(np.may_share_memory(out, part) for part in parts[2:])
    total = out if held == out.dtype and not read_late else np.empty(out.size, held)
    yield combine, (parts[0], parts[1], total)
    for part in parts[2:]:
        yield combine, (total, part, total)
    if op == "mean" and ranks:
        yield np.divide, (total, ranks, total)
    if total is not out:
        yield partial(np.copyto, casting="unsafe"), (out, total)


def _combine(ufunc: np.ufunc, held: DType, left: Array, right: Array, out: Array) -> None:
    ufunc(left, right, out=out, dtype=held)


def perform(steps: Sequence[Step]) -> None:
    """Perform steps.  An overflow is the result's to show, as with the MPI library."""
    with np.errstate(all="ignore"):
        for function, arrays in steps:
            function(*arrays)
