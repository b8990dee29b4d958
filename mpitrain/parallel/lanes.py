"""The steps of reproducible training: each batch is a fixed number of lanes, computed one by one wherever they lie.

A lane is what one of so many ranks would compute: its share of each microbatch, in the same shapes and normalised by
itself.  Ranks deal the lanes out among them.  Whatever is summed over lanes has the same bits however that is done:
gradients in fixed point, and the few other numbers in the order of the lanes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, GradientBuffer
from mpitrain.data.shares import share
from mpitrain.method.method import Plan
from mpitrain.method.steps import Part, add_sums, check_finite, clip, divide, update
from mpitrain.method.tiles import Tiles
from mpitrain.nn.model import Model
from mpitrain.optim import Optimizer, finite
from mpitrain.parallel.synchronous import Synchronous, Tally


class LaneSteps(Synchronous):
    """What reproducible methods share; they say how the lanes' gradients become those of a rank's parts.

    Attributes
    ----------
    lanes : int
        How many a batch is cut into.
    """

    params: FlatBuffer
    lanes: int

    def _deal(self, lanes: int) -> None:
        """Take this rank's lanes: a contiguous, near-equal run of them."""
        if lanes < self.comm.size:
            raise InputError(
                "more ranks than lanes", operation=type(self).__name__, got=f"{self.comm.size} ranks, {lanes} lanes",
                expected="a lane for each rank",
                remedy=f"set lanes to {self.comm.size} or more, or start at most {lanes} ranks",
            )  # fmt: skip
        self.lanes = lanes
        self._dealt = range(*share(lanes, self.comm.size, self.comm.rank))

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """The lanes of this rank, each as (number, of how many)."""
        return tuple((lane, self.lanes) for lane in self._dealt)

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`."""
        super().setup(model, optimizer, plan)
        self._lane_grads = [GradientBuffer(model.layout, self._allocator) for _ in self._dealt]
        self._tiles = Tiles(self.parts, self.comm if self.kind == "sharded" else None)

    @abstractmethod
    def _sum_lanes(self, lanes: Sequence[Array]) -> None:
        """Sum the gradients of all ranks' lanes, shape (layout.size,) each, into those of this rank's parts."""

    def _hand_out(self) -> None:
        """Give all ranks the parameters that were updated: nothing to do where each updates all."""

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        phase = self.comm.phase
        with phase("gradients"):
            tallies = [self._lane(number, microbatches) for number in range(len(self._dealt))]
        with phase("check"):
            total = Tally(*self._over_lanes([np.array(astuple(each)) for each in tallies]).tolist())
            self._check_lanes(total, tallies)
        with phase("reduce"):
            self._sum_lanes([grads.flat for grads in self._lane_grads])
        self.step += 1
        with phase("update"):
            divide(self.parts, total.count)
            clip(self.parts, self.plan, tiles=self._tiles)
            update(self.optimizer, self.parts, self.plan, self.updates, tiles=self._tiles)
        with phase("gather"):
            self._hand_out()
        return total

    def _lane(self, number: int, microbatches: list[Batch]) -> Tally:
        """Compute the gradient of one of this rank's lanes."""
        grads, first = self._lane_grads[number], number * self.microbatches
        found = self._gradients(microbatches[first : first + self.microbatches], grads, None)
        return replace(found, bad=float(found.bad or not finite(grads.flat)))

    def _check_lanes(self, total: Tally, tallies: list[Tally]) -> None:
        whole = self.params.layout.whole()
        lanes = [Part(whole, self.params.flat, grads.flat, {}) for grads in self._lane_grads]
        check_finite(self.comm, not total.bad, lanes, self.step + 1, lambda: not any(each.bad for each in tallies))

    def _over_lanes(self, values: Sequence[Array | None]) -> Array:
        """Sum an array of each lane over all lanes, in their order; of None nothing is added.  Collective.

        Every rank gets all terms, each of them from one rank and zeros from the others, and adds them by itself.
        """
        shape = next(value.shape for value in values if value is not None)
        terms = np.zeros((self.lanes, *shape))
        for lane, value in zip(self._dealt, values, strict=True):
            if value is not None:
                terms[lane] = value
        total: Array = self.comm.allreduce(terms).sum(axis=0)
        return total

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, Any]:
        """See `Method.evaluate`.

        Parameters
        ----------
        batches : iterable of Batch
            One of each of this rank's lanes (`shares`) in turn, for metrics whose bits no layout changes.  Any others
            give the same metrics but for rounding.
        """
        lanes: list[dict[str, Array] | None] = [None] * len(self._dealt)
        for number, batch in enumerate(batches):
            lane = number % len(lanes)
            lanes[lane] = add_sums(lanes[lane], self.model.sums(self.params, batch))
        if lanes[0] is None:
            raise InputError("there is nothing to evaluate", operation="evaluate", got="no batches")
        sums = {name: self._over_lanes([each[name] if each else None for each in lanes]) for name in lanes[0]}
        return self.model.metrics(sums)
