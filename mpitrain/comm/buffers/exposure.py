"""Before others are shown memory of a device: what was queued there must have taken effect, or come first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mpitrain.arrays.devices import Stream


def settle(stream: Stream) -> None:
    """Wait until a stream has done what it was given.

    From then on MPI may read what it has made, write over what it has read, and another stream may use its scratch
    memory.
    """
    stream.synchronize()


@contextmanager
def behind(stream: Stream, work: Stream) -> Iterator[None]:
    """Queue on ``work`` in the block, behind what a stream was given; what that is given afterwards comes behind it."""
    work.wait(stream.record())
    try:
        yield
    finally:
        stream.wait(work.record())
