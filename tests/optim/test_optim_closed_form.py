"""Cases whose result is known on paper: they need no other library."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpitrain.arrays import FlatBuffer, Layout, Segment
from mpitrain.optim import OPTIMIZERS, make_optimizer


@pytest.fixture
def weights():
    """Return a tensor of integers, its constant gradient, and the layout."""
    layout = Layout.build([Segment("w", (5,))], np.float64)
    params, grads = FlatBuffer(layout), FlatBuffer(layout)
    params.views["w"][...] = [4.0, -8.0, 0.0, 16.0, 1024.0]
    grads.views["w"][...] = [1.0, -2.0, 4.0, 64.0, -512.0]
    return params, grads


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "options", "applied"),
    [
        ("sgd", {}, 4.0),
        ("gd", {}, 4.0),
        ("momentum", {"momentum": 0.5}, 1 + 1.5 + 1.75 + 1.875),
        ("nesterov", {"momentum": 0.5}, 1.5 + 1.75 + 1.875 + 1.9375),
    ],
)
def test_four_steps_are_exact_in_binary_fractions(name, options, applied, dtype):
    layout = Layout.build([Segment("w", (3,))], dtype)
    params, grads = FlatBuffer(layout), FlatBuffer(layout)
    params.views["w"][...] = [3, -7, 100]
    optimizer, shard = make_optimizer(name, **options), layout.whole()
    state = optimizer.init(shard)
    for step in range(1, 5):
        grads.views["w"][...] = [16, -32, 64]
        optimizer.update(params.flat, grads.flat, state, 0.25, step, shard)
    expected = np.array([3, -7, 100]) - 0.25 * applied * np.array([16, -32, 64])
    np.testing.assert_array_equal(params.views["w"], expected.astype(dtype))


def test_sgd_with_decay_shrinks_geometrically(train):
    layout = Layout.build([Segment("w", (3,))], np.float64)
    params = FlatBuffer(layout)
    params.views["w"][...] = [1.0, -2.0, 1024.0]
    nothing = FlatBuffer(layout)
    *_, found = train(make_optimizer("sgd", weight_decay=1.0), params, [nothing] * 6, 0.5)
    np.testing.assert_array_equal(found.views["w"], np.array([1.0, -2.0, 1024.0]) * 0.5**6)


def test_decoupled_decay_does_not_pass_the_moments(train):
    layout = Layout.build([Segment("w", (3,))], np.float64)
    params = FlatBuffer(layout)
    params.views["w"][...] = [1.0, -2.0, 1024.0]
    *_, found = train(make_optimizer("adamw", weight_decay=1.0), params, [FlatBuffer(layout)] * 6, 0.5)
    np.testing.assert_array_equal(found.views["w"], np.array([1.0, -2.0, 1024.0]) * 0.5**6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_walks_by_lr_on_a_constant_gradient(name, weights, train):
    params, grads = weights
    before, g = params.views["w"].copy(), grads.views["w"]
    *_, found = train(make_optimizer(name, weight_decay=0.0), params, [grads] * 20, 0.25)
    expected = before - 20 * 0.25 * g / (np.abs(g) + 1e-8)
    np.testing.assert_allclose(found.views["w"], expected, rtol=1e-13)


def test_adagrad_walks_by_the_inverse_roots(weights, train):
    params, grads = weights
    before, g = params.views["w"].copy(), grads.views["w"]
    *_, found = train(make_optimizer("adagrad"), params, [grads] * 10, 0.5)
    walked = 0.5 * sum(1 / math.sqrt(k) for k in range(1, 11))
    np.testing.assert_allclose(found.views["w"], before - walked * np.sign(g), rtol=1e-9)


def test_rmsprop_walks_by_its_geometric_mean_square(weights, train):
    params, grads = weights
    before, g = params.views["w"].copy(), grads.views["w"]
    *_, found = train(make_optimizer("rmsprop", alpha=0.5), params, [grads] * 10, 0.5)
    walked = 0.5 * sum(1 / math.sqrt(1 - 0.5**k) for k in range(1, 11))
    np.testing.assert_allclose(found.views["w"], before - walked * np.sign(g), rtol=1e-7)


def test_lamb_moves_a_tensor_by_lr_times_its_norm(weights, train):
    params, grads = weights
    before = params.views["w"].copy()
    (found,) = train(make_optimizer("lamb", weight_decay=0.0), params, [grads], 0.125)
    moved = before - found.views["w"]
    assert np.linalg.norm(moved) == pytest.approx(0.125 * np.linalg.norm(before), rel=1e-14)
    np.testing.assert_allclose(moved / moved[0], np.sign(grads.views["w"]), rtol=1e-5)


def test_lamb_takes_ratio_one_where_a_norm_is_zero(train):
    layout = Layout.build([Segment("zero", (4,)), Segment("still", (4,))], np.float64)
    params, grads = FlatBuffer(layout), FlatBuffer(layout)
    grads.views["zero"][...] = 1.0
    params.views["still"][...] = 3.0
    (found,) = train(make_optimizer("lamb", weight_decay=0.0), params, [grads], 0.5)
    np.testing.assert_allclose(found.views["zero"], -0.5, rtol=1e-5)
    np.testing.assert_array_equal(found.views["still"], 3.0)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_padding_stays_zero(name, layout, start, gradients, train):
    params = start()
    for _ in train(make_optimizer(name), params, gradients, 0.1):
        pass
    inside = np.zeros(layout.size, bool)
    for segment in layout:
        inside[segment.offset : segment.stop] = True
    assert not inside.all()
    np.testing.assert_array_equal(params.flat[~inside], 0.0)
