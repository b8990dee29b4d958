"""A reduction on mapped memory as a list of steps, each a function and its arrays: laid out once, performed often."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm.dtypes import UFUNCS

Step: TypeAlias = tuple[Callable[..., object], tuple[Any, ...]]


def fold(op: str, parts: Sequence[Array], out: Array, ranks: int) -> Iterator[Step]:
    """Yield the steps that combine equal pieces of all local ranks' arrays, in rank order.

    Parameters
    ----------
    op : str
        A reduction; ``mean`` divides by ``ranks``.
    parts : sequence of array
        The pieces, one per local rank, two or more.
    out : array
        Where the result goes; may be the first piece, or the second.
    ranks : int
        What a mean divides by; 0 leaves the division to a later step.

    Notes
    -----
    16-bit floats are combined in float32 and rounded once.
    """
    held = accumulator(out.dtype)
    combine = partial(_combine, UFUNCS["sum" if op == "mean" else op], held)
    total = out if held == out.dtype else np.empty(out.size, held)
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
