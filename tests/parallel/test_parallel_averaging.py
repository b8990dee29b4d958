"""Local SGD with averaging: where it commits, how it weighs, and where it meets data-parallel SGD."""

from __future__ import annotations

import numpy as np
import pytest
from parallel_cases import RowsFeed, by_label, cnn, last_rank, mlp, plan, same_on_all, schedule, set_up
from parallel_reference import assert_close, buffer, mlp_mean_gradient

from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator
from mpitrain.optim import SGD, Optimizer, make_optimizer
from mpitrain.parallel import ModelAveraging

EVERY, STEPS = 3, 7
FEEDS = {
    "even": RowsFeed(),
    "by label": RowsFeed(owner=by_label),
    "all on the last rank": RowsFeed(owner=last_rank),
}

every_feed = pytest.mark.parametrize("feed", FEEDS.values(), ids=FEEDS.keys())


def averaging(comm: Communicator, every: int, optimizer: Optimizer | None = None, steps: int = STEPS) -> ModelAveraging:
    method = ModelAveraging(comm, average_every=every)
    method.setup(mlp(), optimizer or SGD(), plan(steps))
    return method


def local_sgd(start: FlatBuffer, feed: RowsFeed, size: int, optimizer: Optimizer, every: int) -> FlatBuffer:
    """What the ranks do, one after another: each descends on its rows; then parameters and state are averaged."""
    shard = start.layout.whole()
    replicas = [buffer(start.layout, start.flat) for _ in range(size)]
    states = [optimizer.init(shard) for _ in range(size)]
    seen = np.zeros(size)
    for step in range(1, STEPS + 1):
        for rank, (params, state) in enumerate(zip(replicas, states, strict=True)):
            batch = feed.share(rank, size, 1).batch(step - 1)[0]
            seen[rank] += len(batch)
            if len(batch):
                grads = mlp_mean_gradient(params, batch)[1].flat
                optimizer.update(params.flat, grads, state, schedule(step), step, shard)
        if step % every == 0 or step == STEPS:
            for arrays in ([params.flat for params in replicas], *([s[slot] for s in states] for slot in states[0])):
                mean = np.average(arrays, axis=0, weights=seen)
                for array in arrays:
                    array[...] = mean
            seen[...] = 0
    return replicas[0]


def check_local_sgd(comm: Communicator, feed: RowsFeed, optimizer: Optimizer) -> None:
    method = averaging(comm, EVERY, optimizer)
    start = buffer(method.params.layout, method.params.flat)
    method.advance(feed, until=STEPS)
    assert_close(method.params, local_sgd(start, feed, comm.size, optimizer, EVERY), 1e-12)
    same_on_all(comm, method.params.sha256())
    same_on_all(comm, {slot: array.tobytes() for slot, array in method.optimizer_state.items()})


@every_feed
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_averages_are_weighted_by_samples(on_ranks, feed, name):
    on_ranks(check_local_sgd, feed, make_optimizer(name))


def check_every_step_is_data_parallel(comm: Communicator, feed: RowsFeed) -> None:
    """Σ nᵢ/N (p − lr gᵢ/nᵢ) = p − lr Σ gᵢ/N."""
    method, reference = averaging(comm, every=1), set_up(comm, mlp(), STEPS)
    losses = [each.advance(feed, until=STEPS).loss for each in (method, reference)]
    assert_close(method.params, reference.params, 1e-12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


@every_feed
def test_averaging_every_step_of_plain_sgd_is_data_parallel(on_ranks, feed):
    on_ranks(check_every_step_is_data_parallel, feed)


def check_ranks_differ_in_between(comm: Communicator) -> None:
    method, reference = averaging(comm, EVERY), set_up(comm, mlp(), STEPS)
    for each in (method, reference):
        each.advance(RowsFeed(), until=STEPS)
    apart = np.abs(method.params.flat - reference.params.flat).max()
    assert (apart > 1e-9) == (comm.size > 1)


def test_averaging_more_rarely_is_another_method(on_ranks):
    on_ranks(check_ranks_differ_in_between)


def check_commit_points(comm: Communicator) -> None:
    method, feed = averaging(comm, EVERY, make_optimizer("momentum")), RowsFeed(owner=by_label)
    samples = []
    for until, expected in ((0, 0), (1, 3), (3, 3), (4, 6), (5, 6), (7, 7), (9, 7)):
        progress = method.advance(feed, until)
        samples.append(progress.samples)
        assert progress.step == method.step == expected
        same_on_all(comm, (method.params.sha256(), method.optimizer_state["velocity"].tobytes()))
    assert samples == [0, 7 + 3 + 7, 0, 3 + 7 + 3, 0, 7, 0]


def test_commits_every_k_steps_and_at_the_end(on_ranks):
    on_ranks(check_commit_points)


def check_running_statistics(comm: Communicator) -> None:
    """BatchNorm looks at the rank's own samples; the running statistics are averaged with everything else."""
    method = ModelAveraging(comm, average_every=2, microbatches=2)
    method.setup(cnn(), make_optimizer("adam"), plan(4))
    method.advance(RowsFeed(owner=by_label), until=4)
    same_on_all(comm, method.params.sha256())
    assert np.isfinite(method.params.flat).all()


def test_batchnorm_and_empty_shares_are_averaged(on_ranks):
    on_ranks(check_running_statistics)
