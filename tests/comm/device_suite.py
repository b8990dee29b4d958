"""Checks that every transport of device memory must pass, over CuPy or what stands for it, on any communicator.

Each is called with a communicator and the module.  Inputs are always still being computed when a call is made, results
are read on the stream that is current then, and values are small integers, so that sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conformance import folded, ops, own_rows, shards, values

from mpitrain.comm import Communicator

CHUNK_BYTES = 64
"""To which the suite lowers what is staged at a time."""

SIZES = (0, 1, 15, 16, 17, 32, 33, 48, 49, 113)
"""Of arrays: around one, two and three chunks of float32."""

DTYPES = ("float32", "float16", "float64", "int32", "uint8", "complex64", ml_dtypes.bfloat16)

CHECKS: list[Callable[[Communicator, Any], None]] = []


def check(function: Callable[[Communicator, Any], None]) -> Callable[[Communicator, Any], None]:
    CHECKS.append(function)
    return function


def late(xp: Any, host: np.ndarray) -> Any:
    """An array that is being computed on the current stream."""
    found, source = xp.empty(host.shape, host.dtype), xp.asarray(host)
    delay()
    found[...] = source
    return found


def delay() -> None:
    """Keep the current stream busy; a stand-in is late anyway."""


def same(xp: Any, got: Any, expected: np.ndarray) -> None:
    """Compare on the current stream."""
    assert type(got) is xp.ndarray
    found = xp.asnumpy(got)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.array_equal(found, expected), f"got {found}, expected {expected}"


def own(comm: Communicator, n: int, dtype: Any) -> np.ndarray:
    return values(comm.rank, (n,), dtype)


def can_hold(xp: Any, dtype: Any) -> bool:
    try:
        xp.empty(1, dtype)
    except (TypeError, ValueError):  # bfloat16, in older versions of CuPy
        return False
    return True


@check
def reductions_of_every_size_type_and_operation(comm: Communicator, xp: Any) -> None:
    cases = [(dtype, op, n) for dtype in DTYPES if can_hold(xp, dtype) for op, n in product(ops(dtype), (0, 49))]
    for dtype, op, n in [*cases, *[("float32", "sum", n) for n in SIZES]]:
        x = late(xp, own(comm, n, dtype))
        same(xp, comm.allreduce(x, op), folded(comm.size, (n,), dtype, op))
        same(xp, x, own(comm, n, dtype))
    for op in ("and", "or"):
        everyones = [(np.arange(49) + rank) % 3 > 0 for rank in range(comm.size)]
        expected = np.all(everyones, axis=0) if op == "and" else np.any(everyones, axis=0)
        same(xp, comm.allreduce(late(xp, everyones[comm.rank]), op), expected)


@check
def reduce_and_broadcast_of_every_size_and_root(comm: Communicator, xp: Any) -> None:
    cases = [*product(range(comm.size), ("float16",), (0, 49)), *product([comm.size - 1], ("float32",), SIZES)]
    for root, dtype, n in cases:
        got = comm.reduce(late(xp, own(comm, n, dtype)), "sum", root)
        if comm.rank == root:
            same(xp, got, folded(comm.size, (n,), dtype, "sum"))
        else:
            assert got is None
        same(xp, comm.broadcast(late(xp, own(comm, n, dtype)), root), values(root, (n,), dtype))


@check
def every_algorithm(comm: Communicator, xp: Any) -> None:
    for name in ("ring", "recursive", "doubling", "tree", "ordered", "pipelined", "hierarchical", "default"):
        for dtype, n in product(("float32", "float16"), (0, 1, 5, 113)):
            got = comm.allreduce(late(xp, own(comm, n, dtype)), algorithm=name)
            same(xp, got, folded(comm.size, (n,), dtype, "sum"))
    for name, n in product(("ring", "tree", "ordered", "default"), (5, 113)):
        got = comm.reduce(late(xp, own(comm, n, "int32")), "max", comm.size - 1, algorithm=name)
        if comm.rank == comm.size - 1:
            same(xp, got, folded(comm.size, (n,), "int32", "max"))
    for name, n in product(("ring", "tree", "default"), (5, 113)):
        same(xp, comm.broadcast(late(xp, own(comm, n, "int32")), algorithm=name), values(0, (n,), "int32"))
    counts = shards(comm.size)
    whole = values(0, (7, 2), "float32")
    for name in ("ring", "recursive", "default"):
        same(xp, comm.allgather(late(xp, whole[own_rows(counts, comm.rank)]), counts, algorithm=name), whole)
    for name in ("ring", "recursive", "ordered", "default"):
        got = comm.reduce_scatter(late(xp, values(comm.rank, (7, 2), "float16")), "sum", counts, algorithm=name)
        same(xp, got, folded(comm.size, (7, 2), "float16", "sum")[own_rows(counts, comm.rank)])


@check
def sixteen_bits_are_summed_in_thirty_two(comm: Communicator, xp: Any) -> None:
    for dtype, large in (("float16", 2048.0), (ml_dtypes.bfloat16, 256.0)):  # to which the type cannot add 1
        if not can_hold(xp, dtype):
            continue
        terms = [np.array([large if rank == 0 else 1.0] * 40, dtype) for rank in range(comm.size)]
        expected = np.sum(terms, axis=0, dtype=np.float64).astype(np.float32).astype(dtype)
        same(xp, comm.allreduce(late(xp, terms[comm.rank])), expected)
        huge = late(xp, np.full(3, np.finfo(np.float16).max if dtype == "float16" else 3e38, dtype))
        assert comm.size == 1 or np.isinf(xp.asnumpy(comm.allreduce(huge)).astype(np.float64)).all()


@check
def into_other_arrays_and_in_place(comm: Communicator, xp: Any) -> None:
    for dtype, n in product(("float32", "float16"), (0, 5, 49)):
        expected = folded(comm.size, (n,), dtype, "sum")
        out, kept = late(xp, np.full(n, 7, dtype)), xp.empty(n, dtype)
        kept[...] = out  # is still to be done when the call overwrites ``out``
        x = late(xp, own(comm, n, dtype))
        for into in (out, x):
            assert comm.allreduce(x, out=into) is into
            same(xp, into, expected)
        same(xp, kept, np.full(n, 7, dtype))
        wide = late(xp, np.full(2 * n, 7, dtype))
        comm.broadcast(late(xp, own(comm, n, dtype)), out=wide[::2])
        same(xp, wide[::2], values(0, (n,), dtype))
        same(xp, wide[1::2], np.full(n, 7, dtype))


@check
def results_do_not_overtake_readers_of_their_place(comm: Communicator, xp: Any) -> None:
    """Each call overwrites an array that a kernel has yet to read."""
    last = comm.size - 1
    x, rows = own(comm, 6, "float32"), values(comm.rank, (comm.size, 6), "float32")
    everyones = np.stack([values(r, (6,), "float32") for r in range(comm.size)])
    calls: list[tuple[Callable[[Any], Any], np.ndarray]] = [
        (lambda out: comm.broadcast(late(xp, x), last, out=out), everyones[last]),
        (lambda out: comm.allgather(late(xp, x), out=out), everyones),
        (lambda out: comm.alltoall(late(xp, rows), out=out),
         np.stack([values(r, (comm.size, 6), "float32")[comm.rank] for r in range(comm.size)])),
        (lambda out: comm.reduce_scatter(late(xp, rows), out=out),
         folded(comm.size, (comm.size, 6), "float32", "sum")[comm.rank]),
        (lambda out: comm.scatter(late(xp, values(last, (comm.size, 6), "float32")), last, out=out),
         values(last, (comm.size, 6), "float32")[comm.rank]),
        (lambda out: comm.sendrecv(late(xp, x), (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size, out=out),
         everyones[comm.rank - 1]),
        (lambda out: comm.iallreduce(late(xp, x), out=out).wait(), folded(comm.size, (6,), "float32", "sum")),
    ]  # fmt: skip
    for call, expected in calls:
        out, kept = late(xp, np.full(expected.shape, 7, "float32")), xp.empty(expected.shape, "float32")
        kept[...] = out
        assert call(out) is out
        same(xp, out, expected)
        same(xp, kept, np.full(expected.shape, 7, "float32"))


@check
def one_call_after_the_other_on_two_streams(comm: Communicator, xp: Any) -> None:
    """Memory that is kept from call to call is not used by two at once."""
    streams = [xp.cuda.Stream(non_blocking=True) for _ in range(2)]
    for call, n in product((comm.allreduce, comm.broadcast, comm.reduce_scatter), (5, 113)):
        shape = (comm.size, n)
        found = []
        for turn, stream in enumerate(streams):
            with stream:
                found.append(call(late(xp, values(comm.rank, shape, "float32") + np.float32(10 * turn))))
        for turn, stream in reversed(list(enumerate(streams))):
            with stream:
                terms = [values(r, shape, "float32") + 10 * turn for r in range(comm.size)]
                whole = terms[0] if call == comm.broadcast else np.sum(terms, axis=0, dtype=np.float32)
                same(xp, found[turn], whole[comm.rank] if call == comm.reduce_scatter else whole)


@check
def exchanges(comm: Communicator, xp: Any) -> None:
    counts, last = shards(comm.size), comm.size - 1
    for dtype in ("float32", "float16", "bool", "int64"):
        everyones = [values(r, (comm.size, 20), dtype) for r in range(comm.size)]
        x, whole = late(xp, everyones[comm.rank]), values(0, (7, 2), dtype)
        part = whole[own_rows(counts, comm.rank)]
        same(xp, comm.allgather(x), np.stack(everyones))
        same(xp, comm.allgather(late(xp, part), counts), whole)
        same(xp, comm.alltoall(x), np.stack([each[comm.rank] for each in everyones]))
        same(xp, comm.scatter(x if comm.rank == last else None, last, out=late(xp, everyones[0][0])),
             everyones[last][comm.rank])  # fmt: skip
        got = comm.gather(late(xp, part), last, counts)
        same(xp, got, whole) if comm.rank == last else assert_none(got)
        if comm.size > 1 and comm.rank == 0:
            comm.send(x, 1)
            same(xp, comm.recv(x, 1, 7), everyones[1])
        elif comm.rank == 1:
            same(xp, comm.irecv(x, 0).wait(), everyones[0])
            comm.isend(x, 0, 7).wait()


def assert_none(got: Any) -> None:
    assert got is None


@check
def requests_complete_on_another_stream(comm: Communicator, xp: Any) -> None:
    for dtype, n in product(("float32", "float16"), (0, 5, 113)):
        with xp.cuda.Stream(non_blocking=True):
            x = late(xp, own(comm, n, dtype))
            tree = {"a": x, "b": late(xp, own(comm, n, dtype))}
            requests = [comm.iallreduce(x), comm.ibroadcast(x, comm.size - 1), comm.iallreduce(tree, "mean")]
        with xp.cuda.Stream(non_blocking=True):
            total, given, mean = (request.wait() for request in requests)
            same(xp, total, folded(comm.size, (n,), dtype, "sum"))
            same(xp, given, values(comm.size - 1, (n,), dtype))
            same(xp, mean["b"], folded(comm.size, (n,), dtype, "mean"))
            same(xp, requests[2].wait()["a"], folded(comm.size, (n,), dtype, "mean"))


@check
def results_on_another_stream_outlive_the_memory_they_were_made_of(comm: Communicator, xp: Any) -> None:
    here, there = (xp.cuda.Stream(non_blocking=True) for _ in range(2))
    with here:
        request = comm.iallreduce(late(xp, own(comm, 113, "float16")))
    with there:
        total = request.wait()  # float32 values, which `here` gave memory for, become float16 ones on `there`
        del request
    with here:
        others = [late(xp, np.full(113, 9, "float32")) for _ in range(3)]
    with there:
        same(xp, total, folded(comm.size, (113,), "float16", "sum"))
    with here:
        for other in others:
            same(xp, other, np.full(113, 9, "float32"))


@check
def a_longer_call_before_the_result_of_a_short_one_is_there(comm: Communicator, xp: Any) -> None:
    """Memory that is replaced by more is still read."""
    given = [late(xp, own(comm, n, "float32")) for n in (5, 33, 113)]
    for x in given:
        same(xp, x, own(comm, x.size, "float32"))  # from here on only the calls are still to be done
    delay()
    for total in [comm.allreduce(x) for x in given]:
        same(xp, total, folded(comm.size, total.shape, "float32", "sum"))


@check
def trees_and_buckets(comm: Communicator, xp: Any) -> None:
    shapes = {"a": (40,), "b": (3, 5), "c": (), "d": (0,)}

    def tree(rank: int) -> dict[str, np.ndarray]:
        return {f"{name} {t}": values(rank, shape, t) for name, shape in shapes.items() for t in ("float32", "float16")}

    device = {name: late(xp, each) for name, each in tree(comm.rank).items()}
    mixed = device | {"host": values(comm.rank, (4,), "float32")}
    for bucket_bytes in (None, 1, 100, 10_000):
        before = comm.ledger.snapshot()
        got = comm.allreduce(mixed, bucket_bytes=bucket_bytes)
        if bucket_bytes is None:
            used = comm.ledger.snapshot()[comm.ledger.axis, "allreduce"].messages
            old = before.get((comm.ledger.axis, "allreduce"))
            assert used - (old.messages if old else 0) == 3  # two types on the device, one on the host
        for name, each in tree(0).items():
            same(xp, got[name], folded(comm.size, each.shape, each.dtype, "sum"))
        assert np.array_equal(got["host"], folded(comm.size, (4,), "float32", "sum"))
    assert comm.broadcast(device, out=device) is not None
    for name, each in tree(0).items():
        same(xp, device[name], each)


@check
def arrays_that_share_memory(comm: Communicator, xp: Any) -> None:
    """Of a tree whose results go where another of its arrays lies: all are read before any is written."""
    a, b = late(xp, own(comm, 5, "float32")), late(xp, own(comm, 5, "float32") + np.float32(1))
    comm.allreduce([a, b], out=[b, a], bucket_bytes=1)
    same(xp, b, folded(comm.size, (5,), "float32", "sum"))
    same(xp, a, folded(comm.size, (5,), "float32", "sum") + np.float32(comm.size))
    x = late(xp, values(comm.rank, (comm.size, 3), "float32"))
    whole = np.stack([values(r, (comm.size, 3), "float32")[comm.rank] for r in range(comm.size)])
    same(xp, comm.alltoall(x, out=x), whole)


@check
def strided_arrays(comm: Communicator, xp: Any) -> None:
    base = values(comm.rank, (6, 4), "float32")
    everyones = np.stack([values(r, (6, 4), "float32") for r in range(comm.size)])
    x = late(xp, base)
    for cut in (lambda a: a[..., ::2, :], lambda a: a[..., ::-1, 1:3], lambda a: a[..., 2, :]):
        same(xp, comm.allreduce(cut(x)), cut(everyones).sum(0))
        same(xp, comm.allgather(cut(x)), cut(everyones))
    same(xp, comm.allreduce(x.T), everyones.sum(0).T)


@check
def the_ledger_counts_what_it_counts_on_the_host(comm: Communicator, xp: Any) -> None:
    def used(make: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        comm.ledger.reset()
        comm.allreduce({"a": make(own(comm, 113, "float32")), "b": make(own(comm, 5, "float16"))})
        comm.allgather(make(own(comm, 5, "float32")))
        comm.iallreduce(make(own(comm, 5, "float32"))).wait()
        counts = comm.ledger.snapshot()
        return {name: (each.calls, each.messages, each.logical_bytes) for (_, name), each in counts.items()}

    assert used(lambda host: late(xp, host)) == used(np.array)


@check
def another_shape_is_named_in_debug_mode(comm: Communicator, xp: Any) -> None:
    from mpitrain._errors import MismatchError

    if comm.size == 1:
        return
    comm.debug = True
    try:
        with pytest.raises(MismatchError, match=r"allreduce.*float32\[5\]"):
            comm.allreduce(late(xp, own(comm, 5 + (comm.rank == 0), "float32")))
    finally:
        comm.debug = False
