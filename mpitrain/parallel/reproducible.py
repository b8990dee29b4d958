"""Reproducible SGD, data- and gradient-parallel: the trained weights have the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Layout, plain
from mpitrain.comm import Communicator
from mpitrain.comm.lanes import lane_reduce_scatter
from mpitrain.method.precision import Precision
from mpitrain.method.steps import Part
from mpitrain.method.tiles import tile_shards
from mpitrain.parallel.buckets import buckets_apart
from mpitrain.parallel.data import DataParallel
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.gradient import GradientParallel
from mpitrain.parallel.lanes import LaneSteps
from mpitrain.parallel.owned import OwnedParameters


class ReproducibleDataParallel(LaneSteps, DataParallel):
    """Data-parallel SGD whose weights have the same bits on every number of ranks up to that of the lanes.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    lanes : int
        Into how many lanes a batch is cut; at least one for each rank.  Another number gives other bits.
    microbatches : int
        Into how many parts a lane is cut, see `DataParallel`.
    allocator : Allocator
        Where parameters, gradients and optimizer state live.
    precision : Precision, optional
        In which 16-bit type the passes are computed, see there.

    Notes
    -----
    BatchNorm normalises each lane by itself, and so is not that of `DataParallel`; all else is the same step.  The
    promise holds among processes of one kind: CPU features, versions and threads of the libraries.  With more than one
    BLAS thread, or a model that computes by other means, it is theirs to keep.

    Cost of a step beyond the gradients, which come from smaller matrices: `lane_sum`.  A rank keeps a gradient for each
    of its lanes, and one more.
    """

    reads_in_place: ClassVar[bool] = False

    def __init__(
        self,
        comm: Communicator,
        *,
        lanes: int,
        microbatches: int = 1,
        allocator: Allocator = plain,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(comm, microbatches=microbatches, allocator=allocator, precision=precision)
        self._deal(lanes)


class ShardedLaneSteps(LaneSteps, OwnedParameters):
    """What reproducible methods share that divide optimizer state: shards that begin where tiles do, and their sums."""

    params: GatheredParameters

    def _allocate(self, layout: Layout) -> None:
        self._buckets, rank = buckets_apart(layout, self._apart), self._owners.rank
        self._layouts = [layout.select(segment.name for segment in bucket.segments) for bucket in self._buckets]
        pairs = zip(self._layouts, self._buckets, strict=True)
        self._shard_cuts = [_tile_cuts(each, bucket.start, self._owners.size) for each, bucket in pairs]
        shards = [layout.shard(cuts[rank], cuts[rank + 1]) for cuts in self._shard_cuts]
        sums = [self._allocator(shard.size, layout.dtype) for shard in shards]
        owned = self._allocate_parameters(layout, shards)
        self.parts = tuple(self._part(*each) for each in zip(shards, owned, sums, strict=True))

    def _sum_lanes(self, lanes: Sequence[Array]) -> None:
        for layout, cuts, part in zip(self._layouts, self._shard_cuts, self.parts, strict=True):
            terms, counts = [lane[cuts[0] : cuts[-1]] for lane in lanes], np.diff(cuts).tolist()
            lane_reduce_scatter(self._owners, terms, self.lanes, counts, layout=layout, out=part.grads)

    def _sum_use(self, use: str, lanes: Sequence[Array]) -> Array:
        return lane_reduce_scatter(self._owners, lanes, self.lanes, np.diff(self._place(use)[1]).tolist())

    def _piece(self, name: str) -> Array:
        part, cuts = self._place(name)
        start, stop = (int(cut) - part.shard.start for cut in cuts[self._owners.rank : self._owners.rank + 2])
        return part.grads[start:stop] if start < stop else part.grads[:0]

    def _place(self, name: str) -> tuple[Part, Array]:
        """Return the part of this rank's in whose stretch a tensor lies, and where the tensor is cut by the ranks."""
        segment = self.params.layout[name]
        number = next(n for n, bucket in enumerate(self._buckets) if segment in bucket.segments)
        return self.parts[number], np.clip(self._shard_cuts[number], segment.offset, segment.stop)


def _tile_cuts(layout: Layout, start: int, ranks: int) -> list[int]:
    """Return where the shards of a stretch, laid out so from ``start`` on, begin, and where the last one ends."""
    return [start + shard.start for shard in tile_shards(layout, ranks)] + [start + layout.size]


class ReproducibleGradientParallel(ShardedLaneSteps, GradientParallel):
    """Gradient-parallel SGD with the bits of `ReproducibleDataParallel`, whatever the number of ranks.

    Parameters
    ----------
    comm, lanes, microbatches
        As for `ReproducibleDataParallel`.
    allocator, precision
        As for `GradientParallel`.

    Notes
    -----
    Optimizer state is divided among the ranks, as in stage 1, and so are the summed gradients; those of the lanes are
    kept whole until they are summed, so that there is no stage 2.  Cost: `lane_reduce_scatter`, and an allgather of the
    parameters.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        lanes: int,
        microbatches: int = 1,
        allocator: Allocator | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(comm, microbatches=microbatches, allocator=allocator, precision=precision)
        self._deal(lanes)
