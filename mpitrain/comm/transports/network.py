"""The transport of ranks that have a node each: large arrays go through a pipeline of messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.dtypes import is_half
from mpitrain.comm.algorithms.pipelined import cut, reduce_pieces
from mpitrain.comm.buffers import wire
from mpitrain.comm.dtypes import UFUNCS
from mpitrain.comm.transports.far import PIPELINED_FROM_BYTES
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.transport import Planned

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


class NetworkTransport(HostTransport):
    """Ordinary memory; small arrays are left to the communicator's own way.

    Parameters
    ----------
    comm : Communicator
        The ranks.
    """

    name = "network"

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.least_bytes = self.always_left_bytes = PIPELINED_FROM_BYTES

    def allreduce(self, send: Array, recv: Array, op: str) -> bool:
        """Reduce an array into another where this transport is the faster way; copy as the pipeline takes pieces in."""
        if recv.nbytes < self.least_bytes:
            return False
        _quietly(self._reduction(send, recv, op, 0))
        self._comm._links.book("allreduce")
        return True

    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out a reduction."""
        if buffer.nbytes < self.least_bytes or is_half(buffer.dtype):
            return None
        own = buffer if in_place else np.empty_like(buffer)
        mean = op == "mean"
        values = wire(own)
        source = values if in_place else wire(buffer)
        run = self._reduction(source, values, "sum" if mean else op, self._comm.size if mean else 0)
        result = own if in_place else own.view()
        if not in_place:
            result.flags.writeable = False
        return Planned(partial(_quietly, run), result)

    def _reduction(self, source: Array, values: Array, op: str, divisor: int) -> Callable[[], None]:
        """Return what reduces flat values that are copied from elsewhere first, or are there."""
        given, pieces = (cut(array, self._comm.size) for array in (source, values))
        before = None if source is values else lambda i: np.copyto(pieces[i], given[i])
        return partial(reduce_pieces, self._comm._links, pieces, UFUNCS[op], divisor, before)


def _quietly(run: Callable[[], None]) -> None:
    """Perform a reduction.  An overflow is the result's to show, as with the MPI library."""
    with np.errstate(all="ignore"):
        run()
