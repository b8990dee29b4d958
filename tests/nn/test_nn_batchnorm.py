"""BatchNorm over ranks: shards with an injected sum are the whole batch; and its numerics."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import Batch, FlatBuffer, Key, Layout


class _Ranks:
    """Runs a function on threads that stand for ranks, and sums arrays over them in the order of the ranks."""

    def __init__(self, size):
        self.size = size
        self.calls = [[] for _ in range(size)]
        self._slots = [None] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def reducer(self, rank):
        def reduce(array):
            self.calls[rank].append((array.shape, array.dtype))
            self._slots[rank] = array.copy()
            self._barrier.wait()
            total = sum(self._slots[1:], start=self._slots[0].copy())
            self._barrier.wait()
            array[...] = total
            return array

        return reduce

    def run(self, work):
        with ThreadPoolExecutor(self.size) as threads:
            return [f.result() for f in [threads.submit(work, rank) for rank in range(self.size)]]


def _layer_pass(layer, params, x, dy, reduce=None):
    call = nn.Call(training=True, count=float(len(x)), reduce=reduce)
    y, context = layer.forward(params.tree, x, call)
    grads = FlatBuffer(params.layout)
    dx = layer.backward_input(params.tree, context, dy, call)
    layer.backward_weight(grads.tree, context, dy, call)
    return y.copy(), dx.copy(), grads


@pytest.mark.parametrize("shape", [(3,), (4, 2, 3)], ids=["rows", "images"])
@pytest.mark.parametrize("cuts", [(3, 5), (3, 3), (0, 7), (7, 7), (1, 2)], ids=str)
def test_shards_equal_the_whole_batch(cuts, shape):
    layer = nn.BatchNorm(3)
    random = np.random.default_rng(1)
    params = FlatBuffer(Layout.build([p.segment() for p in layer.parameters()], np.float64))
    params.flat[...] = random.uniform(0.5, 1.5, params.flat.shape)
    x, dy = 5.0 + 2.0 * random.standard_normal((7, *shape)), random.standard_normal((7, *shape))
    y, dx, grads = _layer_pass(layer, params, x, dy)

    ranks = _Ranks(3)
    xs, dys = np.split(x, cuts), np.split(dy, cuts)
    parts = ranks.run(lambda rank: _layer_pass(layer, params, xs[rank], dys[rank], ranks.reducer(rank)))

    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), dx, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sum(p[2].flat for p in parts), grads.flat, rtol=1e-12, atol=1e-12)
    assert ranks.calls[0] == ranks.calls[1] == ranks.calls[2] == [
        ((4,), np.float64), ((3,), np.float64), ((2, 3), np.float64)
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cuts", [(3, 5), (4, 4)], ids=["uneven", "one empty"])
def test_network_on_shards_equals_the_serial_gradient(cuts, dtype):
    build = nn.MODELS["cnn"]((6, 6, 2), 4, channels=[3, 5], hidden=6, dropout=0.3)
    net, exact = (nn.Network(build, nn.CrossEntropy(), d) for d in (dtype, "float64"))
    random = np.random.default_rng(0)
    x, labels = random.random((7, 6, 6, 2)), random.integers(0, 4, 7)

    def gradients(model, rows, reduce=None):
        params, grads = FlatBuffer(model.layout), FlatBuffer(model.layout)
        model.initialise(params, Key(1))
        loss, count = model.loss_and_gradients(params, Batch(x[rows], labels[rows], rows), grads, Key(2).at(5), reduce)
        return loss, count, {name: view.astype(np.float64) for name, view in grads.views.items()}

    loss, count, whole = gradients(exact, np.arange(7))
    ranks, shards = _Ranks(3), np.split(np.arange(7), cuts)
    parts = ranks.run(lambda rank: gradients(net, shards[rank], ranks.reducer(rank)))
    assert sum(p[1] for p in parts) == count == 7.0
    bound = 1e-12 if dtype == "float64" else 1e-5
    assert sum(p[0] for p in parts) == pytest.approx(loss, rel=bound)
    for name, expected in whole.items():
        found = sum(p[2][name] for p in parts)
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected), name


def test_large_mean_costs_no_digits():
    x = np.array([[1e8], [1e8 + 1], [1e8 + 2], [1e8 + 3]])
    layer = nn.BatchNorm(1, eps=1e-12)
    params = FlatBuffer(Layout.build([p.segment() for p in layer.parameters()], np.float64))
    params.views["gamma"][...] = 1.0
    y, _, grads = _layer_pass(layer, params, x, np.ones_like(x))
    np.testing.assert_allclose(y[:, 0], np.array([-1.5, -0.5, 0.5, 1.5]) / np.sqrt(1.25), rtol=1e-10)
    np.testing.assert_allclose(grads.views["running_var"] / 4, 5.0 / 3.0, rtol=1e-10)


def test_single_value_has_variance_zero():
    layer = nn.BatchNorm(2)
    params = FlatBuffer(Layout.build([p.segment() for p in layer.parameters()], np.float64))
    y, dx, grads = _layer_pass(layer, params, np.array([[3.0, -1.0]]), np.ones((1, 2)))
    assert not y.any()
    assert not dx.any()
    np.testing.assert_array_equal(grads.views["running_mean"], [3.0, -1.0])
    np.testing.assert_array_equal(grads.views["running_var"], [0.0, 0.0])


def test_statistics_carry_the_momentum():
    layer = nn.BatchNorm(2, momentum=0.3)
    assert {p.name: (p.group, p.rate) for p in layer.parameters()} == {
        "gamma": ("no_decay", 0.0),
        "beta": ("no_decay", 0.0),
        "running_mean": ("statistics", 0.3),
        "running_var": ("statistics", 0.3),
    }


@pytest.mark.parametrize("options", [{"momentum": 1.5}, {"eps": 0.0}, {"features": 0}])
def test_wrong_options_are_named(options):
    with pytest.raises(InputError, match=f"BatchNorm: {next(iter(options))} is wrong; got"):
        nn.BatchNorm(**({"features": 2} | options))
