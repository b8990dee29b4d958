"""One rank's messages as the algorithms send them: flat words to a rank, counted, and scratch memory that is kept.

They pass by the checks and copies of the public methods, for a `Call` was checked before an algorithm sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.checks import OWN_TAG

if TYPE_CHECKING:
    from mpitrain.comm.algorithms.hierarchical import Hierarchy
    from mpitrain.comm.communicator import Communicator


class Links:
    """Messages between this rank and the others of a communicator.

    Parameters
    ----------
    comm : Communicator
        Its backend performs the messages, and its ledger counts them.

    Attributes
    ----------
    rank, size : int
        The communicator's.
    hierarchy : Hierarchy or None
        Its nodes, once the hierarchical algorithm has looked at them.

    Notes
    -----
    Words are one-dimensional, contiguous arrays, in host memory unless a subclass says otherwise.  Both sides of a
    message know its length, so that an empty one is not sent.
    """

    def __init__(self, comm: Communicator) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.hierarchy: Hierarchy | None = None
        self.comm = comm
        self._scratch: dict[str, Array] = {}
        self._messages = self._bytes = 0

    def send(self, words: Array, dest: int) -> None:
        """Send words to a rank."""
        if words.size:
            self.comm._run(self._sent(words, dest))

    def recv(self, into: Array, source: int) -> None:
        """Receive words from a rank."""
        if into.size:
            self.comm._run(self._wanted(into, source))

    def sendrecv(self, words: Array, dest: int, into: Array, source: int) -> None:
        """Send to one rank while receiving from another."""
        arrival = self.begin_recv(into, source) if into.size else None
        self.send(words, dest)
        if arrival is not None:
            arrival.wait()

    def exchange(self, sent: Iterable[tuple[Array, int]], wanted: Iterable[tuple[Array, int]]) -> None:
        """Send (words, dest) and receive (words, source), all at the same time."""
        handles = [self.begin_recv(into, source) for into, source in wanted if into.size]
        handles += [self.begin_send(words, dest) for words, dest in sent if words.size]
        for handle in handles:
            handle.wait()

    def begin_send(self, words: Array, dest: int) -> Handle:
        """Begin to send words, of which there is at least one."""
        return self.comm._begin(self._sent(words, dest))

    def begin_recv(self, into: Array, source: int) -> Handle:
        """Begin to receive words, of which there is at least one."""
        return self.comm._begin(self._wanted(into, source))

    def scratch(self, purpose: str, elements: int, dtype: DType) -> Array:
        """Return memory for a purpose, the same at every call; its contents are arbitrary."""
        needed = elements * dtype.itemsize
        memory = self._scratch.get(purpose)
        if memory is None or memory.size < needed:
            memory = self._scratch[purpose] = self._empty(needed)
        return memory[:needed].view(dtype)

    def copy(self, words: Array, into: Array) -> None:
        """Copy words of this rank's to another place."""
        into[...] = words

    def book(self, operation: str) -> None:
        """Enter in the ledger what was sent since the last entry."""
        self.comm.ledger.moved(operation, self._messages, self._bytes)
        self._messages = self._bytes = 0

    def _empty(self, nbytes: int) -> Array:
        return np.empty(nbytes, np.uint8)

    def _sent(self, words: Array, dest: int) -> Call:
        self._messages += 1
        self._bytes += words.nbytes
        return Call("send", dtype=words.dtype, send=words, peer=dest, tag=OWN_TAG)

    def _wanted(self, into: Array, source: int) -> Call:
        return Call("recv", dtype=into.dtype, recv=into, peer=source, tag=OWN_TAG)
