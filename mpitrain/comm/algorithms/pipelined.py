"""In a pipeline of small pieces: while ranks fold one piece of the array, others are under way in both directions.

Every rank owns an equal share of each piece: it collects all ranks' values of the share, folds them in rank order as
`ordered` does, and sends the result to all.  That moves as little as a ring does, and what limits it is the network:
measured, 0.99 of what TCP can carry over a link of 1 Gbit/s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.ordered import fold
from mpitrain.comm.algorithms.shares import Combine, even, in_place, share, ufunc
from mpitrain.comm.calls import Call, Handle

MESSAGE_BYTES = 63 * 1024
"""A share of a piece.  Over TCP, MPI libraries send up to 64 KiB, their own header included, unasked.  Longer ones are
asked for first, and question and answer stand in line behind the data under way, so that the two directions of a link
take turns: an allreduce of long messages between two nodes takes up to 1.5 times as long."""

LEAST_MESSAGE_BYTES = 16 * 1024
"""The same among many ranks."""

LANDING_BYTES = 1 << 20
"""Memory for what all ranks send of a piece."""

DEPTH = 4
"""Pieces that are under way at once, and again as many results."""


class _Piece(NamedTuple):
    words: Array
    landing: Array  # shape (ranks, size of the own share)
    arrivals: list[Handle]
    departures: list[Handle]


def piece_bytes(ranks: int) -> int:
    """Return the size of a piece for a number of ranks."""
    return ranks * max(LEAST_MESSAGE_BYTES, min(MESSAGE_BYTES, LANDING_BYTES // ranks))


def allreduce(links: Links, call: Call) -> None:
    """Reduce pieces of the array, a few of them at once."""
    reduce_pieces(links, cut(in_place(call), links.size), ufunc(call))


def cut(words: Array, ranks: int) -> list[Array]:
    """Return the pieces of an array."""
    length = max(1, piece_bytes(ranks) // words.itemsize)
    return [words[start : start + length] for start in range(0, words.size, length)]


def reduce_pieces(
    links: Links,
    pieces: Sequence[Array],
    combine: Combine,
    divisor: int = 0,
    before: Callable[[int], object] | None = None,
    after: Callable[[int], object] | None = None,
) -> None:
    """Perform an allreduce of flat pieces in place.

    Parameters
    ----------
    links : Links
        To the other ranks.
    pieces : sequence of array
        As many on all ranks, and as long; an array of `piece_bytes`, or less.
    combine : Combine
        Of two values.
    divisor : int
        What each result is divided by; 0: nothing.
    before, after : callable, optional
        Told the number of a piece: before its values are read, and when it holds the result; in order.
    """
    pipeline = _Pipeline(links, combine, divisor)
    count = len(pieces)
    for turn in range(count + 2 * DEPTH):
        if turn < count:
            if before is not None:
                before(turn)
            pipeline.begin(pieces[turn])
        if DEPTH <= turn < count + DEPTH:
            pipeline.fold()
        if turn >= 2 * DEPTH:
            pipeline.finish()
            if after is not None:
                after(turn - 2 * DEPTH)


class _Pipeline:
    """Pieces under way: each is begun, folded and finished, always the oldest first.

    Between two ranks the messages of both kinds, values and results, are sent in the order in which they are awaited,
    for all ranks begin and fold in the same turns.
    """

    def __init__(self, links: Links, combine: Combine, divisor: int) -> None:
        self._links, self._combine, self._divisor = links, combine, divisor
        self._others = [rank % links.size for rank in range(links.rank + 1, links.rank + links.size)]
        self._begun: deque[_Piece] = deque()
        self._folded: deque[_Piece] = deque()
        self._turn = 0

    def begin(self, words: Array) -> None:
        """Send every other rank this rank's values of its share."""
        bounds = even(words.size, self._links.size)
        own = share(words, bounds, self._links.rank)
        landing = self._landing(own)
        arrivals = self._recv([(landing[rank], rank) for rank in self._others])
        departures = self._send([(share(words, bounds, rank), rank) for rank in self._others])
        self._begun.append(_Piece(words, landing, arrivals, departures))

    def fold(self) -> None:
        """Fold the own share once all values are there, and send the result to all."""
        words, landing, arrivals, departures = self._begun.popleft()
        bounds, rank = even(words.size, self._links.size), self._links.rank
        own = share(words, bounds, rank)
        _wait(arrivals)
        fold([*landing[:rank], own, *landing[rank + 1 :]], own, self._combine)
        if self._divisor:
            np.divide(own, self._divisor, out=own)
        _wait(departures)  # whose memory the results come to
        arrivals = self._recv([(share(words, bounds, other), other) for other in self._others])
        departures = self._send([(own, other) for other in self._others])
        self._folded.append(_Piece(words, landing, arrivals, departures))

    def finish(self) -> None:
        """Wait until the whole piece is reduced."""
        piece = self._folded.popleft()
        _wait(piece.arrivals)
        _wait(piece.departures)

    def _landing(self, own: Array) -> Array:
        """Return memory for all ranks' values of the own share, which stays untouched for ``DEPTH`` more pieces."""
        self._turn = (self._turn + 1) % (DEPTH + 1)
        memory = self._links.scratch(f"landing{self._turn}", self._links.size * own.size, own.dtype)
        return memory.reshape(self._links.size, own.size)

    def _recv(self, wanted: list[tuple[Array, int]]) -> list[Handle]:
        return [self._links.begin_recv(into, source) for into, source in wanted if into.size]

    def _send(self, sent: list[tuple[Array, int]]) -> list[Handle]:
        return [self._links.begin_send(words, dest) for words, dest in sent if words.size]


def _wait(handles: list[Handle]) -> None:
    for handle in handles:
        handle.wait()
