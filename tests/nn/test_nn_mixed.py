"""Passes in 16 bits: what is summed in float32, what is computed there, and and what a pass gives."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import strict_cupy

from mpitrain import nn
from mpitrain._errors import DtypeError, MissingExtraError
from mpitrain.arrays import Batch, FlatBuffer, GradientBuffer, Key, plain
from mpitrain.arrays.dtypes import half
from mpitrain.arrays.products import half_products
from mpitrain.method import Precision
from mpitrain.nn import Call, CrossEntropy, Network, Pool

HALVES = ["float16", "bfloat16"]
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Largest relative error of a rounding."""

every_half = pytest.mark.parametrize("name", HALVES)


def values(*shape: int, dtype: Any, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


@every_half
def test_products_are_summed_in_float32(name):
    dtype, xp = half(name, "test"), half_products(np)
    n = 4096  # in float16, 1 + 1 + … stays at 2048; in bfloat16, at 256
    for shape in ((n,), (3, n), (2, 3, n)):
        left = np.ones(shape, dtype)
        product = xp.matmul(left, np.ones((n, 5), dtype))
        assert product.dtype == dtype
        assert (product.astype(float) == n).all()


@every_half
@pytest.mark.parametrize("into", ["half", "float32"])
def test_products_are_rounded_once(name, into):
    dtype = half(name, "test")
    left, right = values(7, 33, dtype=dtype), values(33, 5, dtype=dtype, seed=1)
    out = np.empty((7, 5), dtype if into == "half" else np.float32)
    assert half_products(np).matmul(left, right, out=out) is out
    exact = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_array_equal(out.astype(dtype), out)
    np.testing.assert_allclose(out.astype(float), exact, rtol=EPS[name], atol=1e-5)


def test_products_of_other_numbers_are_numpys():
    left, right = values(7, 33, dtype=np.float32), values(33, 5, dtype=np.float32)
    np.testing.assert_array_equal(half_products(np).matmul(left, right), left @ right)
    assert half_products(np).__name__ == "numpy"  # a pool tells libraries apart by it


WIDE = {
    "LayerNorm": (nn.LayerNorm(6), 300.0),  # squares beyond 65504
    "BatchNorm": (nn.BatchNorm(6), 300.0),
    "attention": (nn.CausalAttention(2), 10.0),
    "GELU": (nn.GELU(), 300.0),
    "Sigmoid": (nn.Sigmoid(), 1.0),
    "Tanh": (nn.Tanh(), 1.0),
}


@every_half
@pytest.mark.parametrize(("layer", "scale"), WIDE.values(), ids=WIDE.keys())
def test_norms_softmax_and_exponentials_are_computed_in_float32(name, layer, scale):
    dtype = half(name, "test")
    shape = (5, 6) if isinstance(layer, nn.BatchNorm) else (5, 4, 6)
    x, dy = values(*shape, dtype=dtype, scale=scale), values(*layer_output(layer, shape), dtype=dtype, seed=1)
    params = {
        parameter.name: values(*parameter.shape, dtype=dtype, seed=number) for number, parameter in
        enumerate(layer.parameters())
    }  # fmt: skip
    found, expected = (passes(layer, params, x, dy, each) for each in (dtype, np.dtype(np.float64)))
    assert [each.dtype for each in found[:2]] == [dtype, dtype]
    for ours, theirs in zip(found, expected, strict=True):
        atol = 1e-4 * np.abs(theirs).max()  # float32's rounding of scores of 100, and more than enough for the others
        np.testing.assert_allclose(ours.astype(float), theirs, rtol=1.01 * EPS[name], atol=atol)


def layer_output(layer: nn.Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] // 3) if isinstance(layer, nn.CausalAttention) else shape


def passes(layer: nn.Layer, params: Any, x: np.ndarray, dy: np.ndarray, dtype: Any) -> list[np.ndarray]:
    """Output, input gradient and weight gradients; the latter in float32 at least."""
    params = {each: array.astype(dtype) for each, array in params.items()}
    grads = {each: np.zeros(array.shape, np.promote_types(dtype, np.float32)) for each, array in params.items()}
    call = Call(np, Pool(), training=True, count=1.0)
    y, context = layer.forward(params, x.astype(dtype), call)
    found = [y.copy(), layer.backward_input(params, context, dy.astype(dtype), call).copy()]
    layer.backward_weight(grads, context, dy.astype(dtype), call)
    context.release()
    return found + [grads[each] for each in sorted(grads)]


@every_half
def test_a_layer_that_is_computed_in_float32_has_its_parameters_so(name):
    seen = []

    @nn.in_float32
    class Wide(nn.Linear):
        def forward(self, params: Any, x: np.ndarray, call: Call) -> Any:
            seen.extend([x.dtype, params["weight"].dtype, params["bias"].dtype])
            return super().forward(params, x, call)

    dtype = half(name, "test")
    params = {"weight": values(33, 5, dtype=dtype), "bias": values(5, dtype=dtype, seed=1, scale=9.0)}
    x = values(7, 33, dtype=dtype, seed=2)
    y, _ = Wide(33, 5).forward(params, x, Call(half_products(np), Pool(), training=True))
    assert seen == [np.dtype(np.float32)] * 3
    exact = x.astype(float) @ params["weight"].astype(float) + params["bias"].astype(float)
    np.testing.assert_allclose(y.astype(float), exact, rtol=EPS[name], atol=1e-5)  # rounded once, the bias included


@every_half
def test_the_loss_is_computed_in_float32_and_its_gradient_rounded_once(name):
    dtype, scale = half(name, "test"), 2.0**5
    network = Network(nn.Linear(4, 3, bias=False), CrossEntropy())
    params, grads = FlatBuffer(network.layout.astype(dtype)), FlatBuffer(network.layout)
    params.views["weight"][...] = values(4, 3, dtype=dtype, scale=4.0)
    inputs, labels = (
        np.eye(4, dtype=np.float32),
        np.array([0, 2, 1, 0]),
    )  # so that outputs and gradient are the weight's
    loss, _ = network.scaled_gradients(params, Batch(inputs, labels, np.arange(4)), grads, Key(0), None, scale)
    logits = params.views["weight"].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert loss == pytest.approx(-np.log(p[np.arange(4), labels]).sum(), rel=1e-6)
    expected = scale * (p - np.eye(3)[labels])
    np.testing.assert_allclose(grads.views["weight"], expected, rtol=1.001 * EPS[name])


@every_half
def test_vectors_that_occur_often_are_summed_in_float32(name):
    n = 4097  # odd: neither type has it
    layer, table = nn.Embedding(2, 3), np.ones((2, 3), half(name, "test"))
    grads, call = {"weight": np.zeros((2, 3), np.float32)}, Call(np, Pool(), training=True)
    y, context = layer.forward({"weight": table}, np.ones((n, 1), np.int32), call)
    layer.backward_weight(grads, context, np.ones_like(y), call)
    np.testing.assert_array_equal(grads["weight"], [[0] * 3, [n] * 3])


def small_networks() -> dict[str, tuple[Network, Batch]]:
    images = values(9, 8, 8, 1, dtype=np.float32), np.arange(9) % 10
    tokens = np.random.default_rng(0).integers(0, 17, (2, 5, 70))
    layers = {
        "mlp": nn.MODELS["mlp"](64, 10, hidden=[16], activation="gelu", dropout=0.2, batch_norm=True),
        "cnn": nn.MODELS["cnn"]((8, 8, 1), 10, channels=[4, 8], hidden=16),
        "gpt": nn.MODELS["gpt"](17, 70, layers=2, width=16, heads=2, dropout=0.2, recompute=True),
    }
    data = {"mlp": (images[0].reshape(9, 64), images[1]), "cnn": images, "gpt": tokens}
    return {
        kind: (Network(layer, CrossEntropy()), Batch(*data[kind], np.arange(len(data[kind][0]))))
        for kind, layer in layers.items()
    }


def in_half(network: Network, batch: Batch, dtype: Any, make: Any = FlatBuffer, scale: float = 1.0) -> Any:
    """Loss, count and the gradient of a pass, its parameters rounded to ``dtype``."""
    whole, params = FlatBuffer(network.layout), FlatBuffer(network.layout.astype(dtype))
    network.initialise(whole, Key(0))
    params.flat[...] = whole.flat
    grads = make(network.layout, plain)
    grads.zero()
    found = network.scaled_gradients(params, batch, grads, Key(1), None, scale)
    grads.end_pass()
    return *found, np.array(grads.flat)


@every_half
@pytest.mark.parametrize("make", [FlatBuffer, GradientBuffer])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt"])
def test_a_pass_in_16_bits_is_that_in_float32_but_for_rounding(name, make, kind):
    network, batch = small_networks()[kind]
    loss, count, expected = in_half(network, batch, np.float32)
    found = in_half(network, batch, half(name, "test"), make)
    assert found[1] == count
    assert found[0] == pytest.approx(loss, rel=EPS[name])
    assert found[0] != loss
    # rounding also makes another pixel the largest of its window here and there
    assert np.linalg.norm(found[2] - expected) < 16 * EPS[name] * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt"])
def test_the_scale_multiplies_gradients_and_statistics_and_not_the_loss(kind):
    network, batch = small_networks()[kind]
    once, scaled = (in_half(network, batch, np.float32, scale=scale) for scale in (1.0, 2.0**7))
    assert scaled[:2] == once[:2]
    np.testing.assert_array_equal(scaled[2], 2.0**7 * once[2])
    # bfloat16 has float32's exponents, so that nothing is lost by scaling
    once, scaled = (in_half(network, batch, half("bfloat16", "test"), scale=scale) for scale in (1.0, 2.0**7))
    np.testing.assert_array_equal(scaled[2], 2.0**7 * once[2])


def test_without_ml_dtypes_bfloat16_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(MissingExtraError, match="pip install ml_dtypes"):
        _ = Precision(compute="bfloat16").dtype
    assert Precision(compute="float16").dtype == np.float16


def test_a_library_without_the_type_is_an_error(monkeypatch):
    def without(*args: Any) -> Any:
        raise TypeError("Unsupported dtype bfloat16")

    cupy = strict_cupy.module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    network, memory = small_networks()["mlp"][0], cupy.zeros(0, np.float32)
    assert Precision(compute="bfloat16").check(network, memory) is network
    monkeypatch.setattr(cupy, "ones", without)
    with pytest.raises(DtypeError, match=r"cupy 14.0.0 cannot compute in bfloat16.*use float16, or CuPy 14"):
        Precision(compute="bfloat16").check(network, memory)
