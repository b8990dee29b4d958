"""Host memory for one message."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.devices import Stream
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.libraries import Operand
from mpitrain.comm import results
from mpitrain.comm.buffers.operands import target, wire


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
    stream : Stream or None
        Of the device whose memory this is; None: it is host memory.
    values : array, one-dimensional
        The packed values, in the type in which they are held on the way.
    parts : list of array
        Views of ``values``: each array in its shape.
    wire : array, one-dimensional
        The same memory as words that MPI knows.
    """

    stream: Stream | None = None

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
        self._outs = [target(operation, *each) for each in zip(outs, shapes, likes, strict=True)]
        held = accumulator(self.dtype) if reduces else self.dtype
        place = self._landing(self._outs[0], held) if direct and len(outs) == 1 else None
        sizes = [prod(shape) for shape in shapes]
        self.values: Array = self._empty(sum(sizes), held) if place is None else place
        self.wire = wire(self.values)
        ends = accumulate(sizes)
        self.parts = [
            self.values[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes, strict=True)
        ]

    def fill(self) -> None:
        """Copy the values of ``likes`` in; those that already lie here stay."""
        for part, like, out in zip(self.parts, self._likes, self._outs, strict=True):
            if out is None or like.given is not out.given or not out.holds(part):
                part[...] = like.host()

    def divide(self, divisor: int) -> None:
        """Divide the values."""
        np.divide(self.values, divisor, out=self.values)

    def results(self) -> list[Any]:
        """Return the arrays, each in the caller's library and dtype, or in its ``out``."""
        return [self._result(*each) for each in zip(self.parts, self._likes, self._outs, strict=True)]

    def _empty(self, elements: int, held: DType) -> Array:
        return results.empty((elements,), held)

    def _landing(self, out: Operand | None, held: DType) -> Array | None:
        """Return the memory of ``out`` as a flat array if the result can be received straight into it."""
        view = None if out is None else out.view
        if view is None or view.dtype != held or not (view.flags.c_contiguous and view.flags.aligned):
            return None
        return np.asarray(view).reshape(-1)

    def _result(self, part: Array, like: Operand, out: Operand | None) -> Any:
        if part.dtype != self.dtype:
            with np.errstate(over="ignore"):  # a float32 sum beyond float16 is infinite there
                part = part.astype(self.dtype)
        return like.build(part) if out is None else out.store(part)
