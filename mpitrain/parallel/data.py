"""Data-parallel SGD: every rank computes the gradient of its share of each batch by a replica of the whole model.

The gradients are summed over the ranks and divided once by the global number of samples, so that the step is the one
a single rank would take on the whole batch, however unevenly it is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from mpitrain._errors import InputError
from mpitrain._options import check_kind
from mpitrain.arrays import Allocator, FlatBuffer, GradientBuffer, Layout
from mpitrain.comm import Communicator
from mpitrain.comm.codecs import Codec, CompressedSum, make_codec
from mpitrain.method.precision import Precision
from mpitrain.method.state import Read, State, fill, pieces_of
from mpitrain.method.steps import Part, all_finite, reduce_gradients
from mpitrain.optim import State as OptimizerState
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.in_place import CommonGradients, common_gradients
from mpitrain.parallel.synchronous import DEFAULT_BUCKET_BYTES, Synchronous
from mpitrain.parallel.tally import Tally


class DataParallel(Synchronous):
    """Synchronous data-parallel SGD.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    microbatches : int
        Into how many parts a batch is cut; their gradients are accumulated (less memory, the same step but for
        BatchNorm, which normalises each microbatch on its own).
    bucket_bytes : int
        Largest piece in which gradients are reduced; a codec reduces all at once.
    codec : str or Codec, optional
        How gradients are compressed on the wire: a codec, or the name of one; None: not at all.
    allocator : Allocator, optional
        Where parameters, gradients and optimizer state of this rank's own replica live; None: in ordinary memory, or
        in that of the node (Notes).
    across : Communicator, optional
        The ranks that divide the model, see `Synchronous`; no codec then.
    precision : Precision, optional
        In which 16-bit type the passes are computed, see there; no codec with float16.

    Notes
    -----
    Cost of a step beyond the gradient: an allreduce of the gradients, 2(p−1)/p · n bytes moved per rank where the
    library uses a ring, and one of five numbers.  With a codec: see there.  Memory per rank, with k numbers of
    optimizer state a parameter: (2+k) n bytes.

    On one node that shares memory, with up to 16 ranks, an `Elementwise` optimizer, and neither clipping, codec,
    precision nor an allocator, the ranks have one replica: n bytes of parameters and kn of optimizer state on all of
    them together, and n of gradients each.  A rank sums a shard of the gradients from where they lie, and updates that
    shard for all; no byte is sent.  The bits are those of replicas.  What is shared is read-only but for that update:
    `load_parameters` sets it.  Each rank gives a shard of `state`, and `load` and `load_parameters` read all tensors on
    all ranks, as replicas do.
    """

    reads_in_place: ClassVar[bool] = True
    """Whether a step may sum the gradients of a node where they lie, see `mpitrain.parallel.in_place`."""

    params: FlatBuffer
    grads: GradientBuffer

    def __init__(
        self,
        comm: Communicator,
        *,
        microbatches: int = 1,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        codec: str | Codec | None = None,
        allocator: Allocator | None = None,
        across: Communicator | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(comm, microbatches, bucket_bytes, allocator, across, precision)
        self.codec = make_codec(codec) if isinstance(codec, str) else codec
        check_kind(type(self).__name__, "codec", self.codec, (Codec, type(None)), "a codec, or the name of one")
        if self.codec and across:
            raise InputError(
                "a codec keeps what it leaves out for whole tensors, which are divided", operation=type(self).__name__,
                got=self.codec.name, remedy="use no codec, or leave out across",
            )  # fmt: skip
        if self.codec and precision and precision.compute == "float16":
            raise InputError(
                "a codec would keep what it leaves out of steps that float16 makes overflow",
                operation=type(self).__name__, got=self.codec.name, remedy="use no codec, or bfloat16",
            )  # fmt: skip

    def _allocate(self, layout: Layout) -> None:
        common = self._common_gradients(layout)
        self.kind = "sharded" if common else "replicated"
        if common:
            self.params = GatheredParameters(self.comm, layout, common.buckets, common.shards)
            (shard,), (own,), (sums,) = common.shards, self.params.owned, common.sums
        else:
            self.params, grads = FlatBuffer(layout, self._allocator), GradientBuffer(layout, self._allocator)
            shard, own, sums = layout.whole(), self.params.flat, grads.flat
        self.grads = common or grads
        if self.precision:
            self.rounded = FlatBuffer(layout.astype(self.precision.dtype), self._allocator)
        self.parts = (Part(shard, own, sums, self.optimizer.init(shard, self._allocator)),)
        self.buckets = layout.buckets(self.bucket_bytes)
        self._compressed: CompressedSum | None = None
        if self.codec:
            key = self.plan.key.child("codec")
            self._compressed = CompressedSum(self.comm, self.codec, layout, key, self._allocator)

    def _common_gradients(self, layout: Layout) -> CommonGradients | None:
        """Return the gradients of a replica that the ranks of a node share, where that is possible."""
        if self.codec or self.precision or self._private or not self.reads_in_place:
            return None
        return common_gradients(self.comm, self.across, layout, self.optimizer, self.plan)

    def _initialise(self) -> None:
        initial = self.params
        if isinstance(initial, GatheredParameters):
            initial = self._begin(initial.layout, 0, self.parts)
        else:
            self._draw(initial)
        self._agreement.check_parameters(self.comm, [initial])
        self._hand_out()

    @property
    def optimizer_state(self) -> OptimizerState:
        """What the optimizer keeps, of the part that this rank updates."""
        return self.parts[0].state

    def _reduced(self, own: Tally) -> Tally:
        if self._compressed is None:
            return super()._reduced(own)
        with self.comm.phase("reduce"):
            total = self._agreement.total(own)
            if total.bad:
                return total
            total.check_count(self.step + 1)
            finite = self._compressed.reduce(self.grads.buffer, self.step, total.count)
        with self.comm.phase("check"):
            return replace(total, bad=float(not (finite or all_finite(self.parts))))

    def _reduce_gradients(self) -> None:
        reduce_gradients(self.comm, self.grads.buffer, self.buckets)

    def _hand_out(self) -> None:
        if isinstance(self.params, GatheredParameters):
            with self.comm.phase("gather"):
                self.params.gather()

    def state(self) -> State:
        """See `Method.state`."""
        found = super().state()
        kept = self._compressed.kept if self._compressed else ()
        more = [pieces_of(f"codec.{name}", buffer.flat, buffer.layout.whole(), kind) for name, buffer, kind in kept]
        return State(sum(more, start=found.pieces), found.scalars)

    def load(self, scalars: Mapping[str, Any], read: Read) -> None:
        """See `Method.load`."""
        super().load(scalars, read)
        for prefix, buffer, _ in self._compressed.kept if self._compressed else ():
            fill(f"codec.{prefix}", buffer.flat, buffer.layout.whole(), read)

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        if isinstance(self.params, GatheredParameters):
            self._load_shared(read)
        else:
            super().load_parameters(read)
