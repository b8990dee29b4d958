"""Every collective × reduction × dtype × algorithm × transport × layout × array library × memory × shape, pair by pair.

What the cases are, and how ranks perform one and compare; `test_pairwise.py` says on which ranks.  Values are small
integers, so that every result is exact in every dtype and order, and is compared with what is computed from all ranks'
inputs in int64 or complex128, with zero tolerance.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations, product
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from conformance import own_rows, shards
from pairwise import Case, Rules, cover, fits

import mpitrain.comm
from mpitrain.comm import Communicator
from mpitrain.comm.algorithms import names
from mpitrain.comm.transports import far, network, shared
from mpitrain.comm.transports.entry import Entry

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
THROUGH = {"shared": ("default", "reproducible", "hierarchical"), "network": ("default", "reproducible")}
LAYOUTS = {"one node": "", "parts of 2": "2", "parts of 1": "1", "virtual 2 × 2": "", "virtual 2 × 1": ""}
"""Where ranks are, and ``MPITRAIN_RANKS_PER_NODE`` there; virtual nodes are those of `virtual_nodes.py`."""
ALONE = ("parts of 1", "virtual 2 × 1")
"""Layouts of nodes with one rank, which shares its memory with nobody."""
WORLDS = (("one node", "parts of 2", "parts of 1"), ("virtual 2 × 2",), ("virtual 2 × 1",))
"""The layouts that one job can try; the cases of each job have all pairs by themselves."""
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
    "transport": ["host", "shared", "network"],
    "layout": list(LAYOUTS),
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
    ("transport", "layout", lambda transport, layout: transport != "shared" or layout not in ALONE),
    ("library", "dtype", lambda library, dtype: dtype not in LIBRARIES[library].lacks),
    ("library", "memory", lambda library, memory: memory == "ordinary" or LIBRARIES[library].shares_memory),
    ("memory", "shape", lambda memory, shape: shape != "0-d" or memory not in ("strided", "fortran")),
]  # fmt: skip
CASES = [case for layouts in WORLDS for case in cover({**AXES, "layout": layouts}, RULES)]


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


class Place(NamedTuple):
    """A communicator on which cases of a layout and transport run, and the reductions that its transport performed."""

    comm: Communicator
    performed: list[str]


@contextmanager
def places(layouts: Sequence[str]) -> Iterator[Callable[[Case], Place]]:
    """Yield what tells the place of a case, on ranks that have these layouts; small arrays take the way of large ones.

    Collective.
    """
    made: dict[tuple[str, str], Place] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "STREAMED_FROM_BYTES", shared.SMALLEST_BYTES)
        for module in (far, network):
            patch.setattr(module, "PIPELINED_FROM_BYTES", shared.SMALLEST_BYTES)
        for layout, transport in product(layouts, AXES["transport"]):
            made[layout, transport] = _place_of(layout, transport)
        yield lambda case: made[case["layout"], case["transport"]]
    for place in made.values():
        place.comm.free()


def _place_of(layout: str, transport: str) -> Place:
    with pytest.MonkeyPatch.context() as patch:
        if LAYOUTS[layout]:
            patch.setenv("MPITRAIN_RANKS_PER_NODE", LAYOUTS[layout])
        if transport != "shared":  # which is the choice wherever it can be had
            patch.setenv("MPITRAIN_TRANSPORT", transport)
        comm = mpitrain.comm.world().split(0)
        assert comm is not None
        assert comm.node.transport  # decided now, by the variables
        return Place(comm, _listening(comm))


def _listening(comm: Communicator) -> list[str]:
    """Return a list that takes the reductions which a communicator's transport performs from now on."""
    transport, performed = comm._moves(), []
    perform = transport.allreduce

    def allreduce(send: np.ndarray, recv: np.ndarray, op: str) -> bool:
        done = perform(send, recv, op)
        performed.extend([op] * done)
        return done

    transport.allreduce = allreduce
    if comm._entry is not None and transport.loops(comm._watch) is not None:
        comm._entry = Overheard(comm._entry, performed)
    return performed


class Overheard:
    """The short way of a communicator, and a list that takes the reductions which loops perform on it."""

    def __init__(self, entry: Entry, performed: list[str]) -> None:
        self._entry, self._performed = entry, performed

    def allreduce(self, x: Any, op: Any, out: Any) -> np.ndarray | None:
        result = self._entry.allreduce(x, op, out)
        self._performed.extend([op] * (result is not None))
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)


def run_case_at(place: Place, case: Case) -> None:
    """Perform one case, and see that the transport which it is about did it."""
    place.performed.clear()
    run_case(place.comm, case)
    transport, own = place.comm.transport, case["algorithm"] in ("default", "reproducible")
    if transport == case["transport"] != "host" and own:
        assert place.performed, f"{transport} left it to the library"


def run_cases(cases: Sequence[Case], run: Callable[[Case], object]) -> None:
    """Perform cases; an error says in which."""
    for case in cases:
        try:
            run(case)
        except BaseException as error:
            error.add_note(f"in {case}")
            raise


def cases_of(layouts: Sequence[str], operation: str = "") -> list[Case]:
    """Return the cases of some layouts, all or those of an operation."""
    return [case for case in CASES if case["layout"] in layouts and operation in ("", case["operation"])]


def pairs(cases: Sequence[Case]) -> set[Any]:
    """Return all pairs of values that occur in cases."""
    return {pair for case in cases for pair in combinations([(axis, case[axis]) for axis in AXES], 2)}


def meant_pairs(layouts: Sequence[str]) -> set[Any]:
    """Return the pairs of random cases that keep the rules: nearly all that have a meaning on some layouts."""
    drawn = random.Random(0)
    axes = {**AXES, "layout": layouts}
    sample = [{axis: drawn.choice(values) for axis, values in axes.items()} for _ in range(100_000)]
    return pairs([case for case in sample if fits(case, RULES)])
