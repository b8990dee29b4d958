"""The models of the benchmark as one would write them in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mpitrain.train.bench.tasks import PIXELS, Task


class TorchBlock(nn.Module):  # type: ignore[misc]  # PyTorch is optional, and so unknown to the type checker
    """A pre-norm block, as `mpitrain.nn.gpt.block`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        """Add attention, then the perceptron; (n, t, width) to the same."""
        n, t, width = x.shape
        parts = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TorchGPT(nn.Module):  # type: ignore[misc]
    """A decoder, as `mpitrain.nn.GPT`."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int, tied: bool = True) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(TorchBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Any) -> Any:
        """Return scores; (n, t) to (n, t, vocabulary)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def _mlp(inputs: int, outputs: int, hidden: list[int]) -> Any:
    sizes = [inputs, *hidden]
    layers = [part for a, b in zip(sizes, hidden, strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def _cnn(outputs: int, channels: tuple[int, int], hidden: int, **as_it_is: Any) -> Any:
    first, second = channels
    pixels = (PIXELS // 2) ** 2
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.Conv2d(first, second, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(pixels * second, hidden), nn.ReLU(), nn.Linear(hidden, outputs),
    )  # fmt: skip


_BUILDERS: dict[str, Callable[..., Any]] = {"mlp": _mlp, "cnn": _cnn, "gpt": TorchGPT}


def module(task: Task) -> Any:
    """Return the module of a task, the same on all ranks."""
    torch.manual_seed(0)
    return _BUILDERS[task.kind](**task.options)


def tensors(task: Task, rank: int) -> tuple[Any, Any]:
    """Return a rank's inputs and labels as PyTorch has them: images channels-first."""
    inputs, labels = (torch.from_numpy(each) for each in task.arrays(rank))
    if inputs.ndim == 4:  # a copy even of one channel, whose strides would make convolutions work channels-last
        inputs = inputs.movedim(-1, 1).clone(memory_format=torch.contiguous_format)
    return inputs, labels
