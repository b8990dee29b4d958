"""The rivals: the same models in PyTorch, by DDP over gloo, under `mpitrain.torch`, and on each rank by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import mpitrain.torch as mt
from mpitrain.comm import Communicator
from mpitrain.train.bench.tasks import Steps, Task
from mpitrain.train.bench.torch_models import module, tensors

DDP, OURS, ALONE = "DDP, gloo", "mpitrain.torch", "PyTorch, serial runs"


def peers(comm: Communicator, task: Task) -> dict[str, Steps]:
    """Return the rivals by name.

    Parameters
    ----------
    comm : Communicator
        The world's; PyTorch's process group is there already.
    task : Task
        What is trained: by fused Adam, with one thread a rank.

    Notes
    -----
    Collective.
    """
    torch.set_num_threads(1)
    return {DDP: _ddp(comm, task), OURS: _ours(comm, task), ALONE: _alone(comm, task)}


def _ddp(comm: Communicator, task: Task) -> Steps:
    return _steps(DistributedDataParallel(module(task), gradient_as_bucket_view=True), *tensors(task, comm.rank))


def _alone(comm: Communicator, task: Task) -> Steps:
    return _steps(module(task), *tensors(task, comm.rank))


def _adam(model: Any) -> Any:
    return torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)


def _steps(model: Any, inputs: Any, labels: Any) -> Steps:
    adam = _adam(model)

    def run(steps: int) -> None:
        for _ in range(steps):
            adam.zero_grad()
            cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
            adam.step()

    return run


def _ours(comm: Communicator, task: Task) -> Steps:
    model, (inputs, labels) = module(task), tensors(task, comm.rank)
    opt = mt.DistributedOptimizer(_adam(model), model, comm)

    def run(steps: int) -> None:
        for _ in range(steps):
            opt.zero_grad()
            cross_entropy(model(inputs).flatten(0, -2), labels.flatten(), reduction="sum").backward()
            opt.step(count=labels.numel())

    return run
