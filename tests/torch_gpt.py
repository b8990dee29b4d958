"""How weights of the GPT of `mpitrain.nn` are carried over to that of PyTorch, `mpitrain.train.bench.torch_models`."""

from __future__ import annotations

import numpy as np
import torch

from mpitrain import nn
from mpitrain.arrays import FlatBuffer
from mpitrain.train.bench.torch_models import TorchGPT


def pairs(layer: nn.GPT, twin: TorchGPT) -> dict[str, torch.nn.Parameter]:
    """Return PyTorch's parameter for each name of ours; linear layers are transposed there, see `theirs`."""
    found = {"tokens.weight": twin.tokens.weight, "positions.weight": twin.positions.weight}
    norms = {"norm": twin.norm}
    for i, block in enumerate(twin.blocks):
        norms |= {f"block{i}.attention.inner.norm": block.norm1, f"block{i}.mlp.inner.norm": block.norm2}
        for path in ("attention.inner.qkv", "attention.inner.out", "mlp.inner.up", "mlp.inner.down"):
            linear = getattr(block, path.rpartition(".")[2])
            found |= {f"block{i}.{path}.weight": linear.weight, f"block{i}.{path}.bias": linear.bias}
    for name, norm in norms.items():
        found |= {f"{name}.gamma": norm.weight, f"{name}.beta": norm.bias}
    return found if layer.tied else found | {"head.weight": twin.head.weight}


def theirs(name: str, ours: np.ndarray, heads: int) -> np.ndarray:
    """Return one of our tensors as PyTorch's module has it: (outputs, inputs), and first all queries, then all keys."""
    table = name in ("tokens.weight", "positions.weight", "head.weight")
    values = ours if table else ours.T
    if ".qkv." in name:
        rest = values.shape[1:]
        values = values.reshape(heads, 3, -1, *rest).swapaxes(0, 1).reshape(-1, *rest)
    return np.ascontiguousarray(values)


def twin_of(layer: nn.GPT, params: FlatBuffer, heads: int) -> TorchGPT:
    """Return PyTorch's module with our weights."""
    vocabulary, width = params.views["tokens.weight"].shape
    blocks = sum(name.startswith("block") for name, _ in layer.children)
    twin = TorchGPT(vocabulary, len(params.views["positions.weight"]), blocks, width, heads, layer.tied)
    twin = twin.to(torch.float64 if params.flat.dtype == np.float64 else torch.float32)
    with torch.no_grad():
        for name, parameter in pairs(layer, twin).items():
            parameter.copy_(torch.from_numpy(theirs(name, params.views[name], heads)))
    return twin
