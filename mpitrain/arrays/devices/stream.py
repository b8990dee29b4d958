"""A device as the collectives see it: a stream of work that takes effect later.  No library is named or imported here.

Only `Stream.synchronize` and `Event.synchronize` block.  All other calls queue work and return.  The work of one stream
takes effect in the order in which it was queued.  Between two streams there is no order, unless one of them is told to
wait for an event of the other.  The host must synchronise before it reads what a stream writes, or overwrites what a
stream reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Protocol

from mpitrain._typing import Array, DType


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Block until the stream has come there."""
        ...


class Beacon(Protocol):
    """A point in a stream of one process that streams of other processes can wait for; another one at each `light`."""

    def light(self, stream: Stream) -> None:
        """Set it to where a stream of this process is now."""
        ...

    def follow(self, stream: Stream) -> None:
        """Let what a stream is given from now on take effect after the point to which it was set last."""
        ...

    def close(self) -> None:
        """Let go of another process's."""
        ...


class Stream(ABC):
    """A queue of work on one device.

    Attributes
    ----------
    device : Hashable
        The device; equal for all streams of one.

    Notes
    -----
    *Words* are one-dimensional, contiguous arrays in the device's memory, of types that MPI knows: 16-bit floats are
    uint16, bool is uint8 (`mpitrain.arrays.dtypes.storage`).  Slices of words are words.
    """

    device: Hashable

    @abstractmethod
    def fork(self) -> Stream:
        """Return another stream of the device, which waits for no other by itself."""

    # Order.

    @abstractmethod
    def record(self) -> Event:
        """Return the point up to which work is queued now."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let what is queued from now on take effect after an event of another stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until all that is queued has taken effect."""

    # Memory.

    @abstractmethod
    def empty(self, elements: int, dtype: DType) -> Array:
        """Return new words, whose memory may still be in use by what was queued on this stream before."""

    @abstractmethod
    def pinned(self, nbytes: int) -> Array:
        """Return page-locked host memory, as bytes: a NumPy array of uint8."""

    # What other processes see.  CommunicationError: the driver refuses.

    @abstractmethod
    def share(self, nbytes: int) -> tuple[Array, bytes]:
        """Return new memory, as words of uint8, and the name by which other processes `open` it."""

    @abstractmethod
    def open(self, name: bytes, nbytes: int) -> Array:
        """Return memory of another process, which the device can reach, as words of uint8."""

    @abstractmethod
    def close(self, opened: Array) -> None:
        """Let go of another process's memory, which nothing that is queued uses any more; before that frees it."""

    @abstractmethod
    def beacon(self) -> tuple[Beacon, bytes]:
        """Return a beacon of this process, and the name by which others `sight` it."""

    @abstractmethod
    def sight(self, name: bytes) -> Beacon:
        """Return a beacon of another process."""

    # Work.

    @abstractmethod
    def copy(self, values: Array, into: Array, dtype: DType) -> None:
        """Copy within the device, whatever the strides.

        Parameters
        ----------
        values, into : device array, of the same shape
        dtype : dtype
            What the values are.  Of 16-bit floats, each side has either words or float32 values.
        """

    @abstractmethod
    def download(self, words: Array, into: Array) -> None:
        """Copy words to page-locked memory: a NumPy array of the same dtype and size."""

    @abstractmethod
    def upload(self, values: Array, into: Array) -> None:
        """Copy page-locked memory to words of the same dtype and size."""

    @abstractmethod
    def combine(self, op: str, left: Array, right: Array, out: Array) -> None:
        """Reduce two words each to one.

        Parameters
        ----------
        op : {"sum", "prod", "min", "max", "and", "or"}
        left, right, out : words of the same dtype and size
            ``out`` may be one of the others.
        """

    @abstractmethod
    def divide(self, words: Array, divisor: int) -> None:
        """Divide float or complex words in place."""
