"""Parameters that are one for the ranks of a node, or divided, and whose shards their owners update.

What methods share that divide optimizer state: where parameters lie, who owns what, and how all get what owners wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer, Layout, Shard
from mpitrain.method.state import Kind, Read
from mpitrain.method.steps import Part
from mpitrain.parallel.buckets import Bucket
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.sharded import ShardedParameters
from mpitrain.parallel.synchronous import Synchronous


class OwnedParameters(Synchronous):
    """Keeps parameters of which each rank updates the shards that it owns.

    Attributes
    ----------
    stage : {1, 2, 3}
        What is divided, see `GradientParallel`.
    """

    kind: Kind = "sharded"
    reads_all: ClassVar[bool] = False

    params: GatheredParameters | ShardedParameters
    stage: int = 1
    _buckets: Sequence[Bucket]

    @property
    def _apart(self) -> Collection[str]:
        """Names of the tensors that are divided each by itself in stage 1: none, everything is divided together."""
        return ()

    @property
    def _gathers_by_layer(self) -> bool:
        return self.stage == 3 and self.model.reads_by_layer

    def _allocate_parameters(self, layout: Layout, shards: Sequence[Shard]) -> list[Array]:
        """Set ``params``; return where this rank's shards are."""
        dtype = self.precision.dtype if self.precision else layout.dtype
        if self._gathers_by_layer:
            memory = self._private, self._allocator
            self.params = ShardedParameters(self._owners, self.model, self._buckets, shards, *memory, dtype)
            return self.params.owned
        self.params = GatheredParameters(self._owners, layout.astype(dtype), self._buckets, shards, self._private)
        return [self._allocator(shard.size, layout.dtype) for shard in shards] if self.precision else self.params.owned

    def _part(self, shard: Shard, own: Array, sums: Array) -> Part:
        return Part(shard, own, sums, self.optimizer.init(shard, self._allocator))

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

    def _hand_out(self) -> None:
        with self.comm.phase("gather"):
            self._publish()

    def _publish(self) -> None:
        """Give all ranks the parameters that their owners have written, or see to it that they are gathered anew."""
        if isinstance(self.params, ShardedParameters):
            self.params.release()
            return
        if self.precision:
            with self._passes.overflowing():
                self._copy_to(self.params)
        self.params.gather()

    def _copy_to(self, params: GatheredParameters) -> None:
        """Write this rank's shards, which it keeps elsewhere, to where they are gathered."""
        for place, part in zip(params.owned, self.parts, strict=True):
            place[...] = part.params

    def whole(self) -> FlatBuffer:
        """See `Method.whole`; a copy in stage 3, and where passes are in 16 bits."""
        if self.precision:
            return self._gathered()
        return self.params.whole() if isinstance(self.params, ShardedParameters) else self.params

    def _gathered(self) -> FlatBuffer:
        """Return all parameters as they are updated, in float32.  Collective: each bucket is gathered."""
        layout, shards = self.params.layout.astype(self.model.layout.dtype), [part.shard for part in self.parts]
        found = GatheredParameters(self._owners, layout, self._buckets, shards, self._private)
        self._copy_to(found)
        found.gather()
        return found

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        self._load_shared(read)
