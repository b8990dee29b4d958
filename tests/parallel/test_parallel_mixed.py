"""Mixed precision on many ranks: who keeps what, when all skip a step, and that one rank and many train alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    IMAGES,
    METHODS,
    SEED,
    Recorder,
    RowsFeed,
    by_label,
    every_method,
    every_method_and,
    last_rank,
    mlp,
    plan,
    same_on_all,
)
from tensor_cases import MODELS
from test_parallel_ledger import TALLY_BYTES, spent
from test_parallel_state import saved
from test_tensor_methods import LONG

from mpitrain import nn
from mpitrain._errors import DtypeError, InputError, NonFiniteError
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import Communicator, Count, LocalWorld, ProcessMesh
from mpitrain.data import Dataset
from mpitrain.method import LossScaler, Precision
from mpitrain.nn import Network
from mpitrain.nn.initial import ones
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import DataParallel, GradientParallel, ModelAveraging
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.parallel.tensor import divided_network

HALF = Precision(compute="float16", emulate=True)
HALVES = {"float16": HALF, "bfloat16": Precision(compute="bfloat16", emulate=True)}

every_method_and_half = every_method_and("precision", HALVES, ["float16"])
every_half = pytest.mark.parametrize("precision", HALVES.values(), ids=HALVES.keys())


# The scale


def judged(precision: Precision, verdicts: str) -> list[float]:
    """The scale after each step; ``+``: finite, ``-``: not."""
    scaler, found = LossScaler(precision), []
    for step, verdict in enumerate(verdicts, start=1):
        scaler.judge(verdict == "+", step)
        found.append(scaler.scale)
    return found


def test_the_scale_grows_after_so_many_good_steps_in_a_row_and_backs_off_at_once():
    precision = Precision(compute="float16", initial_scale=8.0, growth_interval=3)
    #                                  two and a bad one: counted anew      three: grows
    assert judged(precision, "+++" "++-" "++" "+" "---" "+++") == [
        8, 8, 16,  16, 16, 8,  8, 8,  16,  8, 4, 2,  2, 2, 4
    ]  # fmt: skip
    precision = Precision(
        compute="float16", initial_scale=8.0, growth_interval=1, growth_factor=1.5, backoff_factor=0.1
    )
    assert judged(precision, "+-") == pytest.approx([12, 1.2])


def test_the_scale_never_grows_beyond_float32():
    precision = Precision(compute="float16", initial_scale=2.0**126, growth_interval=1)
    assert judged(precision, "+++") == [2.0**127] * 3


def test_the_scale_does_not_fall_without_end():
    precision = Precision(compute="float16", initial_scale=1.0, most_skips=4)
    assert judged(precision, "---+---+---")[-1] == 2.0**-9  # never four in a row
    with pytest.raises(NonFiniteError, match=r"4 steps in a row, up to step 5, .*got loss scale 0\.125.*bfloat16"):
        judged(precision, "+----")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("compute", "float8"),
        ("initial_scale", 0.0),
        ("initial_scale", float("inf")),
        ("growth_factor", 1.0),
        ("backoff_factor", 1.0),
        ("growth_interval", 0),
        ("most_skips", 0),
    ],
)
def test_an_option_that_makes_no_sense_is_named(option: str, value: Any):
    with pytest.raises(InputError, match=option):
        Precision(**({"compute": "float16"} | {option: value}))


# Exact steps: one weight, and numbers that are powers of two


class Ones(nn.Linear):
    """y = x w, with w = 1 at first."""

    def parameters(self) -> Any:
        return [nn.Parameter("weight", (self.inputs, self.outputs), ones)]


class Total(nn.MeanSquaredError):
    """Minus the sum of a sample's outputs times its target: the gradient does not depend on the weights."""

    def evaluate(self, outputs: np.ndarray, targets: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        gradient[...] = -targets.reshape(outputs.shape)
        return (outputs * gradient).reshape(len(outputs))


def one_weight(inputs: list[float], targets: list[float]) -> tuple[Network, RowsFeed]:
    """y = w x; the loss is −Σ y t over all samples, which are one batch."""
    dataset = Dataset(np.array(inputs)[:, None], np.array(targets)[:, None], "regression", "exact")
    return Network(Ones(1, 1, bias=False), Total()), RowsFeed(dataset, len(inputs), dtype=np.float32)


def weight(method: Synchronous) -> float:
    return float(method.whole().views["weight"][0, 0])


def every_slot(method: Synchronous) -> list[bytes]:
    return [array.tobytes() for part in method.parts for array in (part.params, *part.state.values())]


def check_overflow(comm: Communicator, make: Any) -> None:
    # One sample's gradient, 2¹⁰ · 2⁸ at a scale of 1, overflows in float16 down to a scale of 2⁻²; the others' are 0.
    network, feed = one_weight([2.0**10, 1, 1, 1, 1, 1, 1, 1], [2.0**8, 0, 0, 0, 0, 0, 0, 0])
    precision = Precision(compute="float16", emulate=True, initial_scale=4.0, growth_interval=2)
    method = make(comm, precision=precision)
    method.setup(network, make_optimizer("momentum"), plan(9, schedule=lambda step: 2.0 ** -(17 + step)))
    before, scales = every_slot(method), [4, 2, 1, 0.5, 0.25, 0.125]
    for step, scale in enumerate(scales):
        assert method.loss_scale == scale
        assert every_slot(method) == before
        progress = method.advance(feed, step + 1)
        assert (progress.step, progress.skipped) == (step + 1, min(step + 1, 5))
        if step < 5:
            assert np.isnan(progress.loss)  # nothing was trained on
            assert (progress.samples, progress.loss_scale) == (0, scale / 2)
    assert (progress.samples, progress.lr) == (8, 2.0**-18)  # of the first step that changed anything
    assert weight(method) == 1 + 2.0**-18 * 2.0**18 / 8
    method.advance(feed, 7)  # after which the scale has grown, and so overflows
    assert method.loss_scale == 0.25
    assert (method.advance(feed, 8).skipped, method.loss_scale) == (6, 0.125)
    same_on_all(comm, (method.step, method.skipped, method.loss_scale, weight(method)))


@every_method
def test_an_overflow_on_one_rank_makes_all_skip_the_step(on_ranks, make):
    on_ranks(check_overflow, make)


def check_averaging(comm: Communicator) -> None:
    network, feed = one_weight([2.0**10, 1, 1, 1], [2.0**8, 0, 0, 0])
    precision = Precision(compute="float16", emulate=True, initial_scale=1.0)
    method = ModelAveraging(comm, average_every=1, precision=precision)
    method.setup(network, SGD(), plan(9, schedule=lambda step: 2.0**-18))
    assert method.advance(feed, 3).skipped == 3
    assert weight(method) == 1
    assert method.advance(feed, 4).skipped == 3
    assert weight(method) == 1 + 1 / 4


def test_ranks_that_average_skip_together(on_ranks):
    on_ranks(check_averaging)


def check_small_updates(comm: Communicator, make: Any, precision: Precision) -> None:
    network, feed = one_weight([1, 1, 1, 1, 1], [1, 1, 1, 1, 1])
    method = make(comm, precision=precision)
    method.setup(network, SGD(), plan(32, schedule=lambda step: 2.0**-12))
    for step in range(1, 33):
        method.advance(feed, step)
        assert weight(method) == 1 + step * 2.0**-12
    assert all(part.params.dtype == np.float32 for part in method.parts)
    assert all(part.grads.dtype == np.float32 for part in method.parts)


@every_method_and_half
def test_updates_that_would_vanish_in_16_bits_add_up(on_ranks, make, precision):
    dtype = precision.dtype.type
    assert dtype(1) + dtype(2.0**-12) == 1
    on_ranks(check_small_updates, make, precision)


def check_accumulation(comm: Communicator, make: Any, precision: Precision) -> None:
    # Microbatches of gradient 2048 and then 1, 1, 1 …: in 16 bits the ones would be lost.
    network, feed = one_weight([1.0] * 8, [2048.0, 1, 1, 1, 1, 1, 1, 1])
    method = make(comm, precision=precision, microbatches=8)
    method.setup(network, SGD(), plan(1, schedule=lambda step: 8.0))
    method.advance(feed, 1)
    assert weight(method) == 1 + 2048 + 7


@every_method_and_half
def test_gradients_of_microbatches_and_ranks_are_added_in_float32(on_ranks, make, precision):
    exact = Precision(compute=precision.compute, emulate=True, initial_scale=16.0)
    on_ranks(check_accumulation, make, exact if precision.compute == "float16" else precision)


# Against a serial simulation, written down by itself


Weights = dict[str, np.ndarray]


def initial() -> Weights:
    network = mlp(np.float32)
    whole = FlatBuffer(network.layout)
    network.initialise(whole, Key(SEED).child("init"))
    return {name: view.astype(np.float64) for name, view in whole.views.items()}


def simulated_gradients(w: Weights, batch: Batch, scale: float, dtype: np.dtype) -> Weights:
    """Of linear, tanh, linear, cross-entropy: sums in float64, and every result of a layer in 16 bits."""

    def rounded(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return array.astype(np.float32).astype(dtype).astype(np.float64)

    w = {name: rounded(array) for name, array in w.items()}
    x = rounded(batch.inputs.reshape(len(batch), -1))
    h = rounded(np.tanh(rounded(rounded(x @ w["1.weight"]) + w["1.bias"])))
    z = rounded(rounded(h @ w["3.weight"]) + w["3.bias"])
    p = np.exp(z - z.max(axis=1, keepdims=True))
    d = rounded(scale * (p / p.sum(axis=1, keepdims=True) - np.eye(3)[batch.targets]))
    with np.errstate(invalid="ignore"):
        back = rounded(rounded(d @ w["3.weight"].T) * (1 - h * h))
        found = {"3.weight": h.T @ d, "3.bias": d.sum(axis=0), "1.weight": x.T @ back, "1.bias": back.sum(axis=0)}
    return {name: rounded(array) for name, array in found.items()}


def simulated(precision: Precision, steps: int, lr: float) -> tuple[Weights, int]:
    """Return the weights after some steps of SGD on one rank, and how many steps were skipped."""
    weights, skipped = initial(), 0
    scale = float(precision.initial_scale) if precision.compute == "float16" else 1.0
    for step in range(steps):
        (batch,) = RowsFeed(IMAGES).whole(step)
        grads = simulated_gradients(weights, batch, scale, precision.dtype)
        if all(np.isfinite(array).all() for array in grads.values()):
            for name, array in grads.items():
                weights[name] -= lr * array / (scale * len(batch))
        else:
            scale, skipped = scale / 2, skipped + 1
    return weights, skipped


def distance(left: Weights, right: Weights) -> float:
    return float(np.sqrt(sum(np.square(array - right[name]).sum() for name, array in left.items())))


def check_simulation(comm: Communicator, make: Any, precision: Precision, steps: int) -> None:
    expected, skipped = simulated(precision, steps, 0.25)
    assert skipped == (4 if precision.compute == "float16" else 0)
    method = make(comm, precision=precision)
    method.setup(mlp(np.float32), SGD(), plan(steps, schedule=lambda step: 0.25))
    assert method.advance(RowsFeed(IMAGES, owner=by_label, dtype=np.float32), steps).skipped == skipped
    relative = distance(expected, method.whole().views) / distance(expected, initial())
    assert relative < BOUNDS[precision.compute]


BOUNDS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
"""On one rank and on many, other sums are rounded."""


@every_method_and_half
def test_training_is_a_serial_simulation_but_for_rounding(on_ranks, make, precision):
    if precision.compute == "float16":
        precision = Precision(compute="float16", emulate=True, initial_scale=2.0**18)
    on_ranks(check_simulation, make, precision, 20)


# States


def trained(comm: Communicator, make: Any, until: int, start: Any = None) -> Any:
    """Train `mlp` with steps that overflow, from the beginning or from a state; return the state at ``until``."""
    precision = Precision(compute="float16", emulate=True, initial_scale=2.0**17, growth_interval=2)
    method = make(comm, precision=precision)
    method.setup(mlp(np.float32), make_optimizer("adam"), plan(8))
    if start is not None:
        scalars, tensors = start
        method.load(scalars, tensors.__getitem__)
    method.advance(RowsFeed(IMAGES, dtype=np.float32), until)
    scalars, tensors = saved(comm, method)
    return scalars, {name: array.astype(np.float32) for name, array in tensors.items()}


def check_resumes(comm: Communicator, writer: Any, reader: Any) -> None:
    expected = trained(comm, reader, 8)
    half_way = trained(comm, writer, 4)
    assert 0 < half_way[0]["skipped"] < expected[0]["skipped"]
    assert half_way[0]["loss_scale"] != {"scale": 2.0**17, "steps": 0, "skips": 0}
    found = trained(comm, reader, 8, half_way)
    assert found[0] == expected[0]
    for name, array in expected[1].items():
        np.testing.assert_allclose(found[1][name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("writer", "reader"), [("data", "data"), ("data", "gradient 3"), ("gradient 2", "gradient 1")])
def test_a_run_that_is_resumed_goes_on_with_its_scale_and_skips(on_ranks, writer, reader):
    on_ranks(check_resumes, METHODS[writer], METHODS[reader])


def check_other_types(comm: Communicator, make: Any) -> None:
    scalars, tensors = trained(comm, DataParallel, 4)
    method = make(comm)
    method.setup(mlp(np.float32), make_optimizer("adam"), plan(8))
    method.load(scalars, tensors.__getitem__)
    assert (method.step, method.skipped, method.loss_scale) == (4, scalars["skipped"], None)
    for name, view in method.whole().views.items():
        np.testing.assert_array_equal(view, tensors[f"params/{name}"].reshape(view.shape))
    again = make(comm, precision=HALF)
    again.setup(mlp(np.float32), make_optimizer("adam"), plan(8))
    again.load({"step": 4}, tensors.__getitem__)  # as a float32 run saves
    assert (again.step, again.skipped, again.loss_scale) == (4, 0, HALF.initial_scale)


@pytest.mark.parametrize("make", [DataParallel, GradientParallel])
def test_states_go_from_16_bits_to_float32_and_back(on_ranks, make):
    on_ranks(check_other_types, make)


# What is sent


def check_bytes(comm: Communicator, precision: Precision) -> None:
    feed, network = RowsFeed(IMAGES, dtype=np.float32), mlp(np.float32)
    size, steps = network.layout.size, 2
    method = DataParallel(comm, precision=precision)
    method.setup(network, SGD(), plan(steps))
    sums = Count(2 * steps, 2 * steps, steps * (4 * size + TALLY_BYTES))
    assert spent(comm, lambda: method.advance(feed, steps)) == {"allreduce": sums}
    method = GradientParallel(comm, precision=precision)
    method.setup(network, SGD(), plan(steps))
    found = spent(comm, lambda: method.advance(feed, steps))
    assert found.pop("allreduce").logical_bytes == steps * TALLY_BYTES
    assert {name: count.logical_bytes for name, count in found.items()} == {
        "reduce_scatter": steps * 4 * size, "allgather": steps * 2 * size,
    }  # fmt: skip


@every_half
def test_gradients_travel_in_float32_and_parameters_in_16_bits(precision):
    LocalWorld(2).run(check_bytes, precision)


# Ranks that divide the model, too


def check_tensor(comm: Communicator, make: Any) -> None:
    shape = {"data": 2, "tensor": -1} if comm.size % 2 == 0 else {"data": 1, "tensor": -1}
    layer = nn.MODELS["mlp"](32, 3, hidden=[5], activation="tanh")
    mesh = ProcessMesh(comm, **shape)
    method = make(mesh["data"], across=mesh["tensor"], precision=Precision(**SKIPPING))
    method.setup(divided_network(layer, nn.CrossEntropy(), mesh["tensor"]), SGD(), plan(20, schedule=lambda step: 0.25))
    progress = method.advance(RowsFeed(IMAGES, owner=last_rank, dtype=np.float32), 20)
    expected, skipped = simulated(Precision(**SKIPPING), 20, 0.25)
    assert progress.skipped == skipped
    same_on_all(comm, (progress.skipped, progress.loss_scale, progress.loss, method.weights_sha256()))
    found, layout = method.whole().views, method.model.layout
    own = {each.name: tuple(slice(*span) for span in each.box) for each in layout}
    off = sum(np.square(expected[name][box] - found[name]).sum() for name, box in own.items())
    assert np.sqrt(off) < BOUNDS["float16"] * distance(expected, initial())
    mesh.free()


SKIPPING: dict[str, Any] = {"compute": "float16", "emulate": True, "initial_scale": 2.0**18}


@pytest.mark.parametrize("make", [DataParallel, partial(GradientParallel, stage=2, bucket_bytes=256)])
def test_ranks_that_divide_the_model_skip_together_and_train_alike(on_ranks, make):
    on_ranks(check_tensor, make)


class OverflowsOn(Network):
    """A network whose gradients are infinite on one rank of all."""

    def __init__(self, of: Network, bad: bool) -> None:
        super().__init__(of.layer, of.loss)
        self.bad = bad

    def scaled_gradients(self, params: Any, batch: Any, grads: Any, *rest: Any) -> tuple[float, float]:
        found = super().scaled_gradients(params, batch, grads, *rest)
        if self.bad:
            grads.tree["1"]["bias"][...] = np.inf
        return found


def check_any_axis(comm: Communicator, make: Any) -> None:
    mesh = ProcessMesh(comm, data=comm.size // 2, tensor=2)
    for bad in range(comm.size):
        method = make(mesh["data"], precision=HALF, across=mesh["tensor"])
        network = OverflowsOn(mlp(np.float32), bad == comm.rank)  # every rank has all of it: no tensor is divided
        method.setup(network, SGD(), plan(2))
        before = every_slot(method)
        progress = method.advance(RowsFeed(IMAGES, dtype=np.float32), 1)
        assert (progress.skipped, progress.loss_scale) == (1, HALF.initial_scale / 2)
        assert every_slot(method) == before
    mesh.free()


@pytest.mark.parametrize("make", [DataParallel, partial(GradientParallel, stage=1)])
@pytest.mark.parametrize("size", [2, 4])
def test_wherever_a_gradient_overflows_the_ranks_of_all_axes_skip(size, make):
    LocalWorld(size).run(check_any_axis, make)


def check_end(comm: Communicator, make: Any) -> None:
    network, feed = one_weight([1, 1, 1, 1], [float("inf"), 1, 1, 1])
    method = make(comm, precision=Precision(compute="float16", emulate=True, most_skips=3))
    method.setup(network, SGD(), plan(9))
    with pytest.raises(NonFiniteError, match="3 steps in a row, up to step 3"):
        method.advance(feed, 9)
    assert weight(method) == 1


@pytest.mark.parametrize("make", [DataParallel, GradientParallel])
def test_what_no_scale_can_mend_ends_all_ranks(on_ranks, make):
    on_ranks(check_end, make)


def check_no_scaler(comm: Communicator, make: Any) -> None:
    network, feed = one_weight([1, 1, 1], [float("inf"), 1, 1])
    method = make(comm, precision=HALVES["bfloat16"])
    method.setup(network, SGD(), plan(9))
    with pytest.raises(NonFiniteError, match="the loss or gradient of step 1 is not finite"):
        method.advance(feed, 9)


@every_method
def test_bfloat16_skips_nothing(make):
    LocalWorld(2).run(check_no_scaler, make)


# What is refused


class OwnModel(nn.Model):
    """A model of somebody's own, of which nothing is asked here but its layout."""

    layout = mlp(np.float32).layout
    initialise = loss_and_gradients = predict = sums = metrics = None


def set_up_with(model: nn.Model, **options: Any) -> None:
    def run(comm: Communicator) -> None:
        DataParallel(comm, **options).setup(model, SGD(), plan(1))

    LocalWorld(1).run(run)


def test_on_a_cpu_16_bits_are_refused_unless_they_are_to_be_emulated():
    message = "CPUs train in float32; got parameters in a CPU's memory; expected a GPU's; .* for tests, set emulate"
    with pytest.raises(DtypeError, match=message):
        set_up_with(mlp(np.float32), precision=Precision(compute="float16"))


@pytest.mark.parametrize(
    ("model", "got"), [(mlp(np.float64), "KeptKeys of float64"), (OwnModel(), "OwnModel of float32")]
)
def test_models_that_do_not_compute_in_16_bits_are_refused(model: nn.Model, got: str):
    with pytest.raises(InputError, match=f"does not compute in 16 bits; got {got}; .* leave out precision"):
        set_up_with(model, precision=HALF)


def test_codecs_go_with_bfloat16_only():
    with pytest.raises(InputError, match=r"float16 makes overflow; got int8; use no codec, or bfloat16"):
        set_up_with(mlp(np.float32), precision=HALF, codec="int8")
    set_up_with(mlp(np.float32), precision=HALVES["bfloat16"], codec="int8")


def check_language_model(comm: Communicator, kind: str, precision: Precision) -> None:
    model = MODELS[kind]
    serial = model.serial(np.float32)
    recorder, feed = Recorder(), RowsFeed(LONG, dtype=np.float32)
    mesh = ProcessMesh(comm, data=1, tensor=-1)
    method = DataParallel(mesh["data"], across=mesh["tensor"], precision=precision)
    method.setup(model.divided(mesh["tensor"], np.float32), recorder, plan(1))
    method.advance(feed, 1)
    whole, expected = FlatBuffer(serial.layout), FlatBuffer(serial.layout)
    serial.initialise(whole, Key(SEED).child("init"))
    (batch,) = feed.whole(0)
    key = Key(SEED).child("train").at(0).child("microbatch0")
    _, count = serial.loss_and_gradients(whole, batch, expected, key)
    (found,), layout = recorder.seen(mesh["data"]), method.model.layout
    mine = FlatBuffer(layout)
    mine.flat[...] = found
    off = 0.0
    for each in layout:
        part = expected.views[each.name][tuple(slice(*span) for span in each.box)]
        off += float(np.square(mine.views[each.name] - part / count).sum())
    assert np.sqrt(off) < 8 * ROUNDING[precision.compute] * np.linalg.norm(expected.flat / count)
    mesh.free()


ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@every_half
@pytest.mark.parametrize("kind", ["gpt", "gpt, sequence"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_divide_a_language_model_find_its_gradient(size, kind, precision):
    LocalWorld(size).run(check_language_model, kind, precision)
