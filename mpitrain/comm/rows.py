"""An array of each rank of a node, which all of them read where it lies.

What the ranks do with each other's arrays is theirs to say; here is where the arrays are, and what makes them seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mpitrain._typing import Array, DType
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.shard_plans import watched
from mpitrain.comm.transports.pages import whole_pages

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


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

    def publication(self) -> Callable[[], None]:
        """Return what makes all ranks' arrays seen, once all have called it, and counts as a reduce_scatter of them."""
        return self._counted(self.arrays[0].size, self._fence)

    def reading(self, size: int, read: Callable[[], object]) -> Callable[[], None]:
        """Return what makes the first elements seen, reads them, and returns once all ranks have; counted as above."""

        def run() -> None:
            self._fence()
            read()
            self._fence()

        return self._counted(size, run)

    def _counted(self, size: int, run: Callable[[], object]) -> Callable[[], None]:
        own = self.arrays[self._comm.rank][:size]
        call = Call("reduce_scatter", dtype=own.dtype, send=own, recv=own, op="sum")
        return watched(self._comm, Prepared("reduce_scatter_plan", [call], lambda: None, own), run)


def rows(comm: Communicator, size: int, dtype: DType) -> Rows | None:
    """Return such memory; None where the ranks are not all on one node that shares its own.  Collective."""
    if comm.size == 1 or comm.transport != "shared" or comm.node.size != comm.size:
        return None
    return Rows(comm, size, dtype)
