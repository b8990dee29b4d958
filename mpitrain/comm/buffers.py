"""The one place that turns callers' arrays into what a backend moves, and back.

Contiguity, element types, the host copy of device arrays and ``out=`` are settled here and nowhere else.  A backend
sees contiguous one-dimensional host arrays of types that MPI knows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.libraries import Operand, owner
from mpitrain.comm import dtypes, trees


def accept(operation: str, x: Any) -> Operand:
    """Return ``x`` as an array whose element type can travel.

    Parameters
    ----------
    operation : str
        For the message of the error.
    x : array of any library, or Python or NumPy scalar

    Raises
    ------
    InputError, DtypeError
        It is neither, or of a type that cannot travel.
    """
    if isinstance(x, Operand):
        return x
    if not isinstance(x, np.ndarray) and isinstance(x, (np.generic, numbers.Number)):
        x = np.asarray(x)
    library = owner(x)
    if library is None:
        raise InputError(
            "not an array", operation=operation, got=type(x).__name__,
            expected="an array (of NumPy, CuPy, PyTorch, JAX, by DLPack, or a buffer), a number, or a dict, list or "
            "tuple of these", remedy="convert it with numpy.asarray, or use the *_object methods",
        )  # fmt: skip
    operand = library.open(operation, x)
    dtypes.check(operation, operand.dtype)
    return operand


def wire(values: Array) -> Array:
    """Return a contiguous host array as the flat words that travel; shares its memory."""
    return values.reshape(-1).view(dtypes.storage(values.dtype))


def outgoing(x: Operand, held: DType | None = None, apart_from: Array | None = None) -> Array:
    """Return ``x`` as flat words to send: its own memory where that is contiguous, else a copy.

    Parameters
    ----------
    x : Operand
        What the caller handed in.
    held : dtype, optional
        Type to convert to before; that of ``x`` if None.
    apart_from : array, optional
        What is received; where the two overlap, ``x`` is copied.
    """
    values = np.ascontiguousarray(x.host(), dtype=held)
    if apart_from is not None and np.may_share_memory(values, apart_from):
        values = values.copy()
    return wire(values)


class Parcel:
    """Memory for one message: arrays of one dtype, packed one after the other.

    Parameters
    ----------
    operation : str
        For the messages of errors.
    shapes : sequence of tuple of int
        Of each array.
    likes : sequence of Operand
        An array of the dtype and library of each result.
    outs : sequence of (array or None)
        Where each result is to go, as the caller handed it in; None: a new array.
    reduces : bool
        The values are reduced on their way, so that 16-bit floats are held in float32.
    direct : bool
        A single result may be received into its ``out``, which no other message uses.

    Attributes
    ----------
    dtype : dtype
        Of the caller's arrays.
    values : array, one-dimensional
        The packed values, in the type in which they are held on the way.
    parts : list of array
        Views of ``values``: each array in its shape.
    wire : array, one-dimensional
        The same memory as words that MPI knows.
    """

    def __init__(
        self,
        operation: str,
        shapes: Sequence[Shape],
        likes: Sequence[Operand],
        outs: Sequence[Any],
        reduces: bool = False,
        direct: bool = True,
    ) -> None:
        self.dtype: DType = likes[0].dtype
        self._likes = likes
        self._outs = [_target(operation, *each) for each in zip(outs, shapes, likes, strict=True)]
        held = accumulator(self.dtype) if reduces else self.dtype
        place = _flat_view(self._outs[0], held) if direct and len(outs) == 1 else None
        sizes = [prod(shape) for shape in shapes]
        self.values: Array = np.empty(sum(sizes), held) if place is None else place
        self.wire = wire(self.values)
        ends = np.cumsum(sizes)
        self.parts = [
            self.values[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)
        ]

    def fill(self) -> None:
        """Copy the values of ``likes`` in; those that already lie here stay."""
        for part, like, out in zip(self.parts, self._likes, self._outs, strict=True):
            if out is None or like.given is not out.given or not out.holds(part):
                part[...] = like.host()

    def results(self) -> list[Any]:
        """Return the arrays, each in the caller's library and dtype, or in its ``out``."""
        return [self._result(*each) for each in zip(self.parts, self._likes, self._outs, strict=True)]

    def _result(self, part: Array, like: Operand, out: Operand | None) -> Any:
        with np.errstate(over="ignore"):  # a float32 sum beyond float16 is infinite there
            part = part.astype(self.dtype, copy=False)
        return like.build(part) if out is None else out.store(part)


class Fused:
    """The arrays of a tree, packed into one parcel per dtype, or into several of ``bucket_bytes`` at most."""

    def __init__(
        self, operation: str, tree: Any, out: Any, reduces: bool = False, bucket_bytes: int | None = None
    ) -> None:  # fmt: skip
        self._tree = tree
        arrays = [accept(operation, leaf) for leaf in trees.leaves(tree)]
        pairs = zip(trees.leaves_like(operation, tree, out), arrays, strict=True)
        outs = [_target(operation, into, array.shape, array) for into, array in pairs]
        buckets = _buckets(arrays, reduces, math.inf if bucket_bytes is None else bucket_bytes)
        self._positions = [position for bucket in buckets for position in bucket]
        entangled = _entangled(arrays, outs) if len(buckets) > 1 else set()
        self.parcels = []
        for bucket in buckets:
            likes = [arrays[i] for i in bucket]
            shapes = [like.shape for like in likes]
            direct = bucket[0] not in entangled
            self.parcels.append(Parcel(operation, shapes, likes, [outs[i] for i in bucket], reduces, direct))

    def fill(self) -> None:
        """Copy the tree's values into the parcels."""
        for parcel in self.parcels:
            parcel.fill()

    def result(self) -> Any:
        """Return the tree of results."""
        found = [array for parcel in self.parcels for array in parcel.results()]
        placed = dict(zip(self._positions, found, strict=True))
        return trees.rebuild(self._tree, (placed[i] for i in range(len(placed))))


def _buckets(arrays: Sequence[Operand], reduces: bool, bucket_bytes: float) -> list[list[int]]:
    """Divide arrays into messages: by dtype, and in their order for as long as the next one fits."""
    groups: dict[DType, list[list[int]]] = {}
    room: dict[DType, float] = {}
    for position, array in enumerate(arrays):
        dtype = array.dtype
        item_bytes = (accumulator(dtype) if reduces else dtype).itemsize
        nbytes = prod(array.shape) * item_bytes
        buckets = groups.setdefault(dtype, [])
        if not buckets or nbytes > room[dtype]:
            buckets.append([])
            room[dtype] = bucket_bytes
        buckets[-1].append(position)
        room[dtype] -= nbytes
    return [bucket for buckets in groups.values() for bucket in buckets]


def apart(operation: str, arrays: Sequence[Operand], outs: Sequence[Any]) -> list[Operand]:
    """Return arrays that travel one after the other, copied where the ``out`` of one uses the memory of another."""
    if len(arrays) < 2 or all(out is None for out in outs):
        return list(arrays)
    entangled = _entangled(arrays, [None if out is None else accept(operation, out) for out in outs])
    return [
        Operand(array.given, array.library, array.host().copy(), array.dtype, array.shape) if i in entangled else array
        for i, array in enumerate(arrays)
    ]


def _entangled(arrays: Sequence[Operand], outs: Sequence[Operand | None]) -> set[int]:
    """Return the positions in a tree at which memory may be used that another one uses, be it tied or swapped."""
    spans = [
        (*_span(operand.view), position)
        for operands in (arrays, outs)
        for position, operand in enumerate(operands)
        if operand is not None and operand.view is not None and operand.view.size
    ]
    clusters: list[set[int]] = []
    end = 0
    for start, stop, position in sorted(spans):
        if start >= end:
            clusters.append(set())
        clusters[-1].add(position)
        end = max(end, stop)
    return {position for cluster in clusters if len(cluster) > 1 for position in cluster}


def _span(view: Array) -> tuple[int, int]:
    """Return the addresses between which the elements of an array lie."""
    steps = [step * (n - 1) for step, n in zip(view.strides, view.shape, strict=True)]
    first = int(view.__array_interface__["data"][0])
    return first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0) + view.itemsize


def _target(operation: str, out: Any, shape: Shape, like: Operand) -> Operand | None:
    """Return what the caller wants the result in, if the result fits and may be written there."""
    if out is None or isinstance(out, Operand):
        return out
    library = owner(out)
    if library is not like.library:
        raise InputError(
            "out is of another library than the input", operation=operation, got=type(out).__name__,
            expected=f"like the input, which is {like.library.name}",
        )  # fmt: skip
    target = library.target(operation, out)
    if target.shape != shape:
        raise InputError("out has the wrong shape", operation=operation, got=target.shape, expected=shape)
    if target.dtype != like.dtype:
        raise DtypeError("out has the wrong dtype", operation=operation, got=target.dtype, expected=like.dtype)
    return target


def _flat_view(out: Operand | None, held: DType) -> Array | None:
    """Return the memory of ``out`` as a flat array if the result can be received straight into it."""
    view = None if out is None else out.view
    if view is None or view.dtype != held or not (view.flags.c_contiguous and view.flags.aligned):
        return None
    return np.asarray(view).reshape(-1)
