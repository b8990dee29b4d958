"""Gradients of which each rank sums a shard while it updates, from those of all ranks of the node, where they lie.

Where nothing comes between the sum and the update, no sum is ever written: one pass reads all ranks' gradients, and
moves moments and parameters.  What must be known before is known before: that the sums are finite follows from each
rank's own gradients, but for values so large that their squares are not.
"""

from __future__ import annotations

import numpy as np

from mpitrain.arrays import GradientBuffer, Layout
from mpitrain.comm import Communicator
from mpitrain.comm.rows import Rows, rows
from mpitrain.method.method import Plan
from mpitrain.optim import Optimizer, Terms
from mpitrain.parallel.buckets import READ_BY_OWNERS, Bucket


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

    Attributes
    ----------
    buckets, shards, sums
        As of `StreamedGradients`, but that the sums are still this rank's own terms.
    """

    def __init__(self, comm: Communicator, layout: Layout, rows: Rows) -> None:
        self._comm, self._rows, self._publish = comm, rows, rows.publication()
        own = rows.arrays[comm.rank]
        super().__init__(layout, lambda size, dtype: own)
        self.buckets = [Bucket(0, layout.size, layout.segments)]
        self.shards = [shard := layout.shards(comm.size)[comm.rank]]
        self._own = slice(shard.start, shard.stop)
        self.sums = [self.flat[self._own]]

    def reduce(self) -> None:
        """Let all ranks read what was added up in a step.  Collective."""
        self._publish()

    def zero(self) -> None:
        """Begin a step: every gradient is zero; so is the padding, to which nothing is ever written."""
        self._unset.update(segment.name for segment in self.layout.segments)

    def terms(self, count: float) -> Terms:
        """Return all ranks' gradients of the shard, as they are from `reduce` until one of them writes again.

        They are for parameters that all ranks read.
        """
        terms = tuple(row[self._own] for row in self._rows.arrays)
        return Terms(terms, count, self._comm.rank, parameters_are_read=True)


def common_gradients(
    comm: Communicator, across: Communicator | None, layout: Layout, optimizer: Optimizer, plan: Plan
) -> CommonGradients | None:
    """Return such gradients; None where the ranks share no memory, are too many, or sums are better taken before.

    Collective over both communicators: ranks that divide a model, ``across``, all have them or none has.
    """
    if comm.size > READ_BY_OWNERS or not sums_while_updating(optimizer, plan):
        return None
    found = rows(comm, layout.size, layout.dtype)
    agreed = across is None or across.allreduce(np.uint8(found is not None), "min")
    return CommonGradients(comm, layout, found) if found and agreed else None


def sums_while_updating(optimizer: Optimizer, plan: Plan) -> bool:
    """Tell whether nothing comes between sum, division and update."""
    return optimizer.takes_terms and plan.clip_norm is None and plan.clip_value is None
