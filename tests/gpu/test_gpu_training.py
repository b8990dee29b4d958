"""What a user does with a GPU: jobs of every kind train there as on the CPU, and what does not go says so."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import strict_cupy

from mpitrain import adapters, data, nn, optim
from mpitrain._errors import DataError, InputError, NonFiniteError
from mpitrain.arrays import Batch, FlatBuffer, Key, device, is_cupy, plain, to_host
from mpitrain.comm import LocalWorld
from mpitrain.method import Plan
from mpitrain.nn import BinaryCrossEntropy, CrossEntropy, MeanSquaredError, Network
from mpitrain.parallel import DataParallel, GradientParallel, PipelineParallel
from mpitrain.train import Job, session, train_job

JOBS = Path(__file__).parents[2] / "jobs"
TRAIN = "train={ batch_size = 16, steps = 4, evaluate_every_steps = 4, checkpoint = { every_steps = 2 } }"
CHANGES = {
    "diabetes": ['train.batch_size="full"'],
    "digits_cnn": ["model.channels=[4, 8]"],
    "digits_mlp": ["model.hidden=[16, 8]"],
    "gpt_pydoc": ["data.options.context=32", "data.options.stride=5000", "model.layers=2", "model.width=8"],
    "text_bigram": ["data.test=0.01"],
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")


def train(name, ranks, *changes, **where):
    """Take a few steps of a shipped job on threads; return rank 0's result."""
    job = Job.load(JOBS / f"{name}.toml", [TRAIN, "optimizer.schedule={}", *CHANGES.get(name, ()), *changes])
    return LocalWorld(ranks, timeout_s=60).run(lambda comm: train_job(job, comm, **where))[0]


def check_same_on_gpu(name, ranks, changes, path):
    """Require that a job gives on the GPU what it gives on the CPU."""
    expected = train(name, ranks, *changes, run_dir=path / "cpu")
    found = train(name, ranks, *changes, 'device="gpu"', run_dir=path / "gpu")
    assert (found["loss"], found["metrics"]["test_loss"]) == pytest.approx(
        (expected["loss"], expected["metrics"]["test_loss"]), rel=1e-3
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*CHANGES, "breast_cancer", "wine_by_feature"])
def test_shipped_jobs(gpu, tmp_path, name, ranks):
    check_same_on_gpu(name, ranks, [], tmp_path)


@pytest.mark.parametrize("name", sorted(set(optim.OPTIMIZERS) - {"gd"}))
def test_optimizers_with_decay_and_clipping(gpu, tmp_path, name):
    changes = [f'optimizer.kind="{name}"', "optimizer.weight_decay=0.01", "optimizer.clip_value=0.05"]
    check_same_on_gpu("digits_mlp", 1, changes, tmp_path)


METHODS = {
    "microbatches, float64": ["digits_cnn", 2, "method.microbatches=3", 'dtype="float64"'],
    "averaging": ["digits_mlp", 2, "method.average_every=2"],
    "int8": ["digits_mlp", 2, 'method.codec.kind="int8"'],
    "topk": ["digits_mlp", 2, 'method.codec.kind="topk"'],
    "powersgd": ["digits_mlp", 2, 'method.codec.kind="powersgd"'],
    "gradient, lamb": ["digits_cnn", 3, 'method.kind="gradient"', 'optimizer.kind="lamb"'],
    "gradient, stage 2": ["gpt_pydoc", 2, 'method.kind="gradient"', "method.stage=2"],
    "gradient, stage 3": ["gpt_pydoc", 3, 'method.kind="gradient"', "method.stage=3"],
    "tensor": ["digits_mlp", 2, "mesh.tensor=2"],
    "tensor, sequence": ["gpt_pydoc", 2, "mesh.tensor=2", "mesh.sequence_parallel=true"],
    "tensor, stage 3": ["gpt_pydoc", 4, "mesh.tensor=2", 'method.kind="gradient"', "method.stage=3"],
    "pipeline": ["digits_cnn", 2, 'method.kind="pipeline"', "method.microbatches=4"],
    "pipeline, zb-h1": ["gpt_pydoc", 2, 'method.kind="pipeline"', 'method.schedule="zb-h1"', "method.microbatches=4"],
    "pipeline, gradient": ["gpt_pydoc", 4, 'method.kind="gradient"', "mesh.pipe=2", "method.microbatches=2"],
    "pipeline, tensor": ["gpt_pydoc", 4, "mesh.pipe=2", "mesh.tensor=2", "method.microbatches=2"],
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (case[1] > 3)) for name, case in METHODS.items()]
)
def test_methods(gpu, tmp_path, case):
    name, ranks, *changes = case
    check_same_on_gpu(name, ranks, changes, tmp_path)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_goes_on_from_its_checkpoint(gpu, tmp_path, stage):
    changes = ['device="gpu"', 'optimizer.kind="adamw"']
    changes += ['method.kind="gradient"', f"method.stage={stage}"] if stage else ['method.codec.kind="bf16"']
    whole = train("digits_mlp", 2, *changes, run_dir=tmp_path / "whole")
    train("digits_mlp", 2, *changes, "train.steps=2", run_dir=tmp_path / "parts")
    resumed = train("digits_mlp", 2, *changes, resume=tmp_path / "parts")
    assert resumed["metrics"]["test_loss"] == pytest.approx(whole["metrics"]["test_loss"], rel=1e-5)


LOSSES = {
    "mse": (MeanSquaredError(), lambda rng: rng.normal(size=(9, 3))),
    "bce": (BinaryCrossEntropy(), lambda rng: rng.integers(0, 2, (9, 3))),
    "cross entropy": (CrossEntropy(0.1), lambda rng: rng.integers(0, 3, 9)),
}


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_metrics_and_outputs(gpu, loss, activation):
    rng, found = np.random.default_rng(0), []
    inputs, targets, weights = rng.normal(size=(9, 4)), loss[1](rng), rng.random(9)
    layer = nn.MODELS["mlp"](4, 3, hidden=[5], activation=activation, batch_norm=True, dropout=0.3)
    network = Network(layer, loss[0], np.float64)
    for allocate in (plain, device):
        params, grads = FlatBuffer(network.layout, allocate), FlatBuffer(network.layout, allocate)
        network.initialise(params, Key(0))
        numbers = []
        for rows in (9, 0):
            batch = Batch(inputs[:rows], targets[:rows], np.arange(rows), weights[:rows])
            sums = network.sums(params, batch)
            assert all(isinstance(each, np.ndarray) for each in sums.values())
            numbers += network.loss_and_gradients(params, batch, grads, Key(1))
            numbers += [value for each in sums.values() for value in each.ravel()]
        outputs = network.predict(params, inputs)
        assert is_cupy(outputs) == (allocate is device)
        found.append([*numbers, *to_host(outputs).ravel(), *to_host(grads.flat)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [DataParallel, GradientParallel, PipelineParallel])
def test_what_is_not_finite_is_found(gpu, make):
    samples = data.load("digits").take(np.arange(64))

    def run(comm):
        method = make(comm, allocator=device)
        network = Network(nn.MODELS["mlp"](64, 10, hidden=[8]), CrossEntropy())
        method.setup(network, optim.SGD(), Plan(Key(0), optim.Constant(lr=1e38), 9, clip_norm=1e30))
        method.advance(data.Batches(samples, 32, seed=0), 9)

    with pytest.raises(NonFiniteError, match=r"step 2 is not finite.*ranks.*\[0, 1\]; tensors: .*3.weight"):
        LocalWorld(2).run(run)


def test_the_gradient_of_an_embedding_keeps_its_digits(gpu):
    layer, rng = nn.Embedding(50, 3), np.random.default_rng(0)
    numbers, dy = rng.integers(0, 50, (64, 128)), 1 + rng.random((64, 128, 3), np.float32)
    expected = np.zeros((50, 3))
    np.add.at(expected, numbers, dy)
    params, grads = {"weight": gpu.zeros((50, 3), np.float32)}, {"weight": gpu.zeros((50, 3), np.float32)}
    call = nn.Call(gpu)
    _, context = layer.forward(params, gpu.asarray(numbers), call)
    layer.backward_weight(grads, context, gpu.asarray(dy), call)
    np.testing.assert_allclose(to_host(grads["weight"]), expected, rtol=1e-6)


WRONG = {
    "label": (CrossEntropy(), np.array([0, 5, 1]), "position 1 is out of range; got 5"),
    "target": (BinaryCrossEntropy(), np.array([[0, 1, 3]] * 3), r"position \(0, 2\) is wrong; got .*3"),
}


@pytest.mark.parametrize(("loss", "targets", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_target_is_named(gpu, loss, targets, message):
    network = Network(nn.MODELS["mlp"](4, 3), loss)
    params, grads = FlatBuffer(network.layout, device), FlatBuffer(network.layout, device)
    with pytest.raises(DataError, match=message):
        network.loss_and_gradients(params, Batch(np.zeros((3, 4)), targets, np.arange(3)), grads, Key(0))


def test_models_of_other_libraries_stay_on_the_cpu(gpu):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = adapters.TorchModel(torch.nn.Linear(4, 3), CrossEntropy())
    with pytest.raises(InputError, match="trained on the CPU; got parameters in a GPU's memory"):
        model.initialise(FlatBuffer(model.layout, device), Key(0))


def test_a_job_for_a_gpu_where_there_is_none(strict, monkeypatch, tmp_path):
    monkeypatch.setattr(strict.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(InputError, match="CuPy sees no GPU"):
        train("digits_mlp", 1, 'device="gpu"', run_dir=tmp_path / "run")


def test_ranks_of_a_node_take_one_gpu_each(strict, monkeypatch, tmp_path):
    used = []
    monkeypatch.setattr(strict.cuda.runtime, "getDeviceCount", lambda: 2)
    monkeypatch.setattr(strict.cuda, "Device", lambda number=0: used.append(number) or strict_cupy.Device())
    train("digits_mlp", 3, 'device="gpu"', "train.steps=1", run_dir=tmp_path / "run")
    assert sorted(used[:3]) == [0, 0, 1]


@pytest.mark.parametrize("name", ["adam", "lamb"])
def test_a_step_fetches_no_more_values_from_a_larger_model(strict, name):
    def fetched(layers):
        def run(comm):
            method = DataParallel(comm, allocator=device)
            layer = nn.MODELS["mlp"](64, 10, hidden=[8] * layers, batch_norm=True, dropout=0.1)
            plan = Plan(Key(0), optim.Constant(lr=1e-3), 4, clip_norm=1e-3, clip_value=1.0)
            method.setup(Network(layer, CrossEntropy()), optim.make_optimizer(name), plan)
            feed, found = data.Batches(data.load("digits"), 32, seed=0), []
            for step in (1, 2, 4):
                method.advance(feed, step)
                found.append(strict.ndarray.fetched)
            assert found[2] - found[1] == 2 * (found[1] - found[0])
            return found[1] - found[0]

        return LocalWorld(1).run(run)[0]

    assert fetched(1) == fetched(4) <= 6


def test_the_stand_in_is_no_less_strict_than_cupy(strict):
    values = strict.arange(3.0)
    for mix in (
        lambda: values + np.ones(3), lambda: np.ones(3) + values, lambda: np.add(values, np.ones(3)),
        lambda: strict.stack([values, np.ones(3)]), lambda: values.__setitem__(..., np.ones(3)),
        lambda: np.asarray(values), lambda: strict.ascontiguousarray(np.ones(3)), lambda: values[np.arange(2)],
        lambda: values.take(strict.arange(2), mode="clip"),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            mix()
    assert isinstance(values[0], strict.ndarray)
    assert float(values.sum()) == 3
    assert not hasattr(values.flags, "writeable")
    assert "cupy" in sys.modules
