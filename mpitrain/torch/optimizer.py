"""`DistributedOptimizer`: a module and an optimizer of PyTorch's, whose gradients are summed over ranks.

The order of a step is that of every method here: reduce → divide → finite check, agreed by all → clip → update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mpitrain._errors import InputError, NonFiniteError
from mpitrain._options import brief
from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator
from mpitrain.optim import finite, scale, squared_norm
from mpitrain.torch.broadcast import check_same_tensors, check_same_values, send
from mpitrain.torch.freezing import Freezing
from mpitrain.torch.groups import layout_of, trained
from mpitrain.torch.memory import ReplicatedMemory, ShardedMemory
from mpitrain.torch.reduction import Reduction, check_losses
from mpitrain.torch.shards import ELEMENTWISE, Saved
from mpitrain.torch.slots import GradientSlot
from mpitrain.torch.statistics import RunningStatistics

_OPERATION = "DistributedOptimizer"

_GUARDS: Any = WeakKeyDictionary()
"""Of an optimizer that was taken over, what keeps others from letting it step."""

_Phase = Literal["gathering", "reduced", "refused"]
"""Gradients are a rank's own, or sums to update by, or sums that were found to be bad."""


class DistributedOptimizer:
    """Data-parallel training of a PyTorch module in one's own loop.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Made of the module's parameters.  It is taken over: `step`, `zero_grad` and its state are reached through
        this object, its ``param_groups`` go on being what learning-rate schedulers change.
    model : torch.nn.Module
        On the CPU, trained in float32 or float64; the same parameters on all ranks.
    comm : Communicator
        The ranks that share each batch.
    reduction : {"sum", "mean"}
        How the loss is reduced over the samples of a rank's batch.  A mean is multiplied by the rank's count first,
        so that uneven batches are right; it allows one backward pass a step, since gradients of means over different
        numbers cannot be added up.
    shard : bool, optional
        True: each rank updates a shard, and keeps the optimizer state of that shard alone, as `GradientParallel` in
        stage 1; where the ranks of a node share memory, the module's parameters are one memory for all of them.
        False: every rank updates everything, and parameters are its own.  None: True for the optimizers of PyTorch's
        that treat each element by itself, else False.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
        For schedulers: ``StepLR(opt.optimizer, 10)``.
    param_groups : list of dict
        The optimizer's.
    steps : int
        Steps taken.

    Raises
    ------
    MismatchError
        The ranks' modules have different tensors, or different values in them.
    InputError, DtypeError
        See `trained` and `layout_of`; or a rule that needs whole tensors was to be sharded.

    Notes
    -----
    Collective over ``comm``, as are `step`, `clip_grad_norm_`, `state_dict` and `edit`.  Cost of a step beyond the
    gradient: a reduce_scatter and an allgather (no bytes move between ranks of one node that share memory), and an
    allreduce of three numbers and the running statistics of batch normalisation.

    A parameter that no sample's loss depends on gets a gradient of zero, on all ranks alike, so that momentum and
    weight decay go on moving it; PyTorch would leave it out.  Frozen parameters are left alone.  Tied ones have one
    gradient.  Buffers are each rank's own, but for the statistics of batch normalisation, see `RunningStatistics`.
    """

    def __init__(
        self, optimizer: Any, model: Any, comm: Communicator, *, reduction: Reduction = "sum",
        shard: bool | None = None,
    ) -> None:  # fmt: skip
        names = trained(model, optimizer)
        check_same_tensors(model.named_parameters(), comm, _OPERATION)
        self._layout = layout_of(model, names)
        check_same_values(model.named_parameters(), comm, _OPERATION)
        self.optimizer, self.model, self.comm, self.steps = optimizer, model, comm, 0
        self._wanted = _one_of(reduction)
        self._freezing = Freezing(model, optimizer)
        self._grads = FlatBuffer(self._layout, comm.empty)
        self._slots = [GradientSlot(model, each.name, self._grads.views[each.name], self._arrived)
                       for each in self._layout]  # fmt: skip
        params = [slot.param for slot in self._slots]
        self._memory: ShardedMemory | ReplicatedMemory = (
            ShardedMemory(optimizer, names, params, self._grads, comm) if _sharded(optimizer, shard)
            else ReplicatedMemory(optimizer, self._grads, comm)
        )  # fmt: skip
        self._statistics = RunningStatistics(model)
        self._looked = False
        self._phase: _Phase = "gathering"
        self._silent = 0
        self._updating = False
        if optimizer in _GUARDS:  # wrapped before
            _GUARDS[optimizer].remove()
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):  # not one that leaves out Optimizer.__init__
            _GUARDS[optimizer] = optimizer.register_step_pre_hook(self._require_updating)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: hyperparameters, and the tensors that this rank updates."""
        found: list[dict[str, Any]] = self.optimizer.param_groups
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step.  Local, and no memory is touched: the next backward pass overwrites.

        Parameters
        ----------
        set_to_none : bool
            As PyTorch's optimizers take it, and of no effect: until the next backward pass there are no gradients.
        """
        for slot in self._slots:
            slot.zero()
        self._looked, self._phase = False, "gathering"

    def step(self, *, count: float | None = None) -> None:
        """Sum the gradients over all ranks, divide by the global count, update.  Collective.

        Parameters
        ----------
        count : float
            Samples (or tokens) whose losses this rank has summed since `zero_grad`, over all its backward passes; may
            be 0.  Not needed where `clip_grad_norm_` was handed it.

        Raises
        ------
        InputError
            On this rank: no count, no backward pass, inside `no_sync`, a gradient or parameter that is no longer where
            the ranks share it.  On all ranks: no rank had samples, or on some rank a parameter was frozen or unfrozen
            since this object was made.
        NonFiniteError
            On all ranks, naming those whose samples gave the bad gradients, where they can be told, and the tensors.
            Nothing is updated, and running statistics are again what the last step left; after `zero_grad` training
            can go on.
        """
        if self._phase != "reduced":
            self._reduce(count, "step")
        elif count is not None and not (_is_count(count) and count == self._count):
            raise InputError("another count than clip_grad_norm_ was handed", operation="step", got=brief(count),
                             expected=self._count)  # fmt: skip
        self._updating = True
        try:
            self._memory.update()
        finally:
            self._updating = False
        self.steps += 1
        self._looked, self._phase = False, "gathering"
        for slot in self._slots:
            slot.passes = 0

    def clip_grad_norm_(self, max_norm: float, *, count: float | None = None) -> float:
        """Reduce the gradients, and scale them down if their global norm is above ``max_norm``.  Collective.

        Parameters
        ----------
        max_norm : float
            Largest norm of the mean gradient over all ranks and all parameters, above 0; infinite to learn the norm
            alone.
        count : float
            As for `step`, which then needs none.

        Returns
        -------
        float
            The norm before, the same on all ranks.

        Raises
        ------
        InputError
            ``max_norm`` is not that; or as for `step`.
        NonFiniteError
            As for `step`.
        """
        _check_norm(max_norm)
        if self._phase != "reduced":
            self._reduce(count, "clip_grad_norm_")
        norm = math.sqrt(self._memory.total(squared_norm(self._memory.sums, self._memory.shard)))
        if norm > max_norm:
            scale(self._memory.sums, self._memory.shard, max_norm / norm)
        return norm

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients only, as the method of this name of DDP's.

        Nothing is ever sent before `step`, so accumulation works without it; within it, `step` is an error.
        """
        self._silent += 1
        try:
            yield
        finally:
            self._silent -= 1

    def edit(self, change: Callable[[], object]) -> None:
        """Change parameters or buffers outside of a step: load, clip, re-initialise.  Collective.

        Parameters
        ----------
        change : callable
            ``lambda: model.load_state_dict(saved)``, say.  Called without gradients, on one rank for each memory in
            which parameters lie, so that ``weight.mul_(0.5)`` halves it once.  Buffers are then taken from rank 0.
            Running statistics that are changed otherwise between steps are lost if the next step is refused.
        """
        self.comm.barrier()
        if self._memory.writes:
            with torch.no_grad():
                change()
        self.comm.barrier()
        send([buffer for _, buffer in self.model.named_buffers()], self.comm)
        self._memory.note()
        self._statistics.note()

    def state_dict(self) -> Saved:
        """Return what ``optimizer.state_dict()`` is without mpitrain: whole tensors on all ranks.  Collective."""
        return self._memory.state()

    def load_state_dict(self, saved: Saved) -> None:
        """Go on from a ``state_dict`` that this object or the optimizer alone gave, on any number of ranks."""
        self._memory.load(saved)

    def _arrived(self) -> None:
        """Refuse to add to sums, and look at the loss of the first backward pass of a step."""
        self._require_gathering("backward")
        if not self._looked:
            self._looked = True
            check_losses(self._wanted)

    def _require_updating(self, *_: object) -> None:
        """Refuse a step that anybody else lets the optimizer take: by this rank's gradients, and on this rank alone."""
        if not self._updating:
            raise InputError(
                "the optimizer that was handed in would step by this rank's gradients alone", operation=_OPERATION,
                got="its own step()", remedy="call step(count=len(inputs)) of the DistributedOptimizer",
            )  # fmt: skip

    def _require_gathering(self, operation: str) -> None:
        if self._phase != "gathering":
            raise InputError(
                "the gradients were summed over ranks already", operation=operation, got=f"{self._phase} gradients",
                expected="a rank's own", remedy="call step() after clip_grad_norm_(), or begin anew with zero_grad()",
            )  # fmt: skip

    def _reduce(self, count: float | None, operation: str) -> None:
        """Sum, check and divide the gradients."""
        self._require_gathering(operation)
        self._memory.check()
        for slot in self._slots:
            slot.collect()
        own = self._checked_count(count, operation)
        if self._wanted == "mean":
            self._grads.flat *= self._grads.flat.dtype.type(own)
        self._phase = "refused"  # unless all is well
        self._memory.reduce()
        told = np.array([own, not finite(self._memory.sums), bool(self._freezing.changed())], np.float64)
        total, bad, frozen, *statistics = self.comm.allreduce(np.concatenate([told, self._statistics.weighted(own)]))
        if frozen or bad or not total:
            self._statistics.restore()
        if frozen:
            self._freezing.refuse(self.comm, operation)
        if bad:
            self._refuse_non_finite()
        if not total:
            raise InputError("no rank had samples", operation=operation, got="count=0 on all ranks")
        self._memory.sums /= self._grads.flat.dtype.type(total)
        self._statistics.set(np.array(statistics) / total)
        self._freezing.drop_gradients()
        self._count, self._phase = count, "reduced"

    def _checked_count(self, count: float | None, operation: str) -> float:
        passes = max(slot.passes for slot in self._slots)
        problem: tuple[str, object, str, str] | None = None
        if self._silent:
            problem = "called inside no_sync", operation, "a call after it", "leave the with block first"
        elif count is None:
            problem = "no count", "count=None", "samples whose losses this rank summed", "step(count=len(inputs))"
        elif not _is_count(count):
            problem = "this is no count", brief(count), "a number ≥ 0", "step(count=len(inputs))"
        elif count and not passes:
            problem = "no backward pass since the last step", f"count={count}", "loss.backward()", "0 if no samples"
        elif self._wanted == "mean" and passes > 1:
            problem = ("gradients of several means were added up", f"{passes} backward passes", "one",
                       'use reduction="sum", for the loss and here')  # fmt: skip
        if problem:
            what, got, expected, remedy = problem
            raise InputError(what, operation=operation, got=got, expected=expected, remedy=remedy)
        assert count is not None
        return float(count)

    def _refuse_non_finite(self) -> None:
        findings = self.comm.allgather_object((self._memory.own_finite(), self._memory.bad_tensors()))
        ranks = [rank for rank, (well, _) in enumerate(findings) if not well]
        names = sorted(set().union(*(found for _, found in findings)))
        raise NonFiniteError(
            f"the gradient of step {self.steps + 1} is not finite", operation=_OPERATION,
            got=f"ranks whose own samples gave it: {ranks or 'none found'}; tensors: {', '.join(names)}",
            remedy="lower the learning rate, or clip_grad_norm_; after zero_grad() the next batch can be taken",
        )  # fmt: skip


def _one_of(reduction: Reduction) -> Reduction:
    if reduction not in ("sum", "mean"):
        raise InputError(
            "there is no such reduction", operation=_OPERATION, got=repr(reduction), expected='"sum" or "mean"'
        )  # fmt: skip
    return reduction


def _sharded(optimizer: Any, wanted: bool | None) -> bool:
    elementwise = type(optimizer) in ELEMENTWISE
    if wanted and not elementwise:
        raise InputError(
            "this optimizer may need whole tensors, and cannot be sharded", operation=_OPERATION,
            got=type(optimizer).__name__, expected=", ".join(each.__name__ for each in ELEMENTWISE),
            remedy="leave out shard=True",
        )  # fmt: skip
    return elementwise if wanted is None else wanted


def _check_norm(value: Any) -> None:
    """Refuse 0 and NaN, which would let nothing be learned, and what is below 0: it turns the gradient round."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and value > 0):
        raise InputError(
            "max_norm is not allowed", operation="clip_grad_norm_", got=brief(value),
            expected="a number above 0, or math.inf to clip nothing",
        )  # fmt: skip


def _is_count(value: Any) -> bool:
    """Tell whether a value, perhaps a tensor, is a finite number that is not negative."""
    try:
        return bool(math.isfinite(value) and value >= 0)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # as NumPy and PyTorch say of several elements
        return False
