"""The short way from a call into the compiled loops does what the long way does, errors included."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import pytest
from conformance import folded, ops, same, values

from mpitrain._errors import MismatchError, MpitrainError
from mpitrain.arrays import plain
from mpitrain.comm import Communicator, direct
from mpitrain.comm.transports import entry, kernel, shared

pytestmark = pytest.mark.mpi

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
SIZES = [0, 1, 7, kernel.SLOT_BYTES // 8, kernel.SLOT_BYTES // 8 + 1, 40_000, 700_001]


@pytest.fixture
def comm(world: Communicator) -> Iterator[Communicator]:
    """A communicator whose calls take the short way."""
    if world.size == 1 or not entry.available():
        pytest.skip("one rank" if world.size == 1 else "not built: no Python headers when mpitrain was installed")
    with world.split(0) as part:
        part.allreduce(np.zeros(1))
        assert part._entry is not None
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
        same(comm._entry(x, op, None), expected)
        assert comm._entry(x, op, out) is out
        same(out, expected)
        same(x, before)
        assert comm._entry(x, op, x) is x
        same(x, expected)


def test_shapes(comm: Communicator) -> None:
    for shape in [(), (1,), (2, 3), (3, 0, 2), (40, 33)]:
        x, out = values(comm.rank, shape), np.zeros(shape)
        same(comm._entry(x, "sum", None), folded(comm.size, shape, "float64", "sum"))
        same(comm._entry(x, "sum", out), folded(comm.size, shape, "float64", "sum"))


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
    assert comm._entry(x, op, out) is None
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
    with pytest.raises(TypeError, match="takes x, op and out, got 1"):
        comm._entry(np.zeros(1))  # type: ignore[call-arg, misc]


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
    assert len(comm._transport._laid_out) == 3
    x = places["another"]
    x[...] = values(comm.rank, x.shape)
    if comm.rank == 0:
        comm._entry = None
    same(comm.allreduce(x, op, out=x), folded(comm.size, x.shape, "float64", op))


def test_more_places_than_are_remembered(comm: Communicator) -> None:
    elements = shared.LOCATED_FROM_BYTES // 8
    memory = comm.empty(elements + shared.LAID_OUT + 8, "float64")
    for start in [*range(shared.LAID_OUT + 8), 0]:
        x = memory[start : start + elements]
        x[...] = comm.rank + start
        comm.allreduce(x, out=x)
        assert set(x) == {sum(range(comm.size)) + comm.size * start}


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
        comm._entry(x, "sum", out)
        comm._entry(x, "sum", x)
        comm._entry(x, "nothing", x)
        comm._entry(x[::2], "sum", x)
        comm._entry(x, "sum", None)
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
