"""mpitrain: training over MPI whose result does not depend on how it was parallelised.

``import mpitrain`` starts no MPI and communicates nothing; the names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpitrain._errors import MpitrainError
    from mpitrain.arrays import Batch, FlatBuffer, Key, Layout, Segment
    from mpitrain.comm import Communicator, LocalWorld, Outcome, ProcessMesh, map_tasks, trace, world
    from mpitrain.data import Batches, Dataset
    from mpitrain.method import Method, Plan, Precision
    from mpitrain.nn import Layer, Model, Network
    from mpitrain.optim import Optimizer
    from mpitrain.parallel import DataParallel, GradientParallel, PipelineParallel
    from mpitrain.train import Job, Trainer

__version__ = "0.1.0.dev0"

_HOMES = {
    "Batch": "arrays",
    "Batches": "data",
    "Communicator": "comm",
    "DataParallel": "parallel",
    "Dataset": "data",
    "FlatBuffer": "arrays",
    "GradientParallel": "parallel",
    "Job": "train",
    "Key": "arrays",
    "Layer": "nn",
    "Layout": "arrays",
    "LocalWorld": "comm",
    "Method": "method",
    "Model": "nn",
    "MpitrainError": "_errors",
    "Network": "nn",
    "Optimizer": "optim",
    "Outcome": "comm",
    "PipelineParallel": "parallel",
    "Plan": "method",
    "Precision": "method",
    "ProcessMesh": "comm",
    "Segment": "arrays",
    "Trainer": "train",
    "map_tasks": "comm",
    "trace": "comm",
    "world": "comm",
}

__all__ = [
    "Batch",
    "Batches",
    "Communicator",
    "DataParallel",
    "Dataset",
    "FlatBuffer",
    "GradientParallel",
    "Job",
    "Key",
    "Layer",
    "Layout",
    "LocalWorld",
    "Method",
    "Model",
    "MpitrainError",
    "Network",
    "Optimizer",
    "Outcome",
    "PipelineParallel",
    "Plan",
    "Precision",
    "ProcessMesh",
    "Segment",
    "Trainer",
    "map_tasks",
    "trace",
    "world",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpitrain' has no attribute {name!r}")
    return getattr(import_module(f"mpitrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
