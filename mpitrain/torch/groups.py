"""Which parameters of a module an optimizer of PyTorch's trains, and how they lie in one flat range."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain._errors import DtypeError, InputError
from mpitrain.arrays import Layout, Segment

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
_OPERATION = "DistributedOptimizer"

_REFUSED = {
    torch.optim.LBFGS: "the optimizer evaluates the loss by itself, in a closure",
    torch.optim.SparseAdam: "the optimizer takes sparse gradients alone",
}


def trained(model: Any, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters of each of the optimizer's groups that require a gradient.

    Raises
    ------
    InputError
        The optimizer has a parameter that is not the module's, or none at all; or it evaluates the loss by itself, or
        takes sparse gradients alone.
    DtypeError
        They are not of one dtype, float32 or float64, or not in host memory.
    """
    for kind, problem in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise InputError(
                problem, operation=_OPERATION, got=kind.__name__, expected="one that takes a step from dense gradients"
            )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for number, group in enumerate(optimizer.param_groups):
        foreign = sum(id(parameter) not in names for parameter in group["params"])
        if foreign:
            raise InputError(
                "the optimizer has parameters that the module has not", operation=_OPERATION,
                got=f"{foreign} in parameter group {number}", remedy="pass the module whose parameters it was made of",
            )  # fmt: skip
        found.append([names[id(each)] for each in group["params"] if each.requires_grad])
    if not any(found):
        raise InputError("nothing is trained", operation=_OPERATION, got="no parameter that requires a gradient")
    return found


def layout_of(model: Any, groups: list[list[str]]) -> Layout:
    """Return the layout of these parameters, group after group."""
    parameters = dict(model.named_parameters())
    wanted = [(name, parameters[name]) for group in groups for name in group]
    kinds = {(parameter.device.type, parameter.dtype) for _, parameter in wanted}
    device, dtype = kinds.pop()
    if kinds or device != "cpu" or dtype not in _DTYPES:
        kinds.add((device, dtype))
        raise DtypeError(
            "the module's parameters are not of one kind that can be shared", operation=_OPERATION,
            got=", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds)),
            expected="all torch.float32, or all torch.float64, on the CPU", remedy="convert it with model.to(dtype)",
        )  # fmt: skip
    return Layout.build([Segment(name, tuple(each.shape)) for name, each in wanted], _DTYPES[dtype])


def runs_of(layout: Layout, groups: list[list[str]]) -> list[tuple[int, int]]:
    """Return where each group begins and ends in the flat range."""
    starts, end = [], layout.size
    for group in reversed(groups):
        start = layout[group[0]].offset if group else end
        starts.append((start, end))
        end = start
    return starts[::-1]
