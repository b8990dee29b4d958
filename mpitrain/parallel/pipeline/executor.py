"""The one executor: walks through the order that a schedule gives this rank, and receives, computes and sends.

It knows no schedule by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mpitrain._typing import Array, Shape
from mpitrain.arrays import Gradients
from mpitrain.comm import Communicator
from mpitrain.parallel.pipeline.links import Edge, Links
from mpitrain.parallel.pipeline.schedule import Operation, Schedule, Sizes
from mpitrain.parallel.pipeline.stages import Microbatch, Pass, Stages

_PHASES = {"F": "forward", "B": "backward input", "W": "backward weight", "BW": "backward"}

_AHEAD = 1
"""Receives are posted for so many operations after the next one."""


class Executor:
    """Runs a rank's stages in any valid order.

    Parameters
    ----------
    comm : Communicator
        Along the pipeline.
    sizes : Sizes
        Which rank has which stage.
    stages : Stages
        This rank's.
    links : Links
        Its messages.

    Attributes
    ----------
    peak : int
        The most forward passes that were in flight at a time in the last training step.

    Notes
    -----
    All methods are collective over the pipeline, with microbatches of the same sizes on all ranks.
    """

    def __init__(self, comm: Communicator, sizes: Sizes, stages: Stages, links: Links) -> None:
        self._comm, self._sizes, self._stages, self._links = comm, sizes, stages, links
        self._last = sizes.stages - 1
        self._shapes: dict[Shape, list[Shape]] = {}
        self.peak = 0

    def train(
        self, schedule: Schedule, microbatches: Sequence[Microbatch], grads: Sequence[Gradients]
    ) -> list[float]:  # fmt: skip
        """Add the gradients of this rank's stages, each microbatch's to its own of ``grads``.

        Returns
        -------
        list of float
            Of each microbatch the sum of its samples' losses on the last stage's rank, 0 elsewhere.

        Notes
        -----
        2 (pv − 1) m messages over all ranks, each of a microbatch's values between two layers.
        """
        losses, self.peak, ways = [0.0] * len(microbatches), 0, dict[tuple[int, int], Pass]()
        for kind, stage, number in self._walk(schedule.orders[self._comm.rank], microbatches):
            with self._comm.phase(_PHASES[kind]):
                if kind == "F":
                    ways[stage, number] = self._forward(stage, number, microbatches[number])
                    self.peak = max(self.peak, len(ways))
                    continue
                way = ways[stage, number]
                if kind != "W":
                    losses[number] += self._turn(stage, number, way)
                dx = self._stages.backward(kind, stage, way, grads[number])
                if dx is not None:
                    self._links.send(Edge(stage - 1, stage, number), dx)
                if kind != "B":
                    self._release(stage, ways.pop((stage, number)))
        return losses

    def outputs(self, microbatches: Sequence[Microbatch]) -> Iterator[Array]:
        """Yield the outputs of each microbatch on the last stage's rank; elsewhere none.

        To be walked through to the end on all ranks.  An output is valid until the next one.
        """
        for _, stage, number in self._walk(self._all_forward(len(microbatches)), microbatches):
            way = self._forward(stage, number, microbatches[number])
            if stage == self._last:
                yield way.y
            self._release(stage, way)

    def shapes(self, microbatch: Microbatch) -> list[Shape]:
        """Return the shape of one sample at the entry of each stage, and of its output; the same on all ranks.

        The first time for each shape of samples, an empty batch is passed through: pv small broadcasts.
        """
        if microbatch.sample_shape not in self._shapes:
            found, empty = [microbatch.sample_shape], _empty(microbatch)
            for stage in range(self._sizes.stages):
                rank = self._sizes.rank_of(stage)
                shape = self._stages.output_shape(stage, empty, found[-1]) if rank == self._comm.rank else None
                found.append(self._comm.broadcast_object(shape, rank))
            self._shapes[microbatch.sample_shape] = found
        return self._shapes[microbatch.sample_shape]

    def _walk(self, order: Sequence[Operation], microbatches: Sequence[Microbatch]) -> Iterator[Operation]:
        """Yield the operations, with receives posted ahead of them and sends seen through behind."""
        shapes = [self.shapes(each) for each in microbatches]
        posted = 0
        for position, operation in enumerate(order):
            for later in order[posted : position + 1 + _AHEAD]:
                self._expect(later, len(microbatches[later.microbatch].batch), shapes[later.microbatch])
                posted += 1
            yield operation
            self._links.sweep()
        self._links.finish()

    def _expect(self, operation: Operation, rows: int, shapes: Sequence[Shape]) -> None:
        kind, stage, number = operation
        if kind == "F" and stage > 0:
            self._links.expect(Edge(stage, stage - 1, number), (rows, *shapes[stage]))
        if kind in ("B", "BW") and stage < self._last:
            self._links.expect(Edge(stage, stage + 1, number), (rows, *shapes[stage + 1]))

    def _forward(self, stage: int, number: int, microbatch: Microbatch) -> Pass:
        """Pass a microbatch through a stage and hand it on."""
        x = microbatch.batch.inputs if stage == 0 else self._links.receive(Edge(stage, stage - 1, number))
        way = self._stages.forward(stage, microbatch, x)
        if stage < self._last:
            self._links.send(Edge(stage + 1, stage, number), way.y)
        return way

    def _turn(self, stage: int, number: int, way: Pass) -> float:
        """Get the gradient of a pass's output; return its loss, which is known on the last stage."""
        if stage == self._last:
            return self._stages.loss(way)
        way.dy = self._links.receive(Edge(stage, stage + 1, number))
        return 0.0

    def _release(self, stage: int, way: Pass) -> None:
        """Give back all memory of a pass that is done."""
        way.release()
        if stage > 0:
            self._links.release(way.x)
        if stage < self._last and way.dy is not None:
            self._links.release(way.dy)

    def _all_forward(self, count: int) -> list[Operation]:
        """Return this rank's forward passes, in groups of p, each through the rank's stages one after another."""
        p = self._sizes.ranks
        return [
            Operation("F", stage, number)
            for start in range(0, count, p)
            for stage in self._sizes.stages_of(self._comm.rank)
            for number in range(start, min(start + p, count))
        ]


def _empty(microbatch: Microbatch) -> Microbatch:
    """Return a microbatch without samples, to be looked at in evaluation mode."""
    call = replace(microbatch.call, training=False, reduce=None)
    return replace(microbatch, batch=microbatch.batch.part(slice(0)), call=call)
