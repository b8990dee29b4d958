"""The one place that turns callers' arrays into what a backend moves, and back.

Contiguity, element types, the host copy of device arrays and ``out=`` are settled here and nowhere else.  A backend
sees contiguous one-dimensional host arrays of types that MPI knows.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.namespace import is_cupy, namespace, to_host
from mpitrain.comm import dtypes, trees

LATE_FROM_BYTES = 1 << 20
"""Arrays from this size on may be copied by whoever performs a call, while messages are under way."""


def accept(operation: str, x: Any) -> Array:
    """Return ``x`` as an array whose element type can travel.

    Parameters
    ----------
    operation : str
        For the message of the error.
    x : NumPy or CuPy array, or Python or NumPy scalar

    Raises
    ------
    InputError, DtypeError
        It is neither, or of a type that cannot travel.
    """
    if isinstance(x, (np.generic, numbers.Number)):
        x = np.asarray(x)
    if not isinstance(x, np.ndarray) and not is_cupy(x):
        raise InputError(
            "not an array", operation=operation, got=type(x).__name__,
            expected="a NumPy or CuPy array, a number, or a dict, list or tuple of these",
            remedy="convert it with numpy.asarray, or use the *_object methods",
        )  # fmt: skip
    if isinstance(x, np.ma.MaskedArray):
        raise InputError("masked array", operation=operation, remedy="fill it with array.filled(value)")
    dtypes.check(operation, x.dtype)
    array: Array = x
    return array


def wire(values: Array) -> Array:
    """Return a contiguous host array as the flat words that travel; shares its memory."""
    return values.reshape(-1).view(dtypes.storage(values.dtype))


def outgoing(x: Array, held: DType | None = None, apart_from: Array | None = None) -> Array:
    """Return ``x`` as flat words to send: its own memory where that is contiguous, else a copy.

    Parameters
    ----------
    x : array
        What the caller handed in.
    held : dtype, optional
        Type to convert to before; that of ``x`` if None.
    apart_from : array, optional
        What is received; where the two overlap, ``x`` is copied.
    """
    values = np.ascontiguousarray(to_host(x), dtype=held)
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
    likes : sequence of array
        An array of the dtype and library of each result.
    outs : sequence of (array or None)
        Where each result is to go; None: a new array.
    reduces : bool
        The values are reduced on their way, so that 16-bit floats are held in float32.

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
        likes: Sequence[Array],
        outs: Sequence[Array | None],
        reduces: bool = False,
    ) -> None:
        self.dtype: DType = likes[0].dtype
        self._likes, self._outs = likes, outs
        for shape, like, out in zip(shapes, likes, outs, strict=True):
            _check_out(operation, out, shape, like)
        held = accumulator(self.dtype) if reduces else self.dtype
        direct = _flat_view(outs[0], held) if len(outs) == 1 else None
        sizes = [prod(shape) for shape in shapes]
        self.values: Array = np.empty(sum(sizes), held) if direct is None else direct
        self.wire = wire(self.values)
        ends = np.cumsum(sizes)
        self.parts = [
            self.values[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)
        ]

    def fill(self) -> None:
        """Copy the values of ``likes`` in; those that already lie here stay."""
        for part, like, out in zip(self.parts, self._likes, self._outs, strict=True):
            if like is not out or not np.may_share_memory(part, out):
                part[...] = to_host(like)

    def source(self) -> Array | None:
        """Return the values that `fill` would copy, as words, where they are one large array that can be read as it is.

        Whoever performs the call may then copy them when it suits.
        """
        like = self._likes[0]
        if len(self._likes) > 1 or self.values.nbytes < LATE_FROM_BYTES or not isinstance(like, np.ndarray):
            return None
        fits = like.dtype == self.values.dtype and like.flags.c_contiguous and like.flags.aligned
        return wire(np.asarray(like)) if fits and not np.may_share_memory(like, self.values) else None

    def results(self) -> list[Array]:
        """Return the arrays, each in the caller's library and dtype, or in its ``out``."""
        return [self._result(*each) for each in zip(self.parts, self._likes, self._outs, strict=True)]

    def _result(self, part: Array, like: Array, out: Array | None) -> Array:
        with np.errstate(over="ignore"):  # a float32 sum beyond float16 is infinite there
            part = part.astype(self.dtype, copy=False)
        if out is None:
            result: Array = namespace(like).asarray(part)
            return result
        if is_cupy(out) or not np.may_share_memory(part, out):
            out[...] = namespace(out).asarray(part)
        return out


class Fused:
    """The arrays of a tree, packed into one parcel per dtype."""

    def __init__(self, operation: str, tree: Any, out: Any, reduces: bool = False) -> None:
        self._tree = tree
        arrays = [accept(operation, leaf) for leaf in trees.leaves(tree)]
        outs = trees.leaves_like(operation, tree, out)
        groups: dict[DType, list[int]] = {}
        for position, array in enumerate(arrays):
            groups.setdefault(array.dtype, []).append(position)
        self._positions = [position for group in groups.values() for position in group]
        self.parcels = []
        for group in groups.values():
            likes = [arrays[i] for i in group]
            shapes = [like.shape for like in likes]
            self.parcels.append(Parcel(operation, shapes, likes, [outs[i] for i in group], reduces))

    def fill(self) -> None:
        """Copy the tree's values into the parcels."""
        for parcel in self.parcels:
            parcel.fill()

    def result(self) -> Any:
        """Return the tree of results."""
        found = [array for parcel in self.parcels for array in parcel.results()]
        placed = dict(zip(self._positions, found, strict=True))
        return trees.rebuild(self._tree, (placed[i] for i in range(len(placed))))


def _check_out(operation: str, out: Any, shape: Shape, like: Array) -> None:
    if out is None:
        return
    if type(out) is not type(like) and not (isinstance(out, np.ndarray) and isinstance(like, np.ndarray)):
        raise InputError(
            "out is of another library than the input", operation=operation, got=type(out).__name__,
            expected=type(like).__name__,
        )  # fmt: skip
    if out.shape != shape:
        raise InputError("out has the wrong shape", operation=operation, got=out.shape, expected=shape)
    if out.dtype != like.dtype:
        raise DtypeError("out has the wrong dtype", operation=operation, got=out.dtype, expected=like.dtype)
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise InputError("out is read-only", operation=operation, remedy="pass a copy, or leave out= away")


def _flat_view(out: Array | None, held: DType) -> Array | None:
    """Return ``out`` as a flat array if the result can be received straight into it."""
    if not isinstance(out, np.ndarray) or out.dtype != held or not (out.flags.c_contiguous and out.flags.aligned):
        return None
    return np.asarray(out).reshape(-1)
