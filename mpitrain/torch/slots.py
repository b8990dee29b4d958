"""Where one parameter's gradient lies, and how it gets there without a pass over it that is not needed.

While a parameter has no gradient, autograd keeps the one that it has just computed as it is; a hook then moves it to
its place.  So nothing is zeroed and nothing added that is zero.  Further passes add to it in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from mpitrain._errors import InputError
from mpitrain._typing import Array

_OPERATION = "DistributedOptimizer"

_HOOKS: Any = WeakTensorKeyDictionary()
"""The hook that moves a parameter's gradient; not kept on the parameter, which may be pickled."""


class GradientSlot:
    """The place of one parameter's gradient.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameter it is.
    name : str
        Its name in the module.
    place : NumPy array
        The memory, of the parameter's shape and dtype.
    arrived : callable
        Called whenever a backward pass has added to it.

    Attributes
    ----------
    passes : int
        Backward passes that have added to it since the last step.
    """

    def __init__(self, model: Any, name: str, place: Array, arrived: Callable[[], None]) -> None:
        path, _, leaf = name.rpartition(".")
        self.name, self._leaf = name, leaf
        self._home: dict[str, Any] = model.get_submodule(path)._parameters
        self.param = self._home[leaf]
        self.view = torch.from_numpy(place)  # not a slice of a tensor: each has a version of its own
        self.passes = 0
        self._version = self.view._version
        self._arrived = arrived
        self._take_over()

    def _take_over(self) -> None:
        """Move this parameter's gradients from now on; an earlier optimizer no longer does."""
        if self.param in _HOOKS:
            _HOOKS[self.param].remove()
        self.param.grad = None
        _HOOKS[self.param] = self.param.register_post_accumulate_grad_hook(self._move)

    def zero(self) -> None:
        """Begin a step; the memory is left as it is."""
        self.param.grad = None
        self.passes = 0

    def _move(self, param: Any) -> None:
        grad = param.grad
        if grad is self.view:
            self._require(self.passes > 0, "a backward pass adds to gradients of the step before", "call zero_grad()")
        else:
            self._require(self.passes == 0, *_DROPPED)
            self._require(
                grad.layout is torch.strided, "the gradient is sparse", "use sparse=False in the embedding"
            )  # fmt: skip
            self.view.copy_(grad.detach())
            param.grad = self.view
        self.passes += 1
        self._version = self.view._version
        self._arrived()

    def collect(self) -> None:
        """Make sure that what the ranks sum next is what the backward passes gave; zero if none reached it.

        Raises
        ------
        InputError
            The gradient was dropped, replaced or changed, or the parameter is another.
        """
        self._require(
            self._home.get(self._leaf) is self.param, "the module has another parameter of this name",
            "make the optimizer after load_state_dict(assign=True) and the like",
        )  # fmt: skip
        grad = self.param.grad
        if self.passes:
            self._require(grad is self.view, *_DROPPED)
            self._require(
                self.view._version == self._version, "the gradient was changed after the backward pass",
                "clip by the optimizer's own clip_grad_norm_(), which clips what was summed over ranks",
            )  # fmt: skip
        else:
            self._require(grad is None or grad is self.view, *_DROPPED)
            self.view.zero_()
            self.param.grad = self.view

    def _require(self, fine: bool, problem: str, remedy: str) -> None:
        if not fine:
            raise InputError(problem, operation=_OPERATION, got=f"parameter {self.name!r}", remedy=remedy)


_DROPPED = (
    "a gradient is no longer where the ranks share it",
    "zero by the optimizer's own zero_grad(), and do not assign to .grad",
)
