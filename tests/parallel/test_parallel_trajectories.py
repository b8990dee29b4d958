"""Ten steps on n ranks go where a serial float64 run goes; where arithmetic is exact, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from parallel_cases import (
    ROWS,
    TEXT,
    KeptKeys,
    Make,
    Recorder,
    RowsFeed,
    by_label,
    cnn,
    every_method,
    every_method_and,
    gpt,
    last_rank,
    mlp,
    plan,
    same_on_all,
    schedule,
    set_up,
)
from parallel_reference import assert_close, buffer, descend, mlp_mean_gradient, network_mean_gradient

from mpitrain import nn
from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator
from mpitrain.data import Dataset
from mpitrain.method import Plan
from mpitrain.nn import Network
from mpitrain.optim import OPTIMIZERS, SGD, Optimizer, make_optimizer
from mpitrain.parallel import DataParallel
from mpitrain.parallel.synchronous import Synchronous

STEPS = 10
BOUND = 1e-9
CLIPPING = {"not clipped": {}, "by norm": {"clip_norm": 0.2}, "by value": {"clip_value": 0.02}}
CLIPPING["by both"] = CLIPPING["by norm"] | CLIPPING["by value"]

FEED = RowsFeed(owner=by_label)


def trained(
    comm: Communicator,
    make: Make,
    network: Network,
    optimizer: Optimizer,
    settings: Plan,
    feed: RowsFeed = FEED,
) -> tuple[Any, FlatBuffer]:
    """Train to the end of the plan; return the method, and where it began."""
    method = make(comm)
    method.setup(network, optimizer, settings)
    start = buffer(network.layout, method.whole().flat)
    assert method.advance(feed, until=settings.steps).step == settings.steps
    same_on_all(comm, method.whole().sha256())
    return method, start


def check_mlp(comm: Communicator, make: Make, optimizer: Optimizer, limits: dict[str, float]) -> None:
    method, start = trained(comm, make, mlp(), optimizer, plan(STEPS, **limits))

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return mlp_mean_gradient(params, FEED.whole(step)[0])[1]

    assert_close(method.whole(), descend(start, optimizer, mean_gradient, STEPS, schedule, **limits), BOUND)


def check_cnn(comm: Communicator, make: Make, optimizer: Optimizer, limits: dict[str, float]) -> None:
    check_network(comm, make, cnn, FEED, optimizer, limits)


def check_gpt(comm: Communicator, make: Make, optimizer: Optimizer, limits: dict[str, float]) -> None:
    check_network(comm, make, gpt, replace(FEED, dataset=TEXT), optimizer, limits)


def check_network(
    comm: Communicator,
    make: Make,
    build: Callable[[], KeptKeys],
    feed: RowsFeed,
    optimizer: Optimizer,
    limits: dict[str, float],
) -> None:
    network, exact = build(), build()
    method, start = trained(comm, make, network, optimizer, plan(STEPS, **limits), feed)

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return network_mean_gradient(exact, params, feed.whole(step), [network.keys[step]])[1]

    assert_close(method.whole(), descend(start, optimizer, mean_gradient, STEPS, schedule, **limits), BOUND)


@every_method_and("name", {name: name for name in sorted(OPTIMIZERS)}, {"adam", "lamb"})
def test_every_optimizer_goes_where_the_serial_run_goes(on_ranks, make, name):
    on_ranks(check_mlp, make, make_optimizer(name, weight_decay=0.01), {})


@every_method_and("limits", CLIPPING, {"by both"})
@pytest.mark.parametrize("name", ["sgd", "lamb"])
def test_clipping_takes_the_norm_of_the_whole_gradient(on_ranks, make, name, limits):
    on_ranks(check_mlp, make, make_optimizer(name), limits)


@every_method_and("name", {name: name for name in ("momentum", "adam", "lamb")}, {"lamb"})
def test_batchnorm_and_dropout_go_where_the_serial_run_goes(on_ranks, make, name):
    on_ranks(check_cnn, make, make_optimizer(name), CLIPPING["by both"])


@every_method
def test_gpt_goes_where_the_serial_run_goes(on_ranks, make):
    on_ranks(check_gpt, make, make_optimizer("adamw", weight_decay=0.1), CLIPPING["by both"])


def check_clipping_bites(comm: Communicator) -> None:
    """The limits above are below what the gradients reach, so that they do something."""
    recorder = Recorder()
    trained(comm, DataParallel, mlp(), recorder, plan(STEPS))
    assert all(np.linalg.norm(seen) > CLIPPING["by norm"]["clip_norm"] for seen in recorder.seen(comm))
    assert all(np.abs(seen).max() > CLIPPING["by value"]["clip_value"] for seen in recorder.seen(comm))


def test_the_limits_of_clipping_are_reached(on_ranks):
    on_ranks(check_clipping_bites)


# Small integers, learning rates and batches that are powers of two: float32 is exact in any order of summation.

INPUTS, OUTPUTS = 3, 2
WEIGHT = np.array([[1, -2], [0, 3], [-1, 1]])
BIAS = np.array([2, -1])


def integers(low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(4).integers(low, high, shape)


TABLE = Dataset(integers(-2, 3, 8, INPUTS), integers(-4, 5, 8, OUTPUTS), "regression", "table")


def integer_run(comm: Communicator, make: Make, feed: RowsFeed, steps: int, microbatches: int = 1) -> Synchronous:
    """Train a linear model on half the squared error, from integers, in float32."""
    method = make(comm, microbatches=microbatches, bucket_bytes=8)
    method.setup(
        Network(nn.Linear(INPUTS, OUTPUTS), nn.MeanSquaredError()), SGD(), plan(steps, schedule=lambda step: 0.25)
    )
    method.load_parameters({"params/weight": WEIGHT.astype("f4"), "params/bias": BIAS.astype("f4")}.__getitem__)
    method.advance(feed, until=steps)
    return method


def check_exact(comm: Communicator, make: Make, feed: RowsFeed, microbatches: int) -> None:
    """Compare with rational arithmetic."""
    steps = 3
    method = integer_run(comm, make, feed, steps, microbatches)
    exact = np.vectorize(Fraction, otypes=[object])
    weight, bias = exact(WEIGHT), exact(BIAS)
    x, targets = exact(np.asarray(TABLE.inputs)), exact(np.asarray(TABLE.targets))
    for _ in range(steps):
        errors = x @ weight + bias - targets
        weight, bias = weight - Fraction(1, 32) * (x.T @ errors), bias - Fraction(1, 32) * errors.sum(0)
    assert (exact(method.whole().views["weight"].astype(float)) == weight).all()
    assert (exact(method.whole().views["bias"].astype(float)) == bias).all()


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("owner", [None, lambda size: np.arange(8) ** 2 % size, lambda size: np.full(8, size - 1)])
@every_method
def test_integers_are_exact(on_ranks, make, owner, microbatches):
    on_ranks(check_exact, make, RowsFeed(TABLE, 8, owner, dtype=np.float32), microbatches)


def check_rounded_once(comm: Communicator, make: Make) -> None:
    """A seventh is no float32 number, but of exact sums it is the same one wherever they were summed."""
    table = Dataset(TABLE.inputs[:7], TABLE.targets[:7], "regression", "table")
    method = integer_run(comm, make, RowsFeed(table, 7, dtype=np.float32), 1)
    total = table.inputs.T @ (table.inputs @ WEIGHT + BIAS - table.targets)
    step = total.astype(np.float32) / np.float32(7) * np.float32(0.25)
    np.testing.assert_array_equal(method.whole().views["weight"], WEIGHT.astype(np.float32) - step)


@every_method
def test_seven_rows_are_divided_once(on_ranks, make):
    on_ranks(check_rounded_once, make)


def check_progress(comm: Communicator, make: Make) -> None:
    """What `advance` tells is over all ranks: the mean loss of each step at its own parameters, and all rows."""
    params = []

    class Watched(KeptKeys):
        def loss_and_gradients(self, p: FlatBuffer, *args: Any) -> tuple[float, float]:
            params.append(method.whole().flat.copy())
            return super().loss_and_gradients(p, *args)

    network, feed = Watched(mlp().layer, nn.CrossEntropy(), np.float64), RowsFeed(owner=last_rank)
    method = set_up(comm, network, 3, make=make)
    progress = method.advance(feed, until=3)
    batches = [feed.whole(step)[0] for step in range(3)]
    losses = [
        mlp_mean_gradient(buffer(network.layout, flat), batch)[0] * len(batch)
        for flat, batch in zip(params, batches, strict=True)
    ]
    assert progress.samples == ROWS + 7
    assert progress.loss == pytest.approx(sum(losses) / progress.samples, rel=1e-12)
    assert (progress.step, progress.lr, progress.stop_requested) == (3, schedule(3), False)
    same_on_all(comm, progress)


@every_method
def test_progress_counts_all_ranks(on_ranks, make):
    on_ranks(check_progress, make)


def check_feeds_in_turn(comm: Communicator, make: Make) -> None:
    """A method may be handed another feed at any time."""
    feeds = [RowsFeed(owner=by_label), RowsFeed(batch_size=ROWS)]
    method = set_up(comm, mlp(), 2, make=make)
    start = buffer(method.params.layout, method.whole().flat)
    for step, feed in enumerate(feeds):
        assert method.advance(feed, until=step + 1).samples == feed.batch_size

    def mean_gradient(params: FlatBuffer, step: int) -> FlatBuffer:
        return mlp_mean_gradient(params, feeds[step].whole(step)[0])[1]

    assert_close(method.whole(), descend(start, SGD(), mean_gradient, 2, schedule), 1e-12)


@every_method
def test_another_feed_may_follow(on_ranks, make):
    on_ranks(check_feeds_in_turn, make)
