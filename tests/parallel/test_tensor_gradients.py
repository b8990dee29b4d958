"""A model that ranks divide has the numbers of the whole one: initial values, losses, gradients, metrics, outputs."""

from __future__ import annotations

import numpy as np
import pytest
from tensor_cases import MODELS, Model, batch_for, boxes, initial, sum_terms

from mpitrain import nn
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator

BOUND = 1e-12
RNG = Key(3).child("train").at(5)


def moved(network: nn.Network) -> FlatBuffer:
    """Initial values with biases and shifts that are not zero, so that one that is added twice shows."""
    params = initial(network)
    for name, view in params.views.items():
        if name.endswith(("bias", "beta")):
            view += 0.1 * np.arange(view.size).reshape(view.shape)
    return params


def check_pass(comm: Communicator, model: Model, rows: int) -> None:
    """Loss, count and every gradient, per tensor, and their norm."""
    serial, divided = model.serial(), model.divided(comm)
    batch, whole, part = batch_for(model, rows), moved(serial), FlatBuffer(divided.layout)
    for name, values in boxes(divided.layout, whole.views).items():
        part.views[name][...] = values
    expected, found = FlatBuffer(serial.layout), FlatBuffer(divided.layout)
    loss = serial.loss_and_gradients(whole, batch, expected, RNG)
    assert divided.loss_and_gradients(part, batch, found, RNG) == pytest.approx(loss, rel=BOUND)
    sum_terms(comm, found)
    if rows:
        named = {segment.name: segment for segment in divided.layout}
        ours = {name: found.views[name] for name in named}
        theirs = boxes(divided.layout, {name: expected.views[name] for name in named})
        for name in named:
            size = np.linalg.norm(expected.views[name])
            assert size > 0
            assert np.linalg.norm(ours[name] - theirs[name]) <= BOUND * size, name
    else:
        assert not found.flat.any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [5, 0])
def test_gradients_are_those_of_the_whole_model(on_ranks, name, rows):
    on_ranks(check_pass, MODELS[name], rows)
