"""Which tensors of a PyTorch module are parameters, statistics and constants, and how they are laid out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain._errors import DtypeError, InputError
from mpitrain.arrays import Layout, Segment

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def statistics_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the layers that keep running statistics, by path.

    Raises
    ------
    InputError
        One averages over all batches alike, ``momentum=None``.
    """
    found = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, torch.nn.modules.batchnorm._NormBase) and layer.running_mean is not None
    }
    for path, layer in found.items():
        if layer.momentum is None:
            raise InputError(
                "a normalisation layer averages over all batches alike", operation="TorchModel",
                got=f"{path}: momentum=None", expected="a momentum in (0, 1]",
            )  # fmt: skip
    return found


def layout_of(module: torch.nn.Module) -> Layout:
    """Return the layout of a module's parameters and running statistics.

    Weights (two axes or more) are of group ``decay``, all other parameters of ``no_decay``.  Frozen parameters are of
    group ``statistics`` with rate 0: saved and loaded with the rest, and never changed.

    Raises
    ------
    DtypeError
        They are not all float32, or all float64, on the CPU.
    InputError
        One is lazy, and has no shape yet.
    """
    for name, each in (*module.named_parameters(), *module.named_buffers()):
        if torch.nn.parameter.is_lazy(each):
            raise InputError(
                "a parameter or buffer has no shape yet",
                operation="TorchModel",
                got=name,
                remedy="run the module on samples first",
            )
    segments = [_segment(name, each) for name, each in module.named_parameters()]
    for path, layer in statistics_of(module).items():
        for leaf in ("running_mean", "running_var"):
            name, shape = f"{path}.{leaf}".lstrip("."), tuple(getattr(layer, leaf).shape)
            segments.append(Segment(name, shape, group="statistics", rate=layer.momentum))
    everywhere = dict(module.named_parameters(remove_duplicate=False))
    first = {id(each): name for name, each in module.named_parameters()}
    ties = {name: first[id(each)] for name, each in everywhere.items() if first[id(each)] != name}
    return Layout.build(segments, _dtype(module), ties)


def _segment(name: str, parameter: Any) -> Segment:
    shape = tuple(parameter.shape)
    if not parameter.requires_grad:
        return Segment(name, shape, group="statistics", rate=0.0)
    return Segment(name, shape, group="decay" if len(shape) > 1 else "no_decay")


def _dtype(module: torch.nn.Module) -> Any:
    kinds = {(each.device.type, each.dtype) for each in module.parameters()}
    if len(kinds) != 1 or not kinds <= {("cpu", dtype) for dtype in _DTYPES}:
        got = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds)) or "no parameters"
        raise DtypeError(
            "the parameters are not of one kind that can be trained", operation="TorchModel", got=got,
            expected="all torch.float32, or all torch.float64, on the CPU", remedy="convert it with module.to(dtype)",
        )  # fmt: skip
    ((_, dtype),) = kinds
    return _DTYPES[dtype]
