"""The GPT of `mpitrain.nn` as one would write it in PyTorch, and how its weights are carried over."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from mpitrain import nn
from mpitrain.arrays import FlatBuffer


class TorchBlock(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchGPT(torch.nn.Module):
    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = torch.nn.Embedding(vocabulary, width), torch.nn.Embedding(context, width)
        self.blocks = torch.nn.ModuleList(TorchBlock(width, heads) for _ in range(layers))
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


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
