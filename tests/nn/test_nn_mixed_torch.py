"""Mixed precision against PyTorch's: gradients under autocast, and the schedule of the loss scale."""

import numpy as np
import pytest

from mpitrain import nn
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.arrays.dtypes import half
from mpitrain.comm import LocalWorld
from mpitrain.data import Batches, Dataset
from mpitrain.method import LossScaler, Plan, Precision
from mpitrain.nn import CrossEntropy, Network
from mpitrain.optim import Constant, Optimizer
from mpitrain.parallel import PipelineParallel

torch = pytest.importorskip("torch")

EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def _theirs(dtype, params, x, labels, scale):
    """Gradients of the same model and weights under autocast; None: without it, in float32."""
    first, norm, last = torch.nn.Linear(64, 32), torch.nn.LayerNorm(32), torch.nn.Linear(32, 10)
    with torch.no_grad():
        for layer, name in ((first, "0"), (last, "3")):
            layer.weight[...] = torch.tensor(params[f"{name}.weight"].T)
            layer.bias[...] = torch.tensor(params[f"{name}.bias"])
        norm.weight[...], norm.bias[...] = torch.tensor(params["1.gamma"]), torch.tensor(params["1.beta"])
    model = torch.nn.Sequential(first, norm, torch.nn.GELU(approximate="tanh"), last)
    with torch.autocast("cpu", dtype=getattr(torch, dtype or "bfloat16"), enabled=dtype is not None):
        loss = torch.nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(labels), reduction="sum")
    (scale * loss).backward()
    found = {"0.weight": first.weight.grad.T, "0.bias": first.bias.grad, "1.gamma": norm.weight.grad,
             "1.beta": norm.bias.grad, "3.weight": last.weight.grad.T, "3.bias": last.bias.grad}  # fmt: skip
    return {name: grad.numpy() for name, grad in found.items()}


@pytest.mark.parametrize("name", EPS)
def test_gradients_are_those_of_autocast_but_for_rounding(name):
    dtype, scale = half(name, "test"), 2.0**6
    network = Network(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10)), CrossEntropy())
    whole, params = FlatBuffer(network.layout), FlatBuffer(network.layout.astype(dtype))
    network.initialise(whole, Key(0))
    params.flat[...] = whole.flat
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((20, 64)).astype(np.float32), rng.integers(0, 10, 20)
    grads = FlatBuffer(network.layout)
    network.scaled_gradients(params, Batch(x, labels, np.arange(20)), grads, Key(1), None, scale)
    theirs, exact = (_theirs(each, whole.views, x, labels, scale) for each in (name, None))
    for tensor, expected in theirs.items():
        size = np.linalg.norm(exact[tensor])
        assert np.linalg.norm(grads.views[tensor] - expected) < 4 * EPS[name] * size, tensor
        ours, rivals = (np.linalg.norm(each[tensor] - exact[tensor]) for each in (grads.views, theirs))
        assert ours < 1.5 * rivals + EPS[name] * size, tensor  # no less accurate


@pytest.mark.parametrize("name", EPS)
def test_so_are_those_of_a_pipeline(name):
    layers = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 10))
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((20, 64)).astype(np.float32), rng.integers(0, 10, 20)
    precision = Precision(compute=name, emulate=True, initial_scale=2.0**6)

    class Kept(Optimizer):
        def update(self, params, grads, state, lr, step, shard, totals=None):
            segments = ((shard.layout.segments[number], cut) for number, cut in shard.pieces)
            self.mean = {each.name: grads[cut].reshape(each.shape).copy() for each, cut in segments}

    def train(comm):
        kept, method = Kept(), PipelineParallel(comm, microbatches=3, schedule="zb-h1", precision=precision)
        method.setup(Network(layers, CrossEntropy()), kept, Plan(Key(0), Constant(lr=1.0), 1))
        start = {each: view.copy() for each, view in method.params.views.items()}
        feed = Batches(Dataset(x, labels, "classification", "noise"), 20, seed=0, dtype="float32")
        method.advance(feed, 1)
        return start, kept.mean

    params, means = {}, {}
    for start, mean in LocalWorld(2).run(train):
        params, means = params | start, means | mean
    theirs, exact = (_theirs(each, params, x, labels, 2.0**6) for each in (name, None))
    assert means.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        ours, size = 20 * 2.0**6 * means[tensor], np.linalg.norm(exact[tensor])
        assert np.linalg.norm(ours - expected) < 4 * EPS[name] * size, tensor


def test_the_scale_is_that_of_gradscaler():
    options = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
    ours = LossScaler(Precision(compute="float16", initial_scale=64.0, **options))
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, **options)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    verdicts = np.random.default_rng(3).random(200) < 0.85
    assert not verdicts.all()
    for step, good in enumerate(verdicts.tolist(), start=1):
        theirs.scale(weight.sum()).backward()
        if not good:
            weight.grad[...] = float("inf")
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.judge(good, step)
        assert ours.scale == theirs.get_scale()
