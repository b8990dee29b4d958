"""Recursive halving and doubling: partners at distances p/2, p/4 … 1 halve what is left to reduce, and back again.

Together they are Rabenseifner's allreduce: R. Rabenseifner, "Optimization of collective reduction operations", ICCS
2004 (recursive halving and doubling); R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication
operations in MPICH", IJHPCA 19, 2005, sections 4.1 (allgather), 4.4 (reduce-scatter) and 4.5 (allreduce).
"""

from __future__ import annotations

from mpitrain._typing import Array
from mpitrain.comm.algorithms.core import Core
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import Bounds, Combine, even, in_place, share, ufunc
from mpitrain.comm.calls import Call


def allreduce(links: Links, call: Call) -> None:
    """Rabenseifner's: halve until each rank of the core has one block reduced, then double."""
    reduce_for_all(links, in_place(call), ufunc(call))


def reduce_for_all(links: Links, words: Array, combine: Combine) -> None:
    """Perform an allreduce of flat words in place."""
    core = Core(links)
    core.join(words, combine)
    if core.inside:
        blocks = even(words.size, core.size)
        _halve(core, links, words, blocks, combine)
        _double(core, links, words, blocks)
    core.hand_back(words)


def reduce_scatter(links: Links, words: Array, bounds: Bounds, combine: Combine) -> None:
    """Reduce the own share in place; the others hold partial results afterwards."""
    core = Core(links)
    core.join(words, combine)
    if core.inside:
        _halve(core, links, words, core.blocks(bounds), combine)
    core.hand_back(_wards(core, words, bounds))


def allgather(links: Links, words: Array, bounds: Bounds) -> None:
    """Fill in the other ranks' shares."""
    core = Core(links)
    core.hand_in(_wards(core, words, bounds))
    if core.inside:
        _double(core, links, words, core.blocks(bounds))
    core.hand_back(words)


def _halve(core: Core, links: Links, words: Array, blocks: Bounds, combine: Combine) -> None:
    """Reduce the core rank's block: with each partner, keep the half of the blocks that holds it and give the rest."""
    distance = core.size // 2
    while distance:
        kept = _blocks(words, blocks, core.rank, distance)
        given = _blocks(words, blocks, core.rank ^ distance, distance)
        arrived = links.scratch("landing", kept.size, words.dtype)
        peer = core.peer(distance)
        links.sendrecv(given, peer, arrived, peer)
        combine(kept, arrived, out=kept)
        distance //= 2


def _double(core: Core, links: Links, words: Array, blocks: Bounds) -> None:
    """Collect all blocks: with each partner, swap all that is known so far."""
    distance = 1
    while distance < core.size:
        known = _blocks(words, blocks, core.rank, distance)
        missing = _blocks(words, blocks, core.rank ^ distance, distance)
        peer = core.peer(distance)
        links.sendrecv(known, peer, missing, peer)
        distance *= 2


def _blocks(words: Array, blocks: Bounds, index: int, count: int) -> Array:
    """Return the aligned group of ``count`` blocks to which a block belongs."""
    first = index // count * count
    return words[blocks[first] : blocks[first + count]]


def _wards(core: Core, words: Array, bounds: Bounds) -> Array:
    return words[:0] if core.ward is None else share(words, bounds, core.ward)
