"""Memory of a device handed to an MPI library that takes it, and reduced by kernels of the device.

The library moves it: messages, broadcasts and exchanges.  It never reduces it, since Open MPI's reductions of device
memory go through plain host memory: that is done by mpitrain's own algorithms over messages.  It never gets it in a
nonblocking collective, which crashes (open-mpi/ompi#9845): those are staged.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.devices import Stream
from mpitrain.comm import algorithms, pieces
from mpitrain.comm.algorithms import Links
from mpitrain.comm.buffers import settle
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.transports.device import DeviceTransport
from mpitrain.comm.transports.staged import StagedTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

SHORT_BYTES = 64 * 1024
"""Up to here fewer messages are worth more than fewer bytes.  Not measured on a device yet."""

_ALGORITHMS = {"allreduce": ("doubling", "ring"), "reduce": ("tree", "ring"), "reduce_scatter": ("recursive", "ring")}
"""By operation, for short arrays and for long ones."""

_ON_HOST = ("hierarchical", "pipelined")
"""Algorithms that compute on the host by other means than combining words."""


class CudaAwareTransport(DeviceTransport):
    """Pointers to device memory for MPI, reductions by the device."""

    name: ClassVar[str] = "cuda_aware"

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self._staged = StagedTransport(comm)
        self._links: DeviceLinks | None = None

    def assign(self, call: Call) -> Call:
        """Choose an algorithm for a reduction that names none, or would leave it to the library."""
        if call.algorithm == algorithms.DEFAULT:
            call = replace(call, algorithm=None)
        if call.algorithm in _ON_HOST or self._is_long(call):
            return self._staged.assign(call)
        if call.algorithm is not None or call.operation not in _ALGORITHMS:
            return call
        sides = (call.send, call.recv)
        nbytes = max(side.nbytes for side in sides if side is not None)
        return replace(call, algorithm=_ALGORITHMS[call.operation][nbytes > SHORT_BYTES])

    def run(self, call: Call) -> None:
        """Perform a call."""
        assert call.stream is not None
        if call.algorithm in _ON_HOST or self._is_long(call):
            self._staged.run(call)
        elif call.algorithm is not None:
            algorithms.perform(self._comm, call, self._links_on(call.stream))
            settle(call.stream)  # the next call may use the scratch memory on another stream
        else:
            settle(call.stream)
            self._comm._run(call)

    def begin(self, call: Call) -> Handle:
        """Begin a message; a collective is staged."""
        if call.peer is None:
            return self._staged.begin(call)
        assert call.stream is not None
        settle(call.stream)
        return self._comm._begin(call)

    def _is_long(self, call: Call) -> bool:
        """Tell whether it is left to the library, whose counts are too small for it."""
        own = call.algorithm is not None or call.operation in _ALGORITHMS
        return not own and pieces.is_long(call, self._comm.size)

    def _links_on(self, stream: Stream) -> DeviceLinks:
        if self._links is None or self._links.stream.device != stream.device:
            self._links = DeviceLinks(self._comm)
        self._links.stream = stream
        return self._links


class DeviceLinks(Links):
    """Messages between memory of devices, and scratch memory there.

    Attributes
    ----------
    stream : Stream
        On which the call under way combines words; MPI sees no pointer before it has come there.
    """

    stream: Stream

    def copy(self, words: Array, into: Array) -> None:
        """Copy words of this rank's to another place on the device."""
        self.stream.copy(words, into, words.dtype)

    def _empty(self, nbytes: int) -> Array:
        return self.stream.empty(nbytes, np.dtype(np.uint8))

    def _sent(self, words: Array, dest: int) -> Call:
        settle(self.stream)
        return super()._sent(words, dest)

    def _wanted(self, into: Array, source: int) -> Call:
        settle(self.stream)
        return super()._wanted(into, source)
