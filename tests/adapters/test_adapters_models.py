"""PyTorch modules as models: under every method their gradients, steps and statistics are those of PyTorch alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")
from adapter_cases import MODULES, ROWS, Lstm, mean_gradients, mlp, samples, seeded, twin  # noqa: E402
from feeds import UnevenFeed  # noqa: E402

from mpitrain import Batch, DataParallel, GradientParallel, Key, Plan, nn, optim  # noqa: E402
from mpitrain._errors import DataError, DtypeError, InputError, MismatchError  # noqa: E402
from mpitrain.adapters import TorchLoss, TorchModel  # noqa: E402
from mpitrain.arrays import FlatBuffer, GradientBuffer, plain  # noqa: E402
from mpitrain.comm import LocalWorld  # noqa: E402

METHODS = {
    "data": DataParallel,
    "gradient 1": GradientParallel,
    "gradient 2": partial(GradientParallel, stage=2, bucket_bytes=256),
    "gradient 3": partial(GradientParallel, stage=3, bucket_bytes=256),
}
KINDS = MODULES | {"lstm": Lstm}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def feed_of(kind):
    inputs, targets = (each.numpy() for each in samples(kind))
    return UnevenFeed(np.moveaxis(inputs, 1, -1) if kind == "cnn" else inputs, targets)


class Whole:
    def __init__(self, batch):
        self._batch = batch

    def share(self, rank, size, microbatches):
        return self

    def batch(self, step):
        return [self._batch]


def trained(make, model, comm, feed, steps=1, optimizer=None, lr=1.0, microbatches=2):
    """A method after some steps, and the parameters before."""
    method = make(comm, microbatches=microbatches)
    method.setup(model, optimizer or optim.SGD(), Plan(Key(1), lambda step: lr, steps))
    before = {name: view.copy() for name, view in method.whole().views.items()}
    comm.barrier()  # parameters may be one memory for all
    progress = method.advance(feed, steps)
    return method, before, progress


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_serial(world, kind, method):
    module = seeded(KINDS[kind])
    expected = mean_gradients(module, kind)
    loss = nn.CrossEntropy()
    found, before, progress = trained(METHODS[method], TorchModel(module, loss), world, feed_of(kind))
    assert {segment.name for segment in found.params.layout} == expected.keys()
    after = found.whole().views
    for name, gradient in expected.items():
        got = before[name] - after[name]
        assert np.linalg.norm(got - gradient.numpy()) <= 1e-10 * float(gradient.norm()), name
    assert progress.samples == ROWS


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_integers_are_exact(world, method):
    random = np.random.default_rng(0)
    inputs, wanted = (random.integers(-8, 9, (8, size)).astype(np.float32) for size in (5, 3))
    module = torch.nn.Linear(5, 3)
    torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
    loss = TorchLoss(lambda outputs, targets: (outputs * targets).sum(1))
    feed = UnevenFeed(inputs, wanted)  # of the shares' ten places, the last two have no sample
    found, _, _ = trained(METHODS[method], TorchModel(module, loss), world, feed)
    after = found.whole().views
    assert np.array_equal(after["weight"], -(wanted.T @ inputs) / 8)
    assert np.array_equal(after["bias"], -wanted.sum(0) / 8)


class Normalised(torch.nn.Module):
    """Batch normalisation, a frozen and an unused parameter, and a constant buffer."""

    def __init__(self):
        super().__init__()
        self.norm, self.out = torch.nn.BatchNorm1d(6, momentum=0.25), torch.nn.Linear(6, 3)
        self.out.bias.requires_grad_(False)
        self.unused = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.out(self.norm(x) * self.scale)


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_statistics_frozen_and_unused_tensors(world, method):
    module = seeded(Normalised)
    bias = module.out.bias.detach().numpy().copy()
    x, labels = samples("mlp")
    shares = [x[:4], x[4:7], x[7:9], x[8:10]][: world.size]
    own = shares[world.rank].numpy()
    batch = Batch(own, labels.numpy()[: len(own)], np.arange(len(own)) + 10 * world.rank)
    model = TorchModel(module, nn.CrossEntropy())
    found, _, _ = trained(METHODS[method], model, world, Whole(batch), 1, optim.AdamW(), microbatches=1)
    total = sum(map(len, shares))
    mean = sum(len(part) * part.mean(0) for part in shares) / total
    variance = sum(len(part) * part.var(0) for part in shares) / total
    views = found.whole().views
    np.testing.assert_allclose(views["norm.running_mean"], 0.25 * mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(views["norm.running_var"], 0.75 + 0.25 * variance, rtol=1e-12)
    assert np.array_equal(views["out.bias"], bias)
    assert np.array_equal(views["unused"], np.ones(2))
    assert model.layout.parameter_count == 6 + 6 + 18 + 2
    outputs = found.predict(x.numpy())  # for which a module has all its parameters, in stage 3 too
    with torch.no_grad():
        np.testing.assert_allclose(outputs, twin(module).eval()(x), rtol=1e-12)


@pytest.mark.mpi
def test_ranks_with_other_initial_values_are_named(world):
    if world.size == 1:
        pytest.skip("nothing can differ")
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, float(world.rank == 1)), torch.nn.init.zeros_(module.bias)
    with pytest.raises(MismatchError, match=r"ranks \[1\]"):
        DataParallel(world).setup(TorchModel(module, nn.CrossEntropy()), optim.SGD(), Plan(Key(0), lambda step: 1.0, 1))


def run_serially(model, feed, steps=3, microbatches=2):
    (found,) = LocalWorld(1).run(lambda comm: trained(DataParallel, model, comm, feed, steps, None, 0.1, microbatches))
    return found


def test_dropout_repeats_and_leaves_the_users_generator_alone():
    def dropping():
        return torch.nn.Sequential(torch.nn.Linear(6, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 3))

    feed = feed_of("mlp")
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    runs = [run_serially(TorchModel(seeded(dropping), nn.CrossEntropy()), feed) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), expected)
    assert np.array_equal(runs[0][0].params.flat, runs[1][0].params.flat)

    model = TorchModel(seeded(dropping), nn.CrossEntropy())
    params, gradients = FlatBuffer(model.layout), []
    model.initialise(params, Key(0))
    batch = Batch(feed.inputs, feed.targets, np.arange(ROWS))
    for key, first in ((Key(0), 0), (Key(0), 0), (Key(0).at(1), 0), (Key(0).child("microbatch1"), 0), (Key(0), 1)):
        grads = FlatBuffer(model.layout)
        model.loss_and_gradients(params, Batch(batch.inputs, batch.targets, batch.index + first), grads, key)
        gradients.append(grads.sha256())
    assert gradients[0] == gradients[1]
    assert len(set(gradients)) == 4  # another step, another microbatch, another share
    assert np.array_equal(model.predict(params, feed.inputs), model.predict(params, feed.inputs))


def test_a_loss_of_pytorch_is_that_of_ours():
    feed = feed_of("mlp")
    ours = run_serially(TorchModel(seeded(mlp), nn.CrossEntropy()), feed)
    function = torch.nn.CrossEntropyLoss(reduction="none")
    theirs = run_serially(TorchModel(seeded(mlp), function), feed)
    np.testing.assert_allclose(theirs[0].params.flat, ours[0].params.flat, rtol=1e-12, atol=1e-15)
    assert theirs[2].loss == pytest.approx(ours[2].loss, rel=1e-12)
    batch = Batch(feed.inputs, feed.targets, np.arange(ROWS))
    loss = theirs[0].evaluate([batch])["loss"]
    assert loss == pytest.approx(ours[0].evaluate([batch])["loss"], rel=1e-12)
    for reduction in ("sum", "mean"):
        model = TorchModel(seeded(mlp), torch.nn.CrossEntropyLoss(reduction=reduction))
        with pytest.raises(InputError, match=r'got shape \(\); expected shape \(10,\); .*"none"'):
            run_serially(model, Whole(batch), microbatches=1)


@pytest.mark.parametrize("inputs", [[], [[1.0, 2.0]]])
def test_a_list_is_no_array_to_predict_from(inputs):
    model = TorchModel(seeded(mlp), nn.CrossEntropy())
    with pytest.raises(DataError, match=r"^TorchModel: the inputs are no array; got list; .*numpy\.asarray"):
        model.predict(FlatBuffer(model.layout), inputs)


class Viewing(torch.nn.Sequential):
    """Flattens samples, and below their losses, in the usual words, which fail where there are none."""

    def forward(self, x):
        return super().forward(x.view(x.size(0), -1))


def viewed(outputs, targets):
    losses = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    return losses.view(losses.size(0), -1).sum(1)


@pytest.mark.parametrize("loss", [nn.CrossEntropy(), viewed], ids=["ours", "of PyTorch"])
def test_a_rank_without_a_sample_evaluates_and_predicts_none(loss):
    feed = feed_of("mlp")
    batch = Batch(feed.inputs.reshape(ROWS, 3, 2), feed.targets, np.arange(ROWS))
    models = [TorchModel(seeded(lambda: Viewing(*mlp())), loss) for _ in range(2)]

    def rank(comm):
        method = DataParallel(comm)
        method.setup(models[comm.rank], optim.SGD(), Plan(Key(0), lambda step: 1.0, 1))
        assert method.predict(batch.inputs[:0]).shape == (0, 3)
        return method.evaluate([batch.part(slice(ROWS if comm.rank == 0 else 0))])["loss"]

    with torch.no_grad():
        expected = float(viewed(seeded(mlp)(torch.from_numpy(feed.inputs)), torch.from_numpy(feed.targets)).mean())
    assert LocalWorld(2).run(rank) == pytest.approx([expected] * 2, rel=1e-12)


def test_weights_of_samples_multiply_their_losses():
    model = TorchModel(seeded(mlp), torch.nn.CrossEntropyLoss(reduction="none"))
    feed, params = feed_of("mlp"), FlatBuffer(model.layout)
    model.initialise(params, Key(0))
    once, thrice = FlatBuffer(model.layout), FlatBuffer(model.layout)
    weights = np.where(np.arange(ROWS) < 4, 3.0, 1.0)
    model.loss_and_gradients(params, Batch(feed.inputs, feed.targets, np.arange(ROWS), weights), once, Key(0))
    rows = np.r_[0:10, 0:4, 0:4]
    model.loss_and_gradients(params, Batch(feed.inputs[rows], feed.targets[rows], rows), thrice, Key(0))
    np.testing.assert_allclose(once.flat, thrice.flat, rtol=1e-12, atol=1e-14)


def told_complete(module):
    """What gradients are told while a module computes them, and all names."""
    model, told = TorchModel(seeded(module), nn.CrossEntropy()), []

    class Told(GradientBuffer):
        def complete(self, prefix):
            told.append(prefix)

    params, grads, feed = FlatBuffer(model.layout), Told(model.layout), feed_of("mlp")
    grads.zero()
    model.loss_and_gradients(params, Batch(feed.inputs, feed.targets, np.arange(ROWS)), grads, Key(0))
    return told, [segment.name for segment in model.layout]


def test_gradients_are_told_complete_layer_by_layer():
    told, _ = told_complete(mlp)
    assert sorted(told[:2]) == ["2.bias", "2.weight"]
    assert sorted(told) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_a_gradient_with_whose_name_others_begin_is_told_complete_too():
    told, names = told_complete(Lstm)
    assert {"lstm.bias_hh_l0", "lstm.bias_hh_l0_reverse"} <= set(told)
    assert sorted(told) == sorted(names)


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.out(x)


class Odd(torch.nn.Sequential):
    """Gives what `wrong` makes of its output."""

    def __init__(self, wrong):
        super().__init__(*mlp())
        self.wrong = wrong

    def forward(self, x):
        return self.wrong(super().forward(x))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(lambda y: (y, 1), "what the module gives is .* got tuple"), (torch.detach, "depends on no parameter that is tr")],
)
def test_outputs_from_which_no_gradient_comes_are_refused(wrong, message):
    model = TorchModel(seeded(partial(Odd, wrong)), nn.CrossEntropy())
    with pytest.raises(InputError, match=f"TorchModel: .*{message}"):
        LocalWorld(1).run(lambda comm: trained(DataParallel, model, comm, feed_of("mlp")))


def replace_layer(module):
    module[0] = torch.nn.Linear(6, 8)


def replace_parameter(module):
    module[0].bias = torch.nn.Parameter(torch.zeros(8))


def take_out(module):
    del module[1]


def add(module):
    module[0].more = torch.nn.Linear(1, 1)


def freeze(module):
    module[0].requires_grad_(False)


def unfreeze(module):
    module[2].requires_grad_(True)


@pytest.mark.parametrize("change", [replace_layer, replace_parameter, take_out, add, freeze, unfreeze])
def test_a_module_that_was_changed_is_refused_and_not_trained_in_part(change):
    module = seeded(mlp)
    module[2].bias.requires_grad_(False)
    model = TorchModel(module, nn.CrossEntropy())
    change(module)
    with pytest.raises(InputError, match="other parameters or modules than when it was handed over"):
        LocalWorld(1).run(lambda comm: trained(DataParallel, model, comm, feed_of("mlp")))


class Pointing(torch.nn.Module):
    """Keeps parts of itself under further names while it is called."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(mlp())

    def forward(self, x):
        self.weight = self.blocks[0].weight
        self.register_parameter("absent", None)
        for block in self.blocks:
            self.current = block
            x = block(x)
        return x


@pytest.mark.parametrize("method", METHODS)
def test_a_module_may_point_at_its_own_parts(method):
    def rank(comm):
        model, plain = (TorchModel(seeded(make), nn.CrossEntropy()) for make in (Pointing, mlp))
        found, expected = (trained(METHODS[method], each, comm, feed_of("mlp"), steps=2)[0] for each in (model, plain))
        assert found.weights_sha256() == expected.weights_sha256()

    LocalWorld(1).run(rank)


def test_what_is_no_module_yet_is_refused():
    with pytest.raises(InputError, match="TorchModel: module is of another kind; got the class Lstm"):
        TorchModel(Lstm, nn.CrossEntropy())
    for name, lazy in (
        ("1.weight", torch.nn.LazyLinear(3)),
        ("1.running_mean", torch.nn.LazyBatchNorm1d(affine=False)),
    ):
        message = f"a parameter or buffer has no shape yet; got {name}; run the module on samples first"
        with pytest.raises(InputError, match=message):
            TorchModel(torch.nn.Sequential(torch.nn.Linear(2, 2), lazy), nn.CrossEntropy())


def test_what_no_checkpoint_would_hold_is_refused():
    with pytest.raises(InputError, match="changes buffers while it trains"):
        run_serially(TorchModel(seeded(Counting), nn.CrossEntropy()), feed_of("mlp"))
    with pytest.raises(InputError, match="momentum=None"):
        TorchModel(torch.nn.BatchNorm1d(2, momentum=None), nn.CrossEntropy())
    mixed = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    with pytest.raises(DtypeError, match=r"float32 on cpu, torch\.float64 on cpu"):
        TorchModel(mixed, nn.CrossEntropy())
    assert TorchModel(mixed, nn.CrossEntropy(), np.float64).layout.dtype == np.float64


def test_a_module_is_converted_to_a_dtype_of_numpy_or_pytorch():
    for dtype in ("float64", np.float64, torch.float64):
        module = torch.nn.Linear(2, 2)
        assert TorchModel(module, nn.CrossEntropy(), dtype).layout.dtype == np.float64
        assert module.weight.dtype == torch.float64
    for dtype, problem in ((torch.float16, "models do not compute in this dtype; got float16"), ("flt", "not a dtype")):
        with pytest.raises(DtypeError, match=problem):
            TorchModel(torch.nn.Linear(2, 2), nn.CrossEntropy(), dtype)


def test_a_loss_is_a_function():
    with pytest.raises(InputError, match="TorchLoss: the loss is no function; got 'cross_entropy'; expected a loss"):
        TorchModel(torch.nn.Linear(2, 2), "cross_entropy")


JOB = """
[data]
source = "digits"
[model]
kind = "build"
build = "{build}:build"
options = {{ width = 12 }}
[optimizer]
kind = "adam"
lr = 0.01
[train]
batch_size = 100
steps = 6
[train.checkpoint]
every_steps = 3
[method]
kind = "{method}"
"""

BUILD = """
import torch
def build(width):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(72, width), torch.nn.Dropout(0.2), torch.nn.Linear(width, 10),
    )
"""


@pytest.mark.mpi
def test_a_job_trains_resumes_and_predicts(world, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    from mpitrain.train import Predictor, load_job, session, train_job

    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")
    torch.manual_seed(world.rank)  # has no say in the initial values
    folder = Path(world.broadcast_object(str(tmp_path)))
    if world.rank == 0:
        (folder / "my.py").write_text(BUILD)
        for method in ("data_parallel", "gradient"):
            (folder / f"{method}.toml").write_text(JOB.format(build=folder / "my.py", method=method))
    world.barrier()
    jobs = {method: load_job(folder / f"{method}.toml", [], world) for method in ("data_parallel", "gradient")}
    whole = train_job(jobs["data_parallel"], world, run_dir=folder / "whole")
    short = load_job(folder / "data_parallel.toml", ["train.steps=3"], world)
    train_job(short, world, run_dir=folder / "parts")
    resumed = train_job(jobs["data_parallel"], world, resume=folder / "parts")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    sharded = train_job(jobs["gradient"], world, run_dir=folder / "sharded")
    assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    outputs = Predictor(folder / "whole").outputs(images)
    assert outputs.shape == (3, 10)
    assert not np.array_equal(outputs, Predictor(folder / "sharded").outputs(images[::-1]))
    other = load_job(folder / "data_parallel.toml", ["seed=1", "train.steps=3"], world)
    assert train_job(other, world, run_dir=folder / "other")["weights_sha256"] != whole["weights_sha256"]


@pytest.mark.mpi
def test_a_reproducible_job_has_the_bits_of_one_rank(world, tmp_path, monkeypatch):
    """With Dropout and BatchNorm, which are keyed and normalised by lane there."""
    pytest.importorskip("sklearn")
    from mpitrain.train import load_job, session, train_job

    monkeypatch.setattr(session, "write_report", lambda path: path / "report.html")
    folder = Path(world.broadcast_object(str(tmp_path)))
    if world.rank == 0:
        (folder / "my.py").write_text(BUILD)
        (folder / "job.toml").write_text(JOB.format(build=folder / "my.py", method="gradient"))
    world.barrier()
    job = load_job(folder / "job.toml", ["reproducible=true", "lanes=4", "train.steps=3"], world)
    found = train_job(job, world, run_dir=folder / "run")
    (serial,) = LocalWorld(1).run(lambda comm: train_job(job, comm, run_dir=tmp_path / "serial"))
    assert found["weights_sha256"] == serial["weights_sha256"]


@pytest.mark.mpi
@pytest.mark.parametrize("make", [DataParallel, GradientParallel])
def test_what_is_written_to_parameters_that_ranks_share_is_refused(world, make):
    model, feed = TorchModel(seeded(mlp), nn.CrossEntropy()), feed_of("mlp")
    method, _, _ = trained(make, model, world, feed)
    method.predict(feed.inputs)
    with torch.no_grad():
        model.module[0].weight.mul_(0.5)
    if world.size > 1:
        with pytest.raises(InputError, match=r"a parameter of the module was written to.*'0.weight'.*load_parameters"):
            method.predict(feed.inputs)


@pytest.mark.mpi
def test_each_ranks_own_replica_may_be_written_to(world):
    model, feed = TorchModel(seeded(mlp), nn.CrossEntropy()), feed_of("mlp")
    method, _, _ = trained(partial(DataParallel, allocator=plain), model, world, feed)
    before = method.params.views["0.weight"].copy()
    method.predict(feed.inputs)
    with torch.no_grad():
        model.module[0].weight.mul_(0.5)
    method.predict(feed.inputs)
    np.testing.assert_array_equal(method.params.views["0.weight"], before * 0.5)


def test_parameters_may_lie_in_a_file_that_is_only_read(tmp_path):
    model, inputs = TorchModel(seeded(mlp), nn.CrossEntropy()), feed_of("mlp").inputs
    params = FlatBuffer(model.layout)
    model.initialise(params, Key(0))
    np.save(tmp_path / "flat.npy", params.flat)
    read = FlatBuffer(model.layout, lambda *_: np.load(tmp_path / "flat.npy", mmap_mode="r"))
    with pytest.warns(UserWarning, match="not writable"):
        found = model.predict(read, inputs)
    np.testing.assert_array_equal(found, model.predict(params, inputs))
