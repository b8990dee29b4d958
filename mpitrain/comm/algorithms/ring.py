"""Round the ring: every rank sends to the next and receives from the one before, a share at a time.

Each share is sent p−1 times to be reduced and p−1 times to be known to all, which is the least that any algorithm can
move.  P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69, 2009.
"""

from __future__ import annotations

from collections.abc import Iterator

from mpitrain._typing import Array
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import Bounds, Combine, share

SEGMENT_BYTES = 1 << 19
"""A share is reduced in segments of this size: one arrives while the one before it is combined, still in the cache."""


def reduce_scatter(links: Links, words: Array, bounds: Bounds, combine: Combine) -> None:
    """Reduce the own share in place; the others hold partial results afterwards."""
    for step in range(1, links.size):
        given = share(words, bounds, links.rank - step)
        kept = share(words, bounds, links.rank - step - 1)
        _pass_on(links, given, kept, combine)


def allgather(links: Links, words: Array, bounds: Bounds) -> None:
    """Fill in the other ranks' shares."""
    before, after = (links.rank - 1) % links.size, (links.rank + 1) % links.size
    for step in range(links.size - 1):
        given = share(words, bounds, links.rank - step)
        links.sendrecv(given, after, share(words, bounds, links.rank - step - 1), before)


def _pass_on(links: Links, given: Array, kept: Array, combine: Combine) -> None:
    """Send a partial result to the next rank while what the rank before sends is combined into ``kept``."""
    before, after = (links.rank - 1) % links.size, (links.rank + 1) % links.size
    parts = list(_segments(kept))
    length = parts[0].size if parts else 0
    landing = links.scratch("landing", 2 * length, kept.dtype).reshape(2, length)
    slots = [landing[i % 2, : part.size] for i, part in enumerate(parts)]
    arrivals = [links.begin_recv(slot, before) for slot in slots[:1]]
    departures = [links.begin_send(part, after) for part in _segments(given)]
    for i, (part, slot) in enumerate(zip(parts, slots, strict=True)):
        arrivals += [links.begin_recv(following, before) for following in slots[i + 1 : i + 2]]
        arrivals[i].wait()
        combine(slot, part, out=part)
    for departure in departures:
        departure.wait()


def _segments(words: Array) -> Iterator[Array]:
    length = max(1, SEGMENT_BYTES // words.itemsize)
    return (words[start : start + length] for start in range(0, words.size, length))
