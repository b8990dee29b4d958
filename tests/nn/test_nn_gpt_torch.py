"""Attention, and the whole GPT: outputs, gradients and first losses against PyTorch."""

import numpy as np
import pytest

from mpitrain import nn, optim
from mpitrain.arrays import Batch, FlatBuffer, Key

torch = pytest.importorskip("torch")
from torch_gpt import pairs, theirs, twin_of  # noqa: E402

F = torch.nn.functional


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_attention_agrees(length):
    random, heads, size = np.random.default_rng(length), 3, 4
    x = random.standard_normal((2, length, heads, 3, size))
    dy = random.standard_normal((2, length, heads * size))
    x_torch = torch.tensor(x, requires_grad=True)
    y_torch = F.scaled_dot_product_attention(*x_torch.permute(3, 0, 2, 1, 4), is_causal=True).transpose(1, 2)
    y_torch.reshape(dy.shape).backward(torch.tensor(dy))

    layer, call = nn.CausalAttention(heads), nn.Call()
    y, context = layer.forward({}, x.reshape(2, length, -1), call)
    dx = layer.backward_input({}, context, dy, call)
    np.testing.assert_allclose(y, y_torch.detach().reshape(dy.shape), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(dx.reshape(x.shape), x_torch.grad, rtol=1e-10, atol=1e-12)


def _gpt(dtype, **options):
    layer = nn.GPT(11, context=70, layers=2, width=12, heads=3, **options)
    net = nn.Network(layer, nn.CrossEntropy(), dtype)
    params = FlatBuffer(net.layout)
    net.initialise(params, Key(1))
    return net, params


def _windows(steps, n, length):
    random = np.random.default_rng(0)
    tokens = np.cumsum(random.integers(0, 3, (steps, n, length + 1)), axis=2) % 11  # something to learn
    return tokens[..., :-1], tokens[..., 1:]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_of_the_gpt_agree(tied):
    net, params = _gpt("float64", tied=tied)
    params.flat[...] += 0.1 * np.random.default_rng(2).standard_normal(params.flat.shape)  # biases, too
    (inputs,), (targets,) = _windows(1, 3, 66)
    grads, twin = FlatBuffer(net.layout), twin_of(net.layer, params, 3)
    loss, count = net.loss_and_gradients(params, Batch(inputs, targets, np.arange(3)), grads, Key(0))
    scores = twin(torch.tensor(inputs))
    total = F.cross_entropy(scores.flatten(0, 1), torch.tensor(targets).flatten(), reduction="sum")
    total.backward()
    assert count == inputs.size
    assert loss == pytest.approx(total.item(), rel=1e-12)
    named = pairs(net.layer, twin)
    assert set(named) == {segment.name for segment in net.layout}
    for name, parameter in named.items():
        expected = parameter.grad.numpy()
        error = np.linalg.norm(theirs(name, grads.views[name], 3) - expected)
        assert error <= 1e-12 * np.linalg.norm(expected), name


def _losses(net, params, inputs, targets, lr):
    optimizer, whole, grads = optim.AdamW(weight_decay=0.1), net.layout.whole(), FlatBuffer(net.layout)
    state = optimizer.init(whole)
    for step, (x, y) in enumerate(zip(inputs, targets, strict=True), start=1):
        grads.zero()
        loss, count = net.loss_and_gradients(params, Batch(x, y, np.arange(len(x))), grads, Key(0))
        grads.flat[...] /= count
        optimizer.update(params.flat, grads.flat, state, lr, step, whole)
        yield loss / count


def _torch_losses(twin, net, inputs, targets, lr):
    named = pairs(net.layer, twin)
    groups = [
        {"params": [named[s.name] for s in net.layout if s.group == group], "weight_decay": decay}
        for group, decay in (("decay", 0.1), ("no_decay", 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr)
    for x, y in zip(torch.tensor(inputs), torch.tensor(targets), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x).flatten(0, 1), y.flatten())
        loss.backward()
        optimizer.step()
        yield loss.item()


def test_the_first_50_losses_agree():
    net, params = _gpt("float32")
    inputs, targets = _windows(50, 4, 32)
    twin = twin_of(net.layer, params, 3)
    expected = list(_torch_losses(twin, net, inputs, targets, 3e-3))
    found = list(_losses(net, params, inputs, targets, 3e-3))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert expected[-1] < expected[0] - 0.5
