"""What goes back is the adjoint of what went there: by the definition, by finite differences, and to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import FlatBuffer, Key
from mpitrain.comm import Communicator
from mpitrain.nn import Context, Pool
from mpitrain.parallel.tensor import ADJOINTS, ColumnLinear, Cut, Pair, PeerCall, Portion
from mpitrain.parallel.tensor.portion import spans

SHAPES = [((2, 7, 3), 1), ((5, 6), -1), ((3, 2, 4), 1), ((0, 4, 2), 1)]
"""Whole arrays, and the axis along which they are cut; two places are fewer than four ranks."""

every_pair = pytest.mark.parametrize("pair", ADJOINTS, ids=lambda pair: pair.name)


class Ground:
    """Vectors of the three spaces, their inner product, and exchanges on copies of them."""

    def __init__(self, comm: Communicator, shape: tuple[int, ...], axis: int) -> None:
        self.comm, self.shape, self.cut = comm, shape, Cut(axis, shape[axis])
        self.call = PeerCall(np, Pool(), peers=comm)

    def vector(self, space: str, seed: int, integers: bool = False) -> np.ndarray:
        """The same on all ranks, one for each, or this rank's part of one."""
        rng = np.random.default_rng([seed, self.comm.rank if space == "own" else 99])
        whole = rng.integers(-50, 50, self.shape).astype(float) if integers else rng.standard_normal(self.shape)
        if space != "parts":
            return whole
        span = spans(self.cut.size, self.comm.size)[self.comm.rank]
        return np.ascontiguousarray(np.swapaxes(np.swapaxes(whole, 0, self.cut.axis)[slice(*span)], 0, self.cut.axis))

    def inner(self, space: str, x: np.ndarray, y: np.ndarray) -> float:
        own = float((x * y).sum())
        return own if space == "same" else float(self.comm.allreduce(own))

    def run(self, exchange: Any, x: np.ndarray) -> np.ndarray:
        context = Context(self.call.pool)
        found = exchange(x.copy(), self.cut, context, self.call).copy()
        context.release()
        return found


def check_definition(comm: Communicator, pair: Pair, integers: bool) -> None:
    for shape, axis in SHAPES:
        ground = Ground(comm, shape, axis)
        x, y = ground.vector(pair.source, 1, integers), ground.vector(pair.target, 2, integers)
        there, back = ground.run(pair.forward, x), ground.run(pair.backward, y)
        assert (there.shape, back.shape) == (y.shape, x.shape)
        left, right = ground.inner(pair.target, there, y), ground.inner(pair.source, x, back)
        assert left == (right if integers else pytest.approx(right, rel=1e-12, abs=1e-12))
        assert not x.size or left != 0


@pytest.mark.parametrize("integers", [True, False])
@every_pair
def test_backward_is_the_adjoint_of_forward(on_ranks, pair, integers):
    on_ranks(check_definition, pair, integers)


def check_differences(comm: Communicator, pair: Pair, step: float = 1e-6) -> None:
    """Of Σ sin(w f(x)), along one direction in all of the source space at once, and along one place of one rank."""
    ground = Ground(comm, (2, 7, 3), 1)
    x, weights = ground.vector(pair.source, 1), ground.vector(pair.target, 2)
    slope = ground.run(pair.backward, weights * np.cos(weights * ground.run(pair.forward, x)))

    def objective(at: np.ndarray) -> float:
        values = np.sin(weights * ground.run(pair.forward, at))
        return ground.inner(pair.target, values, np.ones_like(values))

    single = np.zeros_like(x)
    if single.size and (pair.source == "same" or comm.rank == comm.size - 1):
        single.flat[-1] = 1.0
    for direction in (ground.vector(pair.source, 3), single):
        difference = (objective(x + step * direction) - objective(x - step * direction)) / (2 * step)
        assert ground.inner(pair.source, slope, direction) == pytest.approx(difference, rel=1e-7, abs=1e-7)


@every_pair
def test_backward_gives_the_slope_that_finite_differences_give(on_ranks, pair):
    on_ranks(check_differences, pair)


def test_each_pair_is_the_adjoint_of_one_in_the_table():
    for pair, other in ADJOINTS.items():
        assert ADJOINTS[other] is pair
        assert (pair.forward, pair.backward) == (other.backward, other.forward)
        assert (pair.source, pair.target) == (other.target, other.source)


def check_bytes(comm: Communicator, pair: Pair) -> None:
    """One message there and one back at most, each of the whole array."""
    ground = Ground(comm, (2, 8, 3), 1)
    for exchange, space in ((pair.forward, pair.source), (pair.backward, pair.target)):
        comm.ledger.reset()
        ground.run(exchange, ground.vector(space, 1))
        counts = comm.ledger.snapshot()
        expected = [] if exchange.__name__ in ("identity", "own_part") else [exchange.__name__]
        assert [operation for _, operation in counts] == expected
        assert all((each.messages, each.logical_bytes) == (1, 2 * 8 * 3 * 8) for each in counts.values())


@every_pair
def test_an_exchange_is_one_message_at_most(on_ranks, pair):
    on_ranks(check_bytes, pair)


@pytest.mark.parametrize("size", [4, 5, 67])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_portions_cover_a_size_once_and_nearly_evenly(size: int, parts: int):
    found = [Portion(number, parts).span(size, "things") for number in range(parts)]
    assert [place for span in found for place in range(*span)] == list(range(size))
    lengths = [stop - start for start, stop in found]
    assert max(lengths) - min(lengths) <= 1


def test_heads_stay_whole():
    assert [Portion(number, 2).span(60, "heads", 5) for number in range(2)] == [(0, 36), (36, 60)]


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_box_of_a_random_tensor_is_that_part_of_it(kind: str):
    whole = Key(4).tensor((7, 9), ((0, 7), (0, 9)), kind)
    np.testing.assert_array_equal(Key(4).tensor((7, 9), ((2, 5), (3, 8)), kind), whole[2:5, 3:8])


def test_a_layer_in_an_ordinary_network_says_where_it_belongs():

    layer = ColumnLinear(nn.Linear(3, 4), Portion(0, 2))
    network = nn.Network(layer, nn.MeanSquaredError())
    with pytest.raises(InputError, match="was not told its ranks; put it in a TensorNetwork, not a Network"):
        network.predict(FlatBuffer(network.layout), np.ones((1, 3)))
