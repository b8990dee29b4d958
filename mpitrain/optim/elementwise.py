"""What all optimizers share: the walk over a shard, weight decay, and tensors that are not trained.

An optimizer whose rule looks at one element at a time is an `Elementwise` with a `_step`; it need not know of groups,
shards or statistics.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mpitrain._errors import InputError
from mpitrain._options import NON_NEGATIVE, Checked, option
from mpitrain._typing import Array
from mpitrain.arrays import Shard, namespace
from mpitrain.optim.chunks import chunks, scratch
from mpitrain.optim.optimizer import Optimizer, State
from mpitrain.optim.terms import Terms


class Decay(NamedTuple):
    """What weight decay does to a run in one step, before all else: ``g += penalty * p``, then ``p *= shrink``."""

    penalty: float = 0.0
    shrink: float = 1.0

    def apply(self, p: Array, g: Array, work: Array) -> None:
        """Do it, in place; ``work`` is scratch."""
        if self.penalty:
            namespace(p).multiply(p, self.penalty, out=work)
            g += work
        if self.shrink != 1.0:
            p *= self.shrink


@dataclass(frozen=True, kw_only=True)
class Elementwise(Checked, Optimizer):
    """Base of optimizers that update each element by itself.

    Parameters
    ----------
    weight_decay : float
        Coefficient λ of weight decay on tensors of group ``decay``; as an L2 penalty, whose gradient λp is added to
        the gradient, unless the optimizer says otherwise.

    Notes
    -----
    Not collective.  One pass over the shard's memory; any shard gives the same bits as the whole would.
    """

    full_batch: ClassVar[bool] = False
    """Whether one step takes the whole training set as its batch."""

    elsewhere: ClassVar[Mapping[str, str]] = {
        "lr": "the learning rate is the plan's: Plan(Key(seed=0), Constant(lr=1e-3), steps=100)",
    }

    weight_decay: float = option(NON_NEGATIVE, 0.0)

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
        """Update ``params`` and ``state`` in place; see `Optimizer.update`."""
        self.update_mean(params, Terms((grads,)), state, lr, step, shard)

    @property
    def takes_terms(self) -> bool:
        """Whether the optimizer has an `update_mean`: not a subclass that brings its own `update` or `partials`."""
        return type(self).update is Elementwise.update and type(self).partials is Optimizer.partials

    def update_mean(self, params: Array, terms: Terms, state: State, lr: float, step: int, shard: Shard) -> None:
        """Update ``params`` and ``state`` in place; see `Optimizer.update_mean`."""
        check_shard(params, terms, state, step, shard)
        work = scratch(params)
        mean = work if terms.is_mean else scratch(params)
        for decays, run in self._trained(shard):
            slots = [state[slot][run] for slot in self.slots]
            decay = self._decay(lr) if decays else Decay()
            if self._compiled(params[run], terms.cut(run), slots, lr, step, decay):
                continue
            for chunk in chunks(run, params):
                p = params[chunk]
                g = terms.cut(chunk).mean(mean[: p.size])
                slots = [state[slot][chunk] for slot in self.slots]
                decay.apply(p, g, work[: p.size])
                self._step(p, g, slots, lr, step, work[: p.size])
        follow_statistics(params, terms, shard)

    def _trained(self, shard: Shard) -> list[tuple[bool, slice]]:
        """Return the longest stretches of trained elements that one rule updates, and whether each decays."""
        found: list[tuple[bool, slice]] = []
        for group, run in shard.runs:
            decays = group == "decay" and self.weight_decay > 0
            if group == "statistics":
                continue
            if found and found[-1][0] == decays and found[-1][1].stop == run.start:
                run = slice(found.pop()[1].start, run.stop)
            found.append((decays, run))
        return found

    def _decay(self, lr: float) -> Decay:
        """Return weight decay at a learning rate: by the gradient of the penalty λ‖p‖²/2."""
        return Decay(penalty=self.weight_decay)

    def _compiled(self, p: Array, terms: Terms, slots: Sequence[Array], lr: float, step: int, decay: Decay) -> bool:
        """Update a whole run by a compiled loop, to the same bits as without; tell whether there is one."""
        return False

    @abstractmethod
    def _step(self, p: Array, g: Array, slots: Sequence[Array], lr: float, step: int, work: Array) -> None:
        """Update one chunk in place: parameters ``p`` and ``slots`` from gradients ``g``; ``work`` is scratch."""


def check_shard(params: Array, terms: Terms, state: State, step: int, shard: Shard) -> None:
    """Raise an InputError unless the arrays have the shard's size and ``step`` counts from 1."""
    named = [("params", params), *(("grads", array) for array in terms.arrays), *state.items()]
    for name, array in named:
        if array.shape != (shard.size,):
            raise InputError(f"optimizer update: {name} has the wrong shape", got=array.shape, expected=(shard.size,))
    if step < 1:
        raise InputError("optimizer update: steps count from 1", got=step, expected="1 or more")


def follow_statistics(params: Array, terms: Terms, shard: Shard) -> None:
    """Move running statistics towards the batch's: ``p += rate * (g - p)``."""
    for number, piece in shard.pieces:
        segment = shard.layout.segments[number]
        if segment.group == "statistics":
            p = params[piece]
            g = terms.cut(piece).mean(namespace(p).empty_like(p))
            g -= p
            g *= segment.rate
            p += g
