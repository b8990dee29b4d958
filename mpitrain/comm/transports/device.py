"""What moves memory of a device, on top of a backend that moves host memory."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from mpitrain._errors import CommunicationError, InputError, MissingExtraError
from mpitrain.arrays.devices import Stream
from mpitrain.comm import algorithms
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
    Making one communicates nothing.
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


class PartialTransport(DeviceTransport):
    """A way for some calls, which all ranks go on memory of devices; the rest go another way.

    Parameters
    ----------
    rest : DeviceTransport
        For messages, nonblocking calls, those that name an algorithm, and others that this one leaves to it; and for
        all where this one cannot be opened.
    insists : bool
        Let what cannot be opened be an error.
    """

    def __init__(self, comm: Communicator, rest: DeviceTransport, insists: bool) -> None:
        super().__init__(comm)
        self._rest, self._insists = rest, insists
        self._works = True
        self._private: Communicator | None = None

    @abstractmethod
    def _takes(self, call: Call) -> bool:
        """Tell whether this is the way of a call that names no algorithm; the same on all ranks."""

    @abstractmethod
    def _open(self, call: Call, stream: Stream) -> None:
        """Make ready what a call needs.  Collective; an error is one on all ranks."""

    @abstractmethod
    def _perform(self, call: Call, stream: Stream) -> None:
        """Perform a call; what its stream is given afterwards comes behind it."""

    def assign(self, call: Call) -> Call:
        """Name this way as the algorithm, which debug mode compares, or let the rest choose."""
        if self._works and call.algorithm in (None, algorithms.DEFAULT) and self._takes(call):
            return replace(call, algorithm=self.name)
        return self._rest.assign(call)

    def run(self, call: Call) -> None:
        """Perform a call, this way or by the rest."""
        if call.algorithm != self.name:
            self._rest.run(call)
            return
        assert call.stream is not None
        self._make_ready(call, call.stream)
        if self._works:
            self._perform(call, call.stream)
        else:
            self._rest.run(self._rest.assign(replace(call, algorithm=None)))

    def begin(self, call: Call) -> Handle:
        """Leave it to the rest."""
        return self._rest.begin(call)

    def release(self) -> None:
        """Let the rest go, too."""
        self._rest.release()

    def _make_ready(self, call: Call, stream: Stream) -> None:
        """Open this way; if it was probed and yet cannot be opened, give it up and say so."""
        try:
            self._open(call, stream)
        except (CommunicationError, MissingExtraError) as error:
            if self._insists:
                raise
            self._works = False
            self._comm._device_way = self._comm._device_way.without(self.name, str(error))
            if self._comm.rank == 0:
                instead = f"{self._rest.name} is used instead of {self.name}"
                warnings.warn(f"{instead}, which was probed, but: {error}", RuntimeWarning, stacklevel=2)

    def _meetings(self) -> Communicator:
        """Return a communicator for this way alone: who makes another call must not be taken for one who meets here."""
        if self._private is None:
            self._private = self._comm.split(0, axis=self.name)
            self._comm._keep(self._private)
        assert self._private is not None
        return self._private


def one_gpu(operation: str, before: Stream, now: Stream) -> None:
    """Refuse arrays of one rank on several GPUs.

    Raises
    ------
    InputError
        They are.
    """
    if before.device != now.device:
        raise InputError(
            "arrays of one rank are on several GPUs", operation=operation, expected="one GPU for each rank",
            got=f"GPU {now.device} after GPU {before.device}", remedy="set MPITRAIN_DEVICE_TRANSPORT=staged",
        )  # fmt: skip
