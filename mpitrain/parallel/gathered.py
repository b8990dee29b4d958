"""Parameters that every rank has whole, once for the ranks of a node, and of which each writes the shards it owns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Allocator, FlatBuffer, Layout, Shard
from mpitrain.comm import Communicator
from mpitrain.comm.shard_plans import AllgatherPlan
from mpitrain.optim import kernel
from mpitrain.parallel.buckets import Bucket

_LINE_BYTES = 64

_NEAR_BYTES = 2 << 20
"""Parameters up to this size are still in a near cache when they are used, if they are read all at once before."""


class GatheredParameters(FlatBuffer):
    """Parameters of which each rank writes its shards, and reads all.

    Parameters
    ----------
    owners : Communicator
        The ranks that divide them.
    layout : Layout
        Of what each of them has.
    buckets : sequence of Bucket
        What is divided, each by itself.
    shards : sequence of Shard
        This rank's, one of each bucket.
    allocate : Allocator, optional
        Where memory comes from; None: where the ranks of a node share it.  Collective.

    Attributes
    ----------
    owned : list of array
        Where this rank writes, one for each shard.
    shared : bool
        Whether other ranks read there what this one writes.  All but ``owned`` is read-only then: a change that every
        rank makes would be made several times.
    """

    def __init__(
        self,
        owners: Communicator,
        layout: Layout,
        buckets: Sequence[Bucket],
        shards: Sequence[Shard],
        allocate: Allocator | None = None,
    ) -> None:
        memory = (allocate or owners.shared)(layout.size, layout.dtype)
        self.shared = allocate is None and owners.size > 1 and owners.transport == "shared"
        super().__init__(layout, lambda *_: _read_only(memory) if self.shared else memory)
        self.owned = [memory[shard.start : shard.stop] for shard in shards]
        self._plans = [_plan(owners, memory, *each) for each in zip(buckets, shards, strict=True)]
        self._lines = self._lines_to_fetch()

    def gather(self) -> None:
        """Give all ranks what their owners have written.  Collective: one allgather a bucket."""
        for plan in self._plans:
            plan()
        if self._lines is not None and kernel.spares_lines():
            np.bitwise_or.reduce(self._lines)

    def _lines_to_fetch(self) -> Array | None:
        """Return a byte of each cache line of parameters that others store; None where it does not pay to read ahead.

        Products read a matrix in strips, a line here and a line there, and wait for each that was stored past the
        caches: 75 µs a step for 1.1 MB, which takes 40 to read in one go.
        """
        return self.flat.view(np.uint8)[::_LINE_BYTES] if self.shared and self.flat.nbytes <= _NEAR_BYTES else None


def _plan(owners: Communicator, memory: Array, bucket: Bucket, shard: Shard) -> AllgatherPlan:
    place = memory[bucket.start : bucket.stop]
    return owners.allgather_plan(place, shard.start - bucket.start, shard.stop - bucket.start)


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
