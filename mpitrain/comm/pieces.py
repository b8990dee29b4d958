"""Calls on more elements than the counts of MPI can say, cut into calls that they can.

Reductions and broadcasts are cut into ranges of elements; the others come down to these and to messages between two
ranks, which a backend must be able to send at any length.  Nothing here communicates or knows a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.calls import Call
from mpitrain.comm.checks import OWN_TAG

CHUNK_ELEMENTS = 1 << 30
"""The most that one call of the library's may move.  Its counts are 32-bit integers before MPI-4; half of their range
leaves room for what a library adds up inside."""


@dataclass(frozen=True)
class Pieces:
    """What a call was cut into.

    Parameters
    ----------
    calls : list of Call
        Messages may be performed in any order, collectives in this one.
    finish : callable
        Puts what has arrived in its place, once all are complete.
    """

    calls: list[Call]
    finish: Callable[[], None] = lambda: None


def is_long(call: Call, size: int) -> bool:
    """Tell whether a collective must be cut.

    All ranks find the same, but for a ragged ``alltoall``, where each knows its own counts only: there ``cut`` leaves
    a collective that the other ranks join, cut or not.
    """
    recv, send, share = call.recv, call.send, CHUNK_ELEMENTS // size
    if call.counts is None and (recv is None or recv.size <= share) and (send is None or send.size <= share):
        return False
    return call.peer is None and _elements(call, size) > CHUNK_ELEMENTS


def cut(call: Call, rank: int, size: int) -> Pieces:
    """Cut a long collective.

    Parameters
    ----------
    call : Call
        What `is_long`.
    rank, size : int
        Of the communicator.

    Notes
    -----
    The rank's own share is copied at once.
    """
    sent, wanted = _shares(call.send, call.counts, size), _shares(call.recv, call.recv_counts or call.counts, size)
    match call.operation:
        case "reduce_scatter":
            return Pieces(list(_reduce_scatter(call, rank, sent)))
        case "allgather":
            return Pieces(list(_allgather(call, rank, wanted)))
        case "gather":
            return Pieces(list(_messages(call, rank, _one(call.send, call.root, size), wanted)))
        case "scatter":
            return Pieces(list(_messages(call, rank, sent, _one(call.recv, call.root, size))))
        case "alltoall" if call.counts is None:
            return Pieces(list(_messages(call, rank, sent, wanted)))
        case "alltoall":
            return _ragged_alltoall(call, rank, sent, wanted)
        case _:
            return Pieces(list(_ranges(call)))


def _elements(call: Call, size: int) -> int:
    """Return how many elements all ranks' shares have together, or would if all were as long as the longest."""
    if call.counts is not None:
        return size * max(call.counts + call.recv_counts) if call.recv_counts is not None else sum(call.counts)
    most = max(side.size for side in (call.send, call.recv) if side is not None)
    is_share = (call.operation == "gather" and call.recv is None) or (call.operation == "scatter" and call.send is None)
    return int(most) * (size if is_share else 1)


def _shares(words: Array | None, counts: tuple[int, ...] | None, size: int) -> list[Array]:
    """Return every rank's share of an array."""
    if words is None:
        return []
    lengths = counts or (words.size // size,) * size
    return [words[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def _one(words: Array | None, root: int | None, size: int) -> list[Array]:
    """Return nothing for every rank, but all for the root."""
    assert words is not None
    return [words if rank == root else words[:0] for rank in range(size)]


def _ranges(call: Call) -> Iterator[Call]:
    """Cut a call that works in place."""
    words = call.recv
    assert words is not None
    for start in range(0, words.size, CHUNK_ELEMENTS):
        yield replace(call, recv=words[start : start + CHUNK_ELEMENTS])


def _reduce_scatter(call: Call, rank: int, parts: list[Array]) -> Iterator[Call]:
    """Reduce each share to its owner, in place there."""
    assert call.recv is not None
    call.recv[...] = parts[rank]
    parts[rank] = call.recv
    for owner, part in enumerate(parts):
        yield from _ranges(Call("reduce", dtype=call.dtype, recv=part, op=call.op, root=owner))


def _allgather(call: Call, rank: int, parts: list[Array]) -> Iterator[Call]:
    """Broadcast each share from its owner."""
    parts[rank][...] = call.send
    for owner, part in enumerate(parts):
        yield from _ranges(Call("broadcast", dtype=call.dtype, recv=part, root=owner))


def _messages(call: Call, rank: int, sent: list[Array], wanted: list[Array]) -> Iterator[Call]:
    """Send every rank its part and receive its own; empty ones are not sent, as both sides know."""
    if sent and wanted:
        wanted[rank][...] = sent[rank]
    for peer, part in enumerate(wanted):
        if peer != rank and part.size:
            yield Call("recv", dtype=call.dtype, recv=part, peer=peer, tag=OWN_TAG)
    for peer, part in enumerate(sent):
        if peer != rank and part.size:
            yield Call("send", dtype=call.dtype, send=part, peer=peer, tag=OWN_TAG)


def _ragged_alltoall(call: Call, rank: int, sent: list[Array], wanted: list[Array]) -> Pieces:
    """Send the long parts as messages, as both of their sides do, and all others in one exchange, packed."""
    longest = CHUNK_ELEMENTS // len(sent)
    messages = list(
        _messages(
            call, rank, *([part[: part.size * (part.size > longest)] for part in side] for side in (sent, wanted))
        )
    )
    given, taken = ([part[: part.size * (part.size <= longest)] for part in side] for side in (sent, wanted))
    landing = np.concatenate(taken)
    lengths = tuple(part.size for part in taken)
    exchange = replace(
        call, send=np.concatenate(given), recv=landing, counts=tuple(part.size for part in given), recv_counts=lengths
    )

    def finish() -> None:
        for part, arrived in zip(taken, _shares(landing, lengths, len(taken)), strict=True):
            part[...] = arrived

    return Pieces([*messages, exchange], finish)
