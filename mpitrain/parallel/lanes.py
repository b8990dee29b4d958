"""The steps of reproducible training: each batch is a fixed number of lanes, computed one by one wherever they lie.

A lane is what one of so many ranks would compute: its share of each microbatch, in the same shapes and normalised by
itself.  Ranks deal the lanes out among them.  Whatever is summed over lanes has the same bits however that is done:
gradients in fixed point, and the few other numbers in the order of the lanes.  A tied tensor is summed use by use, and
the uses' sums are then added in their order, because they may come from different ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_whole
from mpitrain._typing import Array
from mpitrain.arrays import Batch, FlatBuffer, GradientBuffer
from mpitrain.comm import Communicator
from mpitrain.comm.lanes import lane_sum
from mpitrain.data.shares import share
from mpitrain.method.evaluation import filled, something
from mpitrain.method.method import Plan
from mpitrain.method.steps import Part, add_sums, check_finite, clip, divide, update
from mpitrain.method.tiles import Tiles
from mpitrain.nn.model import Model
from mpitrain.optim import Optimizer, finite
from mpitrain.parallel.checks import checked
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.parallel.tally import Tally


class LaneSteps(Synchronous):
    """What reproducible methods share; those that divide more say how lanes' gradients become those of a rank's parts.

    Attributes
    ----------
    lanes : int
        How many a batch is cut into.
    """

    params: FlatBuffer
    lanes: int

    def _deal(self, lanes: int) -> None:
        """Take this rank's lanes: a contiguous, near-equal run of them."""
        self.lanes, self._dealt = lanes, deal(lanes, self.comm, type(self).__name__)

    @property
    def shares(self) -> tuple[tuple[int, int], ...]:
        """The lanes of this rank, each as (number, of how many)."""
        return tuple((lane, self.lanes) for lane in self._dealt)

    def setup(self, model: Model, optimizer: Optimizer, plan: Plan) -> None:
        """See `Method.setup`."""
        super().setup(model, optimizer, plan)
        self._further = self._further_uses()
        self._summed = self.params.layout.astype(model.layout.dtype)  # parameters may be handed out in 16 bits
        layout = self._summed.untied(self._further)
        self._lane_grads = [GradientBuffer(layout, self._allocator) for _ in self._dealt]
        self._tiles = self._make_tiles()

    @property
    def lane_grads(self) -> Sequence[GradientBuffer]:
        """The gradients of this rank's lanes, one after another."""
        return self._lane_grads

    def _further_uses(self) -> tuple[str, ...]:
        """Return the names of tied tensors under which lanes keep gradients apart from those of another name."""
        return tuple(self.params.layout.ties)

    def _make_tiles(self) -> Tiles:
        return Tiles(self.parts, self.comm if self.kind == "sharded" else None)

    def _sum_lanes(self, lanes: Sequence[Array]) -> None:
        """Sum the gradients of all ranks' lanes, shape (layout.size,) each, into those of this rank's parts."""
        lane_sum(self._owners, lanes, self.lanes, layout=self._summed, out=self.parts[0].grads)

    def _sum_use(self, use: str, lanes: Sequence[Array]) -> Array:
        """Sum the gradients of a further use, shape (n,) each, over all ranks' lanes; return what is for `_piece`."""
        return lane_sum(self._owners, lanes, self.lanes)

    def _piece(self, name: str) -> Array:
        """Return this rank's summed gradient of its part of a tensor, as a flat view."""
        segment = self._summed[name]
        return self.parts[0].grads[segment.offset : segment.stop]

    def _add_uses(self, lanes: Mapping[str, Sequence[Array]]) -> None:
        """Add what the lanes have of further uses to the gradients of the parts."""
        for use, values in lanes.items():
            total = self._piece(use)
            total += self._sum_use(use, values)

    def _reduce_lanes(self) -> None:
        """Sum the gradients of all lanes into those of this rank's parts.  Collective."""
        size = self._summed.size
        self._sum_lanes([grads.flat[:size] for grads in self._lane_grads])
        self._add_uses({use: [grads.views[use].reshape(-1) for grads in self._lane_grads] for use in self._further})

    def _train_step(self, microbatches: list[Batch]) -> Tally:
        phase = self.comm.phase
        with phase("gradients"):
            tallies = self._lane_gradients(microbatches)
        with phase("check"):
            total = Tally(*self._over_lanes([np.array(each.numbers) for each in tallies]).tolist())
            taken = self._is_lanes_step_taken(total, tallies)
        if not taken:
            return total.untrained()
        total.check_count(self.step + 1)
        with phase("reduce"):
            self._reduce_lanes()
        with phase("update"):
            divide(self.parts, self._passes.scale * total.count)
            clip(self.parts, self.plan, tiles=self._tiles)
            update(self.optimizer, self.parts, self.plan, self.updates + 1, tiles=self._tiles)
        self._hand_out()
        return total

    def _lane_gradients(self, microbatches: list[Batch]) -> list[Tally]:
        """Compute the gradient of each of this rank's lanes."""
        each = self.microbatches
        parts = [microbatches[first : first + each] for first in range(0, len(microbatches), each)]
        pairs = zip(parts, self._lane_grads, strict=True)
        return self._judged([self._gradients(part, grads, None) for part, grads in pairs])

    def _judged(self, tallies: list[Tally]) -> list[Tally]:
        """Return the tallies of this rank's lanes, which now tell whether their gradients are finite, too."""
        pairs = zip(tallies, self._lane_grads, strict=True)
        return [replace(found, bad=float(found.bad or not finite(grads.flat))) for found, grads in pairs]

    def _is_lanes_step_taken(self, total: Tally, tallies: list[Tally]) -> bool:
        """Tell what `Synchronous._is_taken` tells; without a scale of the loss, name the lanes at fault."""
        if self._passes.scaler:
            return self._is_taken(not total.bad, [])
        self._check_lanes(total, tallies)
        return True

    def _check_lanes(self, total: Tally, tallies: list[Tally]) -> None:
        lanes = [Part(grads.layout.whole(), grads.flat, grads.flat, {}) for grads in self._lane_grads]
        check_finite(self.comm, not total.bad, lanes, self.step + 1, lambda: not any(each.bad for each in tallies))

    def _over_lanes(self, values: Sequence[Array | None], comm: Communicator | None = None) -> Array:
        """Sum an array of each lane over all lanes, in their order; of None nothing is added.  Collective.

        Every rank of ``comm``, by default the method's, gets all terms, each of them from one rank and zeros from the
        others, and adds them by itself.
        """
        shape = next(value.shape for value in values if value is not None)
        terms = np.zeros((self.lanes, *shape))
        for lane, value in zip(self._dealt, values, strict=True):
            if value is not None:
                terms[lane] = value
        total: Array = (comm or self.comm).allreduce(terms).sum(axis=0)
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
        params = self.whole()
        for number, batch in enumerate(checked(batches)):
            lane = number % len(lanes)
            lanes[lane] = add_sums(lanes[lane], self.model.sums(params, batch))
        lanes[0] = first = something(filled(self.comm, lanes[0]))
        sums = {name: self._over_lanes([each[name] if each else None for each in lanes]) for name in first}
        return self.model.metrics(sums)


def deal(lanes: int, comm: Communicator, operation: str, what: str = "rank") -> range:
    """Return the lanes of this rank, of those that share them out: a contiguous, near-equal run."""
    check_whole(operation, "lanes", lanes, 1)
    if lanes < comm.size:
        raise InputError(
            f"more {what}s than lanes", operation=operation, got=f"{comm.size} {what}s, {lanes} lanes",
            expected=f"a lane for each {what}",
            remedy=f"set lanes to {comm.size} or more, or start at most {lanes} {what}s",
        )  # fmt: skip
    return range(*share(lanes, comm.size, comm.rank))
