"""The transport that leaves everything to the MPI library (or, among threads, to the world that they share)."""

from __future__ import annotations

import math

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.flatbuffer import plain
from mpitrain.comm.transports.transport import Planned, Transport


class HostTransport(Transport):
    """Ordinary memory, and the communicator's own reductions."""

    name = "host"
    always_left_bytes = math.inf

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed memory of this rank's."""
        return plain(math.prod(shape), dtype).reshape(shape)

    def allreduce(self, send: Array, recv: Array, op: str) -> bool:
        """Reduce an array into another where this transport is the faster way."""
        return False

    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Lay out a reduction."""
        return None
