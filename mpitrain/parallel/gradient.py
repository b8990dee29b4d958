"""Gradient-parallel SGD: each rank reduces the shard of the gradients that it owns, and updates that shard.

Optimizer state is kept by the owner alone (stage 1), reduced gradients too, bucket by bucket as the backward pass gives
them (stage 2), and the parameters too, gathered bucket by bucket for the layers that use them (stage 3).  In stages 1
and 2 the parameters are one array for all ranks of a node, so that on one node nothing is gathered.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mpitrain._errors import InputError
from mpitrain.arrays import Allocator, Batch, Gradients, Layout
from mpitrain.comm import Communicator
from mpitrain.method.precision import Precision
from mpitrain.method.steps import Reach
from mpitrain.nn.model import Reduce
from mpitrain.parallel.across import reach
from mpitrain.parallel.buckets import StreamedGradients, WholeGradients
from mpitrain.parallel.in_place import CommonGradients, common_gradients
from mpitrain.parallel.owned import OwnedParameters
from mpitrain.parallel.sharded import ShardedParameters
from mpitrain.parallel.synchronous import DEFAULT_BUCKET_BYTES
from mpitrain.parallel.tally import Tally


class GradientSteps(OwnedParameters):
    """The step of gradient-parallel methods: gradients are reduced to shards, of which each owner updates its own."""

    reads_in_place: ClassVar[bool] = True
    """Whether a step may sum the gradients of a node where they lie, see `mpitrain.parallel.in_place`."""

    grads: CommonGradients | WholeGradients | StreamedGradients

    def _allocate(self, layout: Layout) -> None:
        if self._terms and self.stage > 1:
            raise InputError(
                f"stage {self.stage} reduces gradients while ranks have only terms of some",
                operation="GradientParallel", got=", ".join(self._terms[:3]),
                remedy="use stage 1, or divide no activations along the sequence",
            )  # fmt: skip
        self.grads = self._place_gradients(layout)
        self._buckets = self.grads.buckets
        shards, sums = self.grads.shards, self.grads.sums
        owned = self._allocate_parameters(layout, shards)
        self.parts = tuple(self._part(*each) for each in zip(shards, owned, sums, strict=True))

    def _place_gradients(self, layout: Layout) -> CommonGradients | WholeGradients | StreamedGradients:
        common = None
        if self.reads_in_place and self._in_one_piece(layout) and not (self._private or self.precision):
            common = common_gradients(self._owners, self.across, layout, self.optimizer, self.plan)
        if common:
            return common
        if self.stage > 1:
            return StreamedGradients(self._owners, layout, self.bucket_bytes, self._private, self._allocator)
        return WholeGradients(self._owners, layout, self._private or self._owners.empty, self._apart)

    def _in_one_piece(self, layout: Layout) -> bool:
        """Tell whether all gradients lie side by side, which in stage 2 takes no more memory than to pass through."""
        if self.stage == 1 or self._gathers_by_layer:
            return self.stage == 1
        largest = self.across.allreduce(np.int64(layout.nbytes), "max") if self.across else layout.nbytes
        return int(largest) <= self.bucket_bytes

    def _gradients(self, microbatches: list[Batch], grads: Gradients, reduce: Reduce | None) -> Tally:
        tally = super()._gradients(microbatches, grads, reduce)
        if isinstance(self.params, ShardedParameters):
            self.params.end_passes()
        return tally

    def _reduce_gradients(self) -> None:
        self.grads.reduce()

    def _over_model(self) -> Reach:
        return reach(self.across, self.params.layout, self._owners)

    def _over_tensors(self) -> Reach:
        return reach(self.across, self.params.layout, self._owners)


class GradientParallel(GradientSteps):
    """Synchronous SGD with optimizer state, gradients and parameters divided among the ranks.

    Parameters
    ----------
    comm : Communicator
        The ranks that share each batch.
    stage : {1, 2, 3}
        1: each rank keeps the optimizer state of a shard of the model.  2: and the gradients of that shard only.  3:
        and the parameters of that shard only, if the model `reads_by_layer` (`Network` does, and those of
        `mpitrain.adapters`); else as 2.
    microbatches : int
        Into how many parts a batch is cut, see `DataParallel`.  In stage 1 their gradients are added up before they
        are reduced; from stage 2 on, where there is nowhere to add them up, those of each are reduced.
    bucket_bytes : int
        From stage 2 on: gradients are reduced in pieces of about this size, each as soon as it is complete; in stage 3
        parameters are gathered in the same pieces.  A layer's weights are never divided, so that a larger layer makes a
        piece by itself.  In stage 2, a model that is no larger than this is one piece, and its step that of stage 1,
        where that sums while it updates (Notes).
    allocator : Allocator, optional
        Where all memory of this rank's lives; None: where the ranks of a node share it, as far as they can.
    across : Communicator, optional
        The ranks that divide the model, see `Synchronous`.
    precision : Precision, optional
        In which 16-bit type parameters are gathered and the passes computed, see there; each rank then keeps the
        float32 parameters of its shards.

    Notes
    -----
    The step is that of `DataParallel`.  Cost of one, for parameters of n bytes on p ranks, beyond the gradient: a
    reduce_scatter of the gradients (in stages 2 and 3 of those of each microbatch), an allgather of the parameters,
    each (p−1)/p · n bytes moved per rank where the library uses a ring, and an allreduce of five numbers.  In stage 3
    parameters are gathered in each pass instead, forward and backward: two allgathers a microbatch, less what is still
    there when a pass begins or turns, and what the first layer's backward pass need not read.  On one node with shared
    memory no byte is sent: each rank reads n bytes of gradients and writes n/p of parameters at a time, in one pass in
    stage 1 if the optimizer is `Elementwise` and nothing is clipped.

    Memory per rank, with k numbers of optimizer state a parameter: n of parameters, or n/p where the node's p ranks
    share them; stage 1: n of gradients and kn/p of state, and n/p more of gradients in ordinary memory; stage 2: (k+1)
    n/p, and the largest bucket; stage 3: (k+2) n/p, the largest bucket of gradients, and the largest buckets of
    parameters that a layer needs together, once a node where its ranks share memory.  On one node stage 3 therefore
    saves nothing over stage 2; with several, each node has its share of the parameters instead of all.  Evaluating,
    predicting and `whole` gather all parameters, for as long as they take.

    Source: S. Rajbhandari, J. Rasley, O. Ruwase, Y. He, "ZeRO: memory optimizations toward training trillion parameter
    models", SC 2020, sections 5.1 to 5.3; here a shard may begin and end within a tensor.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        stage: int = 1,
        microbatches: int = 1,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        allocator: Allocator | None = None,
        across: Communicator | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(comm, microbatches, bucket_bytes, allocator, across, precision)
        if stage not in (1, 2, 3):
            raise InputError(
                "there is no such stage", operation="GradientParallel", got=repr(stage), expected="1, 2 or 3",
                remedy="1 divides the optimizer state, 2 the gradients too, 3 the parameters too",
            )  # fmt: skip
        self.stage = stage
