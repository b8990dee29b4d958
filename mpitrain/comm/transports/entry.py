"""The short way of a collective on NumPy arrays, where it was built: Python's side of `entry.c`.

It is optional.  Without it `mpitrain.comm.direct` does the same, and takes some microseconds longer.
"""

from __future__ import annotations

import platform
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpitrain import _env
from mpitrain._typing import Array, DType
from mpitrain.comm import results
from mpitrain.comm.direct import Doing, reduction
from mpitrain.comm.dtypes import OPS
from mpitrain.comm.transports import kernel
from mpitrain.comm.transports.fence import kind_of
from mpitrain.comm.transports.kernel import Kernel

if TYPE_CHECKING:
    from mpitrain.comm.ledger import Ledger

ABI = 4
"""Of `entry.c`, as this file calls it."""

_FORMATS = "bBhHiIlLqQfd"
"""Those of the buffer protocol that it knows."""

_MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")
"""Where an MPI library's handles are passed alike, be they pointers or of the type int."""

_NOT_COUNTED = array("q", (0, 0))
_NEVER = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Library:
    """The MPI library, as compiled code calls it.

    Parameters
    ----------
    functions : tuple of int
        Addresses of MPI_Allreduce, MPI_Bcast, MPI_Reduce_scatter_block and MPI_Allgather.
    in_place : int
        What stands for MPI_IN_PLACE.
    datatypes, ops : dict of str to int
        Handles, by the names of dtypes and reductions.
    """

    functions: tuple[int, int, int, int]
    in_place: int
    datatypes: dict[str, int]
    ops: dict[str, int]


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks that a communicator's short way connects.

    Parameters
    ----------
    rank, ranks : int
        The number of this one, and how many there are.
    library : Library
        The MPI library between them.
    comm : int
        The library's handle for the communicator.
    most_elements : int
        The most that the library moves in one call, of all ranks together.
    failed : callable
        Given an operation, its array and the library's error code, raises the error.
    """

    rank: int
    ranks: int
    library: Library
    comm: int
    most_elements: int
    failed: Callable[[str, Array, int], None]


@dataclass(frozen=True, eq=False)
class Loops:
    """The compiled loops that reduce for a communicator.

    Parameters
    ----------
    kernel : Kernel
        The loops of its ranks, which are those of one node.
    located_from_bytes : int
        Arrays of at least this size are reduced where they lie, if that is in memory that the ranks share.
    complete : callable
        Given the array for the result, the reduction, and what a loop returned that could not end it, ends it in Python
        and returns the result.
    """

    kernel: Kernel
    located_from_bytes: int
    complete: Callable[[Array, str, int], Array]


class Entry(Protocol):
    """What `entry.c` makes.  The collectives do as those of `mpitrain.comm.direct`."""

    def allreduce(self, x: Any, op: Any, out: Any) -> Array | None: ...  # noqa: D102
    def broadcast(self, x: Any, root: Any, out: Any) -> Array | None: ...  # noqa: D102
    def reduce_scatter(self, x: Any, op: Any, out: Any) -> Array | None: ...  # noqa: D102
    def allgather(self, x: Any, out: Any) -> Array | None: ...  # noqa: D102

    def planned(self, x: Array, op: str, out: Array) -> Array | None:
        """Reduce by the library, without being counted, arrays of a kind that `knows` accepts."""
        ...

    def close(self) -> None:
        """Call the library no more: the communicator is to be freed."""
        ...

    def hold(self, parts: bytes) -> None:
        """Take note of where arrays are reduced in place: of each part the first address, the end, and its block."""
        ...

    def calling(self) -> tuple[str, Array, Any, int] | None:
        """Return the operation that the library performs, its array, its op or root, and how many were before."""
        ...


def make(ranks: Ranks, loops: Loops | None, library_below_bytes: float, ledger: Ledger) -> Entry | None:
    """Return the short way of a communicator; None where there is none, or ``MPITRAIN_KERNEL=off`` forbids it.

    Parameters
    ----------
    ranks : Ranks
        Whom it connects.
    loops : Loops, optional
        What reduces for all; without, the library does so.
    library_below_bytes : float
        Without loops, arrays of at least this size are left to Python, whose transport may have a better way.
    ledger : Ledger
        Where calls are counted.
    """
    made = _type() if _env.kernel() else None
    if made is None:
        return None
    at = array("q", (*_loops(loops), *ranks.library.functions, ranks.comm, ranks.library.in_place))
    at.extend((ranks.rank, ranks.ranks, ranks.most_elements, int(min(library_below_bytes, _NEVER))))
    tallies = *(ledger.tally(name) for name in ("allreduce", "broadcast", "reduce_scatter", "allgather")), _NOT_COUNTED
    complete = None if loops is None else loops.complete
    found: Entry = made(at.tobytes(), _ways(ranks), np.ndarray, results.empty, complete, ranks.failed, tallies)
    return found


def calling(entries: Sequence[Entry], ranks: int) -> tuple[Doing, str] | None:
    """Return what the library is asked for, by one of a communicator's entries, and the number of this call."""
    for entry, found in enumerate(each.calling() for each in entries):
        if found is not None:
            operation, into, detail, returned = found
            return _doing(operation, into, detail, ranks), f"{entry}.{returned}"
    return None


def _doing(operation: str, into: Array, detail: Any, ranks: int) -> Doing:
    root, op = (detail, None) if operation == "broadcast" else (None, detail)
    sizes = {"allgather": into.size // ranks, "reduce_scatter": into.size * ranks}
    send = np.empty(sizes[operation], into.dtype) if operation in sizes else None  # its size is shown, never touched
    return Doing(operation, into, "sum" if op == "mean" else op, root, send)


def knows(dtype: DType, op: str) -> bool:
    """Tell whether `Entry.planned` reduces such arrays where they are contiguous, of native order, and writeable."""
    return dtype.char in _FORMATS and reduction(dtype, op) is not None


def available() -> bool:
    """Tell whether it was built."""
    return _type() is not None


@cache
def _type() -> Any:
    if platform.machine() not in _MACHINES:
        return None
    try:
        module = import_module("mpitrain.comm.transports._entry")
    except ImportError:
        return None
    return module.Entry if module.ABI == ABI else None


def _loops(loops: Loops | None) -> tuple[int, ...]:
    if loops is None:
        return 0, 0, 0, 0
    return *loops.kernel.begin_addresses, kernel.PAST_CACHE_FROM_BYTES, loops.located_from_bytes


def _ways(ranks: Ranks) -> dict[str | None, bytes]:
    """Return what `entry.c` calls a way, for each reduction and format: six numbers."""
    return {op: _way_by_format(ranks.library, op, ranks.ranks) for op in (None, *OPS)}


@cache
def _way_by_format(library: Library, op: str | None, ranks: int) -> bytes:
    numbers = array("q", bytes(8 * 6 * 128))
    for code in _FORMATS:
        dtype = np.dtype(code)
        performed = None if op is None else reduction(dtype, op)
        if op is None:
            way = dtype.itemsize, 0, 0, library.datatypes[dtype.name], 0, 0
        elif performed is None:
            continue
        else:
            loop = kernel.operation_address(dtype, performed) or 0
            kind = kind_of(dtype, performed)
            handles = library.datatypes[dtype.name], library.ops[performed]
            way = dtype.itemsize, loop, kind, *handles, ranks if op == "mean" else 0
        numbers[6 * ord(code) : 6 * ord(code) + 6] = array("q", way)
    return numbers.tobytes()
