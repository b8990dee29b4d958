"""An array of each rank of a node, which all of them read where it lies.

What the ranks do with each other's arrays is theirs to say; here is where the arrays are, and what makes them seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.shard_plans import watched
from mpitrain.comm.transports.fence import LINE_BYTES, needs_barrier
from mpitrain.comm.transports.pages import whole_pages

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_LOOKS = 2000
"""Before a rank that waits gives its core to others."""


class Rows:
    """Memory that all ranks see.

    Parameters
    ----------
    comm : Communicator
        Of a single node that shares memory, see `rows`.
    size : int
        Elements of each array, the same on all ranks.
    dtype : dtype
        Of the elements.

    Attributes
    ----------
    arrays : tuple of array, each of shape (size,)
        In rank order, each in the memory next to its rank.

    Notes
    -----
    Collective.
    """

    def __init__(self, comm: Communicator, size: int, dtype: DType) -> None:
        padded = whole_pages(size * dtype.itemsize) // dtype.itemsize
        block = comm.shared((comm.size, padded), dtype)
        self.arrays: tuple[Array, ...] = tuple(row[:size] for row in block)
        self._comm, own = comm, slice(comm.rank * padded, (comm.rank + 1) * padded)
        fence = comm._moves().plan_allgather(block.reshape(-1), own.start, own.stop)
        assert fence is not None, "the transport shares no memory"
        self._fence = fence

    def publication(self, operation: str, size: int) -> Callable[[], None]:
        """Return what makes all ranks' arrays seen, once all have called it, and counts as an operation on them.

        Parameters
        ----------
        operation : {"allreduce", "reduce_scatter"}
            What the ranks perform by reading.
        size : int
            Of how many elements.
        """
        return self._counted(operation, size, self._fence)

    def reading(self, operation: str, size: int, read: Callable[[], object]) -> Callable[[], None]:
        """Return what makes the arrays seen, reads them, and returns once all ranks have; counted as above."""

        def run() -> None:
            self._fence()
            read()
            self._fence()

        return self._counted(operation, size, run)

    def departures(self) -> Departures:
        """Return what tells that ranks have read enough.  Collective."""
        return Departures(self._comm, self._fence)

    def _counted(self, operation: str, size: int, run: Callable[[], object]) -> Callable[[], None]:
        own = self.arrays[self._comm.rank][:size]
        call = Call(operation, dtype=own.dtype, send=own, recv=own, op="sum")
        return watched(self._comm, Prepared(f"{operation}_plan", [call], lambda: None, own), run)


class Departures:
    """A barrier in two halves: what a rank does in between costs the others no wait.

    Parameters
    ----------
    comm : Communicator
        As of `Rows`.
    fence : callable
        Of the node.

    Notes
    -----
    As `mpitrain.comm.transports.fence`, it relies on x86's order of loads and stores: no store, hence no `leave`,
    overtakes an earlier load.  On other machines nobody looks for what `leave` writes, and ``wait`` is the node's whole
    fence.  Waiting is in sight of watchdog and ledger.
    """

    def __init__(self, comm: Communicator, fence: Callable[[], object]) -> None:
        lines = comm.shared((comm.size, LINE_BYTES // 8), np.dtype(np.int64))
        self._lines = [memoryview(line) for line in lines]
        self._own, self._number = self._lines[comm.rank], 0
        called = Prepared("barrier", [Call("barrier")], lambda: None)
        self.wait = watched(comm, called, fence if needs_barrier() else self._wait)

    def leave(self) -> None:
        """Let the others know that this rank has done."""
        self._number += 1
        self._own[0] = self._number

    def _wait(self) -> None:
        """Return once all ranks have left as often as this one."""
        looks = 0
        for line in self._lines:
            while line[0] < self._number:
                looks += 1
                if looks > _LOOKS:
                    os.sched_yield()


def rows(comm: Communicator, size: int, dtype: DType) -> Rows | None:
    """Return such memory; None where the ranks are not all on one node that shares its own.  Collective."""
    if comm.size == 1 or comm.transport != "shared" or comm.node.size != comm.size:
        return None
    return Rows(comm, size, dtype)
