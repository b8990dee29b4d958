"""The left fold ((x₀ + x₁) + x₂) + … in rank order: the same bits however an array is cut, fused or timed.

Every rank collects all ranks' values of its share and folds them itself, which moves no more bytes than the ring does.
The exchange is the pairwise one of R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication
operations in MPICH", IJHPCA 19, 2005, section 4.4, with all partners at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mpitrain._typing import Array
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import Bounds, Combine

LANDING_BYTES = 1 << 20
"""Memory for what all ranks send at a time; longer shares are exchanged in pieces."""

PIECE_BYTES = 1 << 14
"""The least size of a piece, on many ranks."""


def reduce_scatter(links: Links, words: Array, bounds: Bounds, combine: Combine) -> None:
    """Reduce the own share in place; the others keep their values."""
    largest = max(end - start for start, end in pairwise(bounds))
    length = max(1, max(LANDING_BYTES // links.size, PIECE_BYTES) // words.itemsize)
    for offset in range(0, largest, length):
        pieces = [
            words[min(start + offset, end) : min(start + offset + length, end)] for start, end in pairwise(bounds)
        ]
        _fold_own(links, pieces, combine)


def _fold_own(links: Links, pieces: list[Array], combine: Combine) -> None:
    """Send every rank its piece, and fold what all ranks have of the own one in rank order."""
    own = pieces[links.rank]
    landing = links.scratch("landing", links.size * own.size, own.dtype).reshape(links.size, own.size)
    others = [rank % links.size for rank in range(links.rank + 1, links.rank + links.size)]
    links.exchange([(pieces[rank], rank) for rank in others], [(landing[rank], rank) for rank in reversed(others)])
    fold([own if rank == links.rank else landing[rank] for rank in range(links.size)], own, combine)


def fold(values: Sequence[Array], out: Array, combine: Combine) -> None:
    """Write ((x₀ + x₁) + x₂) + … to ``out``, which may be one of the values; the others may be overwritten."""
    total = values[0]
    for value in values[1:-1]:
        combine(total, value, out=total)
    if len(values) > 1:
        combine(total, values[-1], out=out)
    elif out is not total:
        out[...] = total
