"""The table of our own algorithms, by operation and name, and how one is chosen for a call and performed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mpitrain._errors import InputError
from mpitrain._names import did_you_mean
from mpitrain.comm.algorithms import doubling, hierarchical, ordered, pipelined, recursive, ring, shares, tree
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.calls import Call, Prepared

if TYPE_CHECKING:
    from mpitrain.comm.engine import Engine

Algorithm: TypeAlias = Callable[[Links, Call], None]

DEFAULT = "default"
"""The name of the backend's own way, e.g. that of the MPI library."""

ALGORITHMS: dict[tuple[str, str], Algorithm] = {
    ("allreduce", "ring"): partial(shares.allreduce, ring.reduce_scatter, ring.allgather),
    ("allreduce", "recursive"): recursive.allreduce,
    ("allreduce", "doubling"): doubling.allreduce,
    ("allreduce", "tree"): tree.allreduce,
    ("allreduce", "ordered"): partial(shares.allreduce, ordered.reduce_scatter, ring.allgather),
    ("allreduce", "pipelined"): pipelined.allreduce,
    ("allreduce", "hierarchical"): hierarchical.allreduce,
    ("reduce", "ring"): partial(shares.reduce, ring.reduce_scatter),
    ("reduce", "tree"): tree.reduce,
    ("reduce", "ordered"): partial(shares.reduce, ordered.reduce_scatter),
    ("broadcast", "ring"): partial(shares.broadcast, ring.allgather),
    ("broadcast", "tree"): tree.broadcast,
    ("reduce_scatter", "ring"): partial(shares.reduce_scatter, ring.reduce_scatter),
    ("reduce_scatter", "recursive"): partial(shares.reduce_scatter, recursive.reduce_scatter),
    ("reduce_scatter", "ordered"): partial(shares.reduce_scatter, ordered.reduce_scatter),
    ("allgather", "ring"): partial(shares.allgather, ring.allgather),
    ("allgather", "recursive"): partial(shares.allgather, recursive.allgather),
}


def names(operation: str) -> list[str]:
    """Return the names of the algorithms that an operation has."""
    return [name for each, name in ALGORITHMS if each == operation]


def assign(comm: Engine, prepared: Prepared, algorithm: str | None) -> Prepared:
    """Say how the calls are to be performed: by the caller's choice, else the communicator's table, else the backend.

    Raises
    ------
    InputError
        The operation has no such algorithm.
    """
    if algorithm is None and comm.tuning is None:
        return prepared
    if algorithm is not None:
        _check(prepared.operation, algorithm)
    choices = [_choice(comm, call, algorithm) for call in prepared.calls]
    if not any(choices):
        return prepared
    calls = [replace(call, algorithm=choice) for call, choice in zip(prepared.calls, choices, strict=True)]
    return replace(prepared, calls=calls)


def perform(comm: Engine, call: Call, links: Links | None = None) -> None:
    """Perform a call by the algorithm that it names, over the communicator's own links or others.  Collective."""
    links = links or comm._links
    comm._meet(call)
    with np.errstate(all="ignore"):  # as everywhere, sums beyond the largest float are infinite
        ALGORITHMS[call.operation, call.algorithm or ""](links, call)
    links.book(call.operation)


def tabled(comm: Engine, operation: str, nbytes: int) -> str | None:
    """Return what the communicator's table has for an operation on so much host memory; None if it has no table."""
    return None if comm.tuning is None else comm.tuning.choose(operation, nbytes, comm.size)


def _choice(comm: Engine, call: Call, algorithm: str | None) -> str | None:
    if call.stream is not None:
        return algorithm  # what performs it on a device chooses there
    if algorithm is None:
        whole = max(side.nbytes for side in (call.send, call.recv) if side is not None) if call.dtype else 0
        algorithm = tabled(comm, call.operation, whole)
    return None if algorithm == DEFAULT else algorithm


def _check(operation: str, algorithm: str) -> None:
    known = [*names(operation), DEFAULT]
    if algorithm not in known:
        raise InputError(
            "no such algorithm", operation=operation, got=repr(algorithm), expected=", ".join(map(repr, known)),
            remedy=did_you_mean(str(algorithm), known),
        )  # fmt: skip
