"""All ranks begin with the same parameters, those of one rank; a model that breaks this is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    IMAGES,
    METHODS,
    Make,
    RowsFeed,
    cnn,
    every_method,
    mlp,
    plan,
    random_values,
    same_on_all,
    set_up,
)

from mpitrain import nn
from mpitrain._errors import InputError, MismatchError, NonFiniteError
from mpitrain.arrays import Batch, FlatBuffer, Key
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.comm.codecs import Int8
from mpitrain.data import Batches, Dataset
from mpitrain.method import Method
from mpitrain.nn import Network
from mpitrain.optim import LAMB, SGD, Constant
from mpitrain.parallel import DataParallel, GradientParallel, ModelAveraging, ReproducibleDataParallel
from mpitrain.parallel.pipeline import PipelineParallel
from mpitrain.parallel.tensor import divided_network


def initial_hash(comm: Communicator, make: Make, dtype: str) -> str:
    found = set_up(comm, cnn(dtype), 1, make=make).whole().sha256()
    same_on_all(comm, found)
    return str(found)


def check_initial_parameters(comm: Communicator, make: Make, dtype: str) -> None:
    assert initial_hash(comm, make, dtype) == LocalWorld(1).run(initial_hash, DataParallel, dtype)[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_method
def test_initial_parameters_are_those_of_one_rank(on_ranks, make, dtype):
    on_ranks(check_initial_parameters, make, dtype)


@every_method
def test_advance_before_setup_says_so(make):
    with pytest.raises(InputError, match="advance: comes after setup; call setup"):
        LocalWorld(1).run(lambda comm: make(comm).advance(RowsFeed(1), until=1))


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"batch_size": 5}, "batches of 5 of 10 rows of images, seed 0, shuffle on rank 1"),
        ({"seed": 1}, "batches of 4 of 10 rows of images, seed 1, shuffle on rank 1"),
    ],
)
def test_ranks_that_are_given_other_batches_are_told(other, told):
    def train(comm: Communicator) -> None:
        given = {"batch_size": 4, "seed": 0, "dtype": np.float64} | (other if comm.rank == 1 else {})
        set_up(comm, mlp(), 4).advance(Batches(IMAGES, **given), until=1)

    with pytest.raises(MismatchError, match=f"advance: ranks were given different batches; got {told}; expected"):
        LocalWorld(3).run(train)


def test_ranks_that_divide_a_model_are_given_the_same_batches():
    def train(comm: Communicator) -> None:
        mesh = ProcessMesh(comm, data=1, tensor=2)
        model = divided_network(mlp().layer, nn.CrossEntropy(), mesh["tensor"], "float64", False)
        method = DataParallel(mesh["data"], across=mesh["tensor"])
        method.setup(model, SGD(), plan(4))
        method.advance(Batches(IMAGES, 4, seed=comm.rank, dtype=np.float64), until=1)

    with pytest.raises(MismatchError, match="advance: ranks were given different batches"):
        LocalWorld(2).run(train)


class EmptyFrom(RowsFeed):
    """Nobody has a sample from a step on."""

    def share(self, rank: int, size: int, microbatches: int) -> Any:
        loader = super().share(rank, size, microbatches)

        def batch(step: int) -> list[Batch]:
            return [Batch(*(part[: 0 if step else None] for part in each)) for each in map(parts, loader.batch(step))]

        def parts(each: Batch) -> tuple[np.ndarray, ...]:
            return each.inputs, each.targets, each.index

        return SimpleNamespace(batch=batch)


def check_a_step_without_samples(comm: Communicator, make: Make) -> None:
    method, feed = set_up(comm, mlp(), 4, make=make), EmptyFrom()
    method.advance(feed, until=1)
    before = method.whole().sha256()
    with pytest.raises(InputError, match="no rank had samples; got a count of 0 at step 2"):
        method.advance(feed, until=2)
    assert method.whole().sha256() == before


@every_method
def test_a_step_without_samples_is_refused(on_ranks, make):
    on_ranks(check_a_step_without_samples, make)


def test_lanes_and_codecs_refuse_a_step_without_samples():
    for make in (partial(ReproducibleDataParallel, lanes=4), partial(DataParallel, codec=Int8())):
        LocalWorld(2).run(check_a_step_without_samples, make)


class Missing(RowsFeed):
    """The last share leaves out a microbatch in which it has no samples."""

    def share(self, rank: int, size: int, microbatches: int) -> Any:
        loader, last = super().share(rank, size, microbatches), rank == size - 1
        return SimpleNamespace(batch=lambda step: loader.batch(step)[: -1 if last and step else None])


FEWER = {
    "gradient 1": lambda comm: GradientParallel(comm, microbatches=2),
    "gradient 2": lambda comm: GradientParallel(comm, stage=2, bucket_bytes=8, microbatches=2),
    "pipeline": lambda comm: PipelineParallel(comm, microbatches=2),
    "lanes": lambda comm: ReproducibleDataParallel(comm, lanes=3, microbatches=2),
}


@pytest.mark.parametrize("name", FEWER)
def test_a_share_with_too_few_microbatches_is_refused(name):
    told = "the feed's share of step 2 is not a Batch for each microbatch; got 1; expected 2; .*a Batch of none"
    with pytest.raises(InputError, match=told):
        LocalWorld(2, timeout_s=20).run(
            lambda comm: set_up(comm, mlp(), 4, make=FEWER[name]).advance(Missing(), until=2)
        )


class Counts(Network):
    """Says that a loss is to be divided by whatever it is told."""

    count: float

    def loss_and_gradients(self, *args: Any) -> tuple[float, float]:
        return super().loss_and_gradients(*args)[0], self.count


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (float("nan"), NonFiniteError, "the loss or gradient of step 1 is not finite"),
        (-64.0, InputError, "the model's count is negative; got -64.0"),
    ],
)
def test_a_count_that_nothing_can_be_divided_by_is_refused(count, error, message):
    network = Counts(mlp().layer, nn.CrossEntropy(), np.float64)
    network.count = count
    with pytest.raises(error, match=message):
        LocalWorld(1).run(lambda comm: set_up(comm, network, 4).advance(RowsFeed(), until=1))


STEEP = Dataset(1e80 * random_values(8, 2), random_values(8, 1), "regression", "steep")
"""Gradients of its squared errors are near 1e160, which float64 holds, and their squares are not."""

CLIPPING: dict[str, Make] = {
    "data": DataParallel,
    "gradient": GradientParallel,
    "pipeline": PipelineParallel,
    "lanes": lambda comm: ReproducibleDataParallel(comm, lanes=2),
    "averaging": lambda comm: ModelAveraging(comm, average_every=1),
}


@pytest.mark.parametrize("name", CLIPPING)
def test_a_norm_that_overflows_ends_all_ranks(name):
    """Clipping by it would make every gradient 0; the step is not taken, and not counted."""

    def check(comm: Communicator) -> None:
        network = Network(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), nn.MeanSquaredError(), np.float64)
        method = CLIPPING[name](comm)
        method.setup(network, SGD(), plan(1, clip_norm=1.0))
        before = method.weights_sha256()
        with pytest.raises(NonFiniteError, match=r"too large for its norm.*; got a norm of inf; .*clip_value"):
            method.advance(RowsFeed(STEEP, 8), until=1)
        assert (method.step, method.weights_sha256()) == (0, before)

    LocalWorld(2, timeout_s=20).run(check)


class OneBitOff(Network):
    """Breaks the contract: its initial values depend on the rank."""

    def __init__(self, off: bool) -> None:
        super().__init__(nn.Linear(3, 2), nn.MeanSquaredError())
        self.off = off

    def initialise(self, params: FlatBuffer, key: Key) -> None:
        super().initialise(params, key)
        if self.off and "bias" in params.views:
            bias = params.views["bias"]
            bias[-1] = np.nextafter(bias[-1], np.float32(1))


def check_mismatch(comm: Communicator, method: Method) -> None:
    wrong = {comm.size - 1, 1}
    with pytest.raises(MismatchError, match="initial parameters differ") as caught:
        method.setup(OneBitOff(comm.rank in wrong), SGD(), plan(1))
    assert f"on ranks {sorted(wrong)}" in str(caught.value)
    assert "initialise()" in str(caught.value)


def check_mismatch_of_all_methods(comm: Communicator) -> None:
    if comm.size == 1:
        DataParallel(comm).setup(OneBitOff(True), SGD(), plan(1))  # there is nobody to differ from
        return
    for make in (*METHODS.values(), partial(ModelAveraging, average_every=2)):
        check_mismatch(comm, make(comm))


def test_differing_initial_parameters_name_the_ranks(on_ranks):
    on_ranks(check_mismatch_of_all_methods)


RULES = {
    "rate": lambda rank: (SGD(), plan(3, schedule=Constant(lr=1.0 + rank))),
    "end": lambda rank: (SGD(), plan(3, schedule=lambda step: 1.0 + rank * (step > 2))),
    "steps": lambda rank: (SGD(), plan(3 + rank, schedule=Constant(lr=1.0))),
    "clipping": lambda rank: (SGD(), plan(3, clip_norm=1.0 + rank)),
    "one clips": lambda rank: (SGD(), plan(3, clip_norm=1.0 if rank else None)),
    "kind": lambda rank: (SGD() if rank else LAMB(), plan(3)),
    "option": lambda rank: (SGD(weight_decay=0.1 * rank), plan(3)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", [DataParallel, GradientParallel, PipelineParallel])
def test_ranks_that_would_take_different_steps_are_named(make, rule):
    with pytest.raises(MismatchError, match=r"setup: ranks were set up to take different steps; got .* on rank 1; exp"):
        LocalWorld(2).run(lambda comm: make(comm).setup(mlp(), *rule(comm.rank)))


@pytest.mark.mpi
@pytest.mark.parametrize("make", [DataParallel, GradientParallel])
def test_ranks_are_named_before_they_lay_out_memory_apart(world: Communicator, make: Make) -> None:
    if world.size > 1:
        with pytest.raises(MismatchError, match="setup: ranks were set up to take different steps"):
            make(world).setup(mlp(), SGD(), plan(3, clip_norm=1.0 if world.rank else None))


def test_what_one_rank_does_beside_the_rule_is_its_own_business():
    class Mine(SGD):
        pass

    LocalWorld(2).run(lambda comm: DataParallel(comm).setup(mlp(), Mine() if comm.rank else SGD(), plan(3)))


def check_setup_twice(comm: Communicator, make: Make) -> None:
    """A method that is set up again begins anew."""
    method = set_up(comm, mlp(), 1, make=make)
    first = method.whole().sha256()
    comm.barrier()
    for part in method.parts:
        part.params[...] = 1
    method.step = 7
    method.setup(mlp(), SGD(), plan(1))
    assert (method.whole().sha256(), method.step) == (first, 0)


@every_method
def test_setup_begins_anew(on_ranks, make):
    on_ranks(check_setup_twice, make)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda comm: DataParallel(comm, microbatches=0), "microbatches is too small; got 0; expected at least 1"),
        (lambda comm: DataParallel(comm, bucket_bytes=0), "bucket_bytes is too small; got 0; expected at least 1"),
        (lambda comm: ModelAveraging(comm, average_every=0), "average_every is too small; got 0; expected at least 1"),
        (lambda comm: GradientParallel(comm, microbatches=0), "GradientParallel: microbatches is too small; got 0"),
        (lambda comm: GradientParallel(comm, stage=4), "there is no such stage; got 4; expected 1, 2 or 3"),
    ],
)
def test_unusable_options_are_named(build, message):
    with pytest.raises(InputError, match=message):
        LocalWorld(1).run(build)


class ReadsAtOnce(Network):
    """As a PyTorch module does."""

    reads_by_layer = False

    def loss_and_gradients(self, params: FlatBuffer, *rest: Any) -> tuple[float, float]:
        assert params.flat.size == self.layout.size
        return super().loss_and_gradients(params, *rest)


def check_models_that_read_at_once(comm: Communicator) -> None:
    """In stage 3 too, where those that read layer by layer take the same steps."""
    found = []
    for made in (ReadsAtOnce, Network):
        network = made(mlp().layer, nn.CrossEntropy(), np.float64)
        method = set_up(comm, network, 2, make=METHODS["gradient 3"])
        method.advance(RowsFeed(), until=2)
        found.append(method.weights_sha256())
    assert found[0] == found[1]


def test_parameters_stay_whole_for_models_that_read_them_at_once(on_ranks):
    on_ranks(check_models_that_read_at_once)
