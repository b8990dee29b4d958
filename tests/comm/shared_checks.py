"""Checks of `empty` and `allreduce_plan` that any communicator must pass, whatever its transport."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import ml_dtypes
import numpy as np
import pytest
from conformance import folded, ops, same, values

from mpitrain._errors import DtypeError, InputError
from mpitrain.comm import Communicator
from mpitrain.comm.algorithms import pipelined
from mpitrain.comm.transports import far, kernel, network, shared

CHECKS: list[Callable[[Communicator], None]] = []
SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (0,), (40, 33)]
DTYPES = ["float32", "float64", "int64", "uint8", "float16", ml_dtypes.bfloat16, "complex64"]


def use_loops(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce by the compiled loops, or by NumPy."""
    if which == "compiled" and kernel.LIBRARY.loaded is None:
        pytest.skip("the compiled loops are not built: no C compiler was found when mpitrain was installed")
    monkeypatch.setenv("MPITRAIN_KERNEL", "off" if which == "numpy" else "on")


def cut_small(monkeypatch: pytest.MonkeyPatch, streamed_from_bytes: int) -> None:
    """Let arrays of a few elements pass through shared memory in several chunks."""
    sizes = {"CHUNK_BYTES": 256, "COMPILED_CHUNK_BYTES": 256, "PIECE_BYTES": 128}
    for name in ("STREAMED_FROM_BYTES", "SMALLEST_BYTES", "LOCATED_FROM_BYTES"):
        sizes[name] = streamed_from_bytes
    for name, size in sizes.items():
        monkeypatch.setattr(shared, name, size)
    for module in (kernel, shared):
        monkeypatch.setattr(module, "PAST_CACHE_FROM_BYTES", 1024)
    monkeypatch.setattr(kernel, "SLOT_BYTES", 64)  # some arrays are handed over whole, and some pass in chunks
    monkeypatch.setattr(far, "SHARD_BYTES", 256)
    for module in (far, network):
        monkeypatch.setattr(module, "PIPELINED_FROM_BYTES", 600)  # some arrays below it, some above
    for name in ("MESSAGE_BYTES", "LEAST_MESSAGE_BYTES"):
        monkeypatch.setattr(pipelined, name, 32)


def check(function: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    CHECKS.append(function)
    return function


@check
def memory_is_zeroed_aligned_and_private_to_the_rank(comm: Communicator) -> None:
    for shape in SHAPES:
        x = comm.empty(shape, "float64")
        same(x, np.zeros(shape))
        assert type(x) is np.ndarray
        assert x.size == 0 or x.__array_interface__["data"][0] % 4096 == 0
        comm.barrier()
        x[...] = comm.rank
        comm.barrier()
        same(x, np.full(shape, float(comm.rank)))


@check
def reduces_in_place_every_dtype_op_and_shape(comm: Communicator) -> None:
    for dtype, shape in product(DTYPES, SHAPES):
        x = comm.empty(shape, dtype)
        for op in ops(dtype):
            x[...] = values(comm.rank, shape, dtype)
            assert comm.allreduce(x, op, out=x) is x
            same(x, folded(comm.size, shape, dtype, op))


@check
def reduces_in_place_several_blocks_of_a_rank(comm: Communicator) -> None:
    x = comm.empty(3000 * comm.size, "int64")
    x[...] = np.arange(x.size) + comm.rank
    comm.allreduce(x, out=x)
    same(x, comm.size * np.arange(x.size) + sum(range(comm.size)))


@check
def leaves_the_input_alone_without_out(comm: Communicator) -> None:
    x = comm.empty((40, 33))
    x[...] = values(comm.rank, x.shape)
    same(comm.allreduce(x), folded(comm.size, x.shape, "float32", "sum"))
    same(x, values(comm.rank, x.shape, "float32"))


@check
def plans_every_dtype_op_and_shape(comm: Communicator) -> None:
    for dtype, shape, on_node in product(DTYPES, SHAPES, (True, False)):
        x = comm.empty(shape, dtype) if on_node else np.empty(shape, dtype)
        for op in ops(dtype):
            x[...] = values(comm.rank, shape, dtype)
            plan = comm.allreduce_plan(x, op)
            same(plan(), folded(comm.size, shape, dtype, op))
            same(x, values(comm.rank, shape, dtype))
            assert not plan.result.flags.writeable
            plan = comm.allreduce_plan(x, op, in_place=True)
            assert plan() is x
            same(x, folded(comm.size, shape, dtype, op))


@check
def plans_reduce_what_the_buffer_holds_at_each_call(comm: Communicator) -> None:
    x = comm.empty(1000, "int64")
    plan, place = comm.allreduce_plan(x), comm.allreduce_plan(x, "max", in_place=True)
    for step in range(50):
        x[...] = np.arange(1000) * (comm.rank + step)
        expected = np.arange(1000) * sum(r + step for r in range(comm.size))
        result = plan()
        x[...] = -1  # the buffer is free again, and the result keeps its values
        same(result, expected)
        x[...] = comm.rank + step
        same(place(), np.full(1000, comm.size - 1 + step))


@check
def plans_shards_of_every_dtype_and_op(comm: Communicator) -> None:
    for (dtype, size), on_node in product(zip(DTYPES, (1320, 7, 40, 0, 1320, 1, 700), strict=True), (True, False)):
        x = comm.empty(size, dtype) if on_node else np.empty(size, dtype)
        for op in ops(dtype):
            plan = comm.reduce_scatter_plan(x, op)
            tiles(comm, plan.begin, plan.end, size)
            x[...] = values(comm.rank, (size,), dtype)
            same(plan(), folded(comm.size, (size,), dtype, op)[plan.begin : plan.end])
            assert plan.shard is plan()


def tiles(comm: Communicator, begin: int, end: int, size: int) -> None:
    """The ranks' ranges cover everything once, in cache lines."""
    owned = sorted(comm.allgather_object((begin, end)))
    assert sum(stop - start for start, stop in owned) == size
    assert owned[0][0] == 0
    assert owned[-1][1] == size
    assert all(before[1] == after[0] for before, after in pairwise(owned))


@check
def shards_are_published_to_all_at_once(comm: Communicator) -> None:
    """As training does it, over and over: every rank reduces its shard, writes what follows, and reads all of it."""
    for size, dtype in ((1000, "int64"), (3, "int32"), (0, "float32"), (70_000, "float32")):
        x, whole = comm.empty(size, dtype), comm.shared(size, dtype)
        assert not whole.any()
        reduce = comm.reduce_scatter_plan(x)
        gather = comm.allgather_plan(whole, reduce.begin, reduce.end)
        for step in range(1, 20):
            x[...] = whole + np.arange(size) % 5 + comm.rank
            before = whole.copy()
            reduced = reduce().copy()  # which may lie in the buffer
            x[...] = -1  # the buffer is free again
            same(whole, before)  # nobody has published anything yet
            comm.barrier()
            whole[reduce.begin : reduce.end] = (reduced - comm.size * before[reduce.begin : reduce.end]) * step
            assert gather() is whole
            ranks = comm.size * (comm.size - 1) // 2
            same(whole, ((np.arange(size) % 5 * comm.size + ranks) * step).astype(dtype))


@check
def shards_in_the_order_of_the_ranks_are_cut_alike_wherever_memory_lies(comm: Communicator) -> None:
    for size, dtype in ((1320, "float64"), (7, "int32"), (0, "float32"), (600_000, "int64")):
        x = comm.empty(size, dtype)
        plan, other = (comm.reduce_scatter_plan(each, in_rank_order=True) for each in (x, np.empty(size, dtype)))
        assert (plan.begin, plan.end) == (other.begin, other.end)
        tiles(comm, plan.begin, plan.end, size)
        owned = comm.allgather_object((plan.begin, plan.end))
        assert owned == sorted(owned)
        x[...] = np.arange(size) % 11 + comm.rank
        expected = comm.size * (np.arange(size) % 11) + comm.size * (comm.size - 1) // 2
        same(plan(), expected[plan.begin : plan.end].astype(dtype))


@check
def ranks_without_a_shard_stand_between_others(comm: Communicator) -> None:
    """As those of whole tensors do: on nodes of two, the ranks of one number have theirs side by side, or have not."""
    for odd in (False, True):
        owners = [rank for rank in range(comm.size) if rank % 2 == odd] or [0]
        sizes = [40 * (rank in owners) for rank in range(comm.size)]
        begin = sum(sizes[: comm.rank])
        whole = comm.shared(sum(sizes), "int64")
        gather = comm.allgather_plan(whole, begin, begin + sizes[comm.rank])
        for step in range(1, 20):
            whole[begin : begin + sizes[comm.rank]] = comm.rank + step
            gather()
            same(whole, np.repeat(np.array(owners) + step, 40))
            comm.barrier()


@check
def one_array_of_a_node_is_one(comm: Communicator) -> None:
    whole = comm.shared((3, 5), "float64")
    comm.barrier()
    if comm.node.rank == 0:
        whole[1, 2] = 7
    comm.barrier()
    assert whole[1, 2] == (7 if comm.node.rank == 0 or comm.transport == "shared" else 0)
    assert type(whole) is np.ndarray
    assert whole.shape == (3, 5)


@check
def unusable_shards_are_refused(comm: Communicator) -> None:
    with pytest.raises(InputError, match=r"do not make up the buffer; got .* expected ranges that cover 9 elements"):
        comm.allgather_plan(comm.shared(9), 0, 4)
    with pytest.raises(InputError, match="one contiguous run"):
        comm.allgather_plan(np.zeros((2, 2)), 0, 4)
    with pytest.raises(InputError, match="not an array"):
        comm.reduce_scatter_plan([1.0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reduce_scatter_plan: unknown reduction"):
        comm.reduce_scatter_plan(np.zeros(3), "avg")
    if comm.size > 1:
        backwards = [comm.size - 1 - comm.rank, comm.size - comm.rank]
        with pytest.raises(InputError, match="not in the order of the ranks"):
            comm.allgather_plan(np.zeros(comm.size), *backwards)


@check
def plans_of_uneven_shards_agree_in_debug_mode(comm: Communicator) -> None:
    comm.debug = True
    x, whole = comm.empty(1000, "int64"), comm.shared(1000, "int64")
    reduce = comm.reduce_scatter_plan(x)
    gather = comm.allgather_plan(whole, reduce.begin, reduce.end)
    for step in range(3):
        x[...] = step
        whole[reduce.begin : reduce.end] = reduce()
        same(gather(), np.full(1000, step * comm.size))
        comm.barrier()
    comm.debug = False


@check
def the_ledger_counts_plans_of_shards(comm: Communicator) -> None:
    size = 64
    x, whole = comm.empty(size), comm.shared(size)
    reduce = comm.reduce_scatter_plan(x)
    gather = comm.allgather_plan(whole, reduce.begin, reduce.end)
    comm.ledger.reset()
    for _ in range(3):
        reduce()
        gather()
    planned = "_plan" if comm.transport == "shared" else ""
    for operation in ("reduce_scatter", "allgather"):
        counted = comm.ledger.snapshot().get((comm.ledger.axis, operation + planned))
        expected = None if comm.size == 1 else (3, 3, 3 * 4 * size)
        assert (counted and (counted.calls, counted.messages, counted.logical_bytes)) == expected


@check
def views_and_uneven_sizes(comm: Communicator) -> None:
    x = comm.empty((comm.rank + 3, 50))
    whole = comm.empty(900)
    for part in (x[1:3], x.reshape(-1)[7:120], whole[comm.rank : comm.rank + 33]):
        part[...] = values(comm.rank, part.shape)
        comm.allreduce(part, out=part)
        same(part, folded(comm.size, part.shape, "float32", "sum"))
        part[...] = values(comm.rank, part.shape)
        same(comm.allreduce_plan(part)(), folded(comm.size, part.shape, "float32", "sum"))
    assert not whole[comm.rank + 33 :].any()
    assert not x[0, :7].any()


@check
def ranks_may_mix_shared_and_ordinary_memory(comm: Communicator) -> None:
    for owner in range(comm.size):
        first, second = comm.empty(700), comm.empty(700)
        for mine in ((first, np.empty(700, np.float32)), (first, second)):
            x = mine[comm.rank == owner]
            x[...] = values(comm.rank, x.shape)
            same(comm.allreduce(x, out=x), folded(comm.size, (700,), "float32", "sum"))
            x[...] = values(comm.rank, x.shape)
            same(comm.allreduce_plan(x)(), folded(comm.size, (700,), "float32", "sum"))


@check
def infinite_sums_are_results(comm: Communicator) -> None:
    x = comm.empty(500)
    x[...] = np.finfo(np.float32).max
    comm.allreduce(x, out=x)
    assert np.isinf(x).all() == (comm.size > 1)


@check
def many_calls_in_a_row(comm: Communicator) -> None:
    rng = np.random.default_rng(7)  # the same on all ranks
    buffers = [comm.empty(300, "int64") for _ in range(3)]
    plans = [comm.allreduce_plan(buffer) for buffer in buffers]
    ordinary = np.empty(300, np.int64)
    for _ in range(300):
        which, size, kind = int(rng.integers(3)), int(rng.integers(1, 301)), int(rng.integers(3))
        own = rng.integers(1000, size=(comm.size, 300))
        x = ordinary if kind == 0 else buffers[which]
        x[...] = own[comm.rank]
        if kind == 2:
            same(plans[which](), own.sum(0))
            same(x, own[comm.rank])
            continue
        comm.allreduce(x[:size], out=x[:size])
        same(x[:size], own[:, :size].sum(0))
        same(x[size:], own[comm.rank, size:])


@check
def the_ledger_counts_plans(comm: Communicator) -> None:
    plan = comm.allreduce_plan(comm.empty(10))
    comm.ledger.reset()
    for _ in range(3):
        plan()
    counted = comm.ledger.snapshot()[comm.ledger.axis, "allreduce_plan"]
    assert (counted.calls, counted.messages, counted.logical_bytes) == (3, 3, 120)


@check
def bad_input_is_refused(comm: Communicator) -> None:
    with pytest.raises(InputError, match="empty: negative extent"):
        comm.empty(-1)
    with pytest.raises(DtypeError, match="unsupported dtype"):
        comm.empty(3, "U5")
    with pytest.raises(DtypeError, match="not a dtype"):
        comm.empty(3, "no such")
    with pytest.raises(InputError, match="contiguous"):
        comm.allreduce_plan(np.zeros((4, 4))[:, 1])
    with pytest.raises(InputError, match="NumPy array"):
        comm.allreduce_plan([1.0])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown reduction"):
        comm.allreduce_plan(np.zeros(3), "avg")
    with pytest.raises(DtypeError, match="'and' is not defined"):
        comm.allreduce_plan(np.zeros(3), "and")
