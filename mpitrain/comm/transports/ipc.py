"""Ranks of a node, or of one GPU, that read each other's device memory: collectives without the host or MPI.

Arrays are copied to a window that all ranks have mapped (`mpitrain.comm.buffers.Window`), and kernels of the device
fold them, always in the order of the ranks.  Messages, nonblocking calls, scatters, exchanges of unequal shares, and
calls that name an algorithm go another way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from mpitrain._typing import Array, DType
from mpitrain.arrays.devices import Stream
from mpitrain.comm.buffers import Window, behind
from mpitrain.comm.calls import Call
from mpitrain.comm.transports.device import DeviceTransport, PartialTransport, one_gpu

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

WINDOW_BYTES = 64 * 1024 * 1024
"""A rank's part of the window, at most: longer arrays go through it piece by piece."""

LEAST_BYTES = 1024 * 1024
"""And at least: a window is replaced by a larger one where it has to be."""

SHORT_BYTES = 256 * 1024
"""Up to here every rank folds whole arrays, which takes one fence; above, its shard, which takes two and moves fewer
bytes where there are more than two ranks.  Not measured on several GPUs."""


class IpcTransport(PartialTransport):
    """Windows between processes, reductions by the device."""

    name: ClassVar[str] = "ipc"

    def __init__(self, comm: Communicator, rest: DeviceTransport, insists: bool = True) -> None:
        super().__init__(comm, rest, insists)
        self._window: Window | None = None
        self._ways = {
            "allreduce": self._reduce, "reduce": self._reduce, "broadcast": self._broadcast,
            "allgather": self._gather, "gather": self._gather,
            "reduce_scatter": self._exchange, "alltoall": self._exchange,
        }  # fmt: skip

    def release(self) -> None:
        """Close the window.  Collective."""
        self._close()
        super().release()

    def _takes(self, call: Call) -> bool:
        return call.operation in self._ways and call.recv_counts is None and self._comm.size > 1

    def _open(self, call: Call, stream: Stream) -> None:
        """Make a window that has room for parts as long as the call's, or as long as they may be."""
        if self._window is not None:
            one_gpu(call.operation, self._window.stream, stream)
        nbytes = min(self._extent(call), WINDOW_BYTES)
        if self._window is None or self._window.nbytes < nbytes:
            room = 1 << (max(nbytes, LEAST_BYTES) - 1).bit_length()
            with self._comm._aside():
                self._close()
                self._window = Window(stream, self._meetings(), room)

    def _close(self) -> None:
        window, self._window = self._window, None
        if window is not None:
            window.close()

    def _perform(self, call: Call, stream: Stream) -> None:
        if self._extent(call):
            assert self._window is not None
            with behind(stream, self._window.stream):
                self._ways[call.operation](self._window, call)

    def _extent(self, call: Call) -> int:
        """Return the bytes of the longest part of the window that a rank could fill; the same on all ranks."""
        if call.operation in ("allgather", "gather"):
            assert call.send is not None
            return max(self._counts(call)) * call.send.itemsize
        if call.operation in ("reduce_scatter", "alltoall"):
            assert call.send is not None
            return max(self._counts(call)) * self._comm.size * call.send.itemsize
        assert call.recv is not None
        return call.recv.nbytes

    def _counts(self, call: Call) -> Sequence[int]:
        """Return how many elements each rank's share has."""
        assert call.send is not None
        shares = 1 if call.operation in ("allgather", "gather") else self._comm.size
        return call.counts or [call.send.size // shares] * self._comm.size

    def _reduce(self, window: Window, call: Call) -> None:
        """Reduce to all ranks, or to the root."""
        assert call.recv is not None
        assert call.op is not None
        receives = call.root in (None, self._comm.rank)
        for begin, end in _slices(call.recv.size, window.nbytes // call.recv.itemsize):
            part = call.recv[begin:end]
            if self._comm.size > 2 and part.nbytes > SHORT_BYTES:
                self._reduce_by_shards(window, part, call.op, receives)
            else:
                self._show(window, part)
                if receives:
                    _fold(window.stream, call.op, self._parts(window, 0, part.size, part.dtype), part)

    def _reduce_by_shards(self, window: Window, part: Array, op: str, receives: bool) -> None:
        """Each rank folds its shard, and shows it in the place of its own values there, which nobody else reads."""
        size, rank = self._comm.size, self._comm.rank
        edges = [part.size * each // size for each in range(size + 1)]
        own = slice(edges[rank], edges[rank + 1])
        self._show(window, part)
        _fold(window.stream, op, self._parts(window, own.start, own.stop, part.dtype), part[own])
        _copy(window.stream, part[own], window.words(rank, own.start, own.stop, part.dtype))
        window.fence()
        for each in range(size) if receives else ():
            if each != rank:
                begin, end = edges[each], edges[each + 1]
                _copy(window.stream, window.words(each, begin, end, part.dtype), part[begin:end])

    def _broadcast(self, window: Window, call: Call) -> None:
        assert call.recv is not None
        assert call.root is not None
        for begin, end in _slices(call.recv.size, window.nbytes // call.recv.itemsize):
            part = call.recv[begin:end]
            self._show(window, part if self._comm.rank == call.root else part[:0])
            if self._comm.rank != call.root:
                _copy(window.stream, window.words(call.root, 0, part.size, part.dtype), part)

    def _gather(self, window: Window, call: Call) -> None:
        """Collect every rank's share on all ranks, or on the root."""
        assert call.send is not None
        counts = self._counts(call)
        for begin, end in _slices(max(counts), window.nbytes // call.send.itemsize):
            self._show(window, call.send[begin:end])
            if call.recv is not None:
                for rank, place in enumerate(_places(call.recv, counts)):
                    into = place[begin:end]
                    _copy(window.stream, window.words(rank, 0, into.size, into.dtype), into)

    def _exchange(self, window: Window, call: Call) -> None:
        """Give every rank its share of what each has: folded to one, or side by side."""
        assert call.send is not None
        assert call.recv is not None
        size, rank, dtype, counts = self._comm.size, self._comm.rank, call.send.dtype, self._counts(call)
        stride = window.nbytes // dtype.itemsize // size
        for begin, end in _slices(max(counts), stride):
            window.turn()
            for each, share in enumerate(_places(call.send, counts)):
                given = share[begin:end]
                _copy(window.stream, given, window.words(rank, each * stride, each * stride + given.size, dtype))
            window.fence()
            if call.op is not None:
                into, first = call.recv[begin:end], rank * stride
                _fold(window.stream, call.op, self._parts(window, first, first + into.size, dtype), into)
            else:
                for each, place in enumerate(_places(call.recv, counts)):
                    into = place[begin:end]
                    found = window.words(each, rank * stride, rank * stride + into.size, dtype)
                    _copy(window.stream, found, into)

    def _show(self, window: Window, words: Array) -> None:
        """Let all ranks see words of this one."""
        window.turn()
        _copy(window.stream, words, window.words(self._comm.rank, 0, words.size, words.dtype))
        window.fence()

    def _parts(self, window: Window, begin: int, end: int, dtype: DType) -> list[Array]:
        return [window.words(rank, begin, end, dtype) for rank in range(self._comm.size)]


def _slices(elements: int, most: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + most, elements)) for begin in range(0, elements, most))


def _places(words: Array, counts: Sequence[int]) -> Iterator[Array]:
    """Yield each rank's share."""
    begin = 0
    for count in counts:
        yield words[begin : begin + count]
        begin += count


def _copy(stream: Stream, words: Array, into: Array) -> None:
    if words.size:
        stream.copy(words, into, words.dtype)


def _fold(stream: Stream, op: str, terms: Sequence[Array], out: Array) -> None:
    """Reduce words from left to right."""
    if out.size:
        stream.combine(op, terms[0], terms[1], out)
        for term in terms[2:]:
            stream.combine(op, out, term, out)
