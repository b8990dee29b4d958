"""Sums over a model in units that no layout changes, so that norms have the same bits however the model is divided.

A tile is a fixed stretch of one tensor.  Each lies whole on one rank (`tile_shards`), or on every rank; whoever has it
sums it by itself, and the sums of all tiles are then added in their one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Layout, Shard
from mpitrain.comm import Communicator
from mpitrain.method.steps import Part
from mpitrain.optim import Optimizer, squared_norm

TILE_SIZE = 8192
"""Elements: few enough to divide a model among ranks, and so many that summing, not Python, takes the time."""


class Tiles:
    """The tiles of a model, and which of them are this rank's.

    Parameters
    ----------
    parts : sequence of Part
        What this rank updates: everything, or shards as `tile_shards` cuts them.
    comm : Communicator, optional
        Whose ranks hold the other shards; None if these parts are everything.
    """

    def __init__(self, parts: Sequence[Part], comm: Communicator | None = None) -> None:
        layout = parts[0].shard.layout
        self._comm, self._empty = comm, parts[0].cut(parts[0].shard.start, parts[0].shard.start)
        tiles = list(_tiles(layout))
        self._numbers = [number for number, _, _ in tiles]
        self._own = [
            (index, part.cut(start, stop))
            for index, (_, start, stop) in enumerate(tiles)
            for part in parts
            if part.shard.start <= start and stop <= part.shard.stop
        ]

    def squared_norm(self) -> float:
        """Return the sum of squares of all gradients, ``statistics`` left out.  Collective where there are shards."""
        sums = np.zeros(len(self._numbers))
        for index, tile in self._own:
            sums[index] = squared_norm(tile.grads, tile.shard)
        return float(self._everyones(sums).sum())

    def totals(self, optimizer: Optimizer, step: int) -> Array | None:
        """Return what an optimizer needs of whole tensors (`Optimizer.partials`), or None.  Collective as above."""
        like = self._empty.partials(optimizer, step)
        if like is None:
            return None
        sums = np.zeros((len(self._numbers), like.shape[1]))
        for index, tile in self._own:
            partial = tile.partials(optimizer, step)
            assert partial is not None  # as of the empty part
            sums[index] = partial[self._numbers[index]]
        totals = np.zeros_like(like)
        np.add.at(totals, self._numbers, self._everyones(sums))  # one after the other
        return totals

    def _everyones(self, sums: Array) -> Array:
        """Return the sums of all tiles; where there are shards, one rank has that of a tile and the others a zero."""
        return sums if self._comm is None else self._comm.allreduce(sums)


def tile_shards(layout: Layout, ranks: int) -> list[Shard]:
    """Cut a layout into shards of nearly equal size that begin where tiles do; a shard may be empty."""
    starts = [*(start for _, start, _ in _tiles(layout)), layout.size]
    even = [layout.size * rank // ranks for rank in range(1, ranks)]
    cuts = [0, *(starts[place] for place in np.searchsorted(starts, even)), layout.size]
    return [layout.shard(cuts[rank], cuts[rank + 1]) for rank in range(ranks)]


def _tiles(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Give of each tile the number of its tensor, and where it begins and ends."""
    for number, segment in enumerate(layout.segments):
        for start in range(segment.offset, segment.stop, TILE_SIZE):
            yield number, start, min(start + TILE_SIZE, segment.stop)
