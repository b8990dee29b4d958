"""What the tests of the adapters train: small PyTorch modules in float64, and ten samples shared out unevenly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import mpitrain.torch as mt
from mpitrain.comm import Communicator
from mpitrain.train.bench.torch_models import TorchGPT

ROWS = 10
CLASSES = 3


class Cnn(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1))


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES))


def gpt() -> torch.nn.Module:
    return TorchGPT(vocabulary=5, context=4, layers=1, width=8, heads=2)


def seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().double()


def samples(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(1)
    if kind == "gpt":
        tokens = torch.from_numpy(random.integers(0, 5, (ROWS, 5)))
        return tokens[:, :-1], tokens[:, 1:]
    shape = (2, 4, 4) if kind == "cnn" else (6,)
    return torch.from_numpy(random.standard_normal((ROWS, *shape))), torch.from_numpy(random.integers(0, CLASSES, ROWS))


MODULES: dict[str, Callable[[], torch.nn.Module]] = {"mlp": mlp, "cnn": Cnn, "gpt": gpt}


def loss_sum(module: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, reduction: str = "sum") -> Any:
    return functional.cross_entropy(module(inputs).flatten(0, -2), targets.flatten(), reduction=reduction)


def twin(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(module)


def mean_gradients(module: torch.nn.Module, kind: str) -> dict[str, torch.Tensor]:
    """The serial result on all samples."""
    alone, (inputs, targets) = twin(module), samples(kind)
    (loss_sum(alone, inputs, targets) / targets.numel()).backward()
    return {name: each.grad for name, each in alone.named_parameters() if each.grad is not None}


class Lstm(torch.nn.Module):
    """Its parameters' names begin with each other: ``bias_hh_l0`` and ``bias_hh_l0_reverse``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = torch.nn.LSTM(6, 3, bidirectional=True, batch_first=True), torch.nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x[:, None, :])[0][:, 0])


class Run:
    """One rank with a module, an optimizer and ten samples."""

    def __init__(self, comm: Communicator, **options: Any) -> None:
        self.module = seeded(mlp)
        self.sgd = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)
        self.opt = mt.DistributedOptimizer(self.sgd, self.module, comm, **options)
        self.weight = self.module[0].weight

    def backward(self, reduction: str = "sum") -> None:
        loss_sum(self.module, *samples("mlp"), reduction).backward()

    def step(self, count: Any = ROWS) -> None:
        self.opt.step(count=count)


def two_layers(frozen: bool) -> torch.nn.Module:
    """The same on all threads; PyTorch's generator is not theirs alone."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)).double()
    with torch.no_grad():
        for each in module.parameters():
            each.copy_(torch.linspace(-1.0, 1.0, each.numel()).view(each.shape))
    module[0].requires_grad_(not frozen)
    return module
