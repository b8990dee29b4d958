"""Before MPI is shown memory of a device: what was queued there must have taken effect."""

from __future__ import annotations

from mpitrain.arrays.devices import Stream


def settle(stream: Stream) -> None:
    """Wait until a stream has done what it was given.

    From then on MPI may read what it has made, write over what it has read, and another stream may use its scratch
    memory.
    """
    stream.synchronize()
