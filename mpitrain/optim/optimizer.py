"""The contract of an optimizer: it updates any contiguous shard of a layout's flat range, in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpitrain._typing import Array
from mpitrain.arrays import Allocator, Shard, plain
from mpitrain.optim.terms import Terms

APART_BYTES = 11 * 128
"""How much further into its page each slot begins than the one before: about a third of a page, whole cache lines."""

State = dict[str, Array]
"""Arrays of the shard's size, one per slot: ``{"m": …, "v": …}``."""


class Optimizer(ABC):
    """Turns gradients into new parameters.  Holds hyperparameters only; the state is the caller's.

    Order of a step, always: reduce → divide and unscale → finite check → clip → update.  `update` is the last.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def init(self, shard: Shard, allocator: Allocator = plain) -> State:
        """Return the state of a shard before the first step: zeros, an array of ``shard.size`` per slot.

        Notes
        -----
        Arrays that begin at the same place of a page compete for the same places of a first-level cache.  Parameters
        and gradients do so already; each slot begins at another, which takes a fifth off Adam's time where its arrays
        are not in larger caches.
        """
        dtype = shard.layout.dtype
        skipped = [number * APART_BYTES // dtype.itemsize for number in range(1, len(self.slots) + 1)]
        slots = zip(self.slots, skipped, strict=True)
        return {slot: allocator(skip + shard.size, dtype)[skip:] for slot, skip in slots}

    def partials(self, params: Array, grads: Array, state: State, step: int, shard: Shard) -> Array | None:
        """Return what `update` needs of whole tensors, as sums over this shard; None if it needs nothing.

        Called exactly once a step, before `update`; may change ``state``.

        Returns
        -------
        array of float64, shape (len(shard.layout), k), or None
            To be summed over the owners of the other shards and handed to `update` as ``totals``.
        """
        return None

    @abstractmethod
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
        """Update ``params`` and ``state`` in place.

        Parameters
        ----------
        params : array, shape (shard.size,)
            The shard of the parameters.  ``statistics`` runs follow ``p += rate * (g - p)`` under every optimizer.
        grads : array, shape (shard.size,)
            Mean gradients, reduced, divided, checked and clipped; may be overwritten.
        state : dict of str to array
            What `init` gave.
        lr : float
            Learning rate of this step.
        step : int
            Number of this step, from 1.
        shard : Shard
            Which part of the layout this is.
        totals : array of float64, shape (len(shard.layout), k), optional
            `partials`, summed over all shards.
        """

    @property
    def takes_terms(self) -> bool:
        """Whether the optimizer has an `update_mean`."""
        return False

    def update_mean(self, params: Array, terms: Terms, state: State, lr: float, step: int, shard: Shard) -> None:
        """Update as `update` does, with the same bits, from gradients that are neither summed nor divided yet.

        Parameters
        ----------
        params, state, lr, step, shard
            As for `update`.
        terms : Terms
            Their mean is what `update` would be given.  They are not written to, but for a single one of count 1,
            which is that mean, and may be.

        Raises
        ------
        NotImplementedError
            Unless `takes_terms`.
        """
        raise NotImplementedError(type(self).__name__)
