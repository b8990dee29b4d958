"""The transport that leaves everything to the MPI library (or, among threads, to the world that they share)."""

from __future__ import annotations

import math

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.flatbuffer import plain
from mpitrain.comm.transports.transport import Planned, Transport

LINE_BYTES = 64

BEHIND_A_PAGE_FROM_BYTES = 32 * 1024 * 1024
"""Memory from this size on begins a line behind a page's start, not with it.

MPI libraries reduce by way of temporaries of an array's size.  From 32 MiB on the C library maps each of them anew, and
hands out what begins 16 bytes behind a page's start.  To fill one with whole pages of another process took 6 to 9 %
longer than from memory that begins elsewhere in a page (Open MPI 5, 2 ranks, 33 to 64 MiB; less made no difference)."""


class HostTransport(Transport):
    """Ordinary memory, and the communicator's own reductions."""

    name = "host"
    always_left_bytes = math.inf

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory of this rank's."""
        size = math.prod(shape)
        behind = size * dtype.itemsize >= BEHIND_A_PAGE_FROM_BYTES
        ahead = LINE_BYTES // dtype.itemsize if behind else 0
        return plain(ahead + size, dtype)[ahead:].reshape(shape)

    def allreduce(self, send: Array, recv: Array, op: str) -> bool:
        """Reduce an array into another where this transport is the faster way."""
        return False

    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out a reduction."""
        return None
