"""Memory of a device through page-locked host memory: works with every MPI library, and for every call.

Reductions in place and broadcasts are pipelined chunk by chunk; the host reduces them as it would a host array of that
size, in shared memory where it can.  Other calls go down whole, and their result goes up whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from mpitrain._typing import Array
from mpitrain.arrays.devices import Stream
from mpitrain.comm import algorithms
from mpitrain.comm.buffers import Passage, chunks
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.transports.device import DeviceTransport

_PIPELINED = ("allreduce", "reduce", "broadcast")


class StagedTransport(DeviceTransport):
    """Down, through MPI, and up again."""

    name: ClassVar[str] = "staged"

    def assign(self, call: Call) -> Call:
        """Say in how many parts it travels, and by which algorithm on the host."""
        whole = max(side.nbytes for side in (call.send, call.recv) if side is not None)
        parts = chunks(whole) if call.operation in _PIPELINED else 1
        name = call.algorithm or algorithms.tabled(self._comm, call.operation, -(-whole // parts))
        return replace(call, parts=parts, algorithm=None if name == algorithms.DEFAULT else name)

    def run(self, call: Call) -> None:
        """Perform a call."""
        stream = _stream(call)
        if call.operation not in _PIPELINED:
            passage = Passage(self._staging(stream), call, *_ways(call, self._comm.rank))
            self._comm._perform(passage.call)
            passage.finish()
            return
        assert call.recv is not None
        self._staging(stream).pipeline(call.recv, stream, self._chunk_mover(call), *_ways(call, self._comm.rank))

    def begin(self, call: Call) -> Handle:
        """Begin a call: its values are on the host when this returns."""
        passage = Passage(self._staging(_stream(call)), call, *_ways(call, self._comm.rank))
        return _Begun(self._comm._begin(passage.call), passage)

    def _chunk_mover(self, call: Call) -> Callable[[Array], None]:
        return lambda words: self._comm._perform(replace(call, recv=words, stream=None, parts=1))


class _Begun:
    """A call that is under way on the host, and memory of a device that waits for its result."""

    def __init__(self, handle: Handle, passage: Passage) -> None:
        self._handle, self._passage = handle, passage

    def wait(self) -> None:
        self._handle.wait()
        self._passage.finish()

    def test(self) -> bool:
        return self._handle.test()


def _stream(call: Call) -> Stream:
    assert call.stream is not None
    return call.stream


def _ways(call: Call, rank: int) -> tuple[bool, bool]:
    """Tell whether the host needs what ``recv`` holds before, and the device what it holds afterwards."""
    match call.operation:
        case "allreduce":
            return True, True
        case "reduce":
            return True, call.root == rank
        case "broadcast":
            return call.root == rank, call.root != rank
        case _:
            return False, True
