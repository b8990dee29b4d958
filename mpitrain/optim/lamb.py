"""LAMB: Adam's direction, with a learning rate per tensor in proportion to the tensor's norm, for large batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import EPSILON, Choice, option
from mpitrain._typing import Array
from mpitrain.arrays import Shard, namespace, to_host
from mpitrain.optim.adam import AdamW
from mpitrain.optim.chunks import scratch, sum_of_squares, trained_chunks
from mpitrain.optim.elementwise import check_shard, follow_statistics
from mpitrain.optim.optimizer import State
from mpitrain.optim.terms import Terms


@dataclass(frozen=True, kw_only=True)
class LAMB(AdamW):
    """Layer-wise adaptive moments: ``u = m̂ / (√v̂ + eps) + weight_decay * p; p -= lr * ‖p‖ / ‖u‖ * u`` per tensor.

    Parameters
    ----------
    betas, eps
        As in `Adam`.
    weight_decay : float
        Coefficient on group ``decay``, inside ``u``.
    adapt : {"decay", "trained"}
        Which tensors take the ratio ‖p‖/‖u‖: those of group ``decay``, as in the authors' own code, or all, as in the
        paper, which holds back biases that start at zero.  The ratio is 1 for the others, and where a norm is zero.

    Notes
    -----
    `partials` moves the moments and returns the norms; `update` must follow it with their sums over all shards.
    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
    algorithm 2 with φ(z) = z.
    """

    name: ClassVar[str] = "lamb"

    eps: float = option(EPSILON, 1e-6)
    adapt: str = option(Choice(("decay", "trained")), "decay")

    def partials(self, params: Array, grads: Array, state: State, step: int, shard: Shard) -> Array:
        """Update the moments in ``state``, and return each tensor's squared norms over this shard.

        Returns
        -------
        array of float64, shape (len(shard.layout), 2)
            ‖p‖² and ‖u‖²; zero for ``statistics``.
        """
        check_shard(params, Terms((grads,)), state, step, shard)
        xp = namespace(params)
        norms: Array = xp.zeros((len(shard.layout), 2), np.float64)
        u, work, wide = scratch(params), scratch(params), scratch(params, np.float64)
        for number, chunk in trained_chunks(shard, params):
            p, size = params[chunk], chunk.stop - chunk.start
            self._follow(state["m"][chunk], state["v"][chunk], grads[chunk], work[:size])
            self._proposal(shard, number, chunk, params, state, step, u[:size], work[:size])
            norms[number, 0] += sum_of_squares(p, wide)
            norms[number, 1] += sum_of_squares(u[:size], wide)
        return norms

    def update(
        self,
        params: Array,
        grads: Array,
        state: State,
        lr: float,
        step: int,
        shard: Shard,
        totals: Array | None = None,
    ) -> None:
        """Update ``params`` in place from the moments that `partials` left in ``state``; see `Optimizer.update`.

        Raises
        ------
        InputError
            ``totals`` are missing or of the wrong shape.
        """
        check_shard(params, Terms((grads,)), state, step, shard)
        ratios = self._ratios(shard, totals)
        u, work = scratch(params), scratch(params)
        for number, chunk in trained_chunks(shard, params):
            size = chunk.stop - chunk.start
            self._proposal(shard, number, chunk, params, state, step, u[:size], work[:size])
            u[:size] *= lr * ratios[number]
            params[chunk] -= u[:size]
        follow_statistics(params, Terms((grads,)), shard)

    def _proposal(
        self,
        shard: Shard,
        number: int,
        chunk: slice,
        params: Array,
        state: State,
        step: int,
        u: Array,
        work: Array,
    ) -> None:
        """Write ``u`` of a chunk of tensor ``number``."""
        u *= self._direction(state["m"][chunk], state["v"][chunk], step, u)
        if shard.layout.segments[number].group == "decay" and self.weight_decay:
            namespace(u).multiply(params[chunk], self.weight_decay, out=work)
            u += work

    def _ratios(self, shard: Shard, totals: Array | None) -> list[float]:
        """Return ‖p‖/‖u‖ of each tensor."""
        shape = (len(shard.layout), 2)
        if totals is None or totals.shape != shape:
            raise InputError(
                "lamb: norms of whole tensors are needed", got=None if totals is None else totals.shape,
                expected=shape, remedy="call partials, add them over all shards, and pass the sums as totals",
            )  # fmt: skip
        p, u = np.sqrt(to_host(totals)).T
        adapted = np.array([self.adapt == "trained" or segment.group == "decay" for segment in shard.layout], bool)
        ratios = np.divide(p, u, out=np.ones_like(p), where=adapted & (p > 0) & (u > 0))
        return [float(ratio) for ratio in ratios]
