"""Reproducible pipelines: lanes flow through the stages one after another, and give the bits that they give elsewhere.

Each rank sums the lanes' gradients of its own stages, over the pipelines that share a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Batch
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.comm.local import alone
from mpitrain.data.shares import share
from mpitrain.method.evaluation import filled, something
from mpitrain.method.precision import Precision
from mpitrain.method.steps import add_sums
from mpitrain.method.tiles import Tiles
from mpitrain.parallel.checks import checked
from mpitrain.parallel.lanes import LaneSteps, deal
from mpitrain.parallel.pipeline.method import PipelineParallel
from mpitrain.parallel.tally import Tally


class ReproduciblePipelineParallel(LaneSteps, PipelineParallel):
    """Pipeline-parallel SGD with the bits of `ReproducibleDataParallel`, whatever the numbers of ranks and stages.

    Parameters
    ----------
    where : Communicator or ProcessMesh
        As for `PipelineParallel`, without ``tensor``; each pipeline takes some of the lanes.
    lanes : int
        As for `ReproducibleDataParallel`; at least one for each pipeline.
    microbatches : int
        Into how many parts a lane is cut.  What flows through a pipeline in a step are those of all its lanes, so that
        one each is enough to fill it.
    schedule, chunks, costs, cuts, allocator, precision
        As for `PipelineParallel`.

    Notes
    -----
    Cost of a step beyond that of `PipelineParallel`: `lane_sum` of a rank's stages, also where there is one pipeline,
    and a broadcast for each use of a tensor that is tied across stages.  A rank keeps a gradient of its stages for each
    of its pipeline's lanes, and one more.
    """

    def __init__(
        self,
        where: Communicator | ProcessMesh,
        *,
        lanes: int,
        schedule: str = "1f1b",
        chunks: int = 1,
        microbatches: int = 1,
        costs: Sequence[float] | None = None,
        cuts: Sequence[int] | None = None,
        allocator: Allocator | None = None,
        precision: Precision | None = None,
    ) -> None:
        self.lanes, self._dealt = lanes, deal(lanes, _pipelines(where), type(self).__name__, "pipeline")
        flow = microbatches * len(self._dealt)
        super().__init__(
            where, schedule=schedule, chunks=chunks, microbatches=flow, costs=costs, cuts=cuts, allocator=allocator,
            precision=precision,
        )  # fmt: skip
        self.microbatches = microbatches  # of a lane, as which a batch is dealt out

    @property
    def evaluation_shares(self) -> tuple[tuple[int, int], ...]:
        """The lanes of which this rank hands in what is evaluated: some of its pipeline's."""
        return tuple((lane, self.lanes) for lane in self._handed_in)

    @property
    def _handed_in(self) -> range:
        start, stop = share(len(self._dealt), self.pipe.size, self.pipe.rank)
        return self._dealt[start:stop]

    def _further_uses(self) -> tuple[str, ...]:
        """Return the names of this rank's uses of tied tensors, but for each one's first, which has its place."""
        own = ([use for use, rank in uses if rank == self.pipe.rank] for uses in self._ties.uses.values())
        return tuple(use for uses in own for use in uses[1:])

    def _make_tiles(self) -> Tiles:
        return Tiles(self.parts, self.pipe, self.model.layout, self._ties.copies)

    def _lane_gradients(self, microbatches: list[Batch]) -> list[Tally]:
        return self._judged(self._flow(microbatches, self._lane_grads, None))

    def _add_uses(self, lanes: Mapping[str, Sequence[Array]]) -> None:
        further = {use: self._sum_use(use, values) for use, values in lanes.items()}
        for name, uses in self._ties.uses.items():
            own = self._piece(name)
            terms = [self._ties.everyones(name, further.get(use, own), rank) for use, rank in uses]
            own[...] = reduce(add, terms)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """See `LaneSteps.evaluate`: each rank hands in batches of `evaluation_shares` in turn, or any others."""
        own = self._handed_in or self._dealt[:1]
        sums: list[dict[str, Array] | None] = [None] * len(self._dealt)
        params = self.whole()
        pairs = ((own[number % len(own)], batch) for number, batch in enumerate(checked(batches)))
        for round_ in self._evaluator.rounds(pairs):
            found = self._evaluator.sums([batch for _, batch in round_], params)
            for (lane, _), each in zip(round_, found, strict=False):  # none on other ranks than the last
                number = self._dealt.index(lane)
                sums[number] = add_sums(sums[number], each)
        total = self._totals(sums) if self.pipe.rank == self._last_rank else None  # who alone has sums
        return self.model.metrics(something(self.pipe.broadcast_object(total, self._last_rank)))

    def _totals(self, sums: Sequence[dict[str, Array] | None]) -> dict[str, Array] | None:
        """Return the sums over all lanes, given those of each; None where there are none."""
        first = filled(self.data, next((each for each in sums if each is not None), None))
        if first is None:
            return None
        known = sums if any(sums) else [first, *sums[1:]]
        return {name: self._over_lanes([each[name] if each else None for each in known], self.data) for name in first}


def _pipelines(where: Communicator | ProcessMesh) -> Communicator:
    """Return the ranks that have the same stages of all pipelines; where there is one pipeline, this rank."""
    if not isinstance(where, ProcessMesh):
        return alone()
    if where.shape.get("tensor", 1) > 1:
        raise InputError(
            "matrices of other shapes have other bits", operation="ReproduciblePipelineParallel",
            got=f"tensor={where.shape['tensor']}", expected="the axes pipe and data",
        )  # fmt: skip
    return where["data"] if where.shape.get("data", 1) > 1 else alone()
