"""Where a race takes place: the communicators on each transport, and arrays that stay in the cache or never do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mpitrain._typing import Array, DType, Shape
from mpitrain.comm.bench.cases import Call, Contender, Pair, Variant, handed_in, shapes
from mpitrain.comm.transports.host import HostTransport

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

MOST_BUFFERS = 255
"""Pairs of arrays that calls walk through at most; small arrays stay in the cache all the same."""

Bind = Callable[[str, Array, Array, bool], Call]
"""From an operation, a pair of arrays and whether the result replaces the first, to a rival's call."""


def buffers_for(kind: str, size_bytes: int, cache_bytes: int) -> int:
    """Return how many pairs of arrays calls walk through.

    Parameters
    ----------
    kind : {"resident", "rewritten", "rotating"}
        One; one; or so many that a rank's own are twice the cache, at most `MOST_BUFFERS`.  Their number is odd: two
        contenders that take turns then both walk through all of them, and none has the better pages for itself.
    size_bytes : int
        Of one array of a pair.
    cache_bytes : int
        Of the last cache.
    """
    if kind != "rotating":
        return 1
    return min(MOST_BUFFERS, max(2, -(-2 * cache_bytes // (2 * size_bytes))) | 1)


class Stage:
    """The communicators that our variants run on: all of the job's ranks, on ``host`` and on what the world has chosen.

    Arrays of `Communicator.empty` change how a communicator treats ordinary ones, so they have one of their own.

    Parameters
    ----------
    world : Communicator
        All ranks; its tuning table chooses here too.

    Notes
    -----
    Collective.
    """

    def __init__(self, world: Communicator) -> None:
        self.world = world
        host = self._split()
        host._use(HostTransport())
        self._comms: dict[tuple[str, bool], Communicator] = {("host", False): host, ("host", True): host}
        if world.transport != HostTransport.name:
            self._comms |= {(world.transport, memory): self._split() for memory in (False, True)}
        self.transports = tuple(dict.fromkeys(transport for transport, _ in self._comms))

    def _split(self) -> Communicator:
        comm = self.world.split(0, axis="bench")
        assert comm is not None
        comm.tuning = self.world.tuning
        return comm

    def comm(self, variant: Variant, transport: str) -> Communicator:
        """Return the communicator that a variant runs on."""
        return self._comms[transport, variant.node_memory]

    def free(self) -> None:
        """Release all communicators.  Collective."""
        for comm in self._comms.values():
            comm.free()


class Ground:
    """The arrays of one operation at one size.

    Parameters
    ----------
    operation : str
        E.g. ``allreduce``.
    elements, dtype : int, str
        Of the whole array.
    ranks : int
        Of the job.
    buffers : int
        Pairs of arrays.
    """

    def __init__(self, operation: str, elements: int, dtype: str, ranks: int, buffers: int) -> None:
        self.operation = operation
        self.shapes = shapes(operation, elements, ranks)
        self.dtype = np.dtype(dtype)
        self.pairs: list[Pair] = [self._pair(np.empty) for _ in range(buffers)]

    @property
    def total_bytes(self) -> int:
        """Of the whole array."""
        return max(map(prod, self.shapes)) * self.dtype.itemsize

    @cached_property
    def placed(self) -> list[Pair]:
        """Pairs for rivals of calls on `Communicator.empty`: MPI libraries are faster on them than on NumPy's."""
        return [self._pair(HostTransport().empty) for _ in self.pairs]

    @cached_property
    def first(self) -> Array:
        """What rank 0 hands in when results are looked at; rank r hands in r + 1 times as much."""
        return handed_in(self.shapes[0], self.dtype.name)

    def _pair(self, make: Callable[[Shape, DType], Array]) -> Pair:
        x, y = (make(shape, self.dtype) for shape in self.shapes)
        for array in (x, y):
            array.fill(1)  # written, so that memory is really there
        return x, y

    def ours(self, variant: Variant, comm: Communicator) -> Contender:
        """Return one of our variants on these arrays.  Collective."""
        pairs = self.pairs
        if variant.node_memory:
            pairs = [(comm.empty(self.shapes[0], self.dtype), y) for _, y in pairs]
        calls = [variant.bind(comm, x, y) for x, y in pairs]
        return Contender("ours", calls, [x for x, _ in pairs], [y for _, y in pairs], variant.in_place)

    def rival(self, name: str, bind: Bind, variant: Variant) -> Contender:
        """Return a rival of a variant, on memory as good as it has without sharing it."""
        pairs = self._pairs_beside(variant)
        calls = [bind(self.operation, x, y, variant.in_place) for x, y in pairs]
        overwrites = variant.in_place or self.operation == "broadcast"
        return Contender(name, calls, [x for x, _ in pairs], [y for _, y in pairs], overwrites)

    def always_in_place(self, name: str, bind: Bind, variant: Variant) -> Contender:
        """Return a rival that knows allreduce in place only; it works on the results of those that do not."""
        if variant.in_place or self.operation != "allreduce":
            return self.rival(name, bind, variant)
        results = [y for _, y in self._pairs_beside(variant)]
        return Contender(name, [bind(self.operation, y, y, True) for y in results], results, [], True)

    def _pairs_beside(self, variant: Variant) -> list[Pair]:
        return self.placed if variant.node_memory else self.pairs

    def copies(self) -> list[Call]:
        """Return what copies an array of the whole size, on each pair in turn."""
        size = self.total_bytes // self.dtype.itemsize
        arrays = [(np.ones(size, self.dtype), np.ones(size, self.dtype)) for _ in self.pairs]
        return [_copying(y, x) for x, y in arrays]


def _copying(into: Array, values: Array) -> Call:
    return lambda: np.copyto(into, values)
