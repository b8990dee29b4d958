"""Pipelines that divide optimizer state among those that share a batch: the serial run, and what the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    STEPS_PER_EPOCH,
    TEXT,
    KeptKeys,
    RowsFeed,
    cnn,
    gpt,
    mlp,
    plan,
    same_on_all,
    schedule,
)
from parallel_reference import Named, assert_close, descend
from pipeline_cases import MODELS, Case, serial, tensors, united, whole_params

from mpitrain import nn
from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import FlatBuffer, Shard
from mpitrain.arrays.box import box_size
from mpitrain.comm import Communicator, Count, LocalWorld, ProcessMesh, shard_plans
from mpitrain.comm.shard_plans import AllgatherPlan, ReduceScatterPlan
from mpitrain.comm.transports.shards import bounds
from mpitrain.comm.tuning import Key, Row, Table
from mpitrain.data import Dataset
from mpitrain.method import Precision
from mpitrain.nn import Network
from mpitrain.optim import SGD, Optimizer, make_optimizer
from mpitrain.parallel import (
    DataParallel,
    GradientParallel,
    GradientPipelineParallel,
    PipelineParallel,
)
from mpitrain.train.bench.memory import held_bytes, predicted

TALLY_BYTES = 5 * 8

CASES = {"mlp": Case("gpipe"), "cnn": Case("zb-h1"), "gpt": Case("1f1b")}
"""Of each model a schedule: tied tensors, BatchNorm and biases, each cut between two pipelines."""

SHAPES = {1: (1, 1), 2: (2, 1), 3: (1, 3), 4: (2, 2)}
"""Of each number of ranks how many pipelines there are, and how long each is."""


def mesh_of(comm: Communicator) -> ProcessMesh:
    data, pipe = SHAPES[comm.size]
    return ProcessMesh(comm, data=data, pipe=pipe)


class PieceRecorder(Optimizer):
    """Keeps the mean gradients that a method hands it, piece by piece, and updates nothing."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[str, int, np.ndarray]]] = {}

    def update(self, params: Any, grads: Any, state: Any, lr: Any, step: Any, shard: Shard, totals: Any = None) -> None:
        for number, cut in shard.pieces:
            segment = shard.layout.segments[number]
            piece = segment.name, shard.start + cut.start - segment.offset, grads[cut].copy()
            self.seen.setdefault(step, []).append(piece)

    def whole(self, comm: Communicator, step: int, like: FlatBuffer) -> Named:
        """The gradient of a step; what several ranks have seen must be the same bits, and all must be seen."""
        found = {each.name: np.full(each.size, np.nan) for each in like.layout}
        for name, start, values in chain.from_iterable(comm.allgather_object(self.seen.get(step, []))):
            place = found[name][start : start + values.size]
            assert np.isnan(place).all() or place.tobytes() == values.tobytes(), name
            place[...] = values
        return {name: values.reshape(like.layout[name].shape) for name, values in found.items()}


def ready(
    mesh: ProcessMesh, network: KeptKeys, optimizer: Optimizer, steps: int, case: Case, **limits: float
) -> GradientPipelineParallel:
    method = GradientPipelineParallel(mesh, **case.options(mesh.shape["pipe"]))
    method.setup(network, optimizer, plan(steps, **limits))
    return method


def check_gradients(comm: Communicator, name: str) -> None:
    """An epoch of a batch of 7 and one of 3 rows, in microbatches of which some are empty."""
    build, dataset = MODELS[name]
    mesh, recorder, feed = mesh_of(comm), PieceRecorder(), RowsFeed(dataset)
    method = ready(mesh, build(), recorder, STEPS_PER_EPOCH, CASES[name])
    losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
    params = whole_params(comm, method)
    for step in range(STEPS_PER_EPOCH):
        loss, expected = serial(build(), params, feed, step, method.microbatches)
        found = recorder.whole(comm, step + 1, expected)
        assert_close(found, tensors(expected), 1e-12)
        norm = np.linalg.norm(np.concatenate([gradient.ravel() for gradient in found.values()]))
        assert norm == pytest.approx(np.linalg.norm(expected.flat), rel=1e-12)
        assert losses[step] == pytest.approx(loss, rel=1e-12)
    same_on_all(comm, losses)
    mesh.free()


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_losses_are_those_of_one_rank(name):
    LocalWorld(4, timeout_s=20).run(check_gradients, name)


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_so_they_are_over_mpi(world, name):
    check_gradients(world, name)


def check_trajectory(comm: Communicator, name: str, **limits: float) -> None:
    """The clipped norm is that of all shards of all stages, LAMB's norms are of whole tensors, copies stay copies."""
    mesh, steps = mesh_of(comm), 4
    feed, optimizer, network = RowsFeed(TEXT), make_optimizer(name, weight_decay=0.1), gpt()
    method = ready(mesh, gpt(), optimizer, steps, CASES["gpt"], **limits)
    start = whole_params(comm, method)
    method.advance(feed, until=steps)

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return serial(network, params, feed, step, method.microbatches)[1]

    expected = descend(start, optimizer, mean_gradient, steps, schedule, **limits)
    assert_close(whole_params(comm, method), expected, 1e-9)
    mesh.free()


@pytest.mark.parametrize(
    ("name", "limits"), [("lamb", {"clip_norm": 0.2, "clip_value": 0.02}), ("adamw", {"clip_norm": 0.05}), ("adam", {})]
)
def test_clipping_norms_and_tied_tensors_go_where_the_serial_run_goes(name, limits):
    LocalWorld(4, timeout_s=20).run(lambda comm: check_trajectory(comm, name, **limits))


@pytest.mark.mpi
def test_so_they_do_over_mpi(world):
    check_trajectory(world, "lamb", clip_norm=0.2, clip_value=0.02)


def rings(ranks: int) -> Table:
    rows = [Row(operation, ranks, 1, "ring", {}) for operation in ("reduce_scatter", "allgather", "allreduce")]
    return Table(Key("", "", "", ""), tuple(rows))


@pytest.mark.parametrize("made", [PipelineParallel, GradientPipelineParallel])
def test_copies_stay_the_same_bits_where_sums_depend_on_the_place_of_a_tensor(made: type[PipelineParallel]):
    """As in a ring of three pipelines, in whose stages the tied tensor lies elsewhere."""

    def check(comm: Communicator) -> None:
        mesh = ProcessMesh(comm, data=3, pipe=2)
        mesh["data"].tuning = rings(3)
        method = made(mesh, microbatches=2, costs=[1, 1, 1, 1, 1, 1, 2])  # cut in front of the norm
        method.setup(late_table(), make_optimizer("adam"), plan(3))
        method.advance(RowsFeed(TEXT), until=3)
        united(comm, method.params.views)

    LocalWorld(6, timeout_s=20).run(check)


def cross_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks own the shards in reverse, as if on several nodes, unless rank order is asked for."""
    in_order = shard_plans.reduce_scatter

    def reduce_scatter(comm: Communicator, buffer: np.ndarray, op: str, in_rank_order: bool) -> ReduceScatterPlan:
        if in_rank_order:
            return in_order(comm, buffer, op, in_rank_order)
        cuts = bounds(buffer.size, comm.size, buffer.itemsize)
        begin, end = cuts[comm.size - 1 - comm.rank], cuts[comm.size - comm.rank]
        shard = buffer[begin:end].copy()
        return ReduceScatterPlan(lambda: np.copyto(shard, comm.allreduce(buffer)[begin:end]), begin, end, shard)

    def allgather(comm: Communicator, buffer: np.ndarray, begin: int, end: int) -> AllgatherPlan:
        def run() -> None:
            for start, values in comm.allgather_object((begin, buffer[begin:end].copy())):
                buffer[start : start + values.size] = values

        return AllgatherPlan(run, buffer)

    monkeypatch.setattr(shard_plans, "reduce_scatter", reduce_scatter)
    monkeypatch.setattr(shard_plans, "allgather", allgather)


def test_copies_stay_the_same_where_a_stage_holds_nothing_but_the_tied_tensor(monkeypatch):
    """Its one stretch is cut as the other stage cuts the same tensor, which lies among others there."""
    cross_shards(monkeypatch)

    def check(comm: Communicator) -> None:
        mesh = ProcessMesh(comm, data=2, pipe=2)
        method = GradientPipelineParallel(mesh, microbatches=2, cuts=[6])  # in front of the head
        method.setup(late_table(), make_optimizer("adam"), plan(3))
        start = whole_params(comm, method)
        method.advance(RowsFeed(TEXT), until=3)
        assert (len(method.parts) == 1) == (method.pipe.rank == 1)

        def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
            return serial(late_table(), params, RowsFeed(TEXT), step, 2)[1]

        expected = descend(start, make_optimizer("adam"), mean_gradient, 3, schedule)
        assert_close(whole_params(comm, method), expected, 1e-9)
        mesh.free()

    LocalWorld(4, timeout_s=20).run(check)


class LateTable(nn.Sequential):
    """An embedding that is tied to a head which lies in another place among its stage's tensors."""

    def ties(self) -> dict[str, str]:
        return {"embed.weight": "head.weight"}


def late_table() -> KeptKeys:
    layers = LateTable(
        embed=nn.Embedding(4, 8, std=0.3), up=nn.Linear(8, 24), act=nn.GELU(), down=nn.Linear(24, 8),
        norm=nn.LayerNorm(8), mix=nn.Linear(8, 8), head=nn.Unembedding(4, 8),
    )  # fmt: skip
    return KeptKeys(layers, nn.CrossEntropy(), np.float64)


WIDTH, LAYERS = 2, 4
WEIGHTS = np.random.default_rng(4).integers(-1, 2, (LAYERS, WIDTH, WIDTH))
TABLE = Dataset(
    np.random.default_rng(5).integers(-2, 3, (8, WIDTH)), np.random.default_rng(6).integers(-4, 5, (8, WIDTH)),
    "regression", "table",
)  # fmt: skip


def check_exact(comm: Communicator, precision: Precision | None = None) -> None:
    """Small integers: both types are exact in any order, so that replicas of all kinds take the very same step."""
    mesh, found = mesh_of(comm), []
    for made in (GradientPipelineParallel, PipelineParallel):
        layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        method = made(mesh, microbatches=4, precision=precision)
        method.setup(Network(layers, nn.MeanSquaredError()), SGD(), plan(1, schedule=lambda step: 0.25))
        method.load_parameters({f"params/{n}.weight": w.astype("f4") for n, w in enumerate(WEIGHTS)}.__getitem__)
        method.advance(RowsFeed(TABLE, 8, dtype=np.float32), until=1)
        found.append(united(comm, method.whole().views))
    values = [np.asarray(TABLE.inputs)]
    for weight in WEIGHTS:
        values.append(values[-1] @ weight)
    dy = values[-1] - TABLE.targets
    for number in reversed(range(LAYERS)):
        expected = WEIGHTS[number] - 0.25 * (values[number].T @ dy) / 8
        for each in found:
            np.testing.assert_array_equal(each[f"{number}.weight"], expected)
        dy = dy @ WEIGHTS[number].T
    mesh.free()


every_precision = pytest.mark.parametrize(
    "precision", [None, Precision(compute="float16", emulate=True, initial_scale=4.0)], ids=["float32", "float16"]
)


@every_precision
def test_integers_are_exact(precision):
    LocalWorld(4, timeout_s=20).run(check_exact, precision)


@pytest.mark.mpi
@every_precision
def test_integers_are_exact_over_mpi(world, precision):
    check_exact(world, precision)


# What is sent and kept.


def spent(comm: Communicator, work: Callable[[], object]) -> dict[tuple[str, str], Count]:
    comm.ledger.reset()
    work()
    return {key: count for key, count in comm.ledger.snapshot().items() if key[1] not in ("isend", "irecv")}


def check_ledger(comm: Communicator) -> None:
    """Each stage's gradients to their owners and its parameters to all once a step, tied tensors by themselves."""
    mesh, steps = mesh_of(comm), 3
    pipelines, pipe = mesh.shape["data"], mesh.shape["pipe"]
    method = ready(mesh, gpt(np.float32), make_optimizer("adam"), 1 + steps, CASES["gpt"], clip_norm=1.0)
    feed = RowsFeed(TEXT, dtype=np.float32)
    method.advance(feed, until=1)
    found = spent(comm, lambda: method.advance(feed, until=1 + steps))
    data, planned = method.data.ledger.axis, "_plan" if method.data.transport == "shared" else ""
    assert found.pop((method.comm.ledger.axis, "allreduce")).logical_bytes == steps * TALLY_BYTES
    layout, tied = method.params.layout, method.model.layout["tokens.weight"]
    holds_tied = pipe > 1 and method.pipe.rank in (0, pipe - 1)
    ends = {each.name for each in (layout.segments[0], layout.segments[-1])}
    stretches = 1 + holds_tied * (2 - ("tokens.weight" in ends))  # itself, and what lies before and behind it
    if pipelines > 1:
        for operation in ("reduce_scatter", "allgather"):
            calls = found.pop((data, f"{operation}{planned}"))
            assert (calls.calls, calls.logical_bytes) == (steps * stretches, steps * layout.nbytes)
    if holds_tied:
        of_tied = found.pop(("tied", "allreduce"))
        sizes = method.data.allgather_object(of_tied.logical_bytes)
        assert sum(sizes) == steps * tied.size * 4  # not once for each pipeline
        assert of_tied.calls == steps
    norms = {key: count.logical_bytes for key, count in found.items() if count.calls}
    axes = [data] * (pipelines > 1) + [method.pipe.ledger.axis]
    assert norms == {(axis, "allreduce"): steps * 8 for axis in axes}
    mesh.free()


def test_a_step_sends_what_the_formulas_say():
    LocalWorld(4, timeout_s=20).run(check_ledger)


def check_memory(comm: Communicator) -> None:
    """Optimizer state of a stage once for all pipelines, and its parameters once where they share memory."""
    mesh, item = mesh_of(comm), 4
    layers = nn.MODELS["mlp"](32, 3, hidden=[64, 64, 64])
    method = GradientPipelineParallel(mesh, microbatches=2)
    method.setup(Network(layers, nn.CrossEntropy()), make_optimizer("adam"), plan(1))
    method.advance(RowsFeed(dtype=np.float32), until=1)
    shares = method.data.transport == "shared" and method.data.size > 1
    n, pipelines = method.params.layout.nbytes, method.data.size
    foreseen = predicted(method, n, pipelines, shared=shares)
    state = held_bytes(array for part in method.parts for array in part.state.values())
    sums = held_bytes([method.grads.flat, *(part.grads for part in method.parts)])
    assert method.data.allreduce(float(state), "mean") == foreseen["optimizer"] == 2 * n / pipelines
    assert method.data.allreduce(float(sums), "mean") == foreseen["gradients"]
    assert method.data.allreduce(float(n), "mean") / (pipelines if shares else 1) == foreseen["parameters"]
    assert is_common(method) == shares
    whole = FlatBuffer(method.model.layout)
    assert comm.allreduce(float(state)) == 2 * item * whole.layout.size  # no stage's twice
    mesh.free()


def is_common(method: GradientPipelineParallel) -> bool:
    """Tell whether what one of a stage's ranks writes to its parameters, the others read."""
    flat, group = method.params.flat.view(), method.data
    flat.flags.writeable = True  # what is shared is not to be written to
    before = flat[0]
    group.barrier()
    if group.rank == 0:
        flat[0] = before + 1
    group.barrier()
    found = flat[0] == before + 1
    group.barrier()
    if group.rank == 0:
        flat[0] = before
    group.barrier()
    return bool(group.allreduce(float(found)) == group.size > 1)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "mode",
    [{}, {"MPITRAIN_RANKS_PER_NODE": "2"}, {"MPITRAIN_TRANSPORT": "host"}],
    ids=["one node", "a node for each pipeline", "ordinary memory"],
)
def test_a_rank_keeps_what_the_formulas_say_wherever_memory_lies(world, mode, monkeypatch):
    for name, value in mode.items():
        monkeypatch.setenv(name, value)
    with world.split(0, axis="world") as comm:
        check_memory(comm)
        check_ledger(comm)
        check_trajectory(comm, "adam")


# State, errors, and what a step without an update leaves.


def check_state(comm: Communicator) -> None:
    """Goes on where another method was, and another where it was: each value is saved once."""
    feed, adam, m, mesh = RowsFeed(TEXT), make_optimizer("adam"), 2, mesh_of(comm)
    method = GradientPipelineParallel(mesh, microbatches=m)
    method.setup(gpt(), adam, plan(6))
    method.advance(feed, until=2)
    halfway = gathered(comm, method)

    def go_on(make: Callable[[], Any], step: int, from_: Named, on: Communicator) -> Named:
        other = make()
        other.setup(gpt(), adam, plan(6))
        other.load({"step": step}, from_.__getitem__)
        other.advance(feed, until=step + 2)
        return gathered(on, other)

    def alone(step: int, from_: Named) -> Named:
        return LocalWorld(1).run(lambda one: go_on(lambda: DataParallel(one, microbatches=m), step, from_, one))[0]

    expected = alone(2, halfway)
    method.advance(feed, until=4)
    assert_close(gathered(comm, method), expected, 1e-10)
    for make in (
        lambda: GradientParallel(comm, microbatches=m),
        lambda: PipelineParallel(mesh, microbatches=m),
        lambda: GradientPipelineParallel(comm, microbatches=m),  # one pipeline
        lambda: GradientPipelineParallel(mesh, microbatches=m, schedule="zb-h1"),
    ):
        assert_close(go_on(make, 2, halfway, comm), expected, 1e-10)
    found = go_on(lambda: GradientPipelineParallel(mesh, microbatches=m), 4, expected, comm)
    assert_close(found, alone(4, expected), 1e-10)
    mesh.free()


def gathered(comm: Communicator, method: Any) -> Named:
    """What a checkpoint would hold, put together from pieces that tile each tensor once."""
    found: Named = {}
    own = list(method.state().pieces)
    for piece in chain.from_iterable(comm.allgather_object(own)) if method.kind == "sharded" else own:
        assert box_size(piece.box) == np.prod(piece.global_shape)
        whole = found.setdefault(piece.name, np.full(piece.global_shape, np.nan)).reshape(-1)
        assert np.isnan(whole[slice(*piece.span)]).all(), piece.name
        whole[slice(*piece.span)] = piece.array
    assert not any(np.isnan(values).any() for values in found.values())
    return found


def test_a_run_goes_on_under_other_methods_and_back():
    LocalWorld(4, timeout_s=20).run(check_state)


@pytest.mark.mpi
def test_so_it_does_over_mpi(world):
    check_state(world)


def check_evaluation(comm: Communicator) -> None:
    mesh = mesh_of(comm)
    method = ready(mesh, cnn(), make_optimizer("adam"), 2, CASES["cnn"])
    method.advance(RowsFeed(), until=2)
    params, inputs = whole_params(comm, method), RowsFeed().dataset.inputs[:]
    np.testing.assert_allclose(method.predict(inputs), cnn().predict(params, inputs), rtol=1e-12)
    assert method.weights_sha256() == params.sha256()
    same_on_all(comm, method.weights_sha256())
    mesh.free()


def test_predictions_and_hash_are_those_of_the_whole_model():
    LocalWorld(4, timeout_s=20).run(check_evaluation)


class Spoilt(nn.Linear):
    """Its gradient is infinite, and the loss is not."""

    def backward_weight(self, grads: Any, context: Any, dy: Any, call: Any) -> None:
        super().backward_weight(grads, context, dy, call)
        grads["bias"][0] = np.inf


def test_a_gradient_that_is_not_finite_ends_all_ranks():
    def check(comm: Communicator) -> None:
        layers = nn.Sequential(nn.Flatten(), nn.Linear(32, 5), nn.Tanh(), Spoilt(5, 3), nn.Tanh(), nn.Linear(3, 3))
        method = GradientPipelineParallel(mesh_of(comm), microbatches=2)
        method.setup(KeptKeys(layers, nn.CrossEntropy(), np.float64), SGD(), plan(1))
        before = method.weights_sha256()
        with pytest.raises(NonFiniteError, match=r"of step 1 is not finite; .*tensors: 3\.bias") as caught:
            method.advance(RowsFeed(), until=1)
        same_on_all(comm, str(caught.value))
        assert (method.step, method.weights_sha256()) == (0, before)

    LocalWorld(4, timeout_s=20).run(check)


def test_a_stage_may_have_nothing_to_train():
    """Four stages of four layers, of which two have no parameters."""

    def check(comm: Communicator) -> None:
        method = GradientPipelineParallel(ProcessMesh(comm, data=2, pipe=4), microbatches=2)
        method.setup(mlp(), make_optimizer("adam"), plan(2, clip_norm=0.1))
        method.advance(RowsFeed(), until=2)
        whole_params(comm, method)
        assert method.step == 2

    LocalWorld(8, timeout_s=20).run(check)


def test_a_mesh_without_stages_is_refused():
    with pytest.raises(InputError, match="the mesh does not fit; got data; expected pipe, and data or tensor"):
        LocalWorld(2).run(lambda comm: GradientPipelineParallel(ProcessMesh(comm, data=2)))
