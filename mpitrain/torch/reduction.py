"""Looks at how a loss was reduced: over a batch by a sum, as every step here needs, or by a mean.

Only what autograd has recorded tells, and only the last operations of it are looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal

import torch

from mpitrain._errors import InputError

Reduction = Literal["sum", "mean"]

_CODES: dict[int, Reduction] = {1: "mean", 2: "sum"}
"""How PyTorch's own losses keep their ``reduction``."""

_PASSED_OVER = ("Add", "Sub", "Neg", "View", "Reshape", "Squeeze", "Unsqueeze", "Clone", "ToCopy")
"""Operations that leave a mean a mean.  A product or a quotient is not passed over: it may be what turns one into a
sum."""

_DEPTH = 16


def check_losses(wanted: Reduction) -> None:
    """Require that the loss of the backward pass that is going on was reduced as ``wanted``.

    Called from a hook.  PyTorch does not tell a hook what the pass began with, but the hook runs below the call of
    ``backward``, whose frame has it.

    Raises
    ------
    InputError
        It is seen to be reduced the other way: a term is a mean where none may be, or none is where one should.
    """
    for loss in _roots():
        found = set(_reductions(loss.grad_fn))
        if found and ("mean" in found) != (wanted == "mean"):
            other = "sum" if wanted == "mean" else "mean"
            raise InputError(
                f"the loss is a {other} over the batch", operation="DistributedOptimizer",
                got=f"{other}-reduced loss", expected=f"{wanted}-reduced loss", remedy=_REMEDIES[wanted],
            )  # fmt: skip


_REMEDIES = {
    "sum": 'pass reduction="sum" to the loss, or reduction="mean" to DistributedOptimizer',
    "mean": 'pass reduction="mean" to the loss, or leave out reduction="mean" of DistributedOptimizer',
}


def _roots() -> tuple[Any, ...]:
    """Return the tensors that the innermost ``torch.autograd.backward`` on this thread's stack was called with."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not torch.autograd.backward.__code__:
        frame = frame.f_back
    found = () if frame is None else frame.f_locals.get("tensors", ())
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)


def _reductions(node: Any, depth: int = 0) -> Iterator[Reduction]:
    """Yield how the terms of a loss were reduced, as far as it can be seen."""
    if node is None or depth > _DEPTH:
        return
    name, code = node.name(), getattr(node, "_saved_reduction", None)
    if code in _CODES:
        yield _CODES[code]
    elif name.startswith(("MeanBackward", "SumBackward")):
        yield "mean" if name.startswith("Mean") else "sum"
    elif name.startswith(_PASSED_OVER):
        for after, _ in node.next_functions:
            yield from _reductions(after, depth + 1)
