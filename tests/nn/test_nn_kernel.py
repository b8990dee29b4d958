"""The compiled loops of layers: those of pooling and ReLU have the bits of the NumPy path, the others its values."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.nn import kernel

compiled = pytest.mark.skipif(kernel.LIBRARY.loaded is None, reason="the compiled loops are not built: no C compiler")


def passes(layer: nn.Layer, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    call = nn.Call()
    y, context = layer.forward({}, x, call)
    return y.copy(), layer.backward_input({}, context, dy, call).copy()


def images(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """With many equal maxima, and with NaN and infinities."""
    rng = np.random.default_rng(0)
    found = rng.integers(-2, 3, shape).astype(dtype)
    found.reshape(-1)[::17] = np.nan
    found.reshape(-1)[5::29] = np.inf
    return found


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("window", "shape"),
    [((2, 2), (3, 4, 6, 5)), ((2, 2), (2, 2, 2, 64)), ((2, 2), (2, 4, 4, 130)), ((3, 1), (2, 6, 5, 65)),
     ((1, 3), (1, 3, 6, 1)), ((1, 1), (2, 3, 3, 7)), ((2, 2), (0, 4, 4, 3))],
)  # fmt: skip
def test_maximum_pooling_has_the_bits_of_numpy(monkeypatch, window, shape, dtype):
    x = images(shape, dtype)
    dy = images((shape[0], shape[1] // window[0], shape[2] // window[1], shape[3]), dtype) * -1.5
    found = {}
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        with np.errstate(all="ignore"):
            found[which] = passes(nn.MaxPool2d(window), x, dy)
    for on, off in zip(found["on"], found["off"], strict=True):
        np.testing.assert_array_equal(on, off)
        np.testing.assert_array_equal(np.signbit(on), np.signbit(off))


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_relu_has_the_bits_of_numpy(monkeypatch, dtype):
    x, dy = images((70, 1001), dtype), images((1001, 70), dtype).reshape(70, 1001) * -0.5
    found = {}
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        with np.errstate(all="ignore"):
            found[which] = passes(nn.ReLU(), x, dy)
    for on, off in zip(found["on"], found["off"], strict=True):
        np.testing.assert_array_equal(on, off)
        np.testing.assert_array_equal(np.signbit(on), np.signbit(off))


@compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, (2, 3), 3])
@pytest.mark.parametrize("stride", [1, (2, 1), 3])
@pytest.mark.parametrize("padding", [0, (0, 1), 2])
def test_convolutions_take_and_add_the_same_patches(monkeypatch, dtype, size, stride, padding):
    """Outputs and the weights' gradient have the same bits; the input's is a sum in another order."""
    rng = np.random.default_rng(0)
    layer = nn.Conv2d(2, 5, size, stride, padding)
    x = rng.standard_normal((3, 7, 6, 2)).astype(dtype)
    params = {p.name: rng.standard_normal(p.shape).astype(dtype) for p in layer.parameters()}
    found = {}
    for which in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", which)
        assert kernel.has_patches_of(x) == (which == "on")
        call, grads = nn.Call(), {name: np.zeros_like(value) for name, value in params.items()}
        y, context = layer.forward(params, x, call)
        dy = np.cos(np.arange(y.size)).astype(dtype).reshape(y.shape)
        dx = layer.backward_input(params, context, dy, call)
        layer.backward_weight(grads, context, dy, call)
        found[which] = y.copy(), grads["weight"], dx.copy()
    for on, off in zip(found["on"][:2], found["off"][:2], strict=True):
        np.testing.assert_array_equal(on, off)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(found["on"][2], found["off"][2], rtol=0, atol=100 * eps)


@compiled
def test_the_loops_are_used_and_can_be_forbidden(monkeypatch):
    x, y, dx = np.ones((1, 2, 2, 3)), np.zeros((1, 1, 1, 3)), np.zeros((1, 2, 2, 3))
    assert kernel.max_pool(x, y, (2, 2))
    assert kernel.max_pool_gradient(x, y, y, dx, (2, 2))
    large = np.ones((300, 300))
    assert kernel.relu_gradient(large, large, large.copy())
    assert kernel.relu(large, large.copy())
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    assert not kernel.max_pool(x, y, (2, 2))
    assert not kernel.max_pool_gradient(x, y, y, dx, (2, 2))
    assert not kernel.relu_gradient(large, large, large.copy())
    assert not kernel.relu(large, large.copy())


@pytest.mark.parametrize("kind", ["float16", "float32 by columns", ">f4", "at an odd byte"])
def test_what_does_not_fit_is_left_alone(kind):
    dtype = {"float16": "float16", ">f4": ">f4"}.get(kind, "float32")
    x, dy = np.ones((300, 301), dtype), np.ones((300, 301), dtype)
    if kind == "float32 by columns":
        dy = np.asfortranarray(dy)
    if kind == "at an odd byte":
        dy = np.frombuffer(b"-" + dy.tobytes(), dtype, offset=1).reshape(dy.shape)
    out = np.zeros(x.shape, dtype)
    assert not kernel.relu_gradient(x, dy, out)
    assert not kernel.relu_gradient(x, np.ones((300, 300), dtype), out)
    assert not out.any()
    _, dx = passes(nn.ReLU(), x, dy)
    np.testing.assert_array_equal(dx, dy)
