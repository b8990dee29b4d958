"""Binomial trees: whole arrays up to the root, or down from it, in ⌈log₂p⌉ steps; for short messages.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19, 2005,
sections 4.2 (broadcast) and 4.5 (reduce).
"""

from __future__ import annotations

from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import in_place, ufunc
from mpitrain.comm.calls import Call


def reduce(links: Links, call: Call) -> None:
    """Combine what the children send, and send it to the parent."""
    words, combine = in_place(call), ufunc(call)
    parent, children = _family(links.rank, links.size, call.root or 0)
    for child in children:
        arrived = links.scratch("landing", words.size, words.dtype)
        links.recv(arrived, child)
        combine(words, arrived, out=words)
    if parent is not None:
        links.send(words, parent)


def broadcast(links: Links, call: Call) -> None:
    """Receive from the parent, and send to the children, the one with the most descendants first."""
    words = in_place(call)
    parent, children = _family(links.rank, links.size, call.root or 0)
    if parent is not None:
        links.recv(words, parent)
    for child in reversed(children):
        links.send(words, child)


def allreduce(links: Links, call: Call) -> None:
    """Reduce to rank 0, which broadcasts."""
    reduce(links, call)
    broadcast(links, call)


def _family(rank: int, size: int, root: int) -> tuple[int | None, list[int]]:
    """Return a rank's parent (None: it is the root) and children, nearest first.

    Counted from the root, a rank's parent is what is left without its lowest bit, and its children have one more bit
    below that.
    """
    number = (rank - root) % size
    reach = number & -number or 1 << (size - 1).bit_length()
    distances = [1 << bit for bit in range(reach.bit_length() - 1)]
    parent = (number - reach + root) % size if number else None
    return parent, [(number + d + root) % size for d in distances if number + d < size]
