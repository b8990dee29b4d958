"""Who reduces what on a wide node: within a cache domain first, then among the domains of a socket, then among sockets.

The ranks of a node form a mesh of its levels.  At each level a rank combines the values of those that differ from it at
this level only, in its share of what it had combined before; in the end each holds its share of everything.  Pure
arithmetic; nothing here touches memory.

Of n bytes, with p ranks on s sockets, a rank that reads all others' shards itself fetches n(s−1)/s bytes from other
sockets; by levels only n(s−1)/p, for one more fence and one more write of n·s/p bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from mpitrain.comm.transports.shards import bounds


@dataclass(frozen=True)
class Phase:
    """What a rank does between two fences.

    Parameters
    ----------
    sources : tuple of int
        Ranks of the node whose values it combines, in this order; itself among them.
    begin, end : int
        The elements that it combines.
    """

    sources: tuple[int, ...]
    begin: int
    end: int


class Levels:
    """The levels of a node, innermost first.

    Parameters
    ----------
    sizes : sequence of int
        How many parts the next outer level has of this one; their product is the number of ranks.
    ranks : sequence of int, optional
        The rank at each position of the mesh, the innermost level running fastest; 0, 1, … if None.
    """

    def __init__(self, sizes: Sequence[int], ranks: Sequence[int] | None = None) -> None:
        self.sizes = tuple(sizes)
        self._ranks = tuple(range(prod(sizes))) if ranks is None else tuple(ranks)
        self._position = {rank: position for position, rank in enumerate(self._ranks)}

    @classmethod
    def of(cls, domains: Sequence[tuple[int, ...] | None]) -> Levels:
        """Return the levels of a node whose rank r runs within ``domains[r]``: its numbers, outermost first.

        One level where a rank may run in several domains, or domains have unequal numbers of ranks.
        """
        flat = cls((len(domains),))
        known = [domain for domain in domains if domain is not None]
        if len(known) < len(domains) or len({len(domain) for domain in known}) != 1:
            return flat
        sizes, inside = [], len(known)
        for depth in range(1, len(known[0]) + 1):
            groups = Counter(domain[:depth] for domain in known)
            if len(set(groups.values())) != 1:
                return flat
            sizes.append(inside // groups[known[0][:depth]])
            inside = groups[known[0][:depth]]
        kept = [size for size in (*sizes, inside) if size > 1]
        ordered = sorted(range(len(known)), key=lambda rank: (known[rank], rank))
        return cls(kept[::-1], ordered) if len(kept) > 1 else flat

    def phases(self, rank: int, elements: int, item_bytes: int) -> list[Phase]:
        """Return what a rank does, level by level, for arrays of so many elements."""
        begin, end, stride, found = 0, elements, 1, []
        position = self._position[rank]
        for size in self.sizes:
            own = position // stride % size
            first = position - own * stride
            cuts = bounds(end - begin, size, item_bytes)
            begin, end = begin + cuts[own], begin + cuts[own + 1]
            found.append(Phase(tuple(self._ranks[first + i * stride] for i in range(size)), begin, end))
            stride *= size
        return found
