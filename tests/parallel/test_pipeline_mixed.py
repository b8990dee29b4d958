"""Mixed precision in pipelines: the steps of one rank, messages of half the bytes, and skips that all axes share."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, RowsFeed, mlp, plan, same_on_all
from parallel_reference import Named, assert_close
from pipeline_cases import CASES, MODELS, Case, StageRecorder, every_case, fits, united
from test_parallel_ledger import spent
from test_parallel_mixed import (
    BOUNDS,
    HALF,
    HALVES,
    SKIPPING,
    Ones,
    Total,
    distance,
    every_half,
    every_slot,
    initial,
    simulated,
)
from test_parallel_state import saved
from test_pipeline_training import LAYERS, TABLE, TIED, WEIGHTS, WIDTH, integer_gradients

from mpitrain import nn
from mpitrain._errors import NonFiniteError
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.data import Dataset, evaluation_batches
from mpitrain.method import Precision
from mpitrain.nn import Network
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import DataParallel, GradientPipelineParallel, PipelineParallel
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.parallel.tensor import divided_network

FEW = {("mlp", "bfloat16", "1f1b"), ("cnn", "float16", "interleaved"), ("gpt", "float16", "zb-h1")}
"""What is tried by default."""

every_model_half_and_case = pytest.mark.parametrize(
    ("name", "half", "case"),
    [
        pytest.param(
            name, half, case, id=f"{name}-{half}-{schedule}",
            marks=() if (name, half, schedule) in FEW else pytest.mark.slow,
        )
        for name in MODELS
        for half in HALVES
        for schedule, case in CASES.items()
    ],
)  # fmt: skip

SCALES = {"mlp": 2.0**16, "cnn": 2.0**15, "gpt": 2.0**14}
"""Of float16: the first steps overflow."""


def precision_of(name: str, half: str) -> Precision:
    scale = {"initial_scale": SCALES[name]} if half == "float16" else {}
    return Precision(compute=half, emulate=True, **scale)


def alone(comm: Communicator, what: Any) -> Any:
    """Return what one rank by itself finds, which is asked once."""
    return comm.broadcast_object(LocalWorld(1).run(what)[0] if comm.rank == 0 else None)


# Against one rank on the same microbatches


def course(method: Synchronous, name: str, steps: int, optimizer: Any) -> list[tuple[float, int, float | None]]:
    """Train; return loss, skipped steps and scale after each step."""
    build, dataset = MODELS[name]
    feed, found = RowsFeed(dataset, dtype=np.float32), []
    method.setup(build(np.float32), optimizer, plan(steps))
    for step in range(steps):
        progress = method.advance(feed, until=step + 1)
        found.append((progress.loss, progress.skipped, progress.loss_scale))
    return found


def check_gradient(comm: Communicator, name: str, half: str, case: Case) -> None:
    """Up to the first step that changes something; of the bits of one rank, but for the sum over tied tensors."""
    if not fits(case, MODELS[name][0](), comm.size):
        return
    options, precision, steps = case.options(comm.size), precision_of(name, half), 4
    recorder = StageRecorder()
    method = PipelineParallel(comm, precision=precision, **options)
    found = course(method, name, steps, recorder)

    def expect(one: Communicator) -> Any:
        serial = StageRecorder()
        method = DataParallel(one, precision=precision, microbatches=options["microbatches"])
        return course(method, name, steps, serial), serial.seen

    expected, gradients_of = alone(comm, expect)
    np.testing.assert_array_equal(np.array(found, float), np.array(expected, float))
    assert (0 < found[-1][1] < steps) if half == "float16" else found[-1][1] == 0
    assert recorder.seen.keys() == gradients_of.keys()
    for step, gradients in gradients_of.items():
        whole = united(comm, recorder.seen[step])
        assert whole.keys() == gradients.keys()
        for tensor in gradients.keys() - TIED:
            np.testing.assert_array_equal(whole[tensor], gradients[tensor], err_msg=tensor)
        # rows of a table are added in float32, stage by stage: in 16 bits this would be off by 5e-4
        assert_close(whole, gradients, 1e-6)
    same_on_all(comm, str(found))


@every_model_half_and_case
def test_losses_gradients_and_skips_are_those_of_one_rank(on_ranks, name, half, case):
    on_ranks(check_gradient, name, half, case)


def check_weights(comm: Communicator, case: Case, half: str) -> None:
    """Where no tensor is tied, five steps of Adam leave the bits of one rank."""
    options, precision = case.options(comm.size), precision_of("cnn", half)
    method = PipelineParallel(comm, precision=precision, **options)
    found = course(method, "cnn", 5, make_optimizer("adam"))

    def expect(one: Communicator) -> Any:
        method = DataParallel(one, precision=precision, microbatches=options["microbatches"])
        losses = course(method, "cnn", 5, make_optimizer("adam"))
        walk = evaluation_batches(IMAGES, 4, dtype=np.float32)
        return losses, method.weights_sha256(), saved(one, method), method.evaluate(walk)["loss"]

    losses, sha256, state, loss = alone(comm, expect)
    np.testing.assert_array_equal(np.array(found, float), np.array(losses, float))
    assert method.weights_sha256() == sha256
    scalars, tensors = saved(comm, method)
    assert scalars == state[0]
    assert tensors.keys() == state[1].keys()
    for name, array in state[1].items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    # of the float32 parameters: in 16 bits it would be another
    walk = evaluation_batches(IMAGES, 4, comm.rank, comm.size, np.float32)
    assert method.evaluate(walk)["loss"] == pytest.approx(loss, rel=1e-6)
    assert method.predict(IMAGES.inputs[:3].astype(np.float32)).dtype == np.float32


@pytest.mark.parametrize(("schedule", "half"), [("1f1b", "float16"), ("zb-h1", "bfloat16")])
def test_weights_states_and_metrics_are_those_of_one_rank(on_ranks, schedule, half):
    on_ranks(check_weights, CASES[schedule], half)


def check_simulation(comm: Communicator, precision: Precision) -> None:
    mesh = ProcessMesh(comm, data=comm.size // 2, pipe=2) if comm.size % 2 == 0 else ProcessMesh(comm, pipe=comm.size)
    expected, skipped = simulated(precision, 20, 0.25)
    method = PipelineParallel(mesh, precision=precision, microbatches=3, schedule="zb-h1")
    method.setup(mlp(np.float32), SGD(), plan(20, schedule=lambda step: 0.25))
    assert method.advance(RowsFeed(IMAGES, dtype=np.float32), 20).skipped == skipped
    relative = distance(expected, united(comm, method.params.views)) / distance(expected, initial())
    assert relative < BOUNDS[precision.compute]  # each microbatch and pipeline rounds its own gradient
    mesh.free()


@pytest.mark.parametrize("precision", [Precision(**SKIPPING), HALVES["bfloat16"]], ids=HALVES)
def test_training_is_a_serial_simulation_but_for_rounding(on_ranks, precision):
    on_ranks(check_simulation, precision)


# Exact steps


def check_integers(comm: Communicator, case: Case) -> None:
    """Activations, gradients and their products with the scale are small integers, which float16 has."""
    if comm.size * case.chunks > LAYERS:
        return
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    precision = Precision(compute="float16", emulate=True, initial_scale=4.0)
    method = PipelineParallel(comm, precision=precision, **case.options(comm.size))
    method.setup(Network(layers, nn.MeanSquaredError()), SGD(), plan(1, schedule=lambda step: 0.25))
    method.load_parameters({f"params/{n}.weight": w.astype("f4") for n, w in enumerate(WEIGHTS)}.__getitem__)
    assert method.advance(RowsFeed(TABLE, 8, dtype=np.float32), until=1).skipped == 0
    found = united(comm, method.params.views)
    for number, gradient in enumerate(integer_gradients()):
        np.testing.assert_array_equal(found[f"{number}.weight"], WEIGHTS[number] - 0.25 * gradient / 8)


@every_case
def test_integers_are_exact(on_ranks, case):
    on_ranks(check_integers, case)


def weight_and(comm: Communicator, inputs: list[float], targets: list[float]) -> tuple[Network, RowsFeed]:
    """y = w x through as many stages as there are ranks; the loss is −Σ y t, of positive y."""
    dataset = Dataset(np.array(inputs)[:, None], np.array(targets)[:, None], "regression", "exact")
    layers = nn.Sequential(Ones(1, 1, bias=False), *(nn.ReLU() for _ in range(comm.size - 1)))
    return Network(layers, Total()), RowsFeed(dataset, len(inputs), dtype=np.float32)


def weight(comm: Communicator, method: PipelineParallel) -> float:
    return float(united(comm, method.params.views)["0.weight"][0, 0])


def check_overflow(comm: Communicator) -> None:
    """One microbatch's gradient, on the first stage alone, overflows down to a scale of 2⁻²; the others' are 0."""
    network, feed = weight_and(comm, [2.0**10, 1, 1, 1], [2.0**8, 0, 0, 0])
    precision = Precision(compute="float16", emulate=True, initial_scale=1.0)
    method = PipelineParallel(comm, microbatches=4, precision=precision)
    method.setup(network, make_optimizer("momentum"), plan(9, schedule=lambda step: 2.0**-18))
    before = every_slot(method)
    for step, scale in enumerate([0.5, 0.25, 0.125], start=1):
        progress = method.advance(feed, step)
        assert (progress.skipped, progress.loss_scale, progress.samples) == (step, scale, 0)
        assert np.isnan(progress.loss)
        assert every_slot(method) == before
    progress = method.advance(feed, 4)
    assert (progress.skipped, progress.loss_scale, progress.samples) == (3, 0.125, 4)
    assert weight(comm, method) == 1 + 1 / 4
    same_on_all(comm, (method.step, method.skipped, method.loss_scale))


def test_an_overflow_on_one_stage_makes_all_skip_the_step(on_ranks):
    on_ranks(check_overflow)


def check_accumulation(comm: Communicator, precision: Precision) -> None:
    """Microbatches of gradient 2048 and then 1, 1, 1 …: in 16 bits the ones would be lost."""
    network, feed = weight_and(comm, [1.0] * 8, [2048.0, 1, 1, 1, 1, 1, 1, 1])
    method = PipelineParallel(comm, precision=precision, microbatches=8)
    method.setup(network, SGD(), plan(1, schedule=lambda step: 8.0))
    method.advance(feed, 1)
    assert weight(comm, method) == 1 + 2048 + 7


@pytest.mark.parametrize(
    "precision",
    [Precision(compute="float16", emulate=True, initial_scale=16.0), HALVES["bfloat16"]],
    ids=HALVES,
)
def test_gradients_of_microbatches_are_added_in_float32(on_ranks, precision):
    on_ranks(check_accumulation, precision)


class Embeds(nn.Sequential):
    """A table that embeds on the first stage and unembeds on the last."""

    def __init__(self, between: int) -> None:
        layers: dict[str, nn.Layer] = {f"relu{number}": nn.ReLU() for number in range(between)}
        super().__init__(embed=nn.Embedding(2, 1), **layers, head=nn.Unembedding(2, 1))

    def ties(self) -> dict[str, str]:
        return {"head.weight": "embed.weight"}


class SumOfScores(Total):
    """Minus the sum of all scores of a sample times its targets."""

    def check(self, outputs_shape: tuple[int, ...], targets: np.ndarray) -> None:
        assert np.prod(outputs_shape) == targets.size

    def evaluate(self, outputs: np.ndarray, targets: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        gradient[...] = -targets.reshape(outputs.shape)
        return (outputs * gradient).sum(axis=(1, 2))


def check_tied(comm: Communicator) -> None:
    """Of token 0 in a table of ones: the head's gradient is −t, and the embedding's −(t₀ + t₁)."""
    tokens, targets = np.zeros((1, 1), np.int64), np.array([[2048.0, -2047.0]])
    recorder = StageRecorder()
    precision = Precision(compute="float16", emulate=True, initial_scale=1.0)
    method = PipelineParallel(comm, precision=precision, costs=[1] * (comm.size + 1))
    method.setup(Network(Embeds(comm.size - 1), SumOfScores()), recorder, plan(1))
    method.load_parameters({"params/embed.weight": np.ones((2, 1), np.float32)}.__getitem__)
    method.advance(RowsFeed(Dataset(tokens, targets, "regression", "tied", tokens=True), 1, dtype=np.float32), until=1)
    found = united(comm, recorder.seen[1])["embed.weight"]
    assert found.tolist() == [[-2048.0 - 1.0], [2047.0]]  # 2049 is none of float16's numbers


def test_gradients_of_a_tied_tensor_are_added_in_float32(on_ranks):
    on_ranks(check_tied)


# What is sent


def check_bytes(comm: Communicator, case: Case, precision: Precision | None) -> None:
    """Of each row two values a boundary, forward and back; what is evaluated goes forward, in float32."""
    if comm.size * case.chunks > LAYERS:
        return
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    feed, steps = RowsFeed(TABLE, 7, dtype=np.float32), 3  # batches of seven and of one
    method = PipelineParallel(comm, precision=precision, **case.options(comm.size))
    method.setup(Network(layers, nn.MeanSquaredError()), SGD(), plan(steps, schedule=lambda step: 2.0**-9))
    boundaries = comm.size * case.chunks - 1 if comm.size > 1 else 0
    rows, itemsize = 7 + 1 + 7, 2 if precision else 4

    def sent(work: Any) -> tuple[int, int]:
        found = spent(comm, work).get("isend")
        own = (found.calls, found.logical_bytes) if found else (0, 0)
        calls, nbytes = np.sum(comm.allgather_object(own), axis=0).tolist()
        return calls, nbytes

    messages = 2 * boundaries * method.microbatches * steps
    assert sent(lambda: method.advance(feed, steps)) == (messages, 2 * boundaries * rows * WIDTH * itemsize)
    walk = evaluation_batches(TABLE, 8, comm.rank, comm.size, np.float32)
    assert sent(lambda: method.evaluate(walk))[1] == boundaries * len(TABLE) * WIDTH * 4


@every_case
@pytest.mark.parametrize("precision", [HALF, None], ids=["float16", "float32"])
def test_stages_exchange_half_the_bytes(on_ranks, case, precision):
    on_ranks(check_bytes, case, precision)


# All axes


class Overflows(nn.Linear):
    """Its gradient is infinite on one rank of all."""

    bad = False

    def backward_weight(self, grads: Any, context: Any, dy: Any, call: Any) -> None:
        super().backward_weight(grads, context, dy, call)
        if self.bad:
            grads["bias"][...] = np.inf


def check_any_axis(comm: Communicator, made: Any) -> None:
    mesh = ProcessMesh(comm, data=2, pipe=2, tensor=2)
    for bad in range(comm.size):
        layers = nn.Sequential(nn.Flatten(), Overflows(32, 3), nn.Tanh(), Overflows(3, 3))
        for layer in layers.layers[1::2]:
            layer.bad = bad == comm.rank
        method = made(mesh, precision=HALF, microbatches=2)
        method.setup(Network(layers, nn.CrossEntropy()), make_optimizer("adam"), plan(2))  # no tensor is divided
        before = every_slot(method)
        progress = method.advance(RowsFeed(IMAGES, dtype=np.float32), 1)
        assert (progress.skipped, progress.loss_scale) == (1, HALF.initial_scale / 2)
        assert every_slot(method) == before
    mesh.free()


every_pipeline = pytest.mark.parametrize("made", [PipelineParallel, GradientPipelineParallel])


@every_pipeline
def test_wherever_a_gradient_overflows_the_ranks_of_all_axes_skip(made):
    LocalWorld(8, timeout_s=20).run(check_any_axis, made)


def check_all_axes(comm: Communicator, made: Any) -> None:
    """Pipelines whose stages are divided train as the simulation of one rank."""
    mesh = ProcessMesh(comm, data=-1, pipe=2, tensor=2)
    layer = nn.MODELS["mlp"](32, 3, hidden=[5], activation="tanh")
    method = made(mesh, precision=Precision(**SKIPPING), microbatches=2)
    network = divided_network(layer, nn.CrossEntropy(), mesh["tensor"])
    method.setup(network, SGD(), plan(20, schedule=lambda step: 0.25))
    progress = method.advance(RowsFeed(IMAGES, dtype=np.float32), 20)
    expected, skipped = simulated(Precision(**SKIPPING), 20, 0.25)
    assert progress.skipped == skipped
    same_on_all(comm, (progress.skipped, progress.loss_scale, progress.loss, method.weights_sha256()))
    start, whole = initial(), method.whole()
    for each in whole.layout:
        box = tuple(slice(*span) for span in each.box)
        off = np.linalg.norm(expected[each.name][box] - whole.views[each.name])
        assert off < BOUNDS["float16"] * distance(expected, start)
    mesh.free()


@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.slow)])
@every_pipeline
def test_stages_that_are_divided_train_alike(size, made):
    LocalWorld(size, timeout_s=20).run(check_all_axes, made)


# Ends and states


def check_no_scaler(comm: Communicator) -> None:
    network, feed = weight_and(comm, [1, 1, 1], [float("inf"), 1, 1])
    method = PipelineParallel(comm, precision=HALVES["bfloat16"])
    method.setup(network, SGD(), plan(9))
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="gradient of step 1 is not finite") as caught:
        method.advance(feed, 9)
    same_on_all(comm, str(caught.value))


def test_bfloat16_skips_nothing(on_ranks):
    on_ranks(check_no_scaler)


def check_end(comm: Communicator) -> None:
    network, feed = weight_and(comm, [1, 1, 1, 1], [float("inf"), 1, 1, 1])
    method = PipelineParallel(comm, precision=Precision(compute="float16", emulate=True, most_skips=3))
    method.setup(network, SGD(), plan(9))
    with pytest.raises(NonFiniteError, match="3 steps in a row, up to step 3"):
        method.advance(feed, 9)
    assert weight(comm, method) == 1


def test_what_no_scale_can_mend_ends_all_ranks(on_ranks):
    on_ranks(check_end)


def resumed(comm: Communicator, writer: Any, reader: Any) -> None:
    """From step 3 on, with the scale and the skips of then: the bits of a run that was not interrupted."""
    precision = Precision(compute="float16", emulate=True, initial_scale=2.0**17, growth_interval=2)
    feed, adam = RowsFeed(IMAGES, dtype=np.float32), make_optimizer("adam")

    def trained(comm: Communicator, make: Any, until: int, start: Any = None) -> tuple[Any, Named]:
        method = make(comm, precision=precision, microbatches=3)
        method.setup(mlp(np.float32), adam, plan(8))
        if start is not None:
            method.load(start[0], {name: array.astype(np.float32) for name, array in start[1].items()}.__getitem__)
        method.advance(feed, until)
        return saved(comm, method)

    def of(make: Any, *args: Any) -> tuple[Any, Named]:
        if make is DataParallel:  # on one rank, which has the bits
            return alone(comm, lambda one: trained(one, make, *args))
        return trained(comm, make, *args)

    half_way, expected = of(writer, 4), of(writer, 8)
    assert 0 < half_way[0]["skipped"] < expected[0]["skipped"]
    found = of(reader, 8, half_way)
    assert found[0] == expected[0]
    for name, array in expected[1].items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)


ZB = partial(PipelineParallel, schedule="zb-h1")


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        (PipelineParallel, ZB),
        (PipelineParallel, DataParallel),
        (DataParallel, ZB),
        (DataParallel, GradientPipelineParallel),
    ],
    ids=["pipeline-zb", "pipeline-data", "data-zb", "data-gradient"],
)
def test_a_run_that_is_resumed_goes_on_with_its_scale_and_skips(on_ranks, writer, reader):
    on_ranks(resumed, writer, reader)


@every_half
def test_each_rank_keeps_float32_parameters_and_a_rounded_copy_of_its_stages_alone(precision):
    def check(comm: Communicator) -> None:
        made: list[tuple[int, str]] = []

        def allocate(size: int, dtype: Any) -> np.ndarray:
            made.append((size, dtype.name))
            return np.zeros(size, dtype)

        method = PipelineParallel(comm, precision=precision, allocator=allocate)
        method.setup(mlp(np.float32), SGD(), plan(1))
        own = method.params.layout.size
        assert own < method.model.layout.size
        assert sorted(made) == sorted([(0, "float32"), (own, "float32"), (own, "float32"), (own, precision.compute)])

    LocalWorld(2).run(check)
