"""Kernels for GPUs give what array operations give, and the same bits for a row whatever else is in the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from mpitrain import nn, optim
from mpitrain.arrays import to_host
from mpitrain.nn import CrossEntropy, Network, kernel_cuda
from mpitrain.nn.layer import Call, Layer
from mpitrain.optim import kernel_cuda as optim_kernel_cuda
from mpitrain.optim.terms import Terms

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
LAYERS = {
    "gelu": (lambda: nn.GELU(), (3, 5, 12)),
    "layer_norm": (lambda: nn.LayerNorm(48), (3, 5, 48)),
    "attention of one block": (lambda: nn.CausalAttention(2), (2, 70, 24)),
    "attention of three blocks": (lambda: nn.CausalAttention(2), (1, 530, 12)),
}


USED = {
    "gelu": {"gelu", "gelu_gradient"},
    "layer_norm": {"mean", "centred", "deviation", "layer_norm", "scaled_mean", "projection", "layer_norm_input"},
    "attention": {"causal_mask", "causal_exponentials", "causal_slopes", "divided_heads", "head_means"},
}
"""The kernels of each."""


def watched(monkeypatch: pytest.MonkeyPatch, module: Any, *makers: str) -> set[str]:
    """Return where the names of the kernels appear that a module asks for from now on."""
    names: set[str] = set()

    def watch(make: Any, name: str, *more: Any) -> Any:
        names.add(name)
        return make(name, *more)

    for maker in makers:
        monkeypatch.setattr(module, maker, partial(watch, getattr(module, maker)))
    return names


def passes(layer: Layer, xp: Any, x: np.ndarray) -> list[np.ndarray]:
    """Return output, input's gradient and parameters' gradients, for parameters and gradients that are random."""
    draw = np.random.default_rng(5)
    params = {each.name: xp.asarray(draw.normal(size=each.shape).astype(x.dtype)) for each in layer.parameters()}
    grads = {name: xp.zeros_like(value) for name, value in params.items()}
    call = Call(xp=xp, training=True)
    y, context = layer.forward(params, xp.asarray(x), call)
    dy = xp.asarray(draw.normal(size=y.shape).astype(x.dtype))
    dx = layer.backward_input(params, context, dy, call)
    layer.backward_weight(grads, context, dy, call)
    return [to_host(each) for each in (y, dx, *grads.values())]


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_layers(gpu, monkeypatch, name, dtype):
    make, shape = LAYERS[name]
    x = np.random.default_rng(3).normal(size=shape).astype(dtype)
    used = watched(monkeypatch, kernel_cuda, "elementwise", "row_sums")
    by_kernels = passes(make(), gpu, x)
    assert used == USED[name.partition(" of ")[0]]
    wide = passes(make(), np, x.astype(np.float64))
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    monkeypatch.setattr(kernel_cuda, "elementwise", None)  # which would be called
    by_operations = passes(make(), gpu, x)
    for found, plain, expected in zip(by_kernels, by_operations, wide, strict=True):
        assert found.dtype == dtype
        bound = 4 * np.abs(plain - expected).max() + 16 * np.finfo(dtype).eps * np.abs(expected).max()
        assert np.abs(found - expected).max() <= bound


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("attention of three blocks",)])
def test_a_sample_has_the_same_bits_in_every_batch(gpu, name):
    """Of what kernels compute: products of matrices are the library's."""
    rng = np.random.default_rng(0)
    size = {"layer_norm": (70, 1, 1, 700)}.get(name, (70, 1, 40, 40))
    x = rng.normal(size=size).astype(np.float32)
    run = {"gelu": _gelu, "layer_norm": _layer_norm, "attention of one block": _exponentials}[name]
    whole = run(gpu, x)
    for part in (slice(0, 1), slice(1, 3), slice(3, 8), slice(8, 39), slice(39, 70)):
        for found, expected in zip(run(gpu, x[part]), whole, strict=True):
            assert np.array_equal(found, expected[part])


def _gelu(xp: Any, host: np.ndarray) -> list[np.ndarray]:
    x = xp.asarray(host)
    y, dx = xp.empty_like(x), xp.empty_like(x)
    assert kernel_cuda.gelu(x, y)
    assert kernel_cuda.gelu_gradient(x, y, dx)
    return [to_host(y), to_host(dx)]


def _layer_norm(xp: Any, host: np.ndarray) -> list[np.ndarray]:
    x = xp.asarray(host)
    normal, y, dx = xp.empty_like(x), xp.empty_like(x), xp.empty_like(x)
    inverse = xp.empty((*x.shape[:-1], 1), x.dtype)
    gamma, beta = xp.linspace(1, 2, host.shape[-1], dtype=x.dtype), xp.ones(host.shape[-1], x.dtype)
    assert kernel_cuda.layer_norm(x, gamma, beta, normal, inverse, y, 1e-5)
    assert kernel_cuda.layer_norm_input(normal, inverse, gamma, x, dx)
    return [to_host(each) for each in (normal, inverse, y, dx)]


def _exponentials(xp: Any, host: np.ndarray) -> list[np.ndarray]:
    weights, slopes = xp.asarray(host), xp.asarray(host[..., ::-1].copy())
    totals = xp.empty((*weights.shape[:-1], 1), weights.dtype)
    assert kernel_cuda.causal_exponentials(weights, totals, 0.3)
    assert kernel_cuda.causal_slopes(slopes, weights, totals, 0.3)
    assert (to_host(weights)[..., np.triu(np.ones((40, 40), bool), 1)] == 0).all()
    return [to_host(each) for each in (weights, totals, slopes)]


@DTYPES
@pytest.mark.parametrize("optimizer", [optim.AdamW(weight_decay=0.1), optim.Adam(weight_decay=0.1)])
def test_adam(gpu, monkeypatch, optimizer, dtype):
    shard = Network(nn.MODELS["mlp"](9, 4, hidden=[7], batch_norm=True), CrossEntropy(), np.dtype(dtype)).layout.whole()
    found, used = [], watched(monkeypatch, optim_kernel_cuda, "elementwise")
    for switch in ("on", "off"):
        monkeypatch.setenv("MPITRAIN_KERNEL", switch)
        draw = np.random.default_rng(1)
        params, *grads = (gpu.asarray(draw.normal(size=shard.size).astype(dtype)) for _ in range(4))
        state = optimizer.init(shard, lambda size, dtype: gpu.zeros(size, dtype))
        for step, each in enumerate(grads, start=1):
            optimizer.update_mean(params, Terms((each,), 3.0), state, 0.01, step, shard)
        assert used == ({"adam"} if switch == "on" else set())
        used.clear()
        found.append([to_host(each) for each in (params, *state.values())])
    for kernels, operations in zip(*found, strict=True):
        np.testing.assert_allclose(kernels, operations, rtol=32 * np.finfo(dtype).eps, atol=4 * np.finfo(dtype).eps)
