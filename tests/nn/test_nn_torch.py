"""Outputs and gradients of every layer and loss against PyTorch, in float64."""

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, Key, Layout

torch = pytest.importorskip("torch")


def _parameters(layer):
    params = FlatBuffer(Layout.build([p.segment() for p in layer.parameters()], np.float64))
    params.flat[...] = np.random.default_rng(5).uniform(0.1, 1.0, params.flat.shape)
    return params


def _ours(layer, params, x, dy, training):
    call = nn.Call(training=training, index=np.arange(len(x)), count=float(len(x)))
    y, context = layer.forward(params.tree, x, call)
    grads = FlatBuffer(params.layout)
    dx = layer.backward_input(params.tree, context, dy, call)
    layer.backward_weight(grads.tree, context, dy, call)
    return y, dx, grads.views


def _conv_kernel(w):
    return w.transpose(3, 2, 0, 1)  # (KH, KW, in, out) to PyTorch's (out, in, KH, KW)


IDENTITY = {}
NORM = {"gamma": ("weight", np.array), "beta": ("bias", np.array)}
RUNNING = {"running_mean": ("running_mean", np.array), "running_var": ("running_var", np.array)}
CONV = {"weight": ("weight", _conv_kernel), "bias": ("bias", np.array)}

CASES = {
    "linear": (
        nn.Linear(6, 4),
        lambda: torch.nn.Linear(6, 4),
        (5, 6),
        {"weight": ("weight", np.transpose), "bias": ("bias", np.array)},
    ),
    "conv": (nn.Conv2d(3, 4, 3, padding=1), lambda: torch.nn.Conv2d(3, 4, 3, padding=1), (2, 7, 6, 3), CONV),
    "conv-strided": (
        nn.Conv2d(2, 5, (3, 2), stride=(2, 3), padding=(0, 1)),
        lambda: torch.nn.Conv2d(2, 5, (3, 2), stride=(2, 3), padding=(0, 1)),
        (3, 8, 9, 2),
        CONV,
    ),
    "maxpool": (nn.MaxPool2d(2), lambda: torch.nn.MaxPool2d(2), (2, 6, 7, 3), IDENTITY),
    "maxpool-overlapping": (nn.MaxPool2d(3, 2), lambda: torch.nn.MaxPool2d(3, 2), (2, 8, 8, 3), IDENTITY),
    "avgpool": (nn.AvgPool2d(2), lambda: torch.nn.AvgPool2d(2), (2, 6, 7, 3), IDENTITY),
    "avgpool-overlapping": (
        nn.AvgPool2d((3, 2), (1, 2)),
        lambda: torch.nn.AvgPool2d((3, 2), (1, 2)),
        (2, 5, 6, 3),
        IDENTITY,
    ),
    "batchnorm-images": (nn.BatchNorm(3), lambda: torch.nn.BatchNorm2d(3), (4, 3, 2, 3), NORM | RUNNING),
    "batchnorm": (nn.BatchNorm(5), lambda: torch.nn.BatchNorm1d(5), (7, 5), NORM | RUNNING),
    "layernorm": (nn.LayerNorm(6), lambda: torch.nn.LayerNorm(6), (4, 6), NORM),
    "relu": (nn.ReLU(), torch.nn.ReLU, (4, 6), IDENTITY),
    "gelu": (nn.GELU(), lambda: torch.nn.GELU(approximate="tanh"), (4, 6), IDENTITY),
    "tanh": (nn.Tanh(), torch.nn.Tanh, (4, 6), IDENTITY),
    "sigmoid": (nn.Sigmoid(), torch.nn.Sigmoid, (4, 6), IDENTITY),
}


def _channels_first(x):
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def _torch_twin(build, params, names, training):
    twin = build().double().train(training)
    with torch.no_grad():
        for ours, (theirs, convert) in names.items():
            values = np.ascontiguousarray(convert(params.views[ours]))
            getattr(twin, theirs).copy_(torch.from_numpy(values))
    return twin


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_layer_agrees(name, training):
    layer, build, shape, names = CASES[name]
    params = _parameters(layer)
    twin = _torch_twin(build, params, names, training)
    random = np.random.default_rng(0)
    x = random.standard_normal(shape)
    x_torch = torch.tensor(np.ascontiguousarray(_channels_first(x)), requires_grad=True)
    y_torch = twin(x_torch)
    dy = random.standard_normal(np.moveaxis(np.empty(y_torch.shape), 1, -1).shape if x.ndim == 4 else y_torch.shape)
    y_torch.backward(torch.tensor(np.ascontiguousarray(_channels_first(dy))))

    y, dx, grads = _ours(layer, params, x, dy, training)

    np.testing.assert_allclose(_channels_first(y), y_torch.detach().numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(_channels_first(dx), x_torch.grad.numpy(), rtol=1e-10, atol=1e-12)
    for ours, (theirs, convert) in names.items():
        if ours not in RUNNING:
            expected = getattr(twin, theirs).grad.numpy()
            np.testing.assert_allclose(convert(grads[ours]), expected, rtol=1e-10, atol=1e-12, err_msg=ours)
        elif training:
            before, rate = params.views[ours], params.layout[ours].rate
            followed = before + rate * (grads[ours] / len(x) - before)
            np.testing.assert_allclose(followed, getattr(twin, theirs).numpy(), rtol=1e-12, err_msg=ours)


def test_embedding_agrees():
    layer = nn.Embedding(7, 3)
    params = _parameters(layer)
    twin = torch.nn.Embedding.from_pretrained(torch.tensor(params.views["weight"]), freeze=False)
    numbers = np.random.default_rng(1).integers(0, 6, (4, 5))
    dy = np.random.default_rng(2).standard_normal((4, 5, 3))
    y_torch = twin(torch.tensor(numbers))
    y_torch.backward(torch.tensor(dy))
    y, _, grads = _ours(layer, params, numbers, dy, True)
    np.testing.assert_array_equal(y, y_torch.detach().numpy())
    np.testing.assert_allclose(grads["weight"], twin.weight.grad.numpy(), rtol=1e-13, atol=1e-14)


def _per_sample_mean(losses):
    return losses.reshape(losses.shape[0], -1).mean(axis=1)


F = torch.nn.functional
LOSSES = {
    "cross-entropy": (
        nn.CrossEntropy(),
        (6, 4),
        np.array([0, 3, 1, 1, 2, 0]),
        lambda z, t: F.cross_entropy(z, t, reduction="none"),
    ),
    "cross-entropy-smooth": (
        nn.CrossEntropy(label_smoothing=0.1),
        (6, 4),
        np.array([0, 3, 1, 1, 2, 0]),
        lambda z, t: F.cross_entropy(z, t, reduction="none", label_smoothing=0.1),
    ),
    "bce": (
        nn.BinaryCrossEntropy(),
        (3, 2),
        np.array([[0, 1], [1, 1], [0, 0]]),
        lambda z, t: _per_sample_mean(F.binary_cross_entropy_with_logits(z, t.double(), reduction="none")),
    ),
    "mse": (
        nn.MeanSquaredError(),
        (3, 2),
        np.array([[0.5, 1.0], [-1.0, 2.0], [0.0, 3.0]]),
        lambda z, t: _per_sample_mean(F.mse_loss(z, t, reduction="none")),
    ),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_agrees(name, scale, weighted):
    loss, shape, targets, reference = LOSSES[name]
    outputs = scale * np.random.default_rng(4).standard_normal(shape)
    weights = np.linspace(0.5, 2.0, shape[0]) if weighted else None
    z = torch.tensor(outputs, requires_grad=True)
    losses = reference(z, torch.tensor(targets))
    total = (losses * torch.tensor(weights)).sum() if weighted else losses.sum()
    total.backward()
    value, context = loss.forward(outputs, Batch(outputs, targets, np.arange(shape[0]), weights), nn.Pool())
    np.testing.assert_allclose(value, total.item(), rtol=1e-12)
    np.testing.assert_allclose(loss.backward(context), z.grad.numpy(), rtol=1e-10, atol=1e-14)


def _torch_cnn(net, params):
    """The same network in PyTorch: Conv, BatchNorm, ReLU twice, MaxPool, Flatten, Linear, ReLU, Linear."""
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(6 * 16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10),
    ).double()  # fmt: skip
    views = params.views
    with torch.no_grad():
        for number in (0, 3):
            layers[number].weight.copy_(torch.tensor(np.ascontiguousarray(_conv_kernel(views[f"{number}.weight"]))))
        rows = views["8.weight"].reshape(4, 4, 6, 8).transpose(2, 0, 1, 3).reshape(96, 8)  # channels first
        layers[8].weight.copy_(torch.tensor(np.ascontiguousarray(rows.T)))
        layers[10].weight.copy_(torch.tensor(np.ascontiguousarray(views["10.weight"].T)))
        for number in (8, 10):
            layers[number].bias.copy_(torch.tensor(views[f"{number}.bias"]))
    return layers


def test_whole_network_agrees():
    net = nn.Network(
        nn.MODELS["cnn"]((8, 8, 1), 10, channels=[4, 6], hidden=8, dropout=0.0), nn.CrossEntropy(), "float64"
    )
    params, grads = FlatBuffer(net.layout), FlatBuffer(net.layout)
    net.initialise(params, Key(3))
    twin = _torch_cnn(net, params)
    random = np.random.default_rng(0)
    x, labels = random.random((7, 8, 8, 1)), random.integers(0, 10, 7)
    loss_sum, count = net.loss_and_gradients(params, Batch(x, labels, np.arange(7)), grads, Key(0))
    total = F.cross_entropy(twin(torch.tensor(_channels_first(x))), torch.tensor(labels), reduction="sum")
    total.backward()
    assert count == 7.0
    np.testing.assert_allclose(loss_sum, total.item(), rtol=1e-12)
    for number in (0, 3):
        expected = twin[number].weight.grad.numpy()
        np.testing.assert_allclose(_conv_kernel(grads.views[f"{number}.weight"]), expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            grads.views[f"{number + 1}.gamma"], twin[number + 1].weight.grad, rtol=1e-9, atol=1e-12
        )
        np.testing.assert_allclose(grads.views[f"{number + 1}.beta"], twin[number + 1].bias.grad, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads.views["10.weight"].T, twin[10].weight.grad, rtol=1e-9, atol=1e-12)
