"""A pipeline takes the steps of one rank on the same microbatches, whatever the schedule: mostly to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from parallel_cases import IMAGES, STEPS_PER_EPOCH, KeptKeys, RowsFeed, cnn, gpt, mlp, plan, same_on_all, schedule
from parallel_reference import Named, assert_close, descend
from pipeline_cases import (
    CASES,
    MODELS,
    Case,
    StageRecorder,
    every_case,
    fits,
    ready,
    serial,
    tensors,
    united,
    whole_params,
)

from mpitrain import nn
from mpitrain._errors import InputError, NonFiniteError
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.data import Dataset, evaluation_batches
from mpitrain.nn import Network
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import DataParallel, PipelineParallel
from mpitrain.parallel.pipeline import FAMILIES, Sizes
from mpitrain.parallel.pipeline.links import Edge, Links
from mpitrain.parallel.synchronous import Synchronous

TIED = {"tokens.weight"}


def check_gradients(comm: Communicator, name: str, case: Case) -> None:
    """An epoch of a batch of 7 and one of 3 rows, in microbatches of which some are empty."""
    build, dataset = MODELS[name]
    network, recorder, feed = build(), StageRecorder(), RowsFeed(dataset)
    if not fits(case, network, comm.size):
        return
    method = ready(comm, network, recorder, STEPS_PER_EPOCH, case)
    losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
    params = whole_params(comm, method)
    for step in range(STEPS_PER_EPOCH):
        loss, expected = serial(build(), params, feed, step, method.microbatches)
        found = united(comm, recorder.seen.get(step + 1, {}))
        assert found.keys() == {segment.name for segment in network.layout}
        for tensor, gradient in found.items():
            if tensor not in TIED:  # which alone is summed in another order
                np.testing.assert_array_equal(gradient, expected.views[tensor], err_msg=tensor)
        assert_close(found, tensors(expected), 1e-14)
        norm = np.linalg.norm(np.concatenate([gradient.ravel() for gradient in found.values()]))
        assert norm == pytest.approx(np.linalg.norm(expected.flat), rel=1e-14)
        assert losses[step] == pytest.approx(loss, rel=1e-14)
    same_on_all(comm, losses)


@every_case
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_losses_are_those_of_one_rank(on_ranks, name, case):
    on_ranks(check_gradients, name, case)


def check_trajectory(comm: Communicator, case: Case, name: str) -> None:
    """A clipped norm counts the tied tensor once, LAMB's norms are of whole tensors, and copies stay copies."""
    steps, limits = 4, {"clip_norm": 0.2, "clip_value": 0.02}
    build, dataset = MODELS["gpt"]
    feed, optimizer = RowsFeed(dataset), make_optimizer(name, weight_decay=0.1)
    method = ready(comm, build(), optimizer, steps, case, **limits)
    start, network = whole_params(comm, method), build()
    method.advance(feed, until=steps)

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return serial(network, params, feed, step, method.microbatches)[1]

    expected = descend(start, optimizer, mean_gradient, steps, schedule, **limits)
    assert_close(whole_params(comm, method), expected, 1e-9)
    united(comm, {slot + name: array for slot, name, array in optimizer_state(method)})  # copies alike there too


def optimizer_state(method: PipelineParallel) -> list[tuple[str, str, np.ndarray]]:
    return [
        (slot, part.shard.layout.segments[number].name, array[cut])
        for part in method.parts
        for slot, array in part.state.items()
        for number, cut in part.shard.pieces
    ]


@pytest.mark.parametrize(("case", "name"), [(CASES["1f1b"], "lamb"), (CASES["zb-h1"], "adamw")])
def test_clipping_norms_and_tied_tensors_go_where_the_serial_run_goes(on_ranks, case, name):
    on_ranks(check_trajectory, case, name)


# Small integers: float32 is exact in any order of summation.


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(4).integers(low, high, shape)


WIDTH, LAYERS = 2, 4
WEIGHTS = integers(-1, 2, LAYERS, WIDTH, WIDTH)
TABLE = Dataset(integers(-2, 3, 8, WIDTH), integers(-4, 5, 8, WIDTH), "regression", "table")


def integer_gradients() -> list[np.ndarray]:
    """Of the sum of half the squared errors of a product of matrices, in 64-bit integers."""
    values = [np.asarray(TABLE.inputs).astype(np.int64)]
    for weight in WEIGHTS:
        values.append(values[-1] @ weight)
    dy, found = values[-1] - TABLE.targets, []
    for weight, x in zip(WEIGHTS[::-1], values[-2::-1], strict=True):
        found.append(x.T @ dy)
        dy = dy @ weight.T
    return found[::-1]


def check_exact(comm: Communicator, case: Case) -> None:
    layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if comm.size * case.chunks > LAYERS:
        return
    options = case.options(comm.size)
    method = PipelineParallel(comm, **options)
    method.setup(Network(layers, nn.MeanSquaredError()), SGD(), plan(1, schedule=lambda step: 0.25))
    method.load_parameters({f"params/{n}.weight": w.astype("f4") for n, w in enumerate(WEIGHTS)}.__getitem__)
    method.advance(RowsFeed(TABLE, 8, dtype=np.float32), until=1)
    found = united(comm, method.params.views)
    for number, gradient in enumerate(integer_gradients()):
        np.testing.assert_array_equal(found[f"{number}.weight"], WEIGHTS[number] - 0.25 * gradient / 8)


@every_case
def test_integers_are_exact(on_ranks, case):
    on_ranks(check_exact, case)


# What is sent and kept.


def check_ledger_and_memory(comm: Communicator, case: Case) -> None:
    network, feed, steps = cnn(), RowsFeed(batch_size=10), 6
    method = ready(comm, network, SGD(), 2 + steps, case)
    method.advance(feed, until=2)
    before, misses = comm.ledger.snapshot(), network.pool.misses
    method.advance(feed, until=2 + steps)
    after = comm.ledger.snapshot()
    calls = {key: count.calls - (before[key].calls if key in before else 0) for key, count in after.items()}
    used = {operation: count for (axis, operation), count in calls.items() if count}
    own = [used.pop(name, 0) for name in ("isend", "irecv")]
    sent, received = np.sum(comm.allgather_object(own), axis=0)
    messages = 2 * (comm.size * case.chunks - 1) * method.microbatches if comm.size > 1 else 0
    assert sent == received == steps * messages
    assert method.sizes.messages == messages
    assert used == {"allreduce": steps}  # the tally
    # Memory is that of the first steps, but for messages: how many have not left yet is a matter of time.
    assert network.pool.misses - misses <= own[0] / steps
    assert method.executor.peak == FAMILIES[case.schedule].peak(method.sizes, comm.rank)


@every_case
def test_a_step_sends_and_keeps_what_the_formulas_say(on_ranks, case):
    on_ranks(check_ledger_and_memory, case)


@every_case
def test_no_send_waits_for_its_receive(case):
    """In a world where a blocking send would wait."""
    LocalWorld(3, rendezvous=True, timeout_s=20).run(check_gradients, "cnn", case)


def check_directions(comm: Communicator) -> None:
    """On two ranks a stage's input and its gradient come from the same rank: in any order, each is itself."""
    links = Links(comm, Sizes(2, 2, 1), nn.Pool(), np, np.dtype(np.float64))
    dx, x = Edge(1, 2, 0), Edge(1, 0, 0)
    if comm.rank == 0:
        links.send(dx, np.array([1.0]))
        links.send(x, np.array([2.0]))
    else:
        links.expect(x, (1,))
        links.expect(dx, (1,))
        assert (links.receive(x).tolist(), links.receive(dx).tolist()) == ([2.0], [1.0])
    links.finish()


def test_an_input_is_not_taken_for_a_gradient():
    LocalWorld(2, timeout_s=20).run(check_directions)


# Data and pipeline together.


def check_mesh(comm: Communicator) -> None:
    """BatchNorm over the pipelines' shares, Dropout by the place in the global batch, gradients over both."""
    if comm.size != 4:
        return
    mesh = ProcessMesh(comm, data=2, pipe=2)
    for name in ("cnn", "gpt"):
        build, dataset = MODELS[name]
        recorder, feed, case = StageRecorder(), RowsFeed(dataset), CASES["zb-h1"]
        method = ready(mesh, build(), recorder, STEPS_PER_EPOCH, case)
        losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
        params = whole_params(comm, method)
        for step in range(STEPS_PER_EPOCH):
            loss, expected = serial(build(), params, feed, step, method.microbatches)
            assert_close(united(comm, recorder.seen[step + 1]), tensors(expected), 1e-12)
            assert losses[step] == pytest.approx(loss, rel=1e-12)
        assert sorted(saved(comm, method)) == sorted(f"params/{each.name}" for each in method.model.layout)
        outputs = method.predict(feed.dataset.inputs[:])
        np.testing.assert_allclose(outputs, build().predict(params, feed.dataset.inputs[:]), rtol=1e-12)
        check_metrics(comm, method, params, feed, 4)
    mesh.free()


@pytest.mark.parametrize("size", [4])
def test_data_and_pipeline_compose(size):
    LocalWorld(size, timeout_s=20).run(check_mesh)


@pytest.mark.mpi
def test_data_and_pipeline_compose_over_mpi(world):
    check_mesh(world)


# Evaluation, state, and errors.


def check_metrics(comm: Communicator, method: PipelineParallel, params: FlatBuffer, feed: RowsFeed, rows: int) -> None:
    """Every rank hands in its own rows, of the last batch perhaps none."""
    own = evaluation_batches(feed.dataset, rows, comm.rank, comm.size, np.float64)
    found = method.evaluate(own)
    whole = next(evaluation_batches(feed.dataset, len(feed.dataset), dtype=np.float64))
    expected = method.model.metrics(method.model.sums(params, whole))
    assert found.keys() == expected.keys()
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["confusion"].tolist() == expected["confusion"].tolist()
    same_on_all(comm, found["loss"])


def check_evaluation(comm: Communicator, case: Case, name: str) -> None:
    build, dataset = MODELS[name]
    if not fits(case, build(), comm.size):
        return
    method = ready(comm, build(), SGD(), 1, case)
    params = whole_params(comm, method)
    check_metrics(comm, method, params, RowsFeed(dataset), 3)
    outputs = method.predict(dataset.inputs[:])
    np.testing.assert_array_equal(outputs, build().predict(params, dataset.inputs[:]))
    same_on_all(comm, (outputs.tobytes(), method.weights_sha256()))
    assert method.weights_sha256() == params.sha256()


@pytest.mark.parametrize(("case", "name"), [(CASES["1f1b"], "cnn"), (CASES["interleaved"], "gpt")])
def test_metrics_and_predictions_are_those_of_the_whole_model(on_ranks, case, name):
    on_ranks(check_evaluation, case, name)


def saved(comm: Communicator, method: Synchronous) -> Named:
    """What a checkpoint would hold; each tensor is there once."""
    pieces = [piece for rank in comm.allgather_object(list(method.state().pieces)) for piece in rank]
    found = {piece.name: piece.array.reshape(piece.global_shape).copy() for piece in pieces}
    assert len(found) == len(pieces)
    return found


def check_state(comm: Communicator) -> None:
    """A serial run goes on where a pipeline was, and a pipeline where a serial run was."""
    build, dataset = MODELS["gpt"]
    feed, adam, m = RowsFeed(dataset), make_optimizer("adam"), 2
    method = PipelineParallel(comm, microbatches=m)
    method.setup(build(), adam, plan(4))
    method.advance(feed, until=2)
    halfway = saved(comm, method)

    def go_on(alone: Communicator) -> Named:
        reader = DataParallel(alone, microbatches=m)
        reader.setup(build(), adam, plan(4))
        reader.load({"step": 2}, halfway.__getitem__)
        reader.advance(feed, until=4)
        return saved(alone, reader)

    method.advance(feed, until=4)
    expected = LocalWorld(1).run(go_on)[0]
    assert_close(saved(comm, method), expected, 1e-12)
    again = PipelineParallel(comm, microbatches=m, schedule="zb-h1")
    again.setup(build(), adam, plan(4))
    again.params.flat[...] = np.nan
    again.load({"step": 4}, expected.__getitem__)
    assert again.step == 4
    assert {name: array.tobytes() for name, array in saved(comm, again).items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
    for name, array in united(comm, again.params.views).items():
        np.testing.assert_array_equal(array, expected[f"params/{again.model.layout.ties.get(name, name)}"])


def test_a_tied_tensor_is_saved_once_and_loaded_everywhere(on_ranks):
    on_ranks(check_state)


class RankDependent(KeptKeys):
    """Breaks the contract: its initial values depend on the rank."""

    rank = 0

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        super().initialise(params, key)
        params.flat[...] += self.rank


def check_copies_agree(comm: Communicator) -> None:
    network = RankDependent(gpt().layer, nn.CrossEntropy(), np.float64)
    network.rank = comm.rank
    united(comm, ready(comm, network, SGD(), 1, CASES["1f1b"]).params.views)


def test_copies_begin_alike_whatever_the_model_does(on_ranks):
    on_ranks(check_copies_agree)


def check_not_finite(comm: Communicator) -> None:
    inputs = IMAGES.inputs.copy()
    inputs[0, 1, 2, 0] = np.nan
    spoilt = replace(IMAGES, inputs=inputs)
    method = ready(comm, cnn(dropout=0.0), SGD(), 2, CASES["1f1b"])
    before = method.weights_sha256()
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="of step 1 is not finite") as caught:
        method.advance(RowsFeed(spoilt, batch_size=10), until=2)
    same_on_all(comm, str(caught.value))
    assert (method.step, method.weights_sha256()) == (0, before)


def test_a_value_that_is_not_finite_ends_all_ranks(on_ranks):
    on_ranks(check_not_finite)


def check_stop(comm: Communicator) -> None:
    method = ready(comm, cnn(), SGD(), 9, CASES["zb-h1"])
    if comm.rank == 0:
        method.request_stop()
    progress = method.advance(RowsFeed(), until=9)
    assert (progress.step, progress.stop_requested, progress.samples) == (1, True, 7)
    same_on_all(comm, progress)


def test_all_ranks_stop_together(on_ranks):
    on_ranks(check_stop)


@pytest.mark.parametrize(
    ("ranks", "options", "network", "message"),
    [
        (2, {"schedule": "1f2b"}, mlp, "no such schedule; got '1f2b'; .*did you mean \"?1f1b"),
        (5, {}, mlp, "cannot be cut into so many stages; got 5 stages, 4 layers"),
        (2, {"costs": [1.0]}, mlp, "there is not one cost a layer; got 1; expected 4"),
        (1, {}, lambda: Network(nn.Linear(3, 2), nn.MeanSquaredError()), "cannot be cut into stages; got Linear"),
        (3, {"schedule": "interleaved", "microbatches": 4}, mlp, "microbatches do not divide by the ranks"),
    ],
)
def test_what_cannot_be_is_said(ranks, options, network, message):
    def attempt(comm: Communicator) -> None:
        PipelineParallel(comm, **options).setup(network(), SGD(), plan(1))

    with pytest.raises(InputError, match=message):
        LocalWorld(ranks, timeout_s=5).run(attempt)


def test_costs_move_the_cuts():
    def names(comm: Communicator, costs: list[float]) -> set[str]:
        method = PipelineParallel(comm, costs=costs)
        method.setup(gpt(), SGD(), plan(1))
        return {each.name.partition(".")[0] for each in method.params.layout}

    heavy_start = LocalWorld(2).run(names, [9, 1, 1, 1, 1, 1, 1, 1, 1])
    heavy_end = LocalWorld(2).run(names, [1, 1, 1, 1, 1, 1, 1, 1, 9])
    assert heavy_start == [{"tokens"}, {"tokens", "positions", "block0", "block1", "norm"}]
    assert heavy_end == [{"tokens", "positions", "block0", "block1", "norm"}, {"tokens"}]
