"""Every collective × reduction × dtype × algorithm × transport × array library × memory × shape, pair by pair.

Values are small integers, so that every result is exact in every dtype and order, and is compared with what is
computed from all ranks' inputs in int64 or complex128, with zero tolerance.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import combinations, product
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from conformance import own_rows, shards
from pairwise import Case, Rules, cover, fits

import mpitrain.comm.mpi
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.comm.algorithms import names
from mpitrain.comm.transports import shared

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", *INTEGERS, "float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
REDUCTIONS = ("allreduce", "reduce", "reduce_scatter")
MOVES = ("broadcast", "allgather", "gather", "scatter", "alltoall")
KEEP_SHAPE = ("allreduce", "reduce", "broadcast")
BY_ROWS = ("reduce_scatter", "scatter", "alltoall")
FOLDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda stack: stack.sum(0),
    "mean": lambda stack: stack.sum(0) // len(stack) if stack.dtype.kind == "i" else stack.sum(0) / len(stack),
    "min": lambda stack: stack.min(0),
    "max": lambda stack: stack.max(0),
    "prod": lambda stack: stack.prod(0),
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
}
THROUGH = {"shared": ("default", "reproducible"), "nodes": ("default", "reproducible", "hierarchical")}
LARGE = 66_000  # elements: more than 64 KiB in every dtype, from where on arrays pass through shared memory


class Library(NamedTuple):
    """An array library: from a NumPy array, and back; the dtypes that it lacks; whether it has NumPy's memory."""

    name: str
    make: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]
    lacks: tuple[str, ...] = ()
    shares_memory: bool = True


def _torch(torch: Any) -> Library:
    def make(x: np.ndarray) -> Any:
        is_short = x.dtype == ml_dtypes.bfloat16
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if is_short else torch.from_numpy(x)

    def to_numpy(x: Any) -> np.ndarray:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()

    return Library("torch", make, to_numpy)


def _jax(jax: Any) -> Library:
    return Library("jax", jax.numpy.asarray, np.asarray, ("int64", "uint64", "float64", "complex128"), False)


def _cupy(cupy: Any) -> Library:
    return Library("cupy", cupy.asarray, cupy.asnumpy, ("bfloat16",), False)


def _libraries() -> list[Library]:
    """Return NumPy and those that are installed, usable here, and taken by the collectives."""
    found = [Library("numpy", lambda x: x, np.asarray)]
    with suppress(ImportError):
        taken = {each.name for each in importlib.import_module("mpitrain.arrays.libraries").LIBRARIES}
        for title, module, library in (("PyTorch", "torch", _torch), ("JAX", "jax", _jax), ("CuPy", "cupy", _cupy)):
            with suppress(ImportError, RuntimeError):
                if title in taken:
                    one = library(importlib.import_module(module))
                    one.make(np.zeros(1, np.float32))  # CuPy needs a device
                    found.append(one)
    return found


LIBRARIES = {library.name: library for library in _libraries()}
AXES: dict[str, list[Any]] = {
    "operation": [*REDUCTIONS, *MOVES],
    "op": ["none", *FOLDS],
    "dtype": DTYPES,
    "algorithm": list(
        dict.fromkeys(["default", "reproducible", *(name for each in REDUCTIONS for name in names(each))])
    ),
    "transport": ["host", "shared", "nodes"],
    "library": list(LIBRARIES),
    "memory": ["ordinary", "node", "strided", "fortran", "in place", "node in place"],
    "shape": ["0-d", "empty", "uneven", "large"],
}


def _has(op: str, dtype: str) -> bool:
    """Tell whether a reduction has a meaning for a dtype."""
    if op in ("and", "or"):
        return dtype in ("bool", *INTEGERS)
    if op in ("sum", "prod"):
        return dtype != "bool"
    return op == "none" or not (dtype.startswith("complex") if op != "mean" else dtype in ("bool", *INTEGERS))


RULES: Rules = [
    ("operation", "op", lambda operation, op: (op != "none") == (operation in REDUCTIONS)),
    ("op", "dtype", _has),
    (
        "operation", "algorithm",
        lambda operation, name: name in ("default", *names(operation))
        or (name == "reproducible" and operation in REDUCTIONS),
    ),
    ("op", "algorithm", lambda op, name: name != "reproducible" or op in ("sum", "mean")),
    ("operation", "memory", lambda operation, memory: "place" not in memory or operation in KEEP_SHAPE),
    ("operation", "shape", lambda operation, shape: shape != "0-d" or operation not in BY_ROWS),
    # Transports reduce large arrays for all, and nothing else.
    ("operation", "transport", lambda operation, transport: transport == "host" or operation == "allreduce"),
    ("transport", "shape", lambda transport, shape: transport == "host" or shape == "large"),
    ("algorithm", "transport", lambda name, transport: transport == "host" or name in THROUGH[transport]),
    ("library", "dtype", lambda library, dtype: dtype not in LIBRARIES[library].lacks),
    ("library", "memory", lambda library, memory: memory == "ordinary" or LIBRARIES[library].shares_memory),
    ("memory", "shape", lambda memory, shape: shape != "0-d" or memory not in ("strided", "fortran")),
]  # fmt: skip
CASES = cover(AXES, RULES)


def _pairs(cases: list[Case]) -> set[Any]:
    return {pair for case in cases for pair in combinations(case.items(), 2)}


def test_the_generator_covers_a_small_product() -> None:
    axes = {"a": [1, 2, 3], "b": [1, 2, 3, 4], "c": [0, 1], "d": [0, 1, 2]}
    rules: Rules = [("a", "b", lambda a, b: a != b), ("b", "d", lambda b, d: b != 4 or d == 2)]
    whole = [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    meant = [case for case in whole if case["a"] != case["b"] and (case["b"] != 4 or case["d"] == 2)]
    found = [{axis: case[axis] for axis in axes} for case in cover(axes, rules)]
    assert _pairs(found) == _pairs(meant)
    assert all(case in meant for case in found)
    assert len(found) <= 15  # a product of the two longest axes has 12


def test_every_pair_that_has_a_meaning_occurs() -> None:
    """Of random cases that keep the rules, every pair is one of those that are tested."""
    covered = _pairs([{axis: case[axis] for axis in AXES} for case in CASES])
    drawn = random.Random(0)
    sample = [{axis: drawn.choice(values) for axis, values in AXES.items()} for _ in range(60_000)]
    meant = _pairs([case for case in sample if fits(case, RULES)])
    assert len(meant) > 0.95 * len(covered)
    assert meant <= covered


def _raw(rank: int, shape: tuple[int, ...], dtype: str, scale: int) -> np.ndarray:
    """What a rank puts in, in int64 or complex128: 1, 2, 3, times ``scale``; bool: a third are true."""
    places = np.arange(int(np.prod(shape))).reshape(shape) + rank
    if dtype == "bool":
        return np.asarray(places % 3 == 0).astype(np.int64)
    values = np.asarray(places % 3 + 1) * scale
    return values + 1j * (places % 2) * scale if dtype.startswith("complex") else values


def _inputs(case: Case, size: int) -> tuple[list[np.ndarray], list[int] | None]:
    """Return what each rank puts in, and rows per rank."""
    by_rows, gathers = case["operation"] in BY_ROWS, "gather" in case["operation"]
    counts = shards(size) if case["shape"] == "uneven" and (by_rows or gathers) else None
    lead = (size,) if by_rows else ()
    shape = {"0-d": (), "empty": (*lead, 0, 3), "uneven": (7, 3), "large": (*lead, 3, LARGE // 3)}[case["shape"]]
    scale = size if case["op"] == "mean" else 1
    wholes = [_raw(rank, shape, case["dtype"], scale) for rank in range(size)]
    if gathers and counts is not None:
        wholes = [whole[own_rows(counts, rank)] for rank, whole in enumerate(wholes)]
    return wholes, counts


def _expected(case: Case, everyones: list[np.ndarray], counts: list[int] | None, rank: int, root: int) -> Any:
    """Return the rank's result, computed serially; None if it gets none."""
    operation = case["operation"]
    mine = rank if counts is None else own_rows(counts, rank)
    if operation in ("reduce", "gather") and rank != root:
        return None
    if operation in REDUCTIONS:
        total = FOLDS[case["op"]](np.stack(everyones))
        return total[mine] if operation == "reduce_scatter" else total
    if operation == "broadcast":
        return everyones[root]
    if operation == "scatter":
        return everyones[root][mine]
    parts = [each[mine] for each in everyones] if operation == "alltoall" else everyones
    return np.stack(parts) if counts is None else np.concatenate(parts)


def _place(comm: Communicator, values: np.ndarray, memory: str) -> np.ndarray:
    """Return the values in a kind of memory.  Collective."""
    if "node" in memory:
        x = comm.empty(values.shape, values.dtype)
    elif memory == "strided":
        x = np.zeros((*values.shape[:-1], 2 * values.shape[-1]), values.dtype)[..., ::2]
    else:
        x = np.empty(values.shape, values.dtype, order="F" if memory == "fortran" else "C")
    x[...] = values
    return x


def _call(comm: Communicator, case: Case, x: Any, counts: list[int] | None, root: int) -> Any:
    operation, options = case["operation"], {}
    if case["op"] != "none":
        options["op"] = case["op"]
    if case["algorithm"] == "reproducible":
        options["reproducible"] = True
    elif names(operation):
        options["algorithm"] = case["algorithm"]
    if operation in ("reduce", "broadcast", "gather", "scatter"):
        options["root"] = root
    if counts is not None:
        options["counts"] = counts  # of an alltoall: the same on all ranks, so that each gets its own number from all
    if "place" in case["memory"]:
        options["out"] = x
    return getattr(comm, operation)(x, **options)


def run_case(comm: Communicator, case: Case) -> None:
    """Perform one case on all ranks and compare."""
    library, root = LIBRARIES[case["library"]], comm.size - 1
    dtype = np.dtype(getattr(ml_dtypes, case["dtype"], case["dtype"]))
    everyones, counts = _inputs(case, comm.size)
    own = everyones[comm.rank].astype(dtype)
    x = library.make(_place(comm, own, case["memory"]))
    got = _call(comm, case, x, counts, root)
    expected = _expected(case, everyones, counts, comm.rank, root)
    if "place" not in case["memory"]:
        assert np.array_equal(library.to_numpy(x), own), "the input has changed"
    if expected is None:
        assert got is None
        return
    assert got is x if "place" in case["memory"] else type(got) is type(x) or case["operation"] == "scatter"
    got = library.to_numpy(got) if type(got) is type(x) else got
    expected = np.asarray(expected)
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    assert np.array_equal(got, expected.astype(dtype)), f"got {got}, expected {expected}"


def run_cases(comm: Callable[[Case], Communicator], operation: str) -> None:
    """Perform all cases of an operation."""
    for case in CASES:
        if case["operation"] == operation:
            try:
                run_case(comm(case), case)
            except BaseException as error:
                error.add_note(f"in {case}")
                raise


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("operation", AXES["operation"])
def test_threads(operation: str, size: int) -> None:
    LocalWorld(size, ranks_per_node=2).run(lambda comm: run_cases(lambda case: comm, operation))


@pytest.fixture(scope="module")
def over() -> Iterator[Callable[[Case], Communicator]]:
    """The communicator of a case's transport."""
    settings = {
        "host": {"MPITRAIN_TRANSPORT": "host"},
        "shared": {"MPITRAIN_TRANSPORT": "shared"},
        "nodes": {"MPITRAIN_RANKS_PER_NODE": "2"},
    }
    made: dict[str, Communicator] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "STREAMED_FROM_BYTES", shared.SMALLEST_BYTES)  # ordinary arrays as well
        for name, variables in settings.items():
            with pytest.MonkeyPatch.context() as inner:
                for variable, value in variables.items():
                    inner.setenv(variable, value)
                comm = mpitrain.comm.world().split(0)
                assert comm is not None
                assert comm.node.size
                assert comm.transport  # decided now, by the variables
                made[name] = comm
        yield lambda case: made[case["transport"]]
    for comm in made.values():
        comm.free()


@pytest.mark.mpi
def test_the_transports_are_those_that_are_meant(over: Callable[[Case], Communicator]) -> None:
    found = {name: over({"transport": name}) for name in AXES["transport"]}
    size = found["host"].size
    assert {name: comm.transport for name, comm in found.items()} == {
        "host": "host",
        "shared": "shared" if size > 1 else "host",
        "nodes": "shared" if size in (2, 4) else "host",  # three make nodes of unequal size
    }
    assert found["nodes"].node.size == min(2, size - found["nodes"].rank // 2 * 2)


@pytest.mark.mpi
@pytest.mark.parametrize("operation", AXES["operation"])
def test_processes(over: Callable[[Case], Communicator], operation: str) -> None:
    run_cases(over, operation)
