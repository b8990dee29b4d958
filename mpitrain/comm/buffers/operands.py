"""What a caller hands in: checked, and as the flat words that a backend sends."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import storage
from mpitrain.arrays.libraries import Operand, owner
from mpitrain.comm import dtypes
from mpitrain.comm.buffers.overlap import collision, entangled, overlap


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


def target(operation: str, out: Any, shape: Shape, like: Operand) -> Operand | None:
    """Return what the caller wants the result in, if the result fits and may be written there."""
    if out is None or isinstance(out, Operand):
        return out
    library = owner(out)
    if library is not like.library:
        raise InputError(
            "out is of another library than the input", operation=operation, got=type(out).__name__,
            expected=f"like the input, which is {like.library.name}",
        )  # fmt: skip
    found = library.target(operation, out)
    if found.shape != shape:
        raise InputError("out has the wrong shape", operation=operation, got=found.shape, expected=shape)
    if found.dtype != like.dtype:
        raise DtypeError("out has the wrong dtype", operation=operation, got=found.dtype, expected=like.dtype)
    return found


def wire(values: Array) -> Array:
    """Return a contiguous array as the flat words that travel; shares its memory."""
    return values.reshape(-1).view(storage(values.dtype))


def outgoing(
    x: Operand, held: DType | None = None, apart_from: Array | None = None, on_host: bool = False
) -> Array:  # fmt: skip
    """Return ``x`` as flat words to send: its own memory where that is contiguous, else a copy.

    Parameters
    ----------
    x : Operand
        What the caller handed in.
    held : dtype, optional
        Type to convert to before; that of ``x`` if None.
    apart_from : array, optional
        What is received; where the two overlap, ``x`` is copied.
    on_host : bool
        Copy it to the host if it is on a device.
    """
    if x.memory is not None and not on_host:
        return _words(x, x.memory, held or x.dtype, apart_from)
    values = np.ascontiguousarray(x.host(), dtype=held)
    if apart_from is not None and np.may_share_memory(values, apart_from):
        values = values.copy()
    return wire(values)


def _words(x: Operand, memory: Array, held: DType, apart_from: Array | None) -> Array:
    """Return an array on a device as words there."""
    stays = held == x.dtype and memory.flags.c_contiguous
    if stays and (apart_from is None or not overlap(memory, apart_from)):
        return memory.reshape(-1)
    stream = x.stream
    assert stream is not None
    words = stream.empty(memory.size, storage(held))
    stream.copy(memory, words.reshape(memory.shape), x.dtype)
    return words


def apart(operation: str, arrays: Sequence[Operand], outs: Sequence[Any]) -> list[Operand]:
    """Return arrays that travel one after the other, copied where the ``out`` of one uses the memory of another."""
    if len(arrays) < 2 or all(out is None for out in outs):
        return list(arrays)
    places = [None if out is None else accept(operation, out) for out in outs]
    distinct(operation, arrays, places)
    tangled = entangled(arrays, places)
    return [_copied(array) if i in tangled else array for i, array in enumerate(arrays)]


def distinct(operation: str, arrays: Sequence[Operand], outs: Sequence[Operand | None]) -> None:
    """Refuse places of results that overlap, where one result would be lost to the other."""
    found = collision(arrays, outs) if len(arrays) > 1 else None
    if found is not None:
        raise InputError(
            "results of different arrays would go to the same memory", operation=operation,
            got="out whose arrays {} and {} overlap".format(*found), remedy="give each its own, or leave out= away",
        )  # fmt: skip


def _copied(x: Operand) -> Operand:
    stream = x.stream
    if x.memory is None or stream is None:
        return Operand(x.given, x.library, x.host().copy(), x.dtype, x.shape)
    copy = stream.empty(x.memory.size, x.memory.dtype).reshape(x.shape)
    stream.copy(x.memory, copy, x.dtype)
    return Operand(x.given, x.library, None, x.dtype, x.shape, copy)
