"""The short way of a call, to the compiled loops or the MPI library, does what the long way does, errors included."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
from conformance import folded, ops, same, values

from mpitrain._errors import CommunicationError, MismatchError, MpitrainError
from mpitrain.arrays import plain
from mpitrain.comm import Communicator, direct, pieces
from mpitrain.comm.transports import entry, kernel, shared
from mpitrain.comm.transports.host import HostTransport

pytestmark = pytest.mark.mpi

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
SIZES = [0, 1, 7, kernel.SLOT_BYTES // 8, kernel.SLOT_BYTES // 8 + 1, 40_000, 700_001]


@pytest.fixture
def comm(world: Communicator) -> Iterator[Communicator]:
    """A communicator whose reductions take the short way to the loops."""
    if world.size == 1 or not entry.available():
        pytest.skip("one rank" if world.size == 1 else "not built: no Python headers when mpitrain was installed")
    with world.split(0) as part:
        part.allreduce(np.zeros(1))
        assert part._entry is not None
        yield part


@pytest.fixture
def left(world: Communicator) -> Iterator[Communicator]:
    """A communicator whose calls all take the short way to the library."""
    if not entry.available():
        pytest.skip("not built: no Python headers when mpitrain was installed")
    with world.split(0) as part:
        part._use(HostTransport())
        yield part


@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(comm: Communicator, dtype: str, past_cache: bool) -> None:
    for elements, op in product(SIZES, ops(dtype)):
        team = comm._transport._kernel._team
        team.to_memory = team.writes = past_cache  # else it is as this machine's caches are
        if elements > 1000 and op in ("prod", "and", "or"):
            continue  # that the loops themselves do so is tested elsewhere
        x, out = values(comm.rank, (elements,), dtype), np.zeros(elements, dtype)
        before, expected = x.copy(), folded(comm.size, (elements,), dtype, op)
        same(comm._entry.allreduce(x, op, None), expected)
        assert comm._entry.allreduce(x, op, out) is out
        same(out, expected)
        same(x, before)
        assert comm._entry.allreduce(x, op, x) is x
        same(x, expected)


def test_shapes(comm: Communicator) -> None:
    for shape in [(), (1,), (2, 3), (3, 0, 2), (40, 33)]:
        x, out = values(comm.rank, shape), np.zeros(shape)
        same(comm._entry.allreduce(x, "sum", None), folded(comm.size, shape, "float64", "sum"))
        same(comm._entry.allreduce(x, "sum", out), folded(comm.size, shape, "float64", "sum"))


def _read_only() -> np.ndarray:
    x = np.zeros(4)
    x.flags.writeable = False
    return x


def _misaligned() -> np.ndarray:
    return np.zeros(4 * 8 + 1, np.uint8)[1:].view(np.float64)


LEFT: dict[str, Callable[[], tuple[object, object, object]]] = {
    "read-only": lambda: (x := _read_only(), "sum", x),
    "read-only out": lambda: (np.zeros(4), "sum", _read_only()),
    "other shape": lambda: (np.zeros(4), "sum", np.zeros((2, 2))),
    "longer": lambda: (np.zeros(4), "sum", np.zeros(5)),
    "other dtype": lambda: (np.zeros(4), "sum", np.zeros(4, np.int64)),
    "overlapping": lambda: (lambda base: (base[:4], "sum", base[2:6]))(np.zeros(8)),
    "strided": lambda: (np.zeros(8)[::2], "sum", None),
    "strided out": lambda: (np.zeros(4), "sum", np.zeros(8)[::2]),
    "Fortran": lambda: (np.zeros((3, 2), order="F"), "sum", None),
    "misaligned": lambda: (_misaligned(), "sum", None),
    "misaligned out": lambda: (np.zeros(4), "sum", _misaligned()),
    "byte-swapped": lambda: (np.zeros(4, ">f8"), "sum", None),
    "half": lambda: (np.zeros(4, np.float16), "sum", None),
    "complex": lambda: (np.zeros(4, np.complex64), "sum", None),
    "bool": lambda: (np.zeros(4, bool), "or", None),
    "structured": lambda: (np.zeros(4, "f4,i4"), "sum", None),
    "masked": lambda: (np.ma.zeros(4), "sum", None),
    "objects": lambda: (np.array([None]), "sum", None),
    "number": lambda: (1.5, "sum", None),
    "list": lambda: ([np.zeros(4)], "sum", None),
    "nothing": lambda: (None, "sum", None),
    "out of another kind": lambda: (np.zeros(4), "sum", [0.0] * 4),
    "unknown op": lambda: (np.zeros(4), "average", None),
    "no op": lambda: (np.zeros(4), None, None),
    "mean of integers": lambda: (np.zeros(4, np.int32), "mean", None),
    "and of floats": lambda: (np.zeros(4), "and", None),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_plain_is_left_to_the_long_way_with_nothing_done(comm: Communicator, case: str) -> None:
    x, op, out = LEFT[case]()
    before = comm.ledger.snapshot()
    assert comm._entry.allreduce(x, op, out) is None
    assert comm.ledger.snapshot() == before
    comm.barrier()
    with_entry = _outcome(comm, x, op, out)
    comm._entry = None
    assert _outcome(comm, x, op, out) == with_entry


def _outcome(comm: Communicator, x: object, op: object, out: object) -> str:
    try:
        return repr(comm.allreduce(x, op, out))
    except (MpitrainError, TypeError) as error:
        return repr(error)


def test_wrong_number_of_arguments(comm: Communicator) -> None:
    with pytest.raises(TypeError, match="allreduce takes 3 arguments, got 1"):
        comm._entry.allreduce(np.zeros(1))


def test_uses_are_counted(comm: Communicator) -> None:
    comm.ledger.reset()
    assert not comm.ledger.snapshot()
    for _ in range(3):
        comm.allreduce(np.zeros(5, np.float32))
    count = comm.ledger.snapshot()[comm.ledger.axis, "allreduce"]
    assert (count.calls, count.messages, count.logical_bytes) == (3, 3, 60)


@pytest.mark.parametrize("elements", [1, 100_000])
def test_a_late_rank_is_waited_for_under_the_watch(comm: Communicator, elements: int) -> None:
    count = comm._watch.count
    x = values(comm.rank, (elements,))
    if comm.rank == comm.size - 1:
        time.sleep(0.2)
    same(comm.allreduce(x), folded(comm.size, (elements,), "float64", "sum"))
    if comm.rank < comm.size - 1:
        assert comm._watch.count > count
    assert comm._watch.current is None
    same(comm.allreduce(x, "mean", out=x), folded(comm.size, (elements,), "float64", "mean"))


@pytest.mark.parametrize(
    ("first", "others"),
    [
        (np.zeros(1), np.zeros(2)),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        (np.zeros(3), np.zeros(100_000)),
        (np.zeros(90_000), np.zeros(100_000)),
    ],
    ids=["elements", "dtypes", "slot and chunk", "chunks"],
)
def test_ranks_that_differ_are_told_so_and_may_go_on(comm: Communicator, first: np.ndarray, others: np.ndarray) -> None:
    with pytest.raises(MismatchError, match="ranks reduce different arrays"):
        comm.allreduce(first if comm.rank == 0 else others)
    for elements in (1, 100_000):
        same(comm.allreduce(np.ones(elements)), np.full(elements, float(comm.size)))


def test_one_rank_may_take_the_long_way(comm: Communicator) -> None:
    for elements in (3, 50_000):
        x = values(comm.rank, (elements,))
        got = direct.allreduce(comm, x, "mean", None) if comm.rank == 0 else comm.allreduce(x, "mean")
        same(got, folded(comm.size, (elements,), "float64", "mean"))


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_arrays_are_reduced_where_they_lie(comm: Communicator, op: str) -> None:
    elements = shared.LOCATED_FROM_BYTES // 8
    memory = comm.empty(3 * elements, "float64")
    places = {
        "the same": memory[:elements], "another": memory[-elements:],
        "of the rank's own": memory[comm.rank % 2 * elements :][:elements],
        "on rank 0 elsewhere": np.zeros(elements) if comm.rank == 0 else memory[:elements],
    }  # fmt: skip
    for _ in range(3):
        for x in places.values():
            x[...] = values(comm.rank, x.shape)
            assert comm.allreduce(x, op, out=x) is x
            same(x, folded(comm.size, x.shape, "float64", op))
    assert comm._transport._kernel._team.laid_out_count == 3
    x = places["another"]
    x[...] = values(comm.rank, x.shape)
    if comm.rank == 0:
        comm._entry = None
    same(comm.allreduce(x, op, out=x), folded(comm.size, x.shape, "float64", op))


def test_more_places_than_are_remembered(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    if world.size == 1 or not entry.available():
        pytest.skip("one rank, or not built")
    monkeypatch.setattr(kernel, "LAID_OUT", 8)
    elements = shared.LOCATED_FROM_BYTES // 8
    with world.split(0) as comm:
        memory = comm.empty(elements + 20, "float64")
        remembered = []
        for start in [*range(8), *range(8), 7, 3, *range(8, 11), 0, 10]:
            x = memory[start : start + elements]
            x[...] = comm.rank + start
            comm.allreduce(x, out=x)
            assert set(x) == {sum(range(comm.size)) + comm.size * start}
            remembered.append(comm._transport._kernel._team.laid_out_count)
        assert remembered == [1, 2, 3, 4, 5, 6, 7, 8, *[8] * 10, 1, 2, 3, 4, 4]


def test_memory_that_has_gone_is_forgotten(comm: Communicator) -> None:
    elements = shared.LOCATED_FROM_BYTES // 8
    reused = 0
    for _ in range(4):
        x = comm.empty(elements, "float64")
        for _ in range(2):
            comm.allreduce(x, out=x)
        before = range(x.ctypes.data, x.ctypes.data + x.nbytes)
        del x
        others = [plain(elements, np.dtype(float)) for _ in range(8)]
        reused += sum(other.ctypes.data in before for other in others)
        for other in others:
            other[...] = values(comm.rank, (elements,))
            comm.allreduce(other, out=other)
            same(other, folded(comm.size, (elements,), "float64", "sum"))
    assert int(comm.allreduce(reused)) > 0  # else nothing was tested


def test_nothing_is_kept(comm: Communicator) -> None:
    x, out = np.zeros(5), np.zeros(5)
    counts = sys.getrefcount(x), sys.getrefcount(out), sys.getrefcount(None)
    for _ in range(200):
        comm._entry.allreduce(x, "sum", out)
        comm._entry.allreduce(x, "sum", x)
        comm._entry.allreduce(x, "nothing", x)
        comm._entry.allreduce(x[::2], "sum", x)
        comm._entry.allreduce(x, "sum", None)
    assert (sys.getrefcount(x), sys.getrefcount(out)) == counts[:2]
    assert abs(sys.getrefcount(None) - counts[2]) < 100


def test_it_closes_where_calls_are_looked_at(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    comm.debug = True
    assert comm._entry is None
    comm.debug = False
    assert comm._entry is not None
    monkeypatch.setenv("MPITRAIN_KERNEL", "off")
    with comm.split(0) as part:
        part.allreduce(np.zeros(1))
        assert part._entry is None
    comm.free()
    assert comm._entry is None


# What the library performs.


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_by_the_library(left: Communicator, dtype: str) -> None:
    for elements, op in product([0, 1, 7, 1000], ops(dtype)):
        x, out = values(left.rank, (elements,), dtype), np.zeros(elements, dtype)
        before, expected = x.copy(), folded(left.size, (elements,), dtype, op)
        same(left._entry.allreduce(x, op, None), expected)
        assert left._entry.allreduce(x, op, out) is out
        same(out, expected)
        same(x, before)
        assert left._entry.allreduce(x, op, x) is x
        same(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_reduced(left: Communicator, dtype: str) -> None:
    for rest, op in product([(), (3,), (0, 2), (4, 250)], ops(dtype)):
        x, out = values(left.rank, (left.size, *rest), dtype), np.zeros(rest, dtype)
        expected = folded(left.size, x.shape, dtype, op)[left.rank]
        if rest:
            same(left._entry.reduce_scatter(x, op, None), expected)
        assert left._entry.reduce_scatter(x, op, out) is out
        same(out, expected)
        same(x, values(left.rank, x.shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_collected_and_broadcast(left: Communicator, dtype: str) -> None:
    for shape in [(), (1,), (5, 2), (3, 0), (1000,)]:
        each = [values(rank, shape, dtype) for rank in range(left.size)]
        x = each[left.rank].copy()
        same(left._entry.allgather(x, None), np.stack(each))
        out = np.zeros((left.size, *shape), dtype)
        assert left._entry.allgather(x, out) is out
        same(out, np.stack(each))
        for root in range(left.size):
            x = each[left.rank].copy()
            same(left._entry.broadcast(x, root, None), each[root])
            same(x, each[left.rank])
            out = np.zeros(shape, dtype)
            assert left._entry.broadcast(x, root, out) is out
            same(out, each[root])
            assert left._entry.broadcast(x, root, x) is x
            same(x, each[root])


@pytest.mark.parametrize("case", LEFT)
def test_the_library_is_not_called_with_what_is_not_plain(left: Communicator, case: str) -> None:
    x, op, out = LEFT[case]()
    before = left.ledger.snapshot()
    assert left._entry.allreduce(x, op, out) is None
    assert left._entry.reduce_scatter(x, op, out) is None
    assert left._entry.broadcast(x, left.size, out) is None
    if op == "sum" and case not in ("read-only", "other shape", "longer", "overlapping"):
        assert left._entry.broadcast(x, 0, out) is None
    if case not in ("read-only", "unknown op", "no op", "mean of integers", "and of floats"):
        assert left._entry.allgather(x, out) is None
    assert left.ledger.snapshot() == before
    left.barrier()


@pytest.mark.parametrize("root", [-1, True, None, 1.0, 2**70, np.int64(0)], ids=repr)
def test_roots_that_are_not_plain(left: Communicator, root: object) -> None:
    assert left._entry.broadcast(np.zeros(3), root, None) is None


def test_shapes_that_are_none(left: Communicator) -> None:
    ranks = left.size
    for x in (np.zeros(()), np.zeros((ranks + 1, 2)), np.zeros((0, 2))):
        assert left._entry.reduce_scatter(x, "sum", None) is None
    assert left._entry.reduce_scatter(np.zeros((ranks, 2)), "sum", np.zeros(3)) is None
    assert left._entry.allgather(np.zeros(2), np.zeros((ranks + 1, 2))) is None
    assert left._entry.allgather(np.zeros(2), np.zeros((2, ranks + 1))) is None


def test_long_arrays_are_left_to_be_cut(left: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "CHUNK_ELEMENTS", 4 * left.size)
    left._shorten()
    n = 4 * left.size
    for x, served in ((np.ones(n), True), (np.ones(n + 1), False)):
        assert (left._entry.allreduce(x, "sum", x) is x) == served
        assert (left._entry.broadcast(x, 0, x) is x) == served
    assert left._entry.allgather(np.ones(4), None) is not None
    assert left._entry.allgather(np.ones(5), None) is None
    assert left._entry.reduce_scatter(np.ones((left.size, 4)), "sum", None) is not None
    assert left._entry.reduce_scatter(np.ones((left.size, 5)), "sum", None) is None


def test_calls_of_the_library_are_counted(left: Communicator) -> None:
    left.ledger.reset()
    for _ in range(2):
        left.allreduce(np.zeros(5, np.float32))
        left.broadcast(np.zeros(5, np.float32))
        left.reduce_scatter(np.zeros((left.size, 5), np.float32))
        left.allgather(np.zeros(5, np.float32))
    snapshot, axis, n = left.ledger.snapshot(), left.ledger.axis, left.size
    found = {operation: count.logical_bytes for (where, operation), count in snapshot.items() if where == axis}
    assert found == {"allreduce": 40, "broadcast": 40, "reduce_scatter": 40 * n, "allgather": 40 * n}
    assert all(count.calls == count.messages == 2 for count in snapshot.values())


@pytest.mark.parametrize("planned", [False, True])
def test_the_watchdog_sees_a_call_of_the_library(left: Communicator, planned: bool) -> None:
    """The thread asks for it while the call, which holds no lock, waits for the last rank."""
    seen: list[tuple[object, int | str]] = []
    plan = left.allreduce_plan(np.zeros(3, np.float32), in_place=True)
    left.debug = planned  # which closes the short way, but not to plans

    def look() -> None:
        while not done.wait(0.02):
            seen.append(left._watch.present())

    done = threading.Event()
    thread = threading.Thread(target=look)
    thread.start()
    try:
        if left.rank == left.size - 1:
            time.sleep(0.4)
        if planned:
            plan()
        else:
            left.broadcast(np.zeros(3, np.float32), root=left.size - 1)
    finally:
        done.set()
        thread.join()
    waited = [str(what) for what, _ in seen if what is not None]
    if left.rank < left.size - 1:
        assert len(waited) > 3
        reduction = "allreduce_plan: allreduce(float32[3], op=sum)"
        assert set(waited) == {reduction if planned else f"broadcast(float32[3], root={left.size - 1})"}
    assert left._watch.present()[0] is None


def test_an_error_of_the_library_is_told(left: Communicator) -> None:
    """More comes than there is room for; not every library sees that, and of several ranks some would wait for ever."""
    with left.split(left.rank // 2) as pair:
        if pair.size == 1 or pair.rank == 0 or "Open MPI" not in left.library:
            pair.broadcast(np.zeros(8))
            return
        with pytest.raises(MismatchError, match="broadcast of 4 float64: another rank sent more than this one awaits"):
            pair.broadcast(np.zeros(4))


def test_plans_by_the_library(left: Communicator) -> None:
    for op in ("sum", "mean", "max"):
        x = values(left.rank, (6,))
        plan = left.allreduce_plan(x, op)
        left.ledger.reset()
        for _ in range(2):
            same(np.array(plan()), folded(left.size, (6,), "float64", op))
        assert {key[1]: count.calls for key, count in left.ledger.snapshot().items()} == {"allreduce_plan": 2}
        plan = left.allreduce_plan(x, op, in_place=True)
        assert plan() is x
        same(x, folded(left.size, (6,), "float64", op))


def test_a_plan_on_a_freed_communicator(left: Communicator) -> None:
    with left.split(0) as part:
        part._use(HostTransport())
        plan = part.allreduce_plan(np.ones(3))
        plan()
        part.debug = True
        part.debug = False
    with pytest.raises(CommunicationError, match="allreduce_plan: the communicator was freed"):
        plan()


def test_nothing_of_the_library_is_kept(left: Communicator) -> None:
    x, row, all_rows = np.zeros((left.size, 5)), np.zeros(5), np.zeros((left.size, 5))
    arrays = x, row, all_rows
    before = [sys.getrefcount(each) for each in arrays]
    for _ in range(200):
        left._entry.allreduce(x, "mean", x)
        left._entry.broadcast(x, 0, all_rows)
        left._entry.reduce_scatter(x, "sum", row)
        left._entry.allgather(row, all_rows)
        left._entry.allgather(row, None)
        left._entry.reduce_scatter(row, "sum", None)
    assert [sys.getrefcount(each) for each in arrays] == before


@pytest.mark.usefixtures("world")
def test_handles_that_are_negative_ints(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MPICH's, which mpi4py tells as unsigned numbers of 64 bits."""
    from mpitrain.comm import mpi

    monkeypatch.setattr(mpi.MPI, "_handleof", lambda of: 2**64 - 5)
    assert mpi._handle(mpi.MPI.COMM_SELF) == -5
