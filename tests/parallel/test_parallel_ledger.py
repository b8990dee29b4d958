"""What a step sends is what the layout says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from parallel_cases import CLASSES, STEPS_PER_EPOCH, RowsFeed, by_label, cnn, mlp, plan

from mpitrain import nn
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import Communicator, Count, LocalWorld
from mpitrain.comm.tuning import Key, Row, Table
from mpitrain.data import evaluation_batches
from mpitrain.nn import Network
from mpitrain.optim import make_optimizer
from mpitrain.parallel import DataParallel, GradientParallel, ModelAveraging

TALLY_BYTES = 5 * 8  # loss, count, samples, ranks asked to stop, ranks whose numbers are not finite
FEED = RowsFeed(owner=by_label)


def spent(comm: Communicator, work: Callable[[], object]) -> dict[str, Count]:
    """Return what some work communicated, by operation."""
    comm.ledger.reset()
    work()
    assert {axis for axis, _ in comm.ledger.snapshot()} <= {comm.ledger.axis}
    return {operation: count for (_, operation), count in comm.ledger.snapshot().items()}


def check_mlp(comm: Communicator, bucket_bytes: int) -> None:
    method = DataParallel(comm, bucket_bytes=bucket_bytes)
    # Neither clipping nor LAMB's norms cost anything where every rank holds the whole gradient.
    method.setup(mlp(np.float32), make_optimizer("lamb"), plan(2, clip_norm=1.0, clip_value=1.0))
    layout = method.params.layout
    buckets = -(-layout.nbytes // bucket_bytes)
    assert buckets == len(method.buckets)
    calls = STEPS_PER_EPOCH * (buckets + 1)
    expected = Count(calls, calls, STEPS_PER_EPOCH * (layout.nbytes + TALLY_BYTES))
    assert spent(comm, lambda: method.advance(FEED, until=STEPS_PER_EPOCH)) == {"allreduce": expected}


@pytest.mark.parametrize("bucket_bytes", [4 << 20, 1024, 64])
def test_a_step_sends_each_gradient_once_and_a_tally(on_ranks, bucket_bytes):
    on_ranks(check_mlp, bucket_bytes)


def check_cnn(comm: Communicator, microbatches: int) -> None:
    method = DataParallel(comm, microbatches=microbatches)
    method.setup(cnn(), make_optimizer("sgd"), plan(1))
    channels = (3, 4)
    norms = sum(8 * (features + 1 + features + 2 * features) for features in channels)
    small = 1 + microbatches * 3 * len(channels)
    whole, rest = Count(1, 1, method.params.layout.nbytes), Count(small, small, TALLY_BYTES + microbatches * norms)
    one_replica = comm.transport == "shared" and comm.size > 1  # whose shards the ranks update
    expected = (
        {"allreduce": rest, "reduce_scatter_plan": whole, "allgather_plan": whole} if one_replica
        else {"allreduce": whole + rest}
    )  # fmt: skip
    assert spent(comm, lambda: method.advance(FEED, until=1)) == expected


@pytest.mark.parametrize("microbatches", [1, 3])
def test_batchnorm_adds_three_small_reductions_a_microbatch(on_ranks, microbatches):
    on_ranks(check_cnn, microbatches)


def check_gradient_parallel(comm: Communicator, stage: int, microbatches: int) -> None:
    """Ordinary memory, or the same messages planned: gradients to their owners, and parameters to all."""
    method = GradientParallel(comm, stage=stage, microbatches=microbatches, bucket_bytes=400)
    method.setup(mlp(np.float32), make_optimizer("lamb"), plan(2, clip_norm=1.0, clip_value=1.0))
    layout = method.params.layout
    buckets = {1: 1, 2: 3}[stage]  # two layers' weights, and all biases
    passes = {1: 1, 2: microbatches}[stage]
    found = spent(comm, lambda: method.advance(FEED, until=STEPS_PER_EPOCH))
    steps, planned = STEPS_PER_EPOCH, "_plan" if comm.transport == "shared" else ""
    norms = 8 + 8 * 2 * len(layout)  # what clipping and LAMB need of the whole
    expected = {"allreduce": Count(3 * steps, 3 * steps, steps * (TALLY_BYTES + norms))}
    if comm.size > 1:
        reductions, gathers = passes * buckets * steps, buckets * steps
        expected[f"reduce_scatter{planned}"] = Count(reductions, reductions, passes * steps * layout.nbytes)
        expected[f"allgather{planned}"] = Count(gathers, gathers, steps * layout.nbytes)
    assert found == expected


@pytest.mark.parametrize(("stage", "microbatches"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_each_gradient_goes_to_its_owner_and_each_parameter_to_all(on_ranks, stage, microbatches):
    on_ranks(check_gradient_parallel, stage, microbatches)


DEEP = [16, 24, 8]
"""Hidden units: four linear layers, each of which is a bucket of weights and one of biases."""


def check_fully_sharded(comm: Communicator, microbatches: int) -> None:
    """Each pass gathers every layer forward, and backward all but the last, which is there, and the first."""
    method = GradientParallel(comm, stage=3, microbatches=microbatches, bucket_bytes=1)
    network = Network(nn.MODELS["mlp"](32, CLASSES, hidden=DEEP), nn.CrossEntropy())
    method.setup(network, make_optimizer("adam"), plan(1 + STEPS_PER_EPOCH))
    method.advance(replace(FEED, dtype=np.float32), until=1)  # in which the ranks agree on the order of the layers
    layout = network.layout
    ends = sum(padded_bytes(layout[f"{layer}.{name}"]) for layer in (1, 7) for name in ("weight", "bias"))
    gathers, nbytes = 8 + 4, 2 * layout.nbytes - ends
    comm.ledger.reset()
    method.advance(replace(FEED, dtype=np.float32), until=1 + STEPS_PER_EPOCH)
    counts = dict(comm.ledger.snapshot())
    passes, planned = STEPS_PER_EPOCH * microbatches, "_plan" if comm.transport == "shared" else ""
    expected = {"allreduce": Count(STEPS_PER_EPOCH, STEPS_PER_EPOCH, STEPS_PER_EPOCH * TALLY_BYTES)}
    if comm.size > 1:
        expected[f"reduce_scatter{planned}"] = Count(8 * passes, 8 * passes, passes * layout.nbytes)
        expected[f"allgather{planned}"] = Count(gathers * passes, gathers * passes, passes * nbytes)
    assert counts.pop(("node", "barrier"), Count()).calls == (gathers * passes if planned else 0)
    assert counts == {(comm.ledger.axis, operation): count for operation, count in expected.items()}


def padded_bytes(segment: Segment) -> int:
    return -(-segment.size * 4 // 64) * 64


@pytest.mark.parametrize("microbatches", [1, 3])
def test_parameters_are_gathered_for_each_pass(on_ranks, microbatches):
    on_ranks(check_fully_sharded, microbatches)


def check_memory(comm: Communicator) -> None:
    """A rank keeps its shards; in turn, the largest buckets of weights and of biases are there."""
    method = GradientParallel(comm, stage=3, bucket_bytes=1)
    network = Network(nn.MODELS["mlp"](32, CLASSES, hidden=DEEP), nn.CrossEntropy())
    method.setup(network, make_optimizer("adam"), plan(1))
    params, layout = method.params, network.layout
    assert sum(comm.allgather_object(params.nbytes)) == layout.nbytes
    assert params.nbytes <= layout.nbytes / comm.size + 64 * 8  # each bucket is cut at cache lines
    assert params.passage_nbytes == 32 * 16 * 4 + padded_bytes(layout["3.bias"])


def test_a_rank_keeps_its_shards_and_the_largest_buckets(on_ranks):
    on_ranks(check_memory)


def rings(size: int) -> Table:
    rows = [Row(operation, size, 1, "ring", {}) for operation in ("reduce_scatter", "allgather")]
    return Table(Key("", "", "", ""), tuple(rows))


def moved_by_a_ring(comm: Communicator, stage: int, hidden: list[int]) -> tuple[int, int, Layout]:
    """What a rank sends in one step where rings perform it, and what is reduced and gathered."""
    comm.tuning = rings(comm.size)
    method = GradientParallel(comm, stage=stage, bucket_bytes=400)
    network = Network(nn.MODELS["mlp"](32, CLASSES, hidden=hidden), nn.CrossEntropy())  # no shard is empty
    method.setup(network, make_optimizer("adam"), plan(2))
    method.advance(FEED, until=1)
    comm.ledger.reset()
    method.advance(FEED, until=2)
    counts = {operation: count for (_, operation), count in comm.ledger.snapshot().items()}
    moved = counts["reduce_scatter"] + counts["allgather"]
    return moved.moved_messages, moved.moved_bytes, network.layout


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("stage", "buckets"), [(1, 1), (2, 3), (3, 3)])
def test_rings_move_what_zero_says(size, stage, buckets):
    """Each of p ranks sends all shards but one, of n/p bytes, twice: 2(p-1)/p n; all together exactly 2(p-1) n.

    So does stage 3 with two layers of weights, which are both gathered once: the last is still there when its backward
    pass begins, and the first one's reads none.
    """
    found = LocalWorld(size).run(moved_by_a_ring, stage, [64])
    assert [messages for messages, _, _ in found] == [2 * (size - 1) * buckets] * size
    assert sum(nbytes for _, nbytes, _ in found) == 2 * (size - 1) * found[0][2].nbytes


@pytest.mark.parametrize("size", [2, 3, 4])
def test_stage_3_moves_three_times_the_parameters_less_what_is_still_there(size):
    """Each of p ranks sends (p-1)/p of what is reduced, n, and of what is gathered.

    That is 2n less the weights of the last layer, which are there when its backward pass begins, of the first, whose
    backward pass reads none, and the biases, of which all buckets but the first layer's fit together.
    """
    found = LocalWorld(size).run(moved_by_a_ring, 3, [64, 48, 32])
    layout = found[0][2]
    biases = 4 * (layout.size - layout["1.bias"].offset)
    once = padded_bytes(layout["1.weight"]) + padded_bytes(layout["7.weight"]) + biases
    assert sum(nbytes for _, nbytes, _ in found) == (size - 1) * (3 * layout.nbytes - once)


def check_averaging(comm: Communicator) -> None:
    every, steps = 4, 10
    method = ModelAveraging(comm, average_every=every)
    method.setup(cnn(), make_optimizer("adam"), plan(steps))
    commits, arrays = 3, 3  # at steps 4, 8 and 10; parameters, m and v
    calls = steps + commits * (1 + arrays)
    nbytes = steps * TALLY_BYTES + commits * (8 + arrays * method.params.layout.nbytes)
    assert spent(comm, lambda: method.advance(FEED, until=steps)) == {"allreduce": Count(calls, calls, nbytes)}


def test_averaging_sends_a_tally_a_step_and_the_model_at_commit_points(on_ranks):
    on_ranks(check_averaging)


def check_evaluation(comm: Communicator) -> None:
    method = DataParallel(comm)
    method.setup(mlp(), make_optimizer("sgd"), plan(1))
    batches = list(evaluation_batches(FEED.dataset, 3, comm.rank, comm.size, np.float64))
    sums = 8 * (1 + 1 + 1 + 9)  # loss, count, correct and the confusion matrix
    found = spent(comm, lambda: method.evaluate(batches))
    shapes = found.pop("allgather_object")
    assert (shapes.calls, shapes.logical_bytes < 256 * comm.size) == (2, True)  # its length, and itself
    assert found == {"allreduce": Count(1, 1, sums)}
    assert spent(comm, lambda: method.predict(FEED.dataset.inputs)) == {}
    assert spent(comm, method.state) == {}


def test_evaluation_is_one_reduction_after_shapes_and_predicting_nothing(on_ranks):
    on_ranks(check_evaluation)
