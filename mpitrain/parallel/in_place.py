"""Gradients that each rank sums while it updates, from those of all ranks of the node, where they lie.

Where nothing comes between the sum and the update, no sum is ever written: one pass reads all ranks' gradients, and
moves moments and parameters.  What must be known before is known before: that the sums are finite follows from each
rank's own gradients, but for values so large that their squares are not.
"""

from __future__ import annotations

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, GradientBuffer, Layout, Shard
from mpitrain.comm import Communicator
from mpitrain.comm.rows import Rows, rows
from mpitrain.method.method import Plan
from mpitrain.optim import Optimizer, Terms
from mpitrain.parallel.buckets import READ_BY_OWNERS, Bucket

READ_BY_ALL = 4
"""Ranks up to which each reads the whole gradients of all others; more share the work of summing them."""


class CommonGradients(GradientBuffer):
    """Gradients of this rank, in memory where the others read them.

    Parameters
    ----------
    comm : Communicator
        The ranks that sum their gradients.
    layout : Layout
        Of the model.
    rows : Rows
        The memory.
    operation : {"allreduce", "reduce_scatter"}
        What it comes down to.
    shard : Shard
        What this rank updates.

    Attributes
    ----------
    buckets, shards, sums
        As of `StreamedGradients`, but that the sums are still this rank's own terms.
    """

    def __init__(self, comm: Communicator, layout: Layout, rows: Rows, operation: str, shard: Shard) -> None:
        self._comm, self._rows, self._shard = comm, rows, shard
        self._departures, self._are_read = rows.departures(), False
        self._publish = rows.publication(operation, layout.size)
        own = rows.arrays[comm.rank]
        super().__init__(layout, lambda size, dtype: own)
        self.buckets = [Bucket(0, layout.size, layout.segments)]
        self.shards = [shard]
        self.sums = [self.flat[shard.start : shard.stop]]

    def reduce(self) -> None:
        """Let all ranks read what was added up in a step.  Collective."""
        self._publish()

    def release(self) -> None:
        """Be told that this rank has read the others', which wait for nothing else before they write the next."""
        self._departures.leave()
        self._are_read = True

    def reclaim(self) -> None:
        """Wait until the others have read this rank's, before it writes the next ones: after its forward pass."""
        if self._are_read:
            self._departures.wait()
            self._are_read = False

    @property
    def buffer(self) -> FlatBuffer:
        """See `GradientBuffer.buffer`."""
        self.reclaim()
        return super().buffer

    def zero(self) -> None:
        """Begin a step: every gradient is zero; so is the padding, to which nothing is ever written."""
        self._unset.update(segment.name for segment in self.layout.segments)

    def _ready(self, name: str) -> Array:
        self.reclaim()
        return super()._ready(name)

    def _unwritten(self, name: str) -> Array | None:
        self.reclaim()
        return super()._unwritten(name)

    def terms(self, count: float, parameters_are_read: bool) -> Terms:
        """Return all ranks' gradients of the shard, as they are from `reduce` until one of them writes again."""
        where = slice(self._shard.start, self._shard.stop)
        return Terms(tuple(row[where] for row in self._rows.arrays), count, self._comm.rank, parameters_are_read)


def everywhere(
    comm: Communicator, across: Communicator | None, layout: Layout, optimizer: Optimizer, plan: Plan
) -> CommonGradients | None:
    """Return gradients of which every rank sums all; None where they are better summed before.

    Collective over both communicators: ranks that divide a model, ``across``, all have them or none has.
    """
    if comm.size > READ_BY_ALL or not sums_while_updating(optimizer, plan):
        return None
    return _common(comm, across, layout, "allreduce", layout.whole())


def by_owners(
    comm: Communicator, across: Communicator | None, layout: Layout, optimizer: Optimizer, plan: Plan
) -> CommonGradients | None:
    """Return gradients of which every rank sums a shard; None as above.  Collective as above."""
    if comm.size > READ_BY_OWNERS or not sums_while_updating(optimizer, plan):
        return None
    return _common(comm, across, layout, "reduce_scatter", layout.shards(comm.size)[comm.rank])


def _common(
    comm: Communicator, across: Communicator | None, layout: Layout, operation: str, shard: Shard
) -> CommonGradients | None:
    found = rows(comm, layout.size, layout.dtype)
    agreed = across is None or across.allreduce(np.uint8(found is not None), "min")
    return CommonGradients(comm, layout, found, operation, shard) if found and agreed else None


def sums_while_updating(optimizer: Optimizer, plan: Plan) -> bool:
    """Tell whether nothing comes between sum, division and update."""
    return optimizer.takes_terms and plan.clip_norm is None and plan.clip_value is None
