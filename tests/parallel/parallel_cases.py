"""What the tests of the parallel methods train: tiny models and data, shared out evenly, unevenly and not at all.

All numbers are float32 numbers, so that runs in either precision see the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import Communicator
from mpitrain.data import Dataset, Loader, partition
from mpitrain.data.windows import windows
from mpitrain.method import Plan
from mpitrain.nn import Network
from mpitrain.optim import SGD, Optimizer
from mpitrain.parallel import DataParallel, GradientParallel
from mpitrain.parallel.synchronous import Synchronous

SEED = 3
ROWS, BATCH, STEPS_PER_EPOCH = 10, 7, 2
"""Ten rows in batches of seven and then three: on three ranks seven rows, and on four ranks an empty share."""

SHAPE, CLASSES = (4, 4, 2), 3

Owner = Callable[[int], np.ndarray]
"""Who of so many ranks has each row."""


def random_values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


LABELS = np.array([0, 1, 0, 0, 2, 1, 0, 2, 0, 1])
IMAGES = Dataset(random_values(ROWS, *SHAPE), LABELS, "classification", "images")
TEXT = windows(np.random.default_rng(5).integers(0, 4, ROWS * 6 + 1), "text", 6, None, "abcd")
IMPORTANCE = 0.5 + np.arange(ROWS) % 4


def by_label(size: int) -> np.ndarray:
    """5, 3 and 2 rows for three ranks; the fourth has none."""
    return partition("by_feature", IMAGES, size, seed=SEED)


def last_rank(size: int) -> np.ndarray:
    """Every row on the last rank."""
    return np.full(ROWS, size - 1)


@dataclass(frozen=True)
class RowsFeed:
    """A data set in batches, and who has which of its rows."""

    dataset: Dataset = IMAGES
    batch_size: int = BATCH
    owner: Owner | None = None
    importance: np.ndarray | None = None
    dtype: Any = np.float64

    def share(self, rank: int, size: int, microbatches: int) -> Loader:
        return Loader(
            self.dataset,
            self.batch_size,
            seed=SEED,
            rank=rank,
            size=size,
            owner=None if self.owner is None else self.owner(size),
            sampling="shuffle" if self.importance is None else "importance",
            sampling_weights=self.importance,
            microbatches=microbatches,
            dtype=self.dtype,
        )

    def whole(self, step: int, microbatches: int = 1) -> list[Batch]:
        """The concatenated microbatches of a step, in float64."""
        return replace(self, dtype=np.float64, owner=None).share(0, 1, microbatches).batch(step)


class KeptKeys(Network):
    """A network that keeps the random keys it was handed, so that a serial run can be handed the same."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.keys: list[Key] = []

    def loss_and_gradients(
        self, params: FlatBuffer, batch: Batch, grads: FlatBuffer, rng: Key, reduce: nn.Reduce | None = None
    ) -> tuple[float, float]:
        self.keys.append(rng)
        return super().loss_and_gradients(params, batch, grads, rng, reduce)


class Recorder(Optimizer):
    """Keeps the mean gradients that a method hands it, and updates nothing."""

    def __init__(self) -> None:
        self._parts: dict[int, list[tuple[int, np.ndarray]]] = {}

    def update(self, params: Any, grads: Any, state: Any, lr: Any, step: Any, shard: Any, totals: Any = None) -> None:
        self._parts.setdefault(step, []).append((shard.start, grads.copy()))

    def seen(self, comm: Communicator) -> list[np.ndarray]:
        """The whole gradient of each step, whichever rank saw which part of it."""
        found = []
        for _, parts in sorted(self._parts.items()):
            pieces = {start: array for rank in comm.allgather_object(parts) for start, array in rank if array.size}
            found.append(np.concatenate([pieces[start] for start in sorted(pieces)]))
        return found


def mlp(dtype: Any = np.float64) -> KeptKeys:
    """Linear, tanh, linear, cross-entropy: `parallel_reference.mlp_gradients` has it in closed form."""
    return KeptKeys(nn.MODELS["mlp"](32, CLASSES, hidden=[5], activation="tanh"), nn.CrossEntropy(), dtype)


def cnn(dtype: Any = np.float64, dropout: float = 0.3) -> KeptKeys:
    """Convolutions, two BatchNorms, Dropout."""
    layer = nn.MODELS["cnn"](SHAPE, CLASSES, channels=[3, 4], hidden=6, dropout=dropout)
    return KeptKeys(layer, nn.CrossEntropy(), dtype)


def gpt(dtype: Any = np.float64, recompute: bool = False) -> KeptKeys:
    """Two blocks of attention and perceptron, Dropout, a tied head; for `TEXT`."""
    layer = nn.MODELS["gpt"](4, 6, layers=2, width=8, heads=2, hidden=12, dropout=0.2, recompute=recompute)
    return KeptKeys(layer, nn.CrossEntropy(), dtype)


Make = Callable[..., Synchronous]

METHODS: dict[str, Make] = {
    "data": DataParallel,
    "gradient 1": GradientParallel,
    "gradient 2": partial(GradientParallel, stage=2, bucket_bytes=256),  # a bucket a layer, or several
    "gradient 3": partial(GradientParallel, stage=3, bucket_bytes=256),
}
"""All that must take the same steps."""

every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


def every_method_and(name: str, values: Mapping[str, Any], few: Collection[str]) -> pytest.MarkDecorator:
    """Every method with every value of ``name``; all but data-parallel by default only with ``few`` of them."""
    cases = [
        pytest.param(
            make, value, id=f"{method}-{key}", marks=[] if method == "data" or key in few else pytest.mark.slow
        )
        for method, make in METHODS.items()
        for key, value in values.items()
    ]
    return pytest.mark.parametrize(("make", name), cases)


def schedule(step: int) -> float:
    """A learning rate that shows which step it was asked for."""
    return (1 + step % 3) / 32


def plan(steps: int, **options: Any) -> Plan:
    return Plan(**({"key": Key(SEED), "schedule": schedule, "steps": steps} | options))


def set_up(
    comm: Communicator, network: Network, steps: int, optimizer: Optimizer | None = None, make: Make = DataParallel
) -> Synchronous:
    """Training ready to go: data-parallel, by plain SGD, if nothing is said."""
    method = make(comm)
    method.setup(network, optimizer or SGD(), plan(steps))
    return method


def same_on_all(comm: Communicator, value: Any) -> None:
    """Require a value, e.g. a hash or the bytes of an array, to be the same on all ranks."""
    values = comm.allgather_object(value)
    assert all(each == values[0] for each in values), values


@contextmanager
def part(comm: Communicator, size: int) -> Iterator[Communicator | None]:
    """The communicator of the first ``size`` ranks; None on the others."""
    smaller = comm.split(0 if comm.rank < size else None, axis="part")
    yield smaller
    if smaller is not None:
        smaller.free()
