"""Trees in buckets: how many messages they make, that the values are those without, and what can be wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conformance import same

from mpitrain._errors import InputError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.local import alone

CALLS: dict[str, Callable[..., Any]] = {
    "allreduce": lambda comm, x, **options: comm.allreduce(x, **options),
    "iallreduce": lambda comm, x, **options: comm.iallreduce(x, **options).wait(),
    "reduce": lambda comm, x, **options: comm.reduce(x, root=0, **options),
    "ireduce": lambda comm, x, **options: comm.ireduce(x, root=0, **options).wait(),
    "broadcast": lambda comm, x, **options: comm.broadcast(x, **options),
    "ibroadcast": lambda comm, x, **options: comm.ibroadcast(x, **options).wait(),
}


def messages(comm: Communicator, call: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    comm.ledger.reset()
    call(comm, *arguments, **options)
    return sum(count.messages for count in comm.ledger.snapshot().values())


def equal_arrays(comm: Communicator, name: str) -> None:
    """n arrays of s bytes in buckets of b: ⌊b/s⌋ fit in one, and each larger one travels alone."""
    for n, nbytes, bucket in ((10, 40, 100), (10, 40, 80), (7, 8, 1), (7, 8, 8), (5, 400, 399), (6, 16, 10**6)):
        tree = [np.full(nbytes // 4, float(i + comm.rank), np.float32) for i in range(n)]
        expected = math.ceil(n / max(1, bucket // nbytes))
        assert messages(comm, CALLS[name], tree, bucket_bytes=bucket) == expected
        got, whole = CALLS[name](comm, tree, bucket_bytes=bucket), CALLS[name](comm, tree)
        for a, b in zip(got or [], whole or [], strict=True):
            same(a, b)


def mixed_arrays(comm: Communicator, name: str) -> None:
    """Messages are per dtype, in the order of the tree; 16-bit floats are reduced in 32 bits."""
    tree = {
        "a": np.ones(10, np.float32),  # 40 bytes
        "b": np.ones(30, np.float16),  # 60, or 120 where they are reduced
        "c": np.ones((0, 3), np.float32),
        "d": np.ones(15, np.float32),  # 60: fills the bucket of a
        "e": np.ones(20, np.float16),  # 40, or 80
        "f": np.ones(1, np.float32),
        "g": np.ones(100, np.float32),  # alone
        "h": np.ones(2, np.float32),
    }
    halves = 1 if "broadcast" in name else 2
    assert messages(comm, CALLS[name], tree, bucket_bytes=100) == 4 + halves
    assert messages(comm, CALLS[name], tree) == 2
    got = CALLS[name](comm, tree, bucket_bytes=100)
    for key in tree if got is not None else ():
        same(got[key], tree[key] if "broadcast" in name else tree[key] * comm.size)


CHECKS = [equal_arrays, mixed_arrays]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_between_threads(check: Callable[..., None], size: int, name: str) -> None:
    LocalWorld(size, timeout_s=20).run(check, name)


@pytest.mark.mpi
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_over_mpi(check: Callable[..., None], name: str, world: Communicator) -> None:
    check(world, name)


def test_an_array_alone_in_its_message_is_reduced_where_it_lies() -> None:
    from mpitrain.comm import prepare

    tree = [np.ones(5), np.ones(7)]
    apart = prepare.reduction("allreduce", 1, tree, "sum", tree, None, True, 1)
    assert [call.recv.ctypes.data for call in apart.calls] == [x.ctypes.data for x in tree]
    together = prepare.reduction("allreduce", 1, tree, "sum", tree, None, True)
    assert len(together.calls) == 1


@pytest.mark.parametrize("reproducible", [False, True])
def test_arrays_that_share_memory_are_each_reduced_once(reproducible: bool) -> None:
    """Tied weights, a view of another array, results that go where another input lies."""

    def run(comm: Communicator) -> None:
        a, b, c = np.full(3, 1.0 + comm.rank), np.full(3, 10.0), np.full(3, 100.0)
        for tree, out, expected in (
            ([a, a, c], [a, a, c], [3.0, 3.0, 200.0]),
            ([a, a[::-1][:2], c], [a, a[::-1][:2], c], [6.0, 6.0, 400.0]),
            ([b, c], [c, b], [20.0, 800.0]),
            ([c[:2], a[::-1]], [a[:2], b], [40.0, 12.0]),
        ):
            comm.allreduce(tree, out=out, bucket_bytes=1, reproducible=reproducible)
            for got, value in zip(out, expected, strict=True):
                same(got, np.full(got.shape, value))

    LocalWorld(2).run(run)


@pytest.mark.parametrize(
    "call",
    [
        lambda comm, x, out: comm.allreduce(x, out=out),
        lambda comm, x, out: comm.allreduce(x, out=out, bucket_bytes=1),
        lambda comm, x, out: comm.iallreduce(x, out=out).wait(),
        lambda comm, x, out: comm.allreduce(x, out=out, reproducible=True),
        lambda comm, x, out: comm.reduce_scatter(x, counts=[4], out=out),
        lambda comm, x, out: comm.reduce_scatter(x, counts=[4], out=out, reproducible=True),
        lambda comm, x, out: comm.allgather(x, counts=[4], out=out),
    ],
)
def test_results_that_would_overwrite_each_other_are_refused(call: Callable[..., Any]) -> None:
    comm, a, b, place, table = alone(), np.arange(4.0), np.full(4, 9.0), np.zeros(4), np.zeros((4, 2))
    for out in ([place, place], [place, place[::-1]], [a, a], [a, a[:]]):
        with pytest.raises(InputError, match="same memory; got out whose arrays 0 and 1 overlap; give each its own"):
            call(comm, [a, b], out)
    call(comm, [a, b], [table[:, 0], table[:, 1]])
    same(table, np.stack([a, b], axis=1))
    call(comm, [a, a[:]], [place, place[:]])
    same(place, a)
    call(comm, [a, b, b], [a, b, b[:]])


@pytest.mark.parametrize("dtype", ["f8", "i8"])
def test_rows_of_a_tree_may_be_reduced_to_each_others_place(dtype: str) -> None:
    a, b = np.arange(4).astype(dtype), np.full(4, 9, dtype)
    alone().reduce_scatter([a, b], counts=[4], out=[b, a], reproducible=True)
    same(b, np.arange(4).astype(dtype))
    same(a, np.full(4, 9, dtype))


def test_arrays_of_a_tree_may_go_to_each_others_place() -> None:
    def run(comm: Communicator) -> None:
        a, b = np.full((2, 3), 1.0 + comm.rank), np.full((2, 3), 10.0 * (1 + comm.rank))
        comm.alltoall([a, b], out=[b, a])
        same(b, np.repeat([[1.0], [2.0]], 3, axis=1))
        same(a, np.repeat([[10.0], [20.0]], 3, axis=1))

    LocalWorld(2).run(run)


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
def test_every_algorithm_takes_buckets(algorithm: str) -> None:
    def run(comm: Communicator) -> None:
        tree = [np.full(n, comm.rank + 1.0) for n in range(6)]
        for got, n in zip(comm.allreduce(tree, algorithm=algorithm, bucket_bytes=24), range(6), strict=True):
            same(got, np.full(n, 6.0))

    LocalWorld(3).run(run)


def test_reproducible_sums_have_the_same_bits_in_any_bucket() -> None:
    def run(comm: Communicator) -> None:
        rng = np.random.default_rng(comm.rank)
        tree = [rng.normal(size=n).astype(dtype) for n in (3, 50, 7) for dtype in ("float32", "float64")]
        whole = comm.allreduce(tree, reproducible=True)
        for bucket in (1, 100, 10_000):
            for a, b in zip(comm.allreduce(tree, reproducible=True, bucket_bytes=bucket), whole, strict=True):
                same(a, b)
            comm.reduce(tree, reproducible=True, bucket_bytes=bucket)
        # One message for the exponents, then 60 integers of 8 bytes, 10 in each message.
        assert messages(comm, CALLS["allreduce"], np.ones(60), reproducible=True, bucket_bytes=80) == 1 + 6

    LocalWorld(2).run(run)


@pytest.mark.parametrize("bad", [0, -1, 2.5, "1MB"])
def test_unusable_sizes_are_refused(bad: Any) -> None:
    def run(comm: Communicator) -> None:
        for call in CALLS.values():
            with pytest.raises(InputError, match=r"bucket_bytes.*expected 1 or more bytes, or None"):
                call(comm, np.ones(3), bucket_bytes=bad)
        with pytest.raises(InputError, match="bucket_bytes"):
            comm.allreduce(np.ones(3), reproducible=True, bucket_bytes=bad)

    LocalWorld(1).run(run)
