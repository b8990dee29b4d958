"""Nodes first: reduce-scatter within each node, allreduce of each share across nodes, allgather within each node.

Every leader of a node (its first ranks, as many as the smallest node has) talks to its peers on the other nodes at
once, so that all of a node's links are busy and each byte leaves a node once.  M. Bayatpour, S. Chakraborty, H.
Subramoni, X. Lu, D. K. Panda, "Scalable reduction collectives with data partitioning-based multi-leader design", SC
2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.algorithms import recursive, ring
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import Combine, even, in_place, share, ufunc
from mpitrain.comm.calls import Call

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


@dataclass(frozen=True)
class Hierarchy:
    """A communicator's ranks by node.

    Parameters
    ----------
    node : Links
        To the ranks of this node.
    cross : Links or None
        To the ranks of the same number on all other nodes; None if this rank leads nothing.
    leaders : int
        How many ranks of each node, the first ones, reduce a share across nodes.
    """

    node: Links
    cross: Links | None
    leaders: int

    @classmethod
    def of(cls, comm: Communicator, leaders: int | None = None) -> Hierarchy:
        """Return the hierarchy of a communicator.  Collective.

        Parameters
        ----------
        comm : Communicator
        leaders : int, optional
            At most this many; as many as the smallest node has ranks if None.
        """
        node = comm.node
        smallest = int(comm.allreduce(np.int64(node.size), "min", algorithm="default"))
        leaders = min(leaders or smallest, smallest)
        cross = comm.split(node.rank if node.rank < leaders else None, axis="cross")
        comm._keep(cross)
        return cls(node._links, None if cross is None else cross._links, leaders)


def allreduce(links: Links, call: Call) -> None:
    """Reduce over the nodes of the communicator, which are found at the first call and kept."""
    if links.hierarchy is None:
        links.hierarchy = Hierarchy.of(links.comm)
    reduce_for_all(links.hierarchy, in_place(call), ufunc(call))
    for part in (links.hierarchy.node, links.hierarchy.cross):
        if part is not None:
            part.book(call.operation)


def reduce_for_all(hierarchy: Hierarchy, words: Array, combine: Combine) -> None:
    """Perform an allreduce of flat words in place."""
    node = hierarchy.node
    followers = node.size - hierarchy.leaders
    bounds = [*even(words.size, hierarchy.leaders), *[words.size] * followers]
    ring.reduce_scatter(node, words, bounds, combine)
    if hierarchy.cross is not None:
        recursive.reduce_for_all(hierarchy.cross, share(words, bounds, node.rank), combine)
    ring.allgather(node, words, bounds)
