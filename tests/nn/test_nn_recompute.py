"""Recomputation: the same bits as with kept activations, in less memory, and nothing summed over ranks twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.nn import Network


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


BLOCKS = {
    "perceptron": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3, 3)),
    "norm and dropout": (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm(2), nn.Dropout(0.4), nn.GELU()), (4, 3)),
    "shortcut": (nn.Residual(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3))), (2, 3)),
    "output is a view of the input": (nn.Flatten(), (2, 3, 2)),
    "in itself": (nn.Sequential(nn.Recompute(nn.Linear(3, 3)), nn.Tanh()), (2, 3)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_and_manners_are_those_of_a_layer(name: str, training: bool):
    layer, shape = BLOCKS[name]
    nn.check_layer(nn.Recompute(layer), normal(*shape), training=training)


def step(layer: nn.Layer, batch: Batch, loss: nn.Loss, reduce: nn.Reduce | None = None) -> tuple[Network, Any]:
    """One pass of float64 training: the network, and its loss and gradients."""
    network = Network(layer, loss, np.float64)
    params, grads = FlatBuffer(network.layout), FlatBuffer(network.layout)
    network.initialise(params, Key(1))
    found = network.loss_and_gradients(params, batch, grads, Key(2), reduce)
    return network, (found, grads.flat.tobytes())


def gpt(recompute: bool) -> nn.Layer:
    return nn.MODELS["gpt"](7, 6, layers=6, width=16, heads=2, dropout=0.3, recompute=recompute)


def text() -> Batch:
    tokens = np.random.default_rng(1).integers(0, 7, (8, 7))
    return Batch(tokens[:, :-1], tokens[:, 1:], np.arange(8))


def test_a_gpt_has_the_same_names_and_bits_and_needs_the_activations_of_one_block():
    (kept, expected), (again, found) = (step(gpt(recompute), text(), nn.CrossEntropy()) for recompute in (False, True))
    assert again.layout == kept.layout
    assert found == expected
    tokens, width = 8 * 6, 16
    between = 6 * tokens * width * 8  # what six blocks hand on, which stays
    per_block = (kept.pool.nbytes - between) / 6
    assert again.pool.nbytes < between + 3 * per_block


def test_statistics_are_summed_over_ranks_once_in_each_direction():
    """Each reduction is noted; doubling what is summed makes a sum of something already summed show."""
    calls: dict[bool, list[int]] = {}
    results = {}
    for recompute in (False, True):
        seen = calls[recompute] = []

        def reduce(array: np.ndarray, seen: list[int] = seen) -> np.ndarray:
            seen.append(array.size)
            array *= 2  # two ranks with the same samples
            return array

        block: nn.Layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm(4), nn.ReLU(), nn.BatchNorm(4))
        layer = nn.Sequential(nn.Recompute(block) if recompute else block, head=nn.Linear(4, 2))
        batch = Batch(normal(6, 3), np.arange(6) % 2, np.arange(6))
        _, results[recompute] = step(layer, batch, nn.CrossEntropy(), reduce)
    assert calls[True] == calls[False] == [5, 4, 5, 4, 8, 8]
    assert results[True] == results[False]
