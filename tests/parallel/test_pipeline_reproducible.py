"""Reproducible pipelines: the bits of one data-parallel rank, whatever the stages, schedule and number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, TEXT, KeptKeys, RowsFeed, cnn, gpt, mlp, plan, same_on_all
from pipeline_cases import CASES, Case, fits, united
from test_parallel_mixed import BOUNDS, SKIPPING, distance, initial, simulated
from test_pipeline_gradient import mesh_of

from mpitrain import nn
from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import Batch, Layout
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.data import evaluation_batches
from mpitrain.method import Precision, tiles
from mpitrain.nn.containers import Sequential
from mpitrain.nn.cutting import units
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import (
    DataParallel,
    LaneSteps,
    ReproducibleDataParallel,
    ReproducibleGradientParallel,
    ReproducibleGradientPipelineParallel,
    ReproduciblePipelineParallel,
)

LANES, STEPS = 4, 5
"""Of a batch of seven rows, lanes have two or one; of the next, which has three, the last has none."""

CLIP = 0.2


class ThreeUses(Sequential):
    """A table that embeds, unembeds, and embeds what it unembedded once more: uses on up to three ranks."""

    def __init__(self) -> None:
        super().__init__(
            embed=nn.Embedding(4, 8, std=0.3), norm=nn.LayerNorm(8), up=nn.Unembedding(4, 8, std=0.3), act=nn.GELU(),
            down=nn.Linear(4, 8), head=nn.Unembedding(4, 8),
        )  # fmt: skip

    def ties(self) -> dict[str, str]:
        return {"up.weight": "head.weight", "embed.weight": "head.weight"}  # not the first in the layout


def three_uses(dtype: Any = np.float64) -> KeptKeys:
    return KeptKeys(ThreeUses(), nn.CrossEntropy(), dtype)


MODELS = {
    "cnn": (partial(cnn, np.float32), RowsFeed(dtype=np.float32)),
    "gpt": (partial(gpt, np.float32), RowsFeed(TEXT, dtype=np.float32)),
    "gpt, float64": (gpt, RowsFeed(TEXT)),
    "three uses": (three_uses, RowsFeed(TEXT)),
}

FEW = {
    ("cnn", "1f1b", 1, "adam"),
    ("gpt", "zb-h1", 2, "lamb"),
    ("gpt, float64", "interleaved", 1, "adam"),
    ("three uses", "gpipe", 1, "adam"),
}
"""What is tried by default."""


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a tensor."""
    monkeypatch.setattr(tiles, "TILE_SIZE", 16)


def outcome(method: LaneSteps, model: str, optimizer: str) -> tuple[str, float, dict[str, bytes]]:
    """Train; return a hash of the weights, the mean loss of all steps, and the bytes of the metrics."""
    build, feed = MODELS[model]
    method.setup(build(), make_optimizer(optimizer, weight_decay=0.01), plan(STEPS, clip_norm=CLIP))
    progress = method.advance(feed, until=STEPS)
    walks = [evaluation_batches(feed.dataset, 4, *share, feed.dtype) for share in method.evaluation_shares]
    metrics = method.evaluate(batch for batches in zip(*walks, strict=True) for batch in batches)
    return method.weights_sha256(), progress.loss, {name: np.asarray(each).tobytes() for name, each in metrics.items()}


def serial(model: str, optimizer: str, microbatches: int) -> tuple[str, float, dict[str, bytes]]:
    def train(one: Communicator) -> Any:
        return outcome(ReproducibleDataParallel(one, lanes=LANES, microbatches=microbatches), model, optimizer)

    return LocalWorld(1).run(train)[0]


def check_bits(comm: Communicator, case: Case, model: str, optimizer: str, microbatches: int) -> None:
    if not fits(case, MODELS[model][0](), comm.size) or (case.chunks > 1 and LANES * microbatches % comm.size):
        return
    method = ReproduciblePipelineParallel(
        comm, lanes=LANES, schedule=case.schedule, chunks=case.chunks, microbatches=microbatches
    )
    found = outcome(method, model, optimizer)
    same_on_all(comm, found)
    assert found == serial(model, optimizer, microbatches)


@pytest.mark.parametrize(
    ("model", "schedule", "microbatches", "optimizer"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in (
            (model, schedule, microbatches, optimizer)
            for model in MODELS
            for schedule in CASES
            for microbatches in (1, 2)
            for optimizer in ("adam", "lamb")
        )
    ],
)
def test_weights_losses_and_metrics_have_the_bits_of_one_rank(on_ranks, model, schedule, microbatches, optimizer):
    on_ranks(check_bits, CASES[schedule], model, optimizer, microbatches)


def check_half(comm: Communicator, model: str, compute: str) -> None:
    """Tied tensors and LAMB's norms too; of float16, the first steps overflow in some lane."""
    scale = {"initial_scale": 2.0**15, "growth_interval": 1} if compute == "float16" else {}
    precision = Precision(compute=compute, emulate=True, **scale)

    def found(where: Any, make: Any) -> Any:
        method = make(where, lanes=LANES, precision=precision)
        return (*outcome(method, model, "lamb"), method.skipped, method.loss_scale)

    expected = LocalWorld(1).run(found, ReproducibleDataParallel)[0]
    assert (0 < expected[-2] < STEPS) if compute == "float16" else expected[-1] is None
    for make in (ReproducibleDataParallel, ReproducibleGradientParallel, ReproduciblePipelineParallel):
        assert found(comm, make) == expected
    mesh = mesh_of(comm)
    assert found(mesh, ReproducibleGradientPipelineParallel) == expected
    mesh.free()


@pytest.mark.parametrize(
    ("model", "compute"),
    [("cnn", "float16"), ("gpt", "bfloat16"), pytest.param("gpt", "float16", marks=pytest.mark.slow)],
)
def test_so_have_those_of_passes_in_16_bits(on_ranks, model, compute):
    on_ranks(check_half, model, compute)


def check_simulation(comm: Communicator, make: Any) -> None:
    """Lanes whose losses are scaled, and steps that are skipped, lead where one rank's whole batches do."""
    expected, skipped = simulated(Precision(**SKIPPING), 20, 0.25)
    method = make(comm, lanes=LANES, precision=Precision(**SKIPPING))
    method.setup(mlp(np.float32), SGD(), plan(20, schedule=lambda step: 0.25))
    assert method.advance(RowsFeed(dtype=np.float32), 20).skipped == skipped > 0
    found = united(comm, (method.params if make is ReproduciblePipelineParallel else method.whole()).views)
    assert distance(expected, found) < BOUNDS["float16"] * distance(expected, initial())


@pytest.mark.parametrize("make", [ReproducibleDataParallel, ReproducibleGradientParallel, ReproduciblePipelineParallel])
def test_training_in_16_bits_is_a_serial_simulation_but_for_rounding(on_ranks, make):
    on_ranks(check_simulation, make)


@pytest.mark.parametrize("model", ["cnn", "gpt", "three uses"])
def test_the_bits_are_the_same_wherever_the_model_is_cut(model):
    """Tied tensors lie on one stage or on two, and norms are of other parts of the model."""

    def train(comm: Communicator, cut: int) -> Any:
        return outcome(ReproduciblePipelineParallel(comm, lanes=LANES, cuts=[cut]), model, "lamb")

    expected, count = serial(model, "lamb", 1), len(units(MODELS[model][0]().layer))
    for cut in (1, count // 2, count - 1):
        assert LocalWorld(2, timeout_s=20).run(train, cut) == [expected] * 2, cut


Made = type[ReproduciblePipelineParallel]

every_pipeline = pytest.mark.parametrize("made", [ReproduciblePipelineParallel, ReproducibleGradientPipelineParallel])


def check_mesh(comm: Communicator, made: Made, lanes: int, models: Sequence[str]) -> None:
    """Pipelines with as many lanes each, or not."""
    mesh = ProcessMesh(comm, data=2, pipe=2)
    for model in models:
        found = outcome(made(mesh, lanes=lanes), model, "lamb")
        (expected,) = LocalWorld(1).run(
            lambda one, model=model: outcome(ReproducibleDataParallel(one, lanes=lanes), model, "lamb")
        )
        same_on_all(comm, found)
        assert found == expected
    mesh.free()


@every_pipeline
@pytest.mark.parametrize("lanes", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_so_have_those_of_several_pipelines(made, lanes):
    LocalWorld(4, timeout_s=20).run(check_mesh, made, lanes, ["cnn", "gpt", "three uses"])


@pytest.mark.mpi
@every_pipeline
def test_so_have_those_of_several_pipelines_over_mpi(world, made):
    if world.size == 4:
        check_mesh(world, made, 3, ["cnn", "gpt"])


@pytest.mark.parametrize(("data", "pipe"), [(1, 3), (3, 2)])
def test_so_have_those_that_divide_optimizer_state_on_other_meshes(data: int, pipe: int):
    """One pipeline, which keeps all of it, and three, of which some of a tensor's tiles go to none."""

    def train(comm: Communicator) -> Any:
        mesh = ProcessMesh(comm, data=data, pipe=pipe)
        return outcome(ReproducibleGradientPipelineParallel(mesh, lanes=LANES, schedule="zb-h1"), "gpt", "adam")

    assert LocalWorld(data * pipe, timeout_s=20).run(train) == [serial("gpt", "adam", 1)] * (data * pipe)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_gradient_parallel_run_adds_the_uses_of_a_tensor_in_the_same_order(ranks):
    def train(comm: Communicator) -> Any:
        return outcome(ReproducibleGradientParallel(comm, lanes=LANES), "three uses", "adam")

    assert LocalWorld(ranks).run(train)[0] == serial("three uses", "adam", 1)


def check_any_batches(comm: Communicator) -> None:
    """One batch a rank, not by lane."""
    method = ReproduciblePipelineParallel(comm, lanes=2)
    plain = DataParallel(comm)
    for each in (method, plain):
        each.setup(mlp(), SGD(), plan(1))
    batches = list(evaluation_batches(IMAGES, 4, comm.rank, comm.size, np.float64))
    found, expected = method.evaluate(batches), plain.evaluate(batches)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-14)
    assert found["confusion"].tolist() == expected["confusion"].tolist()
    with pytest.raises(InputError, match="nothing to evaluate"):
        method.evaluate([])


def test_other_batches_are_evaluated_too(on_ranks):
    on_ranks(check_any_batches)


def test_one_pipeline_makes_no_communicator_that_would_have_to_be_freed(monkeypatch):
    monkeypatch.setattr(Communicator, "split", lambda *_, **__: pytest.fail("a communicator was made"))

    def make(comm: Communicator) -> None:
        ReproduciblePipelineParallel(comm, lanes=LANES).setup(mlp(), SGD(), plan(1))

    LocalWorld(2).run(make)


NUMBERS = [(1e16, 1.0), (3.0, 5.0), (-1e16, 1.0), (1.0, 3.0)]
"""Of each lane those of two batches: float addition gives another sum in nearly every other order."""


def check_order(comm: Communicator) -> None:
    method = ReproduciblePipelineParallel(ProcessMesh(comm, data=2, pipe=2) if comm.size == 4 else comm, lanes=LANES)
    method.setup(mlp(), SGD(), plan(1))

    def sums(batches: list[Batch]) -> list[dict[str, np.ndarray]]:
        is_last = method.pipe.rank == method.pipe.size - 1
        return [{"loss": np.array(NUMBERS[lane][turn])} for lane, turn in (b.index for b in batches)] if is_last else []

    method._evaluator.sums = lambda batches, params: sums(batches)  # type: ignore[method-assign]
    method.model.metrics = dict  # type: ignore[method-assign, assignment]
    own = [lane for lane, _ in method.evaluation_shares]
    batches = [Batch(np.zeros(2), np.zeros(2), np.array([lane, turn])) for turn in (0, 1) for lane in own]
    totals = [a + b for a, b in NUMBERS]
    assert method.evaluate(batches) == {"loss": ((totals[0] + totals[1]) + totals[2]) + totals[3]}


def test_numbers_are_added_by_lane_and_in_their_order(on_ranks):
    on_ranks(check_order)


class Explodes(nn.Linear):
    """Gives an infinite gradient, and a finite loss."""

    def backward_weight(self, grads: Any, context: Any, dy: Any, call: Any) -> None:
        super().backward_weight(grads, context, dy, call)
        grads["bias"][0] = np.inf


def check_not_finite(comm: Communicator) -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), Explodes(5, 3), nn.Tanh(), nn.Linear(3, 3))
    method = ReproduciblePipelineParallel(comm, lanes=2)
    method.setup(KeptKeys(layers, nn.CrossEntropy()), SGD(), plan(1))
    before = method.weights_sha256()
    with pytest.raises(NonFiniteError, match=r"of step 1 is not finite; .*tensors: 3\.bias") as caught:
        method.advance(RowsFeed(), until=1)
    same_on_all(comm, str(caught.value))
    assert (method.step, method.weights_sha256()) == (0, before)


def test_a_gradient_that_is_not_finite_ends_all_ranks():
    LocalWorld(3, timeout_s=20).run(check_not_finite)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": 4, "pipe": 1}, "more pipelines than lanes; got 4 pipelines, 3 lanes; expected a lane for each"),
        ({"pipe": 2, "tensor": 2}, "matrices of other shapes have other bits; got tensor=2; expected the axes pipe"),
    ],
)
def test_what_cannot_be_is_said(axes: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        LocalWorld(4, timeout_s=5).run(lambda comm: ReproduciblePipelineParallel(ProcessMesh(comm, **axes), lanes=3))


def test_a_layout_whose_names_have_places_of_their_own():
    layout = three_uses(np.float32).layout
    assert layout.untied(()) is not layout
    assert layout.untied(()).ties == layout.ties
    wide: Layout = layout.untied(["up.weight"])
    assert wide.ties == {"embed.weight": "head.weight"}
    assert wide.segments[: len(layout)] == layout.segments
    assert (wide["up.weight"].offset, wide["up.weight"].shape) == (layout.size, (4, 8))
    assert wide.size == layout.size + 32
