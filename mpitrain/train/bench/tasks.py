"""What is trained: the models of the benchmark, and a batch for each rank, the same for us and for the rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Batch
from mpitrain.nn import MODELS, Layer

CLASSES, PIXELS = 10, 28
CHARACTERS, CONTEXT = 96, 128


@dataclass(frozen=True)
class Task:
    """A model, and what each rank trains it with.

    Parameters
    ----------
    name : str
        As ``--models`` calls it.
    title : str
        What the model is, for people.
    kind, options
        Name of the builder in `mpitrain.nn.MODELS`, and what it is handed.
    shape : tuple of int
        Of a rank's inputs.
    unit : {"samples", "tokens"}
        What throughput counts.
    """

    name: str
    title: str
    kind: str
    options: dict[str, Any]
    shape: tuple[int, ...]
    unit: str = "samples"

    def layer(self) -> Layer:
        """Return the model."""
        return MODELS[self.kind](**self.options)

    @property
    def units(self) -> int:
        """How many samples or tokens a rank takes in a step."""
        return prod(self.shape) if self.unit == "tokens" else self.shape[0]

    def smaller(self, batch: int | None) -> Task:
        """Return the same with another number of samples a rank; None: itself."""
        return self if batch is None else Task(
            self.name, self.title, self.kind, self.options, (batch, *self.shape[1:]), self.unit
        )  # fmt: skip

    def arrays(self, rank: int) -> tuple[Array, Array]:
        """Return a rank's inputs and targets: noise and random classes, or random text and what follows each token."""
        rng = np.random.default_rng(rank)
        if self.unit == "tokens":
            tokens = rng.integers(0, CHARACTERS, (self.shape[0], self.shape[1] + 1))
            return tokens[:, :-1].copy(), tokens[:, 1:].copy()
        return rng.standard_normal(self.shape).astype(np.float32), rng.integers(0, CLASSES, self.shape[0])

    def batch(self, rank: int) -> Batch:
        """Return a rank's part of the global batch."""
        inputs, targets = self.arrays(rank)
        return Batch(inputs, targets, np.arange(len(inputs)) + rank * len(inputs))


@dataclass(frozen=True)
class Repeated:
    """A feed that gives each rank one batch again and again, so that loading costs nothing."""

    kept: Batch

    def share(self, rank: int, size: int, microbatches: int) -> Repeated:
        """Return itself: the batch is this rank's already."""
        return self

    def batch(self, step: int) -> Sequence[Batch]:
        """Return the batch."""
        return [self.kept]


def _mlp(hidden: int, batch: int) -> Task:
    inputs = PIXELS * PIXELS
    options = {"inputs": inputs, "outputs": CLASSES, "hidden": [hidden, hidden]}
    return Task(f"mlp{hidden}", f"MLP {inputs}-{hidden}-{hidden}-{CLASSES}", "mlp", options, (batch, inputs))


def _cnn(batch: int) -> Task:
    image = (PIXELS, PIXELS, 1)
    options = {
        "input_shape": image, "outputs": CLASSES, "channels": (32, 64), "hidden": 128, "dropout": 0.0,
        "batch_norm": False,
    }  # fmt: skip
    return Task("cnn", "CNN 1×28×28, conv 32, conv 64, pool, 128, 10", "cnn", options, (batch, *image))


def _gpt(batch: int) -> Task:
    options = {"vocabulary": CHARACTERS, "context": CONTEXT, "layers": 4, "width": 128, "heads": 4}
    title = f"GPT, 4 layers of width 128, 4 heads, {CONTEXT} characters"
    return Task("gpt", title, "gpt", options, (batch, CONTEXT), "tokens")


TASKS: dict[str, Task] = {
    task.name: task for task in (_mlp(256, 64), _mlp(1024, 64), _mlp(2048, 128), _cnn(64), _gpt(8))
}
"""By name.  One more: a function above, a row here, and its module in `mpitrain.train.bench.torch_models`."""

Steps = Callable[[int], object]
"""Takes so many steps."""
