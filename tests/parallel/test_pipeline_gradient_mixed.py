"""16 bits where pipelines divide optimizer state: the bits of pipelines that do not, and who gathers and keeps what."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, TEXT, RowsFeed, gpt, mlp, plan, same_on_all
from parallel_reference import assert_close
from pipeline_cases import MODELS, united
from test_parallel_mixed import BOUNDS, HALF, HALVES, SKIPPING, distance, initial, simulated
from test_parallel_state import Saved, bits, saved
from test_pipeline_gradient import CASES, is_common, mesh_of
from test_pipeline_mixed import course, precision_of

from mpitrain.comm import Communicator, Count, LocalWorld, ProcessMesh
from mpitrain.data import evaluation_batches
from mpitrain.method import Precision
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import DataParallel, GradientParallel, GradientPipelineParallel, PipelineParallel

STEPS = 5


# Against pipelines whose ranks each keep everything: of two, sums over data are exact in any order


def trained(comm: Communicator, method: PipelineParallel, name: str, optimizer: str = "adam") -> tuple[Any, ...]:
    """Train; return loss, skips and scale of each step, and the state, hash, metrics and predictions at the end."""
    steps, dataset = course(method, name, STEPS, make_optimizer(optimizer)), MODELS[name][1]
    walk = evaluation_batches(dataset, 4, comm.rank, comm.size, np.float32)
    outputs = method.predict(dataset.inputs[:3])
    assert outputs.dtype == np.float32
    return steps, saved(comm, method), method.weights_sha256(), method.evaluate(walk), outputs


def check_bits(comm: Communicator, name: str, half: str) -> None:
    mesh, precision = mesh_of(comm), precision_of(name, half)
    options = CASES[name].options(mesh.shape["pipe"])
    method = GradientPipelineParallel(mesh, precision=precision, **options)
    found = trained(comm, method, name)
    expected = trained(comm, PipelineParallel(mesh, precision=precision, **options), name)
    np.testing.assert_equal(found, expected)
    skipped = found[0][-1][1]
    assert (0 < skipped < STEPS) if half == "float16" else skipped == 0
    assert method.params.layout.dtype == precision.dtype
    assert {each.params.dtype for each in method.parts} == {np.dtype(np.float32)}
    if method.params.layout.size:  # a stage may have nothing to train
        assert is_common(method) == (method.data.transport == "shared" and method.data.size > 1)
    same_on_all(comm, bits(found[1][1]))
    mesh.free()


def every_model_and_half(*by_default: tuple[str, str]) -> pytest.MarkDecorator:
    cases = [(name, half) for name in MODELS for half in HALVES]
    marked = [pytest.param(*case, marks=() if case in by_default else pytest.mark.slow) for case in cases]
    return pytest.mark.parametrize(("name", "half"), marked)


@every_model_and_half(("gpt", "float16"), ("cnn", "bfloat16"))
def test_weights_states_and_metrics_are_those_of_pipelines_that_divide_nothing(name, half):
    LocalWorld(4, timeout_s=20).run(check_bits, name, half)


@pytest.mark.mpi
@every_model_and_half(("gpt", "float16"))
def test_so_they_are_over_mpi(world, name, half):
    check_bits(world, name, half)


@pytest.mark.mpi
@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [{"MPITRAIN_RANKS_PER_NODE": "2"}, {"MPITRAIN_TRANSPORT": "host"}],
    ids=["a node for each pipeline", "ordinary memory"],
)
def test_so_they_are_wherever_memory_lies(world, mode, monkeypatch):
    for name, value in mode.items():
        monkeypatch.setenv(name, value)
    with world.split(0, axis="world") as comm:
        check_bits(comm, "gpt", "float16")


def check_norms(comm: Communicator, name: str) -> None:
    """The way of the first update: the clipped norm and LAMB's are sums of other terms, of float32's rounding."""
    mesh, ways = mesh_of(comm), []
    for made in (GradientPipelineParallel, PipelineParallel):
        method = made(mesh, precision=HALVES["bfloat16"], **CASES["gpt"].options(mesh.shape["pipe"]))
        method.setup(gpt(np.float32), make_optimizer(name), plan(1, clip_norm=0.05))
        start = united(comm, {name: view.copy() for name, view in method.whole().views.items()})
        method.advance(RowsFeed(TEXT, dtype=np.float32), 1)
        ways.append({name: view - start[name] for name, view in united(comm, method.whole().views).items()})
    scale = max(np.abs(way).max() for way in ways[1].values())
    assert scale > 0
    assert_close({n: way / scale for n, way in ways[0].items()}, {n: way / scale for n, way in ways[1].items()}, 1e-4)
    mesh.free()


@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_norms_are_those_of_the_whole_model(name):
    LocalWorld(4, timeout_s=20).run(check_norms, name)


# Against one rank


def check_simulation(comm: Communicator, precision: Precision) -> None:
    mesh = mesh_of(comm)
    expected, skipped = simulated(precision, 20, 0.25)
    method = GradientPipelineParallel(mesh, precision=precision, microbatches=3)
    method.setup(mlp(np.float32), SGD(), plan(20, schedule=lambda step: 0.25))
    assert method.advance(RowsFeed(IMAGES, dtype=np.float32), 20).skipped == skipped
    relative = distance(expected, united(comm, method.whole().views)) / distance(expected, initial())
    assert relative < BOUNDS[precision.compute]  # each microbatch and pipeline rounds its own gradient
    mesh.free()


@pytest.mark.parametrize("precision", [Precision(**SKIPPING), HALVES["bfloat16"]], ids=HALVES)
def test_training_is_a_serial_simulation_but_for_rounding(on_ranks, precision):
    on_ranks(check_simulation, precision)


# States


def half_way(comm: Communicator, method: Any, until: int, start: Saved | None = None) -> Saved:
    method.setup(gpt(np.float32), make_optimizer("adam"), plan(8))
    if start is not None:
        method.load(start[0], {name: array.astype(np.float32) for name, array in start[1].items()}.__getitem__)
    method.advance(RowsFeed(TEXT, dtype=np.float32), until)
    return saved(comm, method)


def check_state(comm: Communicator) -> None:
    """Other methods and meshes begin with what was saved, to the bit; on the same mesh they go on to the same bits."""
    mesh, side_by_side = mesh_of(comm), ProcessMesh(comm, data=-1, pipe=1)
    options: dict[str, Any] = {
        "precision": Precision(compute="float16", emulate=True, initial_scale=2.0**15, growth_interval=2),
        "microbatches": 2,
    }
    start = half_way(comm, GradientPipelineParallel(mesh, **options), 4)
    expected = half_way(comm, GradientPipelineParallel(mesh, **options), 8)
    assert 0 < start[0]["skipped"] < 4
    for made, where in [
        (GradientPipelineParallel, comm),
        (GradientPipelineParallel, side_by_side),
        (GradientParallel, comm),
        (DataParallel, comm),
    ]:
        np.testing.assert_equal(half_way(comm, made(where, **options), 4, start), start)
    for made in (GradientPipelineParallel, PipelineParallel):
        np.testing.assert_equal(half_way(comm, made(mesh, **options), 8, start), expected)
    mesh.free()
    side_by_side.free()


def test_a_run_goes_on_on_another_mesh_with_its_scale_and_skips():
    LocalWorld(4, timeout_s=20).run(check_state)


@pytest.mark.mpi
@pytest.mark.slow
def test_so_it_does_over_mpi(world):
    check_state(world)


# What is sent and kept


def counts(comm: Communicator, work: Any) -> dict[tuple[str, str], Count]:
    """The arrays that are sent while ``work`` is done, by axis and operation."""
    comm.ledger.reset()
    work()
    return {key: each for key, each in comm.ledger.snapshot().items() if each.calls and not key[1].endswith("object")}


def check_bytes(comm: Communicator) -> None:
    """Messages and gathered parameters of half of float32's bytes; evaluations gather float32 ones first."""
    mesh, feed, steps = mesh_of(comm), RowsFeed(TEXT, dtype=np.float32), 3
    walk = list(evaluation_batches(TEXT, 4, comm.rank, comm.size, np.float32))
    training, evaluating = [], []
    for precision in (None, HALF):
        method = GradientPipelineParallel(mesh, precision=precision, **CASES["gpt"].options(mesh.shape["pipe"]))
        method.setup(gpt(np.float32), make_optimizer("adam"), plan(1 + steps, clip_norm=1.0))
        method.advance(feed, 1)
        method.evaluate(walk)
        training.append(counts(comm, lambda method=method: method.advance(feed, 1 + steps)))
        evaluating.append(counts(comm, lambda method=method: method.evaluate(walk)))
    assert method.skipped == 0
    assert training[1].keys() == training[0].keys()
    halved = {"isend", "irecv", "allgather", "allgather_plan"}
    for key, count in training[0].items():
        assert training[1][key].calls == count.calls, key
        assert training[1][key].logical_bytes * (2 if key[1] in halved else 1) == count.logical_bytes, key
    if mesh.shape["data"] > 1:
        key = method.data.ledger.axis, "allgather_plan" if method.data.transport == "shared" else "allgather"
        gathered = evaluating[1].pop(key)
        assert gathered.calls == training[1][key].calls / steps
        assert gathered.logical_bytes == 4 * method.params.layout.size
    passes, expected = ({k: n for k, n in each.items() if k[0] == method.pipe.ledger.axis} for each in evaluating)
    assert passes == expected
    mesh.free()


def test_stages_exchange_and_gather_half_the_bytes():
    LocalWorld(4, timeout_s=20).run(check_bytes)


@pytest.mark.mpi
def test_so_they_do_over_mpi(world):
    check_bytes(world)


def check_memory(comm: Communicator) -> None:
    """A rank keeps its stages in 16 bits, and float32 only of its shards; what it evaluates with, it lets go."""
    made: list[tuple[weakref.ref[np.ndarray], int, str]] = []

    def allocate(size: int, dtype: Any) -> np.ndarray:
        array = np.zeros(size, dtype)
        made.append((weakref.ref(array), size, np.dtype(dtype).name))
        return array

    def alive() -> list[tuple[int, str]]:
        return sorted((size, name) for found, size, name in made if found() is not None)

    mesh = mesh_of(comm)
    method = GradientPipelineParallel(mesh, precision=HALF, allocator=allocate, microbatches=2)
    method.setup(mlp(np.float32), SGD(), plan(1))
    method.advance(RowsFeed(IMAGES, dtype=np.float32), 1)
    own, shards = method.params.layout.size, [part.shard.size for part in method.parts]
    expected = sorted([(own, "float16"), (own, "float32"), *((size, "float32") for size in shards)])
    assert alive() == expected
    assert comm.allreduce(float(sum(shards))) == method.model.layout.size  # no stage's twice
    method.evaluate(evaluation_batches(IMAGES, 4, comm.rank, comm.size, np.float32))
    method.predict(IMAGES.inputs[:2])
    method.weights_sha256()
    comm.barrier()  # between threads, another rank may still be reading what this one gave
    assert alive() == expected
    assert sum(size == own and name == "float32" for _, size, name in made) > 1 + shards.count(own)  # it was there
    mesh.free()


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_keeps_float32_parameters_of_its_shards_alone(ranks):
    LocalWorld(ranks, timeout_s=20).run(check_memory)
