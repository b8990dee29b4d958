"""What containers tell and spare: which gradients are complete, in which order, and what no parameter needs."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, GradientBuffer, Key
from mpitrain.nn import Network


class Refuses(nn.Flatten):
    """Its input's gradient is nobody's business."""

    def backward_input(self, *_: object) -> np.ndarray:
        raise AssertionError("this gradient is not needed")


class Spy(nn.Linear):
    """Notes whether its input's gradient was asked for."""

    asked = False

    def backward_input(self, *arguments: object) -> np.ndarray:
        self.asked = True
        return super().backward_input(*arguments)


def rows(n: int = 5) -> Batch:
    rng = np.random.default_rng(0)
    return Batch(rng.standard_normal((n, 2, 3)), np.arange(n) % 2, np.arange(n))


def gradients(network: Network, grads: FlatBuffer | GradientBuffer) -> None:
    params = FlatBuffer(network.layout)
    network.initialise(params, Key(1))
    network.loss_and_gradients(params, rows(), grads, Key(0))


def test_nothing_is_computed_for_layers_in_front_that_have_no_parameters():
    first, second = Spy(6, 4), Spy(4, 2)
    network = Network(nn.Sequential(Refuses(), Refuses(), first, nn.ReLU(), second), nn.CrossEntropy(), np.float64)
    gradients(network, FlatBuffer(network.layout))
    assert (first.asked, second.asked) == (False, True)


def test_layers_are_complete_from_the_last_to_the_first_those_inside_others_too():
    inner = nn.Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    network = Network(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4), inner, nn.Linear(4, 2)), nn.CrossEntropy(), np.float64
    )
    grads, told = FlatBuffer(network.layout), []
    grads.complete = told.append
    gradients(network, grads)
    names = [segment.name for segment in network.layout]
    trained = [prefix for prefix in told if any(name.startswith(prefix) for name in names)]
    assert trained == ["3.", "2.inner.2.", "2.inner.0.", "1."]
    alone, told = FlatBuffer(Network(nn.Linear(6, 2), nn.CrossEntropy()).layout.astype("f8")), []
    alone.complete = told.append
    layer = nn.Linear(6, 2)
    y, context = layer.forward(alone.tree, np.ones((3, 6)), call := nn.Call(complete=alone.complete))
    layer.backward(alone.tree, alone.tree, context, y, call)
    assert told == [""]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_overwriting_gives_what_adding_to_zeros_gives(model):
    """Twice, so that the second pass adds to the first."""
    layer = {
        "mlp": lambda: nn.MODELS["mlp"](6, 2, hidden=[5], batch_norm=True),
        "cnn": lambda: nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Flatten(), nn.Linear(16, 2)),
    }[model]()
    network = Network(layer, nn.CrossEntropy(), np.float64)
    added, fresh = FlatBuffer(network.layout), GradientBuffer(network.layout)
    fresh.flat[...] = np.nan
    fresh.zero()
    for _ in range(2):
        gradients(network, added)
        gradients(network, fresh)
    assert np.linalg.norm(added.flat) > 0
    np.testing.assert_array_equal(fresh.flat, added.flat)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_overwritten_first_is_added_to_by_whoever_shares_it(tied):
    network = Network(nn.GPT(5, context=4, layers=1, width=4, heads=2, tied=tied), nn.CrossEntropy(), np.float64)
    params, added, fresh = FlatBuffer(network.layout), FlatBuffer(network.layout), GradientBuffer(network.layout)
    network.initialise(params, Key(1))
    tokens = np.random.default_rng(0).integers(0, 5, (3, 5))
    fresh.flat[...] = np.nan
    fresh.zero()
    for _ in range(2):
        for grads in (added, fresh):
            network.loss_and_gradients(params, Batch(tokens[:, :-1], tokens[:, 1:], np.arange(3)), grads, Key(0))
    assert np.linalg.norm(added.views["head.weight"]) > 0
    np.testing.assert_array_equal(fresh.flat, added.flat)


def split(network: Network) -> FlatBuffer:
    """The gradients by `backward_within` and `backward_weight`, as the first stage of a pipeline has them."""
    params, grads = FlatBuffer(network.layout), FlatBuffer(network.layout)
    network.initialise(params, Key(1))
    batch = network.prepared(rows(), params)
    call = nn.Call(training=True, index=batch.index)
    outputs, context = network.layer.forward(params.tree, batch.inputs, call)
    _, loss_context = network.loss.forward(outputs, batch, network.pool)
    dy = network.loss.backward(loss_context)
    network.layer.backward_within(params.tree, context, dy, call)
    network.layer.backward_weight(grads.tree, context, dy, call)
    return grads


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)),
        (nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))), nn.Linear(4, 2)),
        (nn.Flatten(), nn.Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))), nn.Linear(6, 2)),
    ],
)
def test_the_gradients_of_weights_need_none_of_the_input(layers):
    network = Network(nn.Sequential(*layers), nn.CrossEntropy(), np.float64)
    expected = FlatBuffer(network.layout)
    gradients(network, expected)
    assert np.linalg.norm(expected.flat) > 0
    np.testing.assert_array_equal(split(network).flat, expected.flat)


def test_within_no_gradient_of_the_input_is_computed():
    first, second = Spy(6, 4), Spy(4, 2)
    split(Network(nn.Sequential(Refuses(), nn.Sequential(first, nn.ReLU()), second), nn.CrossEntropy(), np.float64))
    assert (first.asked, second.asked) == (False, True)


class Applied(nn.ReLU):
    """Counts the forward passes of its own."""

    overwrites = True
    passes = 0

    def forward(self, *arguments: object) -> tuple[np.ndarray, object]:
        self.passes += 1
        return super().forward(*arguments)


def both_passes(layers: list[nn.Layer], x: np.ndarray, together: bool) -> list[bytes]:
    """Run layers as one `Sequential`, or each by itself."""
    named = {str(number): layer for number, layer in enumerate(layers)}
    whole = [nn.Sequential(**named)] if together else [nn.Sequential(**{name: named[name]}) for name in named]
    rng, call, passes = np.random.default_rng(3), nn.Call(), []
    params = {name: {p.name: rng.standard_normal(p.shape) for p in named[name].parameters()} for name in named}
    grads = {i: {name: np.zeros_like(value) for name, value in each.items()} for i, each in params.items()}
    for part in whole:
        x, context = part.forward(params, x, call)
        passes.append((part, context))
    found, dy = [x.tobytes()], np.cos(np.arange(x.size)).reshape(x.shape)
    for part, context in reversed(passes):
        dy = part.backward(params, grads, context, dy, call)
    return [*found, dy.tobytes(), *(value.tobytes() for each in grads.values() for value in each.values())]


@pytest.mark.parametrize("which", ["on", "off"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("samples", [0, 3, 90])
def test_a_convolution_applies_the_activation_behind_it(monkeypatch, samples, padding, which):
    """With the bits of layers by themselves; others are left to themselves."""
    monkeypatch.setenv("MPITRAIN_KERNEL", which)
    first, second = Applied(), Applied()
    layers = [nn.Conv2d(2, 9, 3, padding=padding), first, nn.Conv2d(9, 2, 3), nn.Tanh(), second, nn.ReLU()]
    x = np.random.default_rng(0).standard_normal((samples, 12, 11, 2))
    together = both_passes(layers, x, together=True)
    assert (first.passes, second.passes) == (0, 1)
    assert together == both_passes(layers, x, together=False)


@pytest.mark.parametrize("which", ["on", "off"])
@pytest.mark.parametrize(
    "last", [nn.ReLU(), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())]
)
def test_no_gradient_is_overwritten_that_others_need(monkeypatch, last, which):
    """Neither the one that a container is handed, nor one that both branches of a residual get."""
    monkeypatch.setenv("MPITRAIN_KERNEL", which)
    rng, call = np.random.default_rng(0), nn.Call()
    layer = nn.Residual(nn.Sequential(nn.Linear(300, 300), last))
    x, dy = (rng.standard_normal((250, 300)) for _ in range(2))
    params = {"inner": {"0": {"weight": rng.standard_normal((300, 300)), "bias": np.ones(300)}}}
    before, grads = dy.copy(), {"inner": {"0": {"weight": np.zeros((300, 300)), "bias": np.zeros(300)}}}
    _, context = layer.forward(params, x, call)
    dx = layer.backward(params, grads, context, dy, call)
    weight, bias = params["inner"]["0"].values()
    np.testing.assert_array_equal(dy, before)
    np.testing.assert_allclose(dx, before + (before * (x @ weight + bias > 0)) @ weight.T, rtol=1e-12, atol=1e-9)


class Doubling(nn.Conv2d):
    """Inherits much, and computes something else."""

    def forward(self, *arguments: object) -> tuple[np.ndarray, object]:
        y, context = super().forward(*arguments)
        y *= 2
        y += 1
        return y, context


class Shifted(nn.ReLU):
    """Likewise."""

    def forward(self, params: object, x: np.ndarray, call: nn.Call) -> tuple[np.ndarray, object]:
        return super().forward(params, x - 1, call)


@pytest.mark.parametrize("layers", [(Doubling, nn.ReLU), (nn.Conv2d, Shifted), (Doubling, Shifted)])
def test_subclasses_are_left_to_themselves(layers):
    every = [layers[0](2, 9, 3), layers[1](), nn.Conv2d(9, 2, 1)]
    x = np.random.default_rng(0).standard_normal((3, 12, 11, 2))
    assert both_passes(every, x, together=True) == both_passes(every, x, together=False)
