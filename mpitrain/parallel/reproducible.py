"""Reproducible SGD, data- and gradient-parallel: the trained weights have the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import ClassVar

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Allocator, FlatBuffer, Layout, plain
from mpitrain.comm import Communicator
from mpitrain.comm.lanes import lane_reduce_scatter, lane_sum
from mpitrain.method.precision import Precision
from mpitrain.method.tiles import tile_shards
from mpitrain.parallel.buckets import Bucket
from mpitrain.parallel.data import DataParallel
from mpitrain.parallel.gradient import GradientParallel
from mpitrain.parallel.lanes import LaneSteps


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

    def _sum_lanes(self, lanes: Sequence[Array]) -> None:
        lane_sum(self.comm, lanes, self.lanes, layout=self.params.layout, out=self.grads.flat)

    def _add_uses(self, lanes: Mapping[str, Sequence[Array]]) -> None:
        for use, values in lanes.items():
            total = self.grads.views[use].reshape(-1)
            total += lane_sum(self.comm, values, self.lanes)


class ReproducibleGradientParallel(LaneSteps, GradientParallel):
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

    params: FlatBuffer

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

    def _allocate(self, layout: Layout) -> None:
        shards = tile_shards(layout, self.comm.size)
        own, self._counts = shards[self.comm.rank], [shard.size for shard in shards]
        dtype = self.precision.dtype if self.precision else layout.dtype
        self.params = FlatBuffer(layout.astype(dtype), self._private or self.comm.shared)
        here = self.params.flat[own.start : own.stop]
        params = self._allocator(own.size, layout.dtype) if self.precision else here
        self.parts = (self._part(own, params, self._allocator(own.size, layout.dtype)),)
        self._buckets, self._places = [Bucket(0, layout.size, layout.segments)], [here]
        self._gathers = [self._gather(self._buckets[0], own)]

    def _sum_lanes(self, lanes: Sequence[Array]) -> None:
        (part,) = self.parts
        lane_reduce_scatter(
            self.comm, lanes, self.lanes, self._counts, layout=self._summed, out=part.grads
        )  # fmt: skip

    def _add_uses(self, lanes: Mapping[str, Sequence[Array]]) -> None:
        (part,) = self.parts
        for use, values in lanes.items():
            segment = self.params.layout[use]
            cuts = np.clip([0, *accumulate(self._counts)], segment.offset, segment.stop)
            start = int(cuts[self.comm.rank]) - part.shard.start
            total = lane_reduce_scatter(self.comm, values, self.lanes, np.diff(cuts).tolist())
            own = part.grads[start : start + total.size]
            own += total

    def _hand_out(self) -> None:
        self._publish()
