"""What moves memory of a device, on top of a backend that moves host memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, ClassVar

from mpitrain.arrays.devices import Stream
from mpitrain.comm.buffers import Staging
from mpitrain.comm.calls import Call, Handle

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


class DeviceTransport(ABC):
    """One way to perform calls on memory of a device.

    Parameters
    ----------
    comm : Communicator
        The communicator, which performs what this comes down to.

    Attributes
    ----------
    name : str
        As ``MPITRAIN_DEVICE_TRANSPORT`` calls it.

    Notes
    -----
    Making one communicates nothing.  Calls other than reductions and broadcasts exchange the same messages as those on
    host memory, so that there one rank's array may be on a device and another's not.
    """

    name: ClassVar[str]

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._stagings: dict[Hashable, Staging] = {}

    @abstractmethod
    def assign(self, call: Call) -> Call:
        """Return a call with what all ranks must agree on about the way it is performed."""

    @abstractmethod
    def run(self, call: Call) -> None:
        """Perform a call; what its stream is given afterwards comes behind it."""

    @abstractmethod
    def begin(self, call: Call) -> Handle:
        """Begin a call, which names no algorithm.  Once it is complete, every stream sees the result."""

    def release(self) -> None:  # noqa: B027
        """Let go of what other ranks see of this one's device, where they do.  Collective."""

    def _staging(self, stream: Stream) -> Staging:
        if stream.device not in self._stagings:
            self._stagings[stream.device] = Staging(stream)
        return self._stagings[stream.device]
