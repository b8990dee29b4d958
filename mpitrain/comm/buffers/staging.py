"""Page-locked host memory between a device and MPI: kept from call to call, and filled and emptied in a pipeline.

While the host reduces one chunk, the device's copy engines bring the next one down and the one before up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from mpitrain._typing import Array, DType
from mpitrain.arrays.devices import Event, Stream
from mpitrain.comm.calls import Call

CHUNK_BYTES = 4 * 1024 * 1024
"""What is copied at a time; the same on all ranks, since each chunk is a collective.  A PCIe link carries it in some
0.2 ms, while its reduction on the host takes longer.  Not measured on a device yet."""

DEPTH = 3
"""Chunks under way: one on its way down, one on the host, one on its way up."""

_LEAST_BYTES = 64 * 1024


class Slot:
    """Page-locked memory, and the last copy that uses it."""

    def __init__(self, memory: Array) -> None:
        self.memory = memory
        self.last: Event | None = None

    def words(self, elements: int, dtype: DType) -> Array:
        """Return its first words."""
        return self.memory[: elements * dtype.itemsize].view(dtype)

    def settle(self) -> None:
        """Wait until no copy uses the memory any more."""
        if self.last is not None:
            self.last.synchronize()
            self.last = None


class Staging:
    """Copies between one device and page-locked memory, on two streams of their own.

    Parameters
    ----------
    stream : Stream
        Any of the device's.

    Notes
    -----
    Memory: up to `DEPTH` chunks, or what the longest message takes; kept.
    """

    def __init__(self, stream: Stream) -> None:
        self._down, self._up = stream.fork(), stream.fork()
        self._free: list[Slot] = []

    @contextmanager
    def behind(self, stream: Stream) -> Iterator[None]:
        """Copy in the block behind what a stream was given; what it is given afterwards comes behind the copies."""
        begun = stream.record()
        self._down.wait(begun)
        self._up.wait(begun)
        try:
            yield
        finally:  # after an error too: a copy may be under way to memory that is then handed out again
            stream.wait(self._up.record())

    @contextmanager
    def slots(self, count: int, nbytes: int) -> Iterator[list[Slot]]:
        """Lend page-locked memory of so many bytes each."""
        lent = [self.take(nbytes) for _ in range(count)]
        try:
            yield lent
        finally:
            self._free += lent

    def take(self, nbytes: int) -> Slot:
        """Return memory that nobody uses; copies from it may be under way."""
        fitting = [slot for slot in self._free if slot.memory.size >= nbytes]
        if fitting:
            slot = min(fitting, key=lambda each: each.memory.size)
            self._free.remove(slot)
            return slot
        if self._free:  # it is replaced by a larger one
            smaller = max(self._free, key=lambda each: each.memory.size)
            smaller.settle()
            self._free.remove(smaller)
        return Slot(self._up.pinned(1 << (max(nbytes, _LEAST_BYTES) - 1).bit_length()))

    def give_back(self, slot: Slot) -> None:
        """Take memory back."""
        self._free.append(slot)

    def download(self, words: Array, slot: Slot) -> None:
        """Begin to copy words down, once what is copied up from there is."""
        if slot.last is not None:
            self._down.wait(slot.last)
        self._down.download(words, slot.words(words.size, words.dtype))
        slot.last = self._down.record()

    def upload(self, slot: Slot, words: Array) -> None:
        """Begin to copy words up, which the host has written."""
        self._up.upload(slot.words(words.size, words.dtype), words)
        slot.last = self._up.record()

    def pipeline(
        self, words: Array, stream: Stream, move: Callable[[Array], None], down: bool, up: bool
    ) -> None:  # fmt: skip
        """Move words through the host, chunk by chunk.

        Parameters
        ----------
        words : words
            On the device.
        stream : Stream
            On which they were made, and the result is used.
        move : callable
            Given a chunk in host memory, communicates it in place.
        down, up : bool
            Whether the host needs what the device has, and the device what the host then has.
        """
        parts = list(_chunks(words))
        with self.slots(min(DEPTH, len(parts)), parts[0].nbytes) as slots, self.behind(stream):
            if down:
                self.download(parts[0], slots[0])
            for number, part in enumerate(parts):
                slot = slots[number % DEPTH]
                if down and number + 1 < len(parts):
                    self.download(parts[number + 1], slots[(number + 1) % DEPTH])
                slot.settle()
                move(slot.words(part.size, part.dtype))
                if up:
                    self.upload(slot, part)


def chunks(nbytes: int) -> int:
    """Return in how many parts words travel; an empty array in one, since all ranks of a collective take part."""
    return max(1, -(-nbytes // CHUNK_BYTES))


def _chunks(words: Array) -> Iterator[Array]:
    length = CHUNK_BYTES // words.itemsize
    for number in range(chunks(words.nbytes)):
        yield words[number * length : (number + 1) * length]


class Passage:
    """A call whose memory goes through the host whole.

    Parameters
    ----------
    staging : Staging
        Of the device.
    call : Call
        On memory of the device.
    down, up : bool
        Whether the host needs what ``recv`` holds before, and the device what it holds afterwards.

    Attributes
    ----------
    call : Call
        The same on host memory; what it needs is there.
    """

    def __init__(self, staging: Staging, call: Call, down: bool, up: bool) -> None:
        self._staging, self._recv = staging, call.recv if up else None
        self._slots: list[Slot] = []
        assert call.stream is not None
        with staging.behind(call.stream):
            send, recv = self._host(call.send, True), self._host(call.recv, down)
        for slot in self._slots:
            slot.settle()
        self.call = replace(call, send=send, recv=recv, stream=None)

    def finish(self) -> None:
        """Copy up what has arrived, wait until it is there, and let go of the device's memory."""
        if self._recv is not None:
            self._staging.upload(self._slots[-1], self._recv)
            self._slots[-1].settle()
            self._recv = None
        while self._slots:
            self._staging.give_back(self._slots.pop())

    def _host(self, words: Array | None, filled: bool) -> Array | None:
        if words is None:
            return None
        slot = self._staging.take(words.nbytes)
        self._slots.append(slot)
        if filled:
            self._staging.download(words, slot)
        return slot.words(words.size, words.dtype)
