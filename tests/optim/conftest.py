"""A small model's layout with all three groups, and the same gradients for everyone."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.arrays import FlatBuffer, Layout, Segment

STEPS = 12


@pytest.fixture
def layout():
    return Layout.build(
        [
            Segment("first.weight", (7, 5)),
            Segment("first.bias", (5,), group="no_decay"),
            Segment("norm.mean", (5,), group="statistics", rate=0.25),
            Segment("norm.var", (3,), group="statistics", rate=0.5),
            Segment("second.weight", (5, 3)),
            Segment("empty.weight", (0, 3)),
            Segment("second.bias", (3,), group="no_decay"),
        ],
        np.float64,
    )


@pytest.fixture
def start(layout):
    """Return initial parameters, the same at each call."""

    def make(layout=layout):
        rng = np.random.default_rng(1)
        buffer = FlatBuffer(layout)
        for segment in layout:
            buffer.views[segment.name][...] = rng.normal(size=segment.shape)
        return buffer

    return make


@pytest.fixture
def gradients(layout):
    """Return the gradients of each of some steps; of very different sizes."""
    rng = np.random.default_rng(2)
    found = []
    for step in range(STEPS):
        buffer = FlatBuffer(layout)
        for segment in layout:
            buffer.views[segment.name][...] = rng.normal(size=segment.shape) * 10.0 ** (step % 3 - 1)
        found.append(buffer)
    return found


@pytest.fixture
def train():
    """Return a function that applies an optimizer to a whole layout, step by step."""

    def run(optimizer, params, gradients, lr):
        shard = params.layout.whole()
        state = optimizer.init(shard)
        for step, grads in enumerate(gradients, start=1):
            g = grads.flat.copy()
            totals = optimizer.partials(params.flat, g, state, step, shard)
            optimizer.update(params.flat, g, state, lr, step, shard, totals)
            yield params

    return run
