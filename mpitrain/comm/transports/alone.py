"""The only rank of a communicator, which has what it sums, and keeps it on its device."""

from __future__ import annotations

from typing import ClassVar

from mpitrain.arrays.devices import Stream
from mpitrain.comm.calls import Call
from mpitrain.comm.transports.device import PartialTransport


class AloneTransport(PartialTransport):
    """Copies within the device, where the result has another place; nonblocking calls and messages go another way."""

    name: ClassVar[str] = "alone"

    def _takes(self, call: Call) -> bool:
        return call.peer is None and call.recv_counts is None  # which the rest checks

    def _open(self, call: Call, stream: Stream) -> None:
        """There is nothing to open."""

    def _perform(self, call: Call, stream: Stream) -> None:
        if call.send is not None and call.recv is not None:
            stream.copy(call.send, call.recv, call.send.dtype)
