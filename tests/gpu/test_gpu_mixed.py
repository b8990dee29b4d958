"""Mixed precision on CuPy arrays trains as the emulation on NumPy's does: `make test-gpu`.

Every check also runs on NumPy, against itself, so that it is known to work before a GPU is at hand.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

from mpitrain import data, nn, optim
from mpitrain._errors import DtypeError
from mpitrain.arrays import Batch, FlatBuffer, Key, is_cupy, plain, to_host
from mpitrain.arrays.products import half_products
from mpitrain.comm import LocalWorld
from mpitrain.data.windows import windows
from mpitrain.method import Plan, Precision
from mpitrain.nn import CrossEntropy, Network
from mpitrain.parallel import DataParallel, GradientParallel, GradientPipelineParallel, PipelineParallel

STEPS = 6
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(params=EPS)
def precision(request, xp):
    """A precision for this library; where it lacks bfloat16, the test is skipped."""
    made = Precision(compute=request.param, emulate=xp is np, initial_scale=2.0**20)
    network = Network(nn.MODELS["mlp"](2, 2), CrossEntropy())
    try:
        made.check(network, xp.zeros(0, np.float32))
    except DtypeError as error:
        pytest.skip(str(error))
    return made


def test_products_are_summed_in_float32(xp, precision):
    dtype, n = precision.dtype, 4096
    left, right = xp.ones((3, n), dtype), xp.ones((n, 5), dtype)
    assert (to_host(half_products(xp).matmul(left, right)).astype(float) == n).all()
    out = xp.empty((3, 5), np.float32)
    half_products(xp).matmul(left, right, out=out)
    assert (to_host(out) == n).all()
    stack = half_products(xp).matmul(xp.ones((2, 3, n), dtype), xp.ones((2, n, 5), dtype))
    assert (to_host(stack).astype(float) == n).all()


MODELS = {
    "mlp": lambda: nn.MODELS["mlp"](64, 10, hidden=[16], activation="gelu", dropout=0.2, batch_norm=True),
    "cnn": lambda: nn.MODELS["cnn"]((8, 8, 1), 10, channels=[4, 8], hidden=16),
    "gpt": lambda: nn.MODELS["gpt"](17, 80, layers=2, width=16, heads=2, dropout=0.2, recompute=True),
}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients(xp, allocator, precision, kind):
    network = Network(MODELS[kind](), CrossEntropy())
    inputs, labels = data.load("digits").rows(np.arange(12))
    if kind == "gpt":
        inputs, labels = np.random.default_rng(0).integers(0, 17, (2, 12, 80))
    found = []
    for allocate in (plain, allocator):
        layouts = network.layout, network.layout.astype(precision.dtype), network.layout
        whole, params, grads = (FlatBuffer(layout, allocate) for layout in layouts)
        network.initialise(whole, Key(0))
        params.flat[...] = whole.flat
        batch = Batch(inputs, labels, np.arange(12))
        loss, count = network.scaled_gradients(params, batch, grads, Key(1), None, 64.0)
        found.append((loss, count, to_host(grads.flat)))
    assert is_cupy(grads.flat) == (xp is not np)
    eps = EPS[precision.compute]
    assert found[1][:2] == pytest.approx(found[0][:2], rel=eps)
    assert np.linalg.norm(found[1][2] - found[0][2]) < 16 * eps * np.linalg.norm(found[0][2])


@pytest.mark.parametrize("make", [DataParallel, GradientParallel])
def test_training_skips_the_same_steps(xp, allocator, precision, make):
    def run(comm, allocate):
        emulate = Precision(compute=precision.compute, emulate=allocate is plain, initial_scale=2.0**20)
        method = make(comm, allocator=allocate, precision=emulate)
        layer = nn.MODELS["mlp"](64, 10, hidden=[16])
        method.setup(Network(layer, CrossEntropy()), optim.SGD(), Plan(Key(0), optim.Constant(lr=0.01), STEPS))
        progress = method.advance(data.Batches(data.load("digits"), 64, seed=0), STEPS)
        return progress, to_host(method.whole().flat)

    expected = LocalWorld(1).run(run, plain)[0]
    assert expected[0].skipped > 0 or precision.compute == "bfloat16"
    for progress, params in LocalWorld(2).run(run, allocator):
        assert progress.skipped == expected[0].skipped
        assert progress.loss_scale == expected[0].loss_scale
        np.testing.assert_allclose(params, expected[1], rtol=0, atol=4 * EPS[precision.compute])


PIPELINES = {
    "1f1b": PipelineParallel,
    "zb-h1": partial(PipelineParallel, schedule="zb-h1"),
    "gradient": GradientPipelineParallel,
}


@pytest.mark.parametrize("kind", ["mlp", pytest.param("gpt", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES.keys())
def test_a_pipeline_sends_16_bits_and_skips_the_same_steps(xp, allocator, precision, make, kind):
    samples = data.load("digits")
    if kind == "gpt":
        tokens = np.random.default_rng(0).integers(0, 17, 48 * 80 + 1)
        samples = windows(tokens, "noise", 80, None, "abcdefghijklmnopq")

    def run(comm, make, allocate):
        emulate = Precision(compute=precision.compute, emulate=allocate is plain, initial_scale=2.0**18)
        method = make(comm, allocator=allocate, precision=emulate, microbatches=4)
        network = Network(MODELS[kind](), CrossEntropy())
        method.setup(network, optim.SGD(), Plan(Key(0), optim.Constant(lr=0.01), STEPS))
        feed = data.Batches(samples, 48 if kind == "mlp" else 8, seed=0)
        progress = method.advance(feed, STEPS)
        sent = comm.ledger.snapshot().get((comm.ledger.axis, "isend"))
        on_device = {name: is_cupy(view) for name, view in method.params.views.items()}
        assert set(on_device.values()) == {allocate is not plain}
        own = {name: to_host(view) for name, view in method.whole().views.items()}
        return progress, own, sent.logical_bytes if sent else 0, method.predict(samples.inputs[:2])

    def pipeline(allocate):
        return LocalWorld(2).run(run, make, allocate)

    (expected,) = LocalWorld(1).run(run, DataParallel, plain)
    assert expected[0].skipped > 0 or precision.compute == "bfloat16"
    emulated = pipeline(plain)
    for (progress, own, sent, outputs), emulation in zip(pipeline(allocator), emulated, strict=True):
        assert (progress.skipped, progress.loss_scale) == (expected[0].skipped, expected[0].loss_scale)
        assert sent == emulation[2]
        assert is_cupy(outputs) == (xp is not np)
        np.testing.assert_allclose(to_host(outputs), expected[3], rtol=0, atol=32 * EPS[precision.compute])
        for name, values in own.items():
            np.testing.assert_allclose(values, expected[1][name], rtol=0, atol=4 * EPS[precision.compute], err_msg=name)
