"""Streamed gradients: which tensors go together, when they are reduced, what is kept, and what is refused."""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import numpy as np
import pytest
from parallel_cases import RowsFeed, cnn, mlp, plan

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key, Layout, Segment, plain, unwritten
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.nn import Network
from mpitrain.optim import SGD, Adam
from mpitrain.optim.optimizer import APART_BYTES
from mpitrain.parallel import GradientParallel
from mpitrain.parallel.buckets import StreamedGradients, buckets_of

LAYOUT = Layout.build(
    [
        Segment("embedding.weight", (100,)),
        Segment("0.weight", (40,)),
        Segment("0.other", (40,)),
        Segment("0.bias", (4,), group="no_decay"),
        Segment("1.weight", (30,)),
        Segment("1.bias", (3,), group="no_decay"),
        Segment("1.mean", (3,), group="statistics", rate=0.1),
    ],
    np.float64,
    ties={"head.weight": "embedding.weight"},
)


def named(bucket_bytes: int) -> list[list[str]]:
    return [[segment.name for segment in bucket.segments] for bucket in buckets_of(LAYOUT, bucket_bytes)]


def test_buckets_hold_whole_layers_of_one_group_the_last_first():
    small = [["1.bias"], ["0.bias"], ["1.mean"]]
    assert named(1) == [["1.weight"], ["0.weight", "0.other"], ["embedding.weight"], *small]
    biases = [["0.bias", "1.bias"], ["1.mean"]]
    assert named(8 * 112) == [["0.weight", "0.other", "1.weight"], ["embedding.weight"], *biases]
    assert named(1 << 20) == [["embedding.weight", "0.weight", "0.other", "1.weight"], *biases]


@pytest.mark.parametrize("bucket_bytes", [1, 8 * 112, 1 << 20])
@pytest.mark.parametrize("layout", [LAYOUT, cnn().layout, mlp().layout, Layout.build([])])
def test_buckets_tile_the_flat_range(layout, bucket_bytes):
    ranges = sorted((bucket.start, bucket.stop) for bucket in buckets_of(layout, bucket_bytes))
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges)][: len(ranges)]
    assert not ranges or ranges[-1][1] == layout.size


def streamed(comm: Communicator, bucket_bytes: int = 1) -> StreamedGradients:
    return StreamedGradients(comm, LAYOUT, bucket_bytes, plain, plain)


def leaf(grads: Gradients, name: str) -> np.ndarray:
    node: Any = grads.tree
    for key in name.split("."):
        node = node[key]
    return node


def whole(comm: Communicator, grads: StreamedGradients) -> dict[str, np.ndarray]:
    found = FlatBuffer(LAYOUT)
    pieces = [(shard.start, shard.stop, sums) for shard, sums in zip(grads.shards, grads.sums, strict=True)]
    for start, stop, sums in chain(*comm.allgather_object(pieces)):
        found.flat[start:stop] = sums
    return found.views


def reductions(comm: Communicator) -> int:
    count = comm.ledger.snapshot().get((comm.ledger.axis, "reduce_scatter"))
    return count.calls if count else 0


def check_order(comm: Communicator, order: list[str], bucket_bytes: int) -> None:
    """Ranks work in orders of their own, and say what is complete or not; two passes add up."""
    grads = streamed(comm, bucket_bytes)
    mine = order[comm.rank :] + order[: comm.rank]
    for _ in range(2):
        grads.zero()
        for _ in range(2):
            for name in mine:
                leaf(grads, name)[...] += comm.rank + len(name)
                if comm.rank % 2 == 0 and name != "head.weight":
                    grads.complete(name)
            grads.end_pass()
        for name, view in whole(comm, grads).items():
            times = 2 if name in ("embedding.weight", "head.weight") else 1
            expected = 2 * sum(rank + len(name) for rank in range(comm.size))
            if times == 2:
                expected = 2 * sum(2 * rank + len("embedding.weight") + len("head.weight") for rank in range(comm.size))
            np.testing.assert_array_equal(view, expected)


@pytest.mark.parametrize("bucket_bytes", [1, 8 * 112, 1 << 20])
@pytest.mark.parametrize("backwards", [False, True])
def test_any_order_gives_the_sums(bucket_bytes, backwards):
    names = [*(segment.name for segment in LAYOUT if segment.name != "embedding.weight")]
    order = [*(reversed(names) if backwards else names)]

    def check(comm: Communicator) -> None:
        check_order(comm, ["embedding.weight", "head.weight", *order], bucket_bytes)

    for size in (1, 3):
        LocalWorld(size, timeout_s=20).run(check)


def test_a_bucket_is_reduced_once_complete_and_not_before_its_turn():
    def check(comm: Communicator) -> None:
        grads = streamed(comm)
        grads.zero()
        comm.ledger.reset()
        for prefix, expected in (("0.", 0), ("1.", 2), ("embedding.", 2), ("embedding.", 2), ("head.", 6), ("", 6)):
            grads.complete(prefix)
            assert reductions(comm) == expected, prefix
        grads.end_pass()
        assert reductions(comm) == 6

    LocalWorld(2).run(check)


def test_a_whole_name_completes_that_tensor_alone():
    layout = Layout.build([Segment("w", (4,)), Segment("w2", (4,))], np.float64)

    def check(comm: Communicator) -> None:
        grads = StreamedGradients(comm, layout, 1, plain, plain)
        leaf(grads, "w")[...] = 1
        grads.complete("w")
        assert reductions(comm) == 0
        leaf(grads, "w2")[...] = 2
        grads.complete("w2")
        assert reductions(comm) == 2

    LocalWorld(2).run(check)


class Spy(Network):
    """Notes, when a layer's forward pass is over, how many reductions there have been at each completion."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(cnn().layer, nn.CrossEntropy(), np.float64)
        self.comm, self.seen = comm, []

    def loss_and_gradients(self, params: FlatBuffer, batch: Batch, grads: Any, rng: Key, reduce: Any = None) -> Any:
        complete = grads.complete

        def spy(prefix: str) -> None:
            complete(prefix)
            self.seen.append((prefix, reductions(self.comm)))

        grads.complete = spy
        try:
            return super().loss_and_gradients(params, batch, grads, rng, reduce)
        finally:
            del grads.complete


def test_layers_say_when_they_are_complete_so_that_reduction_begins_during_the_backward_pass():
    def check(comm: Communicator) -> None:
        network = Spy(comm)
        method = GradientParallel(comm, stage=2, bucket_bytes=1)
        method.setup(network, SGD(), plan(1))
        comm.ledger.reset()
        method.advance(RowsFeed(), until=1)
        weights = dict(network.seen)
        assert [weights[f"{layer}."] for layer in (10, 8, 3, 0)][:3] == [1, 2, 3]
        assert weights["0."] == len(method.grads.buckets)

    LocalWorld(2).run(check)


class Counted:
    """An allocator that knows how many bytes of what it gave are still held."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[np.ndarray]] = []

    def __call__(self, size: int, dtype: np.dtype[Any], /) -> np.ndarray:
        array = np.zeros(size, dtype)
        self.given.append(weakref.ref(array))
        return array

    def held_bytes(self) -> int:
        return sum(array.nbytes for array in (ref() for ref in self.given) if array is not None)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_memory_of_each_kind_is_the_formula(size, stage):
    """Ordinary memory, of n bytes of parameters; with shards of nearly equal size, that add up to n exactly."""
    hidden = [64, 64, 64]

    def held(comm: Communicator) -> tuple[int, int, int]:
        network, memory = Network(nn.MODELS["mlp"](32, 3, hidden=hidden), nn.CrossEntropy()), Counted()
        method = GradientParallel(comm, stage=stage, bucket_bytes=1, allocator=memory)
        method.setup(network, Adam(), plan(1))
        method.advance(RowsFeed(dtype=np.float32), until=1)
        nbytes, item = network.layout.nbytes, network.layout.dtype.itemsize
        states = sum(array.nbytes for part in method.parts for array in part.state.values())
        apart = sum(3 * APART_BYTES for _ in method.parts)  # in front of m, and twice as much in front of v
        sums = sum(part.grads.nbytes for part in method.parts)
        largest = max(bucket.size for bucket in method.grads.buckets) * item
        assert largest == {1: nbytes, 2: item * 64 * 64}[stage]
        biases = sum(bucket.size * item for bucket in method.grads.buckets if "bias" in bucket.segments[0].name)
        gradients = {1: nbytes, 2: largest + biases + sums}[stage]
        assert memory.held_bytes() == nbytes + gradients + states + apart
        return nbytes, states, sums

    found = LocalWorld(size).run(held)
    nbytes = found[0][0]
    assert sum(states for _, states, _ in found) == 2 * nbytes
    assert sum(sums for _, _, sums in found) == nbytes
    assert all(abs(sums - nbytes / size) <= 64 * 8 for _, _, sums in found)  # a line for each bucket


def check_what_is_left(comm: Communicator) -> None:
    """What lies in the passage from other buckets is neither a tensor's gradient nor padding."""
    grads = streamed(comm)
    for used in ({segment.name for segment in LAYOUT}, {"0.weight", "1.bias"}):
        grads.zero()
        for bucket in grads.buckets:
            for segment in bucket.segments:
                node = grads.tree
                for key in segment.name.split(".")[:-1]:
                    node = node[key]
                written = unwritten(node, segment.name.split(".")[-1]) if segment.name in used else None
                if written is not None:
                    written[...] = 5
                grads.complete(segment.name)
        grads.end_pass()
        for name, view in whole(comm, grads).items():
            expected = 5 * comm.size if LAYOUT.ties.get(name, name) in used else 0
            np.testing.assert_array_equal(view, expected)
        total = comm.allreduce(sum(float(np.abs(sums).sum()) for sums in grads.sums))
        assert total == 5 * comm.size * sum(LAYOUT[name].size for name in used)


def test_what_no_layer_wrote_is_zero():
    for size in (1, 2, 3):
        LocalWorld(size, timeout_s=20).run(check_what_is_left)


@pytest.mark.parametrize("attribute", ["flat", "views"])
def test_all_gradients_at_once_are_refused(attribute):
    with pytest.raises(InputError, match=r"all gradients at once, which stage 2 never has; .* expected grads.tree; "):
        getattr(LocalWorld(1).run(streamed)[0], attribute)


def test_what_is_touched_after_it_was_complete_is_refused():
    def late(comm: Communicator) -> None:
        grads = streamed(comm)
        grads.zero()
        grads.complete("1.")
        leaf(grads, "0.bias")[...] += 1  # not complete
        leaf(grads, "1.weight")[...] += 1

    with pytest.raises(InputError, match=r"gradient of '1.weight' was asked for after it was complete"):
        LocalWorld(2).run(late)
