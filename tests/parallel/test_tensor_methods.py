"""Methods over a mesh: the gradient, norm and loss of data × tensor are the serial ones of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    IMAGES,
    METHODS,
    ROWS,
    SEED,
    STEPS_PER_EPOCH,
    Make,
    Recorder,
    RowsFeed,
    by_label,
    last_rank,
    plan,
    same_on_all,
    schedule,
)
from parallel_reference import buffer, descend, network_mean_gradient
from tensor_cases import CONTEXT, MODELS, VOCABULARY, Model, boxes, initial

from mpitrain._errors import InputError, MismatchError, NonFiniteError
from mpitrain.arrays import FlatBuffer, Gradients, Key
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.data import evaluation_batches
from mpitrain.data.windows import windows
from mpitrain.optim import SGD, Optimizer, make_optimizer
from mpitrain.parallel import DataParallel, GradientParallel, ModelAveraging
from mpitrain.parallel.tensor import TensorNetwork
from mpitrain.train import checkpoint

BOUND = 1e-10
LONG = windows(
    np.random.default_rng(5).integers(0, VOCABULARY, ROWS * CONTEXT + 1), "text", CONTEXT, None, "abcdefghijklm"
)
SHAPES = {1: [(1, 1)], 2: [(1, 2)], 3: [(1, 3)], 4: [(2, 2), (1, 4)]}
"""Meshes, data by tensor, of so many ranks."""


@contextmanager
def meshes(comm: Communicator) -> Iterator[list[ProcessMesh]]:
    made = [ProcessMesh(comm, data=data, tensor=tensor) for data, tensor in SHAPES[comm.size]]
    yield made
    for mesh in made:
        mesh.free()


def feed_for(model: Model, **options: Any) -> RowsFeed:
    return RowsFeed(LONG if model.kind == "gpt" else IMAGES, **options)


def keys(step: int, microbatches: int) -> list[Key]:
    return [Key(SEED).child("train").at(step).child(f"microbatch{number}") for number in range(microbatches)]


def ready(mesh: ProcessMesh, model: Model, make: Make, optimizer: Optimizer, steps: int, **options: Any) -> Any:
    """A method set up over a mesh; ``clip…`` goes to the plan."""
    bounds = {name: options.pop(name) for name in list(options) if name.startswith("clip")}
    method = make(mesh["data"], across=mesh["tensor"], **options)
    method.setup(model.divided(mesh["tensor"]), optimizer, plan(steps, **bounds))
    return method


def check_gradients(comm: Communicator, model: Model, make: Make, feed: RowsFeed, microbatches: int) -> None:
    serial = model.serial()
    whole = initial(serial, SEED)
    with meshes(comm) as made:
        for mesh in made:
            recorder = Recorder()
            method = ready(mesh, model, make, recorder, STEPS_PER_EPOCH, microbatches=microbatches)
            layout = method.params.layout
            for name, values in boxes(layout, whole.views).items():
                np.testing.assert_array_equal(method.whole().views[name], values)  # initial values, to the bit
            losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
            for step, flat in enumerate(recorder.seen(mesh["data"])):
                batches = feed.whole(step, microbatches)
                loss, expected = network_mean_gradient(serial, whole, batches, keys(step, microbatches))
                assert losses[step] == pytest.approx(loss, rel=BOUND)
                norms = {name: np.linalg.norm(values) for name, values in expected.views.items()}
                found = buffer(layout, flat)
                for name, values in boxes(layout, expected.views).items():
                    assert norms[name] > 0
                    assert np.linalg.norm(found.views[name] - values) <= BOUND * norms[name], name
            same_on_all(comm, losses)


CASES = {
    "microbatches": ({}, 2),
    "by label": ({"owner": by_label}, 2),
    "all on the last rank": ({"owner": last_rank}, 1),
}
FEW = {
    ("data", "mlp of four", "by label"),
    ("gradient 1", "gpt, sequence", "by label"),
    ("gradient 2", "gpt", "microbatches"),
    ("gradient 3", "gpt", "by label"),
}
"""What runs by default; the others are slow together."""

EVERY = [
    pytest.param(*each, marks=() if each in FEW else pytest.mark.slow)
    for each in ((method, name, case) for method in METHODS for name in MODELS for case in CASES)
    if not (each[0] in ("gradient 2", "gradient 3") and MODELS[each[1]].sequence)  # which is refused
]


@pytest.mark.parametrize(("method", "name", "case"), EVERY)
def test_gradients_are_the_serial_ones(on_ranks, method, name, case):
    options, microbatches = CASES[case]
    on_ranks(check_gradients, MODELS[name], METHODS[method], feed_for(MODELS[name], **options), microbatches)


def check_trajectory(comm: Communicator, name: str, method: str, optimizer: str, bounds: dict[str, float]) -> None:
    """Parameters after some steps, which is where wrong norms show: of clipping, and of LAMB's ratios."""
    model, steps = MODELS[name], 4
    feed, serial = feed_for(model, owner=by_label), model.serial()

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return network_mean_gradient(serial, params, feed.whole(step), keys(step, 1))[1]

    start = initial(serial, SEED)
    options = {"adapt": "trained"} if optimizer == "lamb" else {}
    chosen = make_optimizer(optimizer, **options)
    expected = descend(start, chosen, mean_gradient, steps, schedule, **bounds)
    batches = list(evaluation_batches(feed.dataset, 4, dtype=np.float64))
    metrics = serial.metrics(_added([serial.sums(expected, batch) for batch in batches]))
    with meshes(comm) as made:
        for mesh in made:
            trained = ready(mesh, model, METHODS[method], chosen, steps, **bounds)
            trained.advance(feed, until=steps)
            whole = trained.whole().views
            for tensor, values in boxes(trained.params.layout, expected.views).items():
                size = np.linalg.norm(values - boxes(trained.params.layout, start.views)[tensor])
                assert np.linalg.norm(whole[tensor] - values) <= 1e-9 * max(size, 1e-3), tensor
            group = mesh["data"]
            own = list(evaluation_batches(feed.dataset, 4, group.rank, group.size, np.float64))
            found = trained.evaluate(own)
            assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-9)
            np.testing.assert_array_equal(found["confusion"], metrics["confusion"])
            same_on_all(comm, (trained.weights_sha256(), found["loss"]))


def _added(sums: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.sum([each[name] for each in sums], axis=0) for name in sums[0]}


NORM = {"clip_norm": 0.05}


@pytest.mark.parametrize(
    ("name", "method", "optimizer", "bounds"),
    [
        ("gpt, sequence", "data", "lamb", NORM),
        pytest.param("gpt", "gradient 1", "lamb", NORM, marks=pytest.mark.slow),
        ("mlp of three", "gradient 2", "adam", NORM),
        pytest.param("mlp of three", "data", "adam", NORM | {"clip_value": 0.01}, marks=pytest.mark.slow),
        pytest.param("gpt, untied, smoothed", "gradient 2", "lamb", NORM, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_serial_ones(on_ranks, name, method, optimizer, bounds):
    on_ranks(check_trajectory, name, method, optimizer, bounds)


class Norms(SGD):
    """Asks for the squared norm of each tensor, and keeps what it is told."""

    slots = ()

    def partials(self, params: Any, grads: Any, state: Any, step: Any, shard: Any) -> np.ndarray:
        found = np.zeros((len(shard.layout), 1))
        for number, piece in shard.pieces:
            found[number] = params[piece] @ params[piece]
        return found

    def update(self, *arguments: Any) -> None:
        object.__setattr__(self, "told", arguments[-1])


def check_totals(comm: Communicator, make: Make) -> None:
    model = MODELS["gpt, sequence"]
    whole = initial(model.serial(), SEED)
    with meshes(comm) as made:
        for mesh in made:
            norms = Norms()
            method = ready(mesh, model, make, norms, 1)
            method.advance(feed_for(model), until=1)
            expected = [np.sum(whole.views[segment.name] ** 2) for segment in method.params.layout]
            np.testing.assert_allclose(norms.told[:, 0], expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["data", "gradient 1"])
def test_what_optimizers_need_of_whole_tensors_counts_each_element_once(on_ranks, method):
    on_ranks(check_totals, METHODS[method])


def check_hash(comm: Communicator) -> None:
    """The hash of weights does not tell how they are divided."""
    model = MODELS["gpt, sequence"]
    whole = initial(model.serial(), SEED)
    with meshes(comm) as made:
        for mesh in made:
            for make in (DataParallel, GradientParallel):
                method = ready(mesh, model, make, make_optimizer("sgd"), 1)
                assert method.weights_sha256() == whole.sha256()


def test_the_hash_of_the_weights_is_that_of_the_whole_model(on_ranks):
    on_ranks(check_hash)


EXCHANGES = [("data", 4, "data", 1), ("data", 1, "gradient 2", 4), ("gradient 1", 4, "data", 3), ("data", 3, "data", 4)]


@pytest.mark.parametrize(("writer", "writers", "reader", "readers"), EXCHANGES)
def test_checkpoints_pass_between_meshes(tmp_path: Path, writer: str, writers: int, reader: str, readers: int):
    """What a mesh has written goes on on any other, and on one rank, where it would have gone."""
    model = MODELS["gpt"]
    feed, layout = feed_for(model), model.serial().layout

    def method_on(comm: Communicator, name: str) -> Any:
        data, tensor = SHAPES[comm.size][0]
        return ready(ProcessMesh(comm, data=data, tensor=tensor), model, METHODS[name], make_optimizer("adam"), 4)

    def outcome(method: Any) -> tuple[str, float]:
        digest = method.weights_sha256()
        method.advance(feed, until=4)
        share = feed.share(method.comm.rank, method.comm.size, 1).batch(0)
        return digest, method.evaluate(share)["loss"]

    def write(comm: Communicator) -> tuple[str, float]:
        method = method_on(comm, writer)
        method.advance(feed, until=2)
        checkpoint.save(tmp_path, 2, method.state(), comm, layout)
        return outcome(method)

    def read(comm: Communicator) -> tuple[str, float]:
        found = checkpoint.load(tmp_path / "step-00000002", comm, layout)
        method = method_on(comm, reader)
        method.load(found.scalars, found.read)
        return outcome(method)

    digest, loss = LocalWorld(writers).run(write)[0]
    for found in LocalWorld(readers).run(read):
        assert found == (digest, pytest.approx(loss, rel=1e-9))


class Spoiled(TensorNetwork):
    """A model one rank of which computes a gradient that is not a number, and tells nobody."""

    at = -1

    def loss_and_gradients(self, params: Any, batch: Any, grads: Gradients, *others: Any) -> tuple[float, float]:
        found = super().loss_and_gradients(params, batch, grads, *others)
        if self.at >= 0:
            grads.tree["head"]["weight"][0, 0] = np.nan
        return found


def check_not_finite(comm: Communicator, make: Make) -> None:
    with meshes(comm) as made:
        for mesh in made:
            model = MODELS["gpt, untied, smoothed"]
            divided = model.divided(mesh["tensor"])
            divided.__class__ = Spoiled
            divided.at = 0 if comm.rank == comm.size - 1 else -1
            method = make(mesh["data"], across=mesh["tensor"])
            method.setup(divided, make_optimizer("sgd"), plan(2))
            with pytest.raises(NonFiniteError) as caught:
                method.advance(feed_for(model), until=1)
            culprit = mesh.shape["data"] - 1
            assert f"ranks whose own samples gave it: [{culprit}]; tensors: head.weight" in str(caught.value)
            same_on_all(comm, str(caught.value).partition("rank")[0])


@pytest.mark.parametrize("method", ["data", "gradient 1"])
def test_what_only_one_rank_sees_ends_the_step_on_all(on_ranks, method):
    on_ranks(check_not_finite, METHODS[method])


def check_stop(comm: Communicator) -> None:
    model = MODELS["mlp of three"]
    with meshes(comm) as made:
        for mesh in made:
            method = ready(mesh, model, DataParallel, make_optimizer("sgd"), 9)
            method.advance(feed_for(model), until=2)
            if comm.rank == comm.size - 1:
                method.request_stop()
            progress = method.advance(feed_for(model), until=9)
            assert (progress.step, progress.stop_requested) == (3, True)


def test_a_stop_that_one_rank_asks_for_stops_all(on_ranks):
    on_ranks(check_stop)


class Differing(TensorNetwork):
    """A model whose initial values depend on the rank."""

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        super().initialise(params, key)
        params.views["norm.gamma"][0] += self.peers.rank


def test_tensors_that_all_ranks_hold_are_compared_at_the_start():
    def check(comm: Communicator) -> None:
        divided = MODELS["gpt"].divided(comm)
        divided.__class__ = Differing
        DataParallel(comm.split(comm.rank), across=comm).setup(divided, make_optimizer("sgd"), plan(1))

    with pytest.raises(MismatchError, match=r"initial parameters differ between ranks; got .* on ranks \[1, 2\]"):
        LocalWorld(3).run(check)


def test_what_does_not_go_with_a_divided_model_is_refused():
    def refused(comm: Communicator, make: Any, sequence: bool = False) -> None:
        method = make(comm.split(comm.rank), across=comm)
        method.setup(MODELS["gpt, sequence" if sequence else "gpt"].divided(comm), make_optimizer("sgd"), plan(1))

    cases = [
        (partial(DataParallel, codec="fp16"), False, "a codec keeps what it leaves out for whole tensors"),
        (partial(ModelAveraging, average_every=2), False, "ranks that divide a model take every step together"),
        (partial(GradientParallel, stage=2), True, "stage 2 reduces gradients while ranks have only terms of some"),
    ]
    for make, sequence, message in cases:
        with pytest.raises(InputError, match=message):
            LocalWorld(2).run(refused, make, sequence)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["gpt", "gpt, sequence"])
def test_memory_is_that_of_the_formula(size: int, name: str):
    """Parameters, gradients and Adam's state of the largest part, but for the padding of each tensor."""

    def held(comm: Communicator) -> tuple[int, int]:
        method = DataParallel(comm.split(comm.rank), across=comm)
        method.setup(MODELS[name].divided(comm, np.float32), make_optimizer("adam"), plan(1))
        arrays = [method.params.flat, method.grads.flat, *method.optimizer_state.values()]
        return sum(array.nbytes for array in arrays), len(method.params.layout)

    w, h, layers, heads = 20, 9, 2, 5
    most = {"heads": -(-heads // size) * w // heads, "units": -(-h // size), "tokens": -(-VOCABULARY // size)}
    divided = most["tokens"] * w + layers * (4 * w * most["heads"] + 3 * most["heads"] + (2 * w + 1) * most["units"])
    repeated = (CONTEXT + 2) * w + layers * 6 * w
    for nbytes, tensors in LocalWorld(size).run(held)[:1]:
        assert 0 <= nbytes - 4 * 4 * (divided + repeated) < 4 * 64 * tensors
