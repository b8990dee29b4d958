"""The mathematics on CuPy arrays gives what it gives on NumPy's: `make test-gpu`.

Every check also runs on NumPy, against itself, so that it is known to work before a GPU is at hand.
"""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain import data, nn, optim
from mpitrain.arrays import Batch, FlatBuffer, Key, is_cupy, plain, to_host
from mpitrain.comm import LocalWorld
from mpitrain.method import Plan
from mpitrain.nn import CrossEntropy, Network
from mpitrain.parallel import DataParallel

STEPS = 5


def test_random_bits_are_the_same(xp):
    key = Key(7, "here", 3)
    assert np.array_equal(to_host(key.bits(xp.arange(9), (1, 11))), key.bits(np.arange(9), (1, 11)))


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_optimizers(xp, allocator, name):
    layout = Network(nn.MODELS["mlp"](9, 4, hidden=[7], batch_norm=True), CrossEntropy()).layout
    shard = layout.whole()
    start = np.random.default_rng(0).normal(size=layout.size).astype(np.float32)
    found = []
    for library, allocate in ((np, plain), (xp, allocator)):
        optimizer = optim.make_optimizer(name)
        params, state = library.asarray(start.copy()), optimizer.init(shard, allocate)
        for step in range(1, STEPS + 1):
            grads = library.asarray(np.random.default_rng(step).normal(size=layout.size).astype(np.float32))
            totals = optimizer.partials(params, grads, state, step, shard)
            optimizer.update(params, grads, state, 0.01, step, shard, totals)
        found.append(to_host(params))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt"])
def test_loss_and_gradients(xp, allocator, kind):
    layers = {
        "mlp": nn.MODELS["mlp"](64, 10, hidden=[16], activation="gelu", dropout=0.2, batch_norm=True),
        "cnn": nn.MODELS["cnn"]((8, 8, 1), 10, channels=[4, 8], hidden=16),
        "gpt": nn.MODELS["gpt"](17, 80, layers=2, width=16, heads=2, dropout=0.2),
    }
    network = Network(layers[kind], CrossEntropy(), np.float64)
    inputs, labels = data.load("digits").rows(np.arange(12))
    if kind == "gpt":
        inputs, labels = np.random.default_rng(0).integers(0, 17, (2, 12, 80))
    found = []
    for library, allocate in ((np, plain), (xp, allocator)):
        batch = Batch(library.asarray(inputs), library.asarray(labels), library.arange(12))
        params, grads = FlatBuffer(network.layout, allocate), FlatBuffer(network.layout, allocate)
        network.initialise(params, Key(0))
        loss, count = network.loss_and_gradients(params, batch, grads, Key(1))
        assert is_cupy(grads.flat) == (library is not np)
        found.append((loss, count, to_host(grads.flat)))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-12)
    np.testing.assert_allclose(found[1][2], found[0][2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "complex64"])
def test_allreduce_gives_arrays_of_the_same_library(xp, dtype):
    def run(comm):
        total = comm.allreduce({"a": xp.arange(5, dtype=dtype), "b": xp.full((2, 3), comm.rank, dtype)})
        assert is_cupy(total["a"]) == (xp is not np)
        return to_host(total["a"]), to_host(total["b"])

    for a, b in LocalWorld(3).run(run):
        assert np.array_equal(a, 3 * np.arange(5, dtype=dtype))
        assert np.array_equal(b, np.full((2, 3), 3, dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_tensors_stay_on_their_device(device, dtype):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")

    def run(comm):
        x = torch.full((2, 3), comm.rank + 1, dtype=getattr(torch, dtype), device=device)
        total, out = comm.allreduce(x), torch.zeros_like(x)
        comm.allgather(x.T, out=torch.zeros((3, 3, 2), dtype=x.dtype, device=device))
        assert comm.allreduce([x], out=[out])[0] is out
        assert total.device == x.device
        return total.tolist(), out.tolist()

    for found in LocalWorld(3).run(run):
        assert found == ([[6] * 3] * 2, [[6] * 3] * 2)


def test_data_parallel_training(xp, allocator):
    def run(comm, allocate):
        method = DataParallel(comm, allocator=allocate)
        layer = nn.MODELS["mlp"](64, 10, hidden=[16], batch_norm=True)
        method.setup(Network(layer, CrossEntropy()), optim.Adam(), Plan(Key(0), optim.Constant(lr=0.01), STEPS))
        feed = data.Batches(data.load("digits"), 64, seed=0)
        return method.advance(feed, STEPS).loss, to_host(method.params.flat)

    expected = LocalWorld(1).run(run, plain)[0]
    for loss, params in LocalWorld(2).run(run, allocator):
        assert loss == pytest.approx(expected[0], rel=1e-4)
        np.testing.assert_allclose(params, expected[1], rtol=1e-3, atol=1e-4)
