"""Methods over a mesh: the gradient, norm and loss of data × tensor are the serial ones of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    IMAGES,
    METHODS,
    ROWS,
    SEED,
    STEPS_PER_EPOCH,
    Make,
    Recorder,
    RowsFeed,
    by_label,
    last_rank,
    plan,
    same_on_all,
)
from parallel_reference import buffer, network_mean_gradient
from tensor_cases import CONTEXT, MODELS, VOCABULARY, Model, boxes, initial

from mpitrain.arrays import Key
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.data.windows import windows
from mpitrain.optim import Optimizer

BOUND = 1e-10
LONG = windows(
    np.random.default_rng(5).integers(0, VOCABULARY, ROWS * CONTEXT + 1), "text", CONTEXT, None, "abcdefghijklm"
)
SHAPES = {1: [(1, 1)], 2: [(1, 2)], 3: [(1, 3)], 4: [(2, 2), (1, 4)]}
"""Meshes, data by tensor, of so many ranks."""


@contextmanager
def meshes(comm: Communicator) -> Iterator[list[ProcessMesh]]:
    made = [ProcessMesh(comm, data=data, tensor=tensor) for data, tensor in SHAPES[comm.size]]
    yield made
    for mesh in made:
        mesh.free()


def feed_for(model: Model, **options: Any) -> RowsFeed:
    return RowsFeed(LONG if model.kind == "gpt" else IMAGES, **options)


def keys(step: int, microbatches: int) -> list[Key]:
    return [Key(SEED).child("train").at(step).child(f"microbatch{number}") for number in range(microbatches)]


def ready(mesh: ProcessMesh, model: Model, make: Make, optimizer: Optimizer, steps: int, **options: Any) -> Any:
    """A method set up over a mesh; ``clip…`` goes to the plan."""
    bounds = {name: options.pop(name) for name in list(options) if name.startswith("clip")}
    method = make(mesh["data"], across=mesh["tensor"], **options)
    method.setup(model.divided(mesh["tensor"]), optimizer, plan(steps, **bounds))
    return method


def check_gradients(comm: Communicator, model: Model, make: Make, feed: RowsFeed, microbatches: int) -> None:
    serial = model.serial()
    whole = initial(serial, SEED)
    with meshes(comm) as made:
        for mesh in made:
            recorder = Recorder()
            method = ready(mesh, model, make, recorder, STEPS_PER_EPOCH, microbatches=microbatches)
            layout = method.params.layout
            for name, values in boxes(layout, whole.views).items():
                np.testing.assert_array_equal(method.params.views[name], values)  # initial values, to the bit
            losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
            for step, flat in enumerate(recorder.seen(mesh["data"])):
                batches = feed.whole(step, microbatches)
                loss, expected = network_mean_gradient(serial, whole, batches, keys(step, microbatches))
                assert losses[step] == pytest.approx(loss, rel=BOUND)
                norms = {name: np.linalg.norm(values) for name, values in expected.views.items()}
                found = buffer(layout, flat)
                for name, values in boxes(layout, expected.views).items():
                    assert norms[name] > 0
                    assert np.linalg.norm(found.views[name] - values) <= BOUND * norms[name], name
            same_on_all(comm, losses)


CASES = {
    "microbatches": ({}, 2),
    "by label": ({"owner": by_label}, 2),
    "all on the last rank": ({"owner": last_rank}, 1),
}
FEW = ("data", "gradient 1")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_serial_ones(on_ranks, name, method, case):
    if method == "gradient 2" and MODELS[name].sequence:
        pytest.skip("refused")
    options, microbatches = CASES[case]
    on_ranks(check_gradients, MODELS[name], METHODS[method], feed_for(MODELS[name], **options), microbatches)
