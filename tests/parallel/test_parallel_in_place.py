"""Sums that are taken while the parameters are updated: on one node that shares its memory, and with the same bits."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import METHODS, Make, RowsFeed, by_label, cnn, mlp, plan, same_on_all

from mpitrain import nn
from mpitrain._errors import NonFiniteError
from mpitrain.arrays import FlatBuffer, Gradients, Key
from mpitrain.comm import Communicator
from mpitrain.nn import Network
from mpitrain.optim import SGD, make_optimizer
from mpitrain.parallel import DataParallel, GradientParallel
from mpitrain.parallel.in_place import CommonGradients, common_gradients

pytestmark = pytest.mark.mpi

IN_PLACE = {"data": DataParallel, "gradient 1": GradientParallel}
in_place_methods = pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE.keys())

STEPS = 12

NEVER = 1e30
"""A norm that no gradient comes to: what could be clipped is summed before it is used."""


def trained(world: Communicator, make: Make, optimizer: str, dtype: str, **options: object) -> tuple[str, bool]:
    """Return the hash of what some steps give, and whether sums were taken in place."""
    method = make(world, microbatches=2)
    method.setup(cnn(dtype), make_optimizer(optimizer), plan(STEPS, **options))
    method.advance(RowsFeed(owner=by_label, dtype=np.dtype(dtype)), until=STEPS)
    same_on_all(world, method.weights_sha256())
    return method.weights_sha256(), isinstance(method.grads, CommonGradients)


@pytest.mark.parametrize("kernel", ["on", "off"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@in_place_methods
def test_bits_are_those_of_sums_that_are_there_first(
    world: Communicator, make: Make, optimizer: str, dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPITRAIN_KERNEL", kernel)
    in_place = trained(world, make, optimizer, dtype)
    before = trained(world, make, optimizer, dtype, clip_norm=NEVER)
    assert in_place[0] == before[0]
    assert (in_place[1], before[1]) == (world.size > 1, False)


@pytest.mark.parametrize("name", ["gradient 2", "gradient 3"])
def test_streamed_sums_are_divided_while_updating_with_the_same_bits(world: Communicator, name: str) -> None:
    make = METHODS[name]
    in_update, before = (trained(world, make, "adam", "float32", **each) for each in ({}, {"clip_norm": NEVER}))
    assert in_update[0] == before[0]


def test_in_stage_2_a_model_of_one_bucket_takes_the_step_of_stage_1(world: Communicator) -> None:
    nbytes = cnn("float32").layout.nbytes
    stage_1 = trained(world, GradientParallel, "adam", "float32")
    for bucket_bytes, fits in ((nbytes, True), (nbytes - 1, False)):
        make = partial(GradientParallel, stage=2, bucket_bytes=bucket_bytes)
        found = trained(world, make, "adam", "float32")
        assert found[1] == (fits and world.size > 1)
        assert found[0] == stage_1[0] or not found[1]


def test_a_node_that_shares_no_memory_sums_before(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPITRAIN_TRANSPORT", "host")
    with world.split(0, axis="host") as comm:
        for make in IN_PLACE.values():
            assert not trained(comm, make, "adam", "float32")[1]


class Large(Network):
    """Adds a value to one gradient of every rank that has samples; its square may not be finite."""

    def __init__(self, value: float) -> None:
        super().__init__(mlp().layer, nn.CrossEntropy(), np.float32)
        self.value = value

    def loss_and_gradients(
        self, params: FlatBuffer, batch: object, grads: Gradients, rng: Key, reduce: nn.Reduce | None = None
    ) -> tuple[float, float]:
        found = super().loss_and_gradients(params, batch, grads, rng, reduce)
        grads.tree["3"]["bias"][0] += np.float32(self.value)
        return found


def large(world: Communicator, make: Make, value: float, **feed: object) -> str:
    method = make(world)
    method.setup(Large(value), make_optimizer("sgd"), plan(2))
    with np.errstate(over="ignore"):
        method.advance(RowsFeed(dtype=np.float32, **feed), until=2)
    return method.weights_sha256()


@in_place_methods
def test_values_with_squares_beyond_the_range_are_used(world: Communicator, make: Make) -> None:
    """They are finite, and so are their sums."""
    same_on_all(world, large(world, make, 1e30))


@in_place_methods
def test_sums_beyond_the_range_end_the_run_though_no_term_is(world: Communicator, make: Make) -> None:
    if world.size == 1:
        pytest.skip("there is one term")
    with pytest.raises(NonFiniteError, match=r"ranks whose own samples gave it: none; tensors: 3\.bias"):
        large(world, make, 3e38)


class Late(SGD):
    """Reads gradients some time after the others have."""

    def update_mean(self, *args: Any) -> None:
        time.sleep(0.003)
        super().update_mean(*args)


@in_place_methods
def test_no_rank_writes_while_another_still_reads(world: Communicator, make: Make) -> None:
    """The last rank reads late; the others have their next gradients by then."""
    found = []
    for options in ({}, {"clip_norm": NEVER}):
        method = make(world)
        method.setup(mlp(np.float32), Late() if world.rank == world.size - 1 else SGD(), plan(10, **options))
        method.advance(RowsFeed(dtype=np.float32), until=10)
        found.append(method.weights_sha256())
    same_on_all(world, found[0])
    assert found[0] == found[1]


def test_ranks_that_divide_a_model_all_sum_in_place_or_none_does(world: Communicator, monkeypatch) -> None:
    if world.size != 4:
        pytest.skip("two ranks that share a batch, twice")
    if world.rank >= 2:
        monkeypatch.setenv("MPITRAIN_TRANSPORT", "host")
    layout, optimizer = cnn().layout, make_optimizer("adam")
    with world.split(world.rank // 2, axis="data") as data, world.split(world.rank % 2, axis="tensor") as tensor:
        alone = common_gradients(data, None, layout, optimizer, plan(STEPS))
        assert (alone is None) == (world.rank >= 2)
        assert common_gradients(data, tensor, layout, optimizer, plan(STEPS)) is None
