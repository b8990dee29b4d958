"""Gradient-parallel SGD: each rank reduces the shard of the gradients that it owns, and updates that shard.

Optimizer state is kept by the owner alone (stage 1), and reduced gradients too, bucket by bucket as the backward pass
gives them (stage 2).  On one node the parameters are one array for all ranks, so that nothing is gathered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Batch, FlatBuffer, Layout, Shard, plain
from mpitrain.comm import Communicator
from mpitrain.comm.shard_plans import AllgatherPlan
from mpitrain.method.state import Kind, Read
from mpitrain.method.steps import Part, all_finite, clip, divide, update
from mpitrain.parallel.buckets import Bucket, StreamedGradients, WholeGradients
from mpitrain.parallel.synchronous import DEFAULT_BUCKET_BYTES, Synchronous, Tally


class GradientParallel(Synchronous):
    """Synchronous SGD with gradients and optimizer state divided among the ranks.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    stage : {1, 2}
        1: each rank keeps the optimizer state of a shard of the model.  2: and the gradients of that shard only.
    microbatches : int
        Into how many parts a batch is cut, see `DataParallel`.  In stage 1 their gradients are added up before they
        are reduced; in stage 2, where there is nowhere to add them up, those of each are reduced.
    bucket_bytes : int
        Stage 2: gradients are reduced in pieces of about this size, each as soon as it is complete.  A layer's weights
        are never divided, so that a larger layer makes a piece by itself.
    allocator : Allocator, optional
        Where all memory of this rank's lives; None: where the ranks of a node share it, as far as they can.
    across : Communicator, optional
        The ranks that divide the model, see `Synchronous`.

    Notes
    -----
    The step is that of `DataParallel`.  Cost of one, for parameters of n bytes on p ranks, beyond the gradient: a
    reduce_scatter of the gradients (in stage 2 of those of each microbatch), an allgather of the parameters, each
    (p−1)/p · n bytes moved per rank where the library uses a ring, and an allreduce of five numbers.  On one node with
    shared memory no byte is moved: each rank reads n bytes of gradients and writes n/p of parameters.

    Memory per rank, with k numbers of optimizer state a parameter: n of parameters, or n/p where the node's p ranks
    share them; stage 1: n of gradients and kn/p of state, and n/p more of gradients in ordinary memory; stage 2: (k+1)
    n/p, and the largest bucket.

    Source: S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: memory optimizations toward training trillion parameter
    models", SC 2020, sections 5.1 and 5.2; here a shard may begin and end within a tensor.
    """

    kind: ClassVar[Kind] = "sharded"

    def __init__(
        self,
        comm: Communicator,
        *,
        stage: int = 1,
        microbatches: int = 1,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        allocator: Allocator | None = None,
        across: Communicator | None = None,
    ) -> None:
        super().__init__(comm, microbatches, bucket_bytes, allocator or plain, across)
        if stage not in (1, 2):
            raise InputError(
                "there is no such stage", operation="GradientParallel", got=stage, expected="1 or 2",
                remedy="1 divides the optimizer state, 2 the gradients too",
            )  # fmt: skip
        self.stage = stage
        self._private = allocator

    def _allocate(self, layout: Layout) -> None:
        if self._terms and self.stage == 2:
            raise InputError(
                "stage 2 reduces gradients while ranks have only terms of some", operation="GradientParallel",
                got=", ".join(self._terms[:3]), remedy="use stage 1, or divide no activations along the sequence",
            )  # fmt: skip
        memory = self._private or self.comm.empty
        self.params = FlatBuffer(layout, self._private or self.comm.shared)
        self.grads: WholeGradients | StreamedGradients = (
            WholeGradients(self.comm, layout, memory) if self.stage == 1
            else StreamedGradients(self.comm, layout, self.bucket_bytes, memory, self._allocator)
        )  # fmt: skip
        self.parts = tuple(self._part(*each) for each in zip(self.grads.shards, self.grads.sums, strict=True))
        self._gathers = [self._gather(*each) for each in zip(self.grads.buckets, self.grads.shards, strict=True)]

    def _part(self, shard: Shard, sums: Array) -> Part:
        own = self.params.flat[shard.start : shard.stop]
        return Part(shard, own, sums, self.optimizer.init(shard, self._allocator))

    def _gather(self, bucket: Bucket, shard: Shard) -> AllgatherPlan:
        place = self.params.flat[bucket.start : bucket.stop]
        return self.comm.allgather_plan(place, shard.start - bucket.start, shard.stop - bucket.start)

    def _initialise(self) -> None:
        initial = FlatBuffer(self.params.layout, self._allocator)  # what is shared would hide that ranks differ
        self.model.initialise(initial, self.plan.key.child("init"))
        self._verify(initial)
        for part in self.parts:
            part.params[...] = initial.flat[part.shard.start : part.shard.stop]
        self._publish()

    def _publish(self) -> None:
        """Give all ranks the parameters that their owners have written.  Collective."""
        for gather in self._gathers:
            gather()

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        phase = self.comm.phase
        with phase("gradients"):
            own = self._gradients(microbatches, self.grads, self._reduce)
        with phase("reduce"):
            self._sum_terms()
            self.grads.reduce()
        with phase("check"):
            total = self._agreed(self._sum(replace(own, bad=float(own.bad or not all_finite(self.parts)))))
            self._check_finite(not total.bad, microbatches)
        self.step += 1
        with phase("update"):
            divide(self.parts, total.count)
            reach = self._reach(self.comm)
            clip(self.parts, self.plan, reach)
            update(self.optimizer, self.parts, self.plan, self.step, reach)
        with phase("gather"):
            self._publish()
        return total

    def load_parameters(self, read: Read) -> None:
        """See `Method.load_parameters`."""
        self.comm.barrier()  # a rank may still predict with what is there now
        super().load_parameters(read)
        self._publish()
