"""Pipelines that divide optimizer state: what the ranks of a stage hold alike, each updates a shard of.

Passes are a pipeline's, and the step gradient-parallel's, over the ranks that have the same stages.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

from mpitrain.arrays import Allocator
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.method.precision import Precision
from mpitrain.method.steps import Reach
from mpitrain.method.tiles import Tiles
from mpitrain.parallel.across import reach
from mpitrain.parallel.buckets import WholeGradients
from mpitrain.parallel.gathered import GatheredParameters
from mpitrain.parallel.gradient import GradientSteps
from mpitrain.parallel.pipeline.method import PipelineParallel
from mpitrain.parallel.pipeline.reproducible import ReproduciblePipelineParallel
from mpitrain.parallel.reproducible import ShardedLaneSteps


class GradientPipelineParallel(GradientSteps, PipelineParallel):
    """Pipeline-parallel SGD with the optimizer state of each stage divided among the pipelines that share a batch.

    Parameters
    ----------
    where : Communicator or ProcessMesh
        As for `PipelineParallel`.  Ranks along ``data`` have the same stages, and divide their optimizer state; a
        single pipeline keeps all of it.
    schedule, chunks, microbatches, costs, cuts
        As for `PipelineParallel`.
    allocator : Allocator, optional
        Where all memory of this rank's lives; None: where the ranks of a stage share it, as far as they are on a node.
    precision : Precision, optional
        In which 16-bit type the parameters of stages are gathered, the stages compute, and activations and their
        gradients are sent, see there; each rank then keeps the float32 parameters of its shards.

    Notes
    -----
    The step is that of `PipelineParallel`, and is stage 1 of `GradientParallel`: the gradients of all microbatches are
    added up before they are reduced.  There is no stage 2, for the gradients of a stage are complete only when the last
    microbatch has passed backward.

    Cost of a step beyond the passes, for a stage of n bytes on d ranks along ``data``: a reduce_scatter of its
    gradients and an allgather of its parameters, each (d−1)/d · n bytes moved per rank where the library uses a ring,
    and none sent where they share memory; and an allreduce of five numbers.  A tensor that is tied across stages is
    reduced and gathered by itself, so that all its holders cut it alike; its gradient is then summed over the stages
    shard by shard, a d-th of the bytes of `PipelineParallel`.

    Memory per rank, with k numbers of optimizer state a parameter: n of parameters, or n/d where the d ranks share
    them; n of gradients, and n/d more in ordinary memory; kn/d of optimizer state.  With a precision, parameters take
    half as much, and those of a rank's shards n/d more in float32; what evaluates, predicts or hashes gathers n in
    float32, once where memory is shared, and lets it go afterwards.
    """

    reads_in_place: ClassVar[bool] = False  # stages on other nodes might not, and all take the same steps

    params: GatheredParameters
    grads: WholeGradients

    def __init__(
        self,
        where: Communicator | ProcessMesh,
        *,
        schedule: str = "1f1b",
        chunks: int = 1,
        microbatches: int = 1,
        costs: Sequence[float] | None = None,
        cuts: Sequence[int] | None = None,
        allocator: Allocator | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(
            where, schedule=schedule, chunks=chunks, microbatches=microbatches, costs=costs, cuts=cuts,
            allocator=allocator, precision=precision,
        )  # fmt: skip

    @property
    def _apart(self) -> Collection[str]:
        return self._ties.shared

    def _reduce_gradients(self) -> None:
        super()._reduce_gradients()
        parts = zip(self.grads.buckets, self.parts, strict=True)
        self._ties.sum({bucket.segments[0].name: part.grads for bucket, part in parts if bucket.segments})

    def _over_model(self) -> Reach:
        return reach(self.across, self.params.layout, self.data, self.pipe, elsewhere=self._ties.copies)

    @property
    def _saved_elsewhere(self) -> Collection[str]:
        return self._ties.copies


class ReproducibleGradientPipelineParallel(ShardedLaneSteps, ReproduciblePipelineParallel, GradientPipelineParallel):
    """Pipelines that divide optimizer state, with the bits of `ReproducibleDataParallel`.

    Parameters
    ----------
    where, lanes, microbatches, schedule, chunks, costs, cuts
        As for `ReproduciblePipelineParallel`.
    allocator, precision
        As for `GradientPipelineParallel`.

    Notes
    -----
    Cost of a step beyond that of `ReproduciblePipelineParallel`: `lane_reduce_scatter` in place of `lane_sum`, and an
    allgather of the parameters of a rank's stages.
    """

    params: GatheredParameters

    def _make_tiles(self) -> Tiles:
        return Tiles(self.parts, self.comm, self.model.layout, self._ties.copies)
