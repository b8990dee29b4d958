"""Shards in memory that the ranks of a node share: reduced straight from the peers' arrays, published by a fence.

Each rank owns a shard of every array.  It combines the node's values of that shard in its own array, where no other
rank reads them; a result is one array for all, to which each rank writes its shard.  With several nodes, a shard of the
node is divided once more among the ranks of one number on all nodes, so that every byte leaves a node once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from weakref import ref

import numpy as np

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.compiled import address
from mpitrain.comm.buffers import wire
from mpitrain.comm.calls import Call
from mpitrain.comm.transports.blocks import NOWHERE, Arena, Memory, Place
from mpitrain.comm.transports.far import Far
from mpitrain.comm.transports.program import Combine, Step, perform
from mpitrain.comm.transports.shards import bounds


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """A reduction that is laid out, of which this rank gets a shard.

    Parameters
    ----------
    run : callable
        Performs it once.
    begin, end : int
        The elements of the shard.
    shard : array, shape (end - begin,)
        Where they are afterwards.
    """

    run: Callable[[], object]
    begin: int
    end: int
    shard: Array


class CommonMemory:
    """Arrays that are one for all ranks of a node.

    Parameters
    ----------
    arena : Arena
        Of the node.
    ranks : int
        How many share it; each backs an equal part with pages.
    """

    def __init__(self, arena: Arena, ranks: int) -> None:
        self._arena, self._ranks = arena, ranks
        self._blocks: dict[int, ref[Memory]] = {}

    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeros that all ranks of the node see.  Collective over the node."""
        nbytes = prod(shape) * dtype.itemsize
        number, memory = self._arena.allocate(-(-nbytes // self._ranks))
        self._blocks = {each: held for each, held in self._blocks.items() if held() is not None}
        self._blocks[number] = ref(memory)
        return np.asarray(memory.reshape(-1)[:nbytes]).view(dtype).reshape(shape)

    def locate(self, array: Array) -> Place:
        """Return the block in which an array lies, and its first byte there."""
        for number, held in self._blocks.items():
            memory = held()
            if memory is None:
                continue
            offset_bytes = address(array) - address(memory)
            if 0 <= offset_bytes <= memory.nbytes - array.nbytes:
                return Place(number, offset_bytes)
        return NOWHERE


def far_reduce_scatter(
    far: Far, wait: Callable[[], None], op: str, parts: list[Array], total_ranks: int, piece_bytes: int
) -> PlannedShard:
    """Plan how a rank reduces its shard of arrays of its node, and then its part of that with the other nodes.

    Parameters
    ----------
    wait : callable
        The node's fence.
    op : str
        A reduction; ``mean`` divides by ``total_ranks``.
    parts : list of array
        Those of the node's ranks, in order.
    piece_bytes : int
        What is combined at once.
    """
    own, nodes = parts[far.rank], far.across.size
    cuts = bounds(own.size, far.ranks * nodes, own.itemsize)[far.rank * nodes :][: nodes + 1]
    near = Combine([part[cuts[0] : cuts[-1]] for part in parts], [own[cuts[0] : cuts[-1]]])
    begin, end = cuts[far.across.rank], cuts[far.across.rank + 1]
    shard = np.empty(end - begin, own.dtype)
    counts = tuple(after - before for before, after in pairwise(cuts))
    summed = "sum" if op == "mean" else op
    across = Call(
        "reduce_scatter", dtype=own.dtype, send=wire(near.targets[0]), recv=wire(shard), op=summed, counts=counts
    )
    steps: list[Step] = [(wait, ()), *near.steps(summed, piece_bytes), (far.across._run, (across,))]
    if op == "mean":
        steps.append((np.divide, (shard, total_ranks, shard)))
    return PlannedShard(partial(perform, [*steps, (wait, ())]), begin, end, shard)


def far_allgather(
    far: Far, wait: Callable[[], None], whole: Array, begin: int, end: int, agree: Callable[[bool], bool]
) -> Callable[[], object] | None:
    """Plan how the ranks of one number give each other their shards; None if these do not lie side by side.

    Parameters
    ----------
    agree : callable
        Tells whether something holds on all ranks of all nodes.
    """
    owned = far.across.allgather_object((begin, end))
    aligned = all(before[1] == after[0] for before, after in pairwise(owned))
    if not agree(aligned):
        return None
    staged = np.empty(end - begin, whole.dtype)
    counts = tuple(stop - start for start, stop in owned)
    call = Call(
        "allgather", dtype=whole.dtype, send=wire(staged), recv=wire(whole[owned[0][0] : owned[-1][1]]), counts=counts
    )
    # Only what other nodes' ranks send changes, and of this node nobody else writes there.
    steps: list[Step] = [(np.copyto, (staged, whole[begin:end])), (far.across._run, (call,)), (wait, ())]
    return partial(perform, steps)
