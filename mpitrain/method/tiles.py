"""Sums over a model in units that no layout changes, so that norms have the same bits however the model is divided.

A tile is a fixed stretch of one tensor.  Each lies whole on one rank (`tile_shards`), or on every rank; whoever has it
sums it by itself, and the sums of all tiles are then added in their one order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Layout, Segment, Shard
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
    whole : Layout, optional
        The whole model's, if the layout of ``parts`` has only some of its tensors.
    elsewhere : collection of str
        Tensors that this rank leaves out of sums.  Another rank updates the same tensors and counts them.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        comm: Communicator | None = None,
        whole: Layout | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        layout = parts[0].shard.layout
        self._comm, self._empty = comm, parts[0].cut(parts[0].shard.start, parts[0].shard.start)
        places = [(segment.name, start - segment.offset) for segment, start, _ in _tiles(whole or layout)]
        self._numbers = _numbers_in(layout, places)
        self._counts = [name not in elsewhere for name, _ in places]
        indices = {place: index for index, place in enumerate(places)}
        self._own = [
            (indices[segment.name, start - segment.offset], part.cut(start, stop))
            for segment, start, stop in _tiles(layout)
            for part in parts
            if part.shard.start <= start and stop <= part.shard.stop
        ]

    def squared_norm(self) -> float:
        """Return the sum of squares of all gradients, ``statistics`` left out.  Collective where there are shards."""
        sums = np.zeros(len(self._numbers))
        for index, tile in self._own:
            if self._counts[index]:
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
            if self._counts[index]:
                sums[index] = partial[self._numbers[index]]
        totals, here = np.zeros_like(like), self._numbers >= 0
        np.add.at(totals, self._numbers[here], self._everyones(sums)[here])  # one after the other
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


def _tiles(layout: Layout) -> Iterator[tuple[Segment, int, int]]:
    """Give of each tile its tensor, and where it begins and ends."""
    for segment in layout.segments:
        for start in range(segment.offset, segment.stop, TILE_SIZE):
            yield segment, start, min(start + TILE_SIZE, segment.stop)


def _numbers_in(layout: Layout, places: Sequence[tuple[str, int]]) -> Array:
    """Return of each tile the number of its tensor in a layout, −1 if the tensor is not there."""
    numbers = {segment.name: number for number, segment in enumerate(layout.segments)}
    return np.array([numbers.get(name, -1) for name, _ in places], np.int64)
