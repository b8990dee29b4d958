"""What layers are said to cost, against closed forms, and against what their passes do keep."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.nn.costs import cost, kept_bytes, training_flops
from mpitrain.nn.layer import Call, Context

CASES: dict[str, tuple[nn.Layer, tuple[int, ...]]] = {
    "mlp": (nn.MODELS["mlp"](6, 3, hidden=[5, 4]), (7, 6)),
    "cnn": (nn.MODELS["cnn"]((6, 8, 1), 3, channels=(2, 3), hidden=4, dropout=0.0, batch_norm=False), (2, 6, 8, 1)),
    "norms, dropout": (nn.MODELS["cnn"]((4, 4, 2), 3, channels=[3, 4], hidden=6, dropout=0.3), (5, 4, 4, 2)),
    "means": (nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(0.0)), (2, 4, 4, 3)),
    "strides": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1)), (2, 7, 5, 2)),
    "gpt": (nn.GPT(9, 70, layers=2, width=8, heads=2), (3, 70)),
    "gpt, recomputed": (nn.GPT(9, 70, layers=2, width=8, heads=2, dropout=0.1, recompute=True), (3, 70)),
    "shortcut": (nn.Residual(nn.Linear(4, 3), nn.Linear(4, 3)), (2, 4)),
}


def test_an_mlp_costs_what_its_products_cost() -> None:
    layer, (rows, _) = CASES["mlp"]
    products = [2 * rows * m * n for m, n in ((6, 5), (5, 4), (4, 3))]
    found = cost(layer, (rows, 6))
    assert found.forward == found.backward_input == found.backward_weight == sum(products)
    assert training_flops(layer, (rows, 6)) == 3 * sum(products) - products[0]  # nobody asks for the input's gradient


def test_convolutions_and_attention() -> None:
    layer, shape = CASES["strides"]
    assert (cost(layer, shape).shape, cost(layer, shape).forward) == ((2, 3, 4, 3), 2 * (2 * 3 * 4) * (3 * 2 * 2) * 3)
    heads = cost(nn.CausalAttention(2), (3, 5, 24))
    pairs = 5 + 4 + 3 + 2 + 1
    assert (heads.shape, heads.forward) == ((3, 5, 8), 2 * (2 * 3 * 2 * pairs * 4))
    assert heads.backward_input == 2 * heads.forward
    gpt = cost(*CASES["gpt"])
    linear = 2 * (3 * 70) * (2 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 8 * 9)
    assert gpt.forward == linear + 2 * cost(nn.CausalAttention(2), (3, 70, 24)).forward
    assert training_flops(*CASES["gpt"]) == gpt.flops  # embeddings cost nothing, all that follows needs dx


@pytest.mark.parametrize("name", CASES)
def test_what_the_forward_pass_keeps_is_what_is_counted(name: str) -> None:
    layer, shape = CASES[name]
    y, context = forward(layer, shape, np.float32)
    assert cost(layer, shape).shape == y.shape
    assert cost(layer, shape).kept == held(context)


HALF_CASES = {**CASES, "recomputed in float32": (nn.Recompute(nn.Sigmoid()), (3, 4))}


def forward(layer: nn.Layer, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Context]:
    network = nn.Network(layer, nn.CrossEntropy())
    drawn, params = FlatBuffer(network.layout), FlatBuffer(network.layout.astype(dtype))
    network.initialise(drawn, Key(0))
    params.flat[...] = drawn.flat
    inputs: Any = np.zeros(shape, np.int64 if layer.takes_indices else dtype)
    call = Call(training=True, key=Key(0), index=np.arange(len(inputs)))
    return layer.forward(params.tree if params.tree else {}, inputs, call)


def held(context: Context, unit: str = "size") -> int:
    return sum(getattr(array, unit) for array in context._held) + sum(held(child, unit) for child in context.children)


@pytest.mark.parametrize("name", HALF_CASES)
def test_in_16_bits_copies_in_float32_are_counted_too(name: str) -> None:
    layer, shape = HALF_CASES[name]
    _, context = forward(layer, shape, np.float16)
    assert kept_bytes(layer, shape, np.dtype(np.float16)) == held(context, "nbytes")
    assert kept_bytes(layer, shape, np.dtype(np.float64)) == 8 * cost(layer, shape).kept


class Mine(nn.Layer):
    """Somebody's own."""

    def forward(self, params: Any, x: Any, call: Call) -> Any:
        return x, call.context()

    def backward_input(self, params: Any, context: Context, dy: Any, call: Call) -> Any:
        return dy


def test_a_layer_of_which_nobody_has_said_it_is_refused() -> None:
    with pytest.raises(InputError, match="nobody has said what this layer costs; got Mine"):
        cost(Mine(), (2, 3))
