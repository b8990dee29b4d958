"""Parameters that are one for the ranks of a node, or divided, and whose shards their owners update.

What methods share that divide optimizer state: where parameters lie, who owns what, and how all get what owners wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Layout, Shard, is_cupy
from mpitrain.comm.shard_plans import AllgatherPlan
from mpitrain.method.state import Kind, Read
from mpitrain.method.steps import Part
from mpitrain.optim import kernel
from mpitrain.parallel.buckets import Bucket
from mpitrain.parallel.sharded import ShardedParameters
from mpitrain.parallel.synchronous import Synchronous

_LINE_BYTES = 64

_NEAR_BYTES = 2 << 20
"""Parameters up to this size are still in a near cache when they are used, if they are read all at once before."""


class OwnedParameters(Synchronous):
    """Keeps parameters of which each rank updates the shards that it owns.

    Attributes
    ----------
    stage : {1, 2, 3}
        What is divided, see `GradientParallel`.
    """

    kind: ClassVar[Kind] = "sharded"

    params: FlatBuffer | ShardedParameters
    stage: int = 1
    _buckets: Sequence[Bucket]
    _lines: Array | None = None

    @property
    def _apart(self) -> Collection[str]:
        """Names of the tensors that are divided each by itself in stage 1: none, everything is divided together."""
        return ()

    @property
    def _gathers_by_layer(self) -> bool:
        return self.stage == 3 and self.model.reads_by_layer

    def _allocate_parameters(self, layout: Layout, shards: Sequence[Shard]) -> list[Array]:
        """Set ``params``, and what hands them out; return where this rank's shards are."""
        dtype = self.precision.dtype if self.precision else layout.dtype
        if self._gathers_by_layer:
            memory = self._private, self._allocator
            self.params = ShardedParameters(self._owners, self.model, self._buckets, shards, *memory, dtype)
            return self.params.owned
        self.params = FlatBuffer(layout.astype(dtype), self._private or self._owners.shared)
        self._lines = self._lines_to_fetch(self.params.flat)
        self._gathers = [self._gather(*each) for each in zip(self._buckets, shards, strict=True)]
        self._places = [self.params.flat[shard.start : shard.stop] for shard in shards]
        return [self._allocator(shard.size, layout.dtype) for shard in shards] if self.precision else self._places

    def _lines_to_fetch(self, flat: Array) -> Array | None:
        """Return a byte of each cache line of parameters that others store; None where it does not pay to read ahead.

        Products read a matrix in strips, a line here and a line there, and wait for each that was stored past the
        caches: 75 µs a step for 1.1 MB, which takes 40 to read in one go.
        """
        owners = self._owners
        shared = owners.size > 1 and owners.transport == "shared" and not (self.precision or is_cupy(flat))
        return flat.view(np.uint8)[::_LINE_BYTES] if shared and flat.nbytes <= _NEAR_BYTES else None

    def _part(self, shard: Shard, own: Array, sums: Array) -> Part:
        return Part(shard, own, sums, self.optimizer.init(shard, self._allocator))

    def _gather(self, bucket: Bucket, shard: Shard) -> AllgatherPlan:
        place = self.params.flat[bucket.start : bucket.stop]
        return self._owners.allgather_plan(place, shard.start - bucket.start, shard.stop - bucket.start)

    def _initialise(self) -> None:
        layout = self.params.layout.astype(self.model.layout.dtype)
        stretches: list[tuple[Layout, int, Sequence[Part]]] = [(layout, 0, self.parts)]
        if isinstance(self.params, ShardedParameters):
            stretches = [
                (layout.select(segment.name for segment in bucket.segments), bucket.start, (part,))
                for bucket, part in zip(self._buckets, self.parts, strict=True)
            ]
        self._agreement.check_parameters(self._owners, (self._begin(*each) for each in stretches))
        self._publish()

    def _begin(self, layout: Layout, start: int, parts: Sequence[Part]) -> FlatBuffer:
        """Fill parts of a stretch of the model, which begins at ``start`` and is laid out as ``layout`` says."""
        initial = FlatBuffer(layout, self._allocator)  # what is shared would hide that ranks differ
        self._draw(initial)
        for part in parts:
            part.params[...] = initial.flat[part.shard.start - start : part.shard.stop - start]
        return initial

    @property
    def _parameters_are_read(self) -> bool:
        shared = isinstance(self.params, FlatBuffer) and not self.precision
        return shared and self._owners.transport == "shared"

    def _hand_out(self) -> None:
        with self.comm.phase("gather"):
            self._publish()

    def _publish(self) -> None:
        """Give all ranks the parameters that their owners have written, or see to it that they are gathered anew."""
        if isinstance(self.params, ShardedParameters):
            self.params.release()
            return
        if self.precision:
            self._round()
        for gather in self._gathers:
            gather()
        if self._lines is not None and kernel.spares_lines():
            np.bitwise_or.reduce(self._lines)

    def _round(self) -> None:
        """Write this rank's shards to where they are gathered, in 16 bits."""
        with self._passes.overflowing():
            for place, part in zip(self._places, self.parts, strict=True):
                place[...] = part.params

    def whole(self) -> FlatBuffer:
        """See `Method.whole`; a copy in stage 3, and where passes are in 16 bits."""
        if self.precision:
            return self._gathered()
        return self.params.whole() if isinstance(self.params, ShardedParameters) else self.params

    def _gathered(self) -> FlatBuffer:
        """Return all parameters as they are updated, in float32.  Collective: each bucket is gathered."""
        layout = self.params.layout.astype(self.model.layout.dtype)
        found = FlatBuffer(layout, self._private or self._owners.shared)
        for bucket, part in zip(self._buckets, self.parts, strict=True):
            place, start = found.flat[bucket.start : bucket.stop], part.shard.start - bucket.start
            place[start : start + part.shard.size] = part.params
            self._owners.allgather_plan(place, start, start + part.shard.size)()
        return found

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        self._owners.barrier()  # a rank may still predict with what is there now
        super().load_parameters(read)
        self._publish()
