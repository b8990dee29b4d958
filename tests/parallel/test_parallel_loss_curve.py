"""Rounding moves the loss curve of n ranks no further from that of one than another order of summation moves it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

from mpitrain import data, nn
from mpitrain.arrays import Batch, Key
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.data import Dataset, Loader
from mpitrain.method import Plan
from mpitrain.nn import Network
from mpitrain.optim import SGD
from mpitrain.parallel import DataParallel

STEPS = 50
PERMUTATIONS = 4


@cache
def digits() -> Dataset:
    return data.load("digits")


@dataclass(frozen=True)
class Permuted:
    """The digits, with the rows of each rank's share in another order."""

    seed: int | None = None

    def share(self, rank: int, size: int, microbatches: int) -> Permuted.Share:
        loader = Loader(digits(), 64, seed=1, rank=rank, size=size, microbatches=microbatches)
        return Permuted.Share(loader, self.seed)

    @dataclass(frozen=True)
    class Share:
        loader: Loader
        seed: int | None

        def batch(self, step: int) -> list[Batch]:
            batches = self.loader.batch(step)
            if self.seed is None:
                return batches
            random = np.random.default_rng([self.seed, step])
            return [_reordered(batch, random.permutation(len(batch))) for batch in batches]


def _reordered(batch: Batch, order: np.ndarray) -> Batch:
    return Batch(batch.inputs[order], batch.targets[order], batch.index[order])


def curve(comm: Communicator, seed: int | None = None) -> np.ndarray:
    """The loss of each step of a float32 network with BatchNorm and Dropout.

    It is smooth: at the kinks of ReLU or of a maximum, rounding rarely, but then visibly, takes the other branch.
    """
    layer = nn.MODELS["mlp"](64, 10, hidden=[64], activation="gelu", dropout=0.25, batch_norm=True)
    method = DataParallel(comm)
    method.setup(Network(layer, nn.CrossEntropy()), SGD(), Plan(Key(0), lambda step: 0.5, STEPS))
    feed = Permuted(seed)
    return np.array([method.advance(feed, until=step + 1).loss for step in range(STEPS)])


@cache
def serial_curve(seed: int | None = None) -> np.ndarray:
    return LocalWorld(1).run(curve, seed)[0]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean square over the steps."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def check_curve(comm: Communicator) -> None:
    found = curve(comm)
    if comm.rank == 0:
        serial = serial_curve()
        spread = max(distance(serial_curve(seed), serial) for seed in range(PERMUTATIONS))
        assert serial[-5:].mean() < serial[:5].mean() / 2
        assert distance(found, serial) <= 3 * spread


def test_curve_is_within_three_times_the_spread_of_serial_runs(on_ranks):
    pytest.importorskip("sklearn")
    on_ranks(check_curve)
