"""What the collectives ask of an array library, and an array as they see it.  No library is named or imported here.

Arrays lie in one of three places: in host memory, of which there is a NumPy view; on a device on which mpitrain can
queue work (`mpitrain.arrays.devices`), as words; or elsewhere, from where they are copied whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.devices import Stream


class Operand:
    """Something that a caller handed in, seen through its library.

    Parameters
    ----------
    given : object
        What was handed in.
    library : Library
        Whose it is.
    view : NumPy array or None
        Its values, in its own memory wherever that is host memory; None for memory of a device.
    dtype : dtype
        Of its elements.
    shape : tuple of int
        Its extents.
    memory : device array or None
        Its own memory, in its shape and as the words that are sent, if it lies on a device on which work can be queued.
    """

    __slots__ = ("dtype", "given", "library", "memory", "shape", "view")

    def __init__(
        self,
        given: Any,
        library: Library,
        view: Array | None,
        dtype: DType,
        shape: Shape,
        memory: Array | None = None,
    ) -> None:
        self.given, self.library, self.view, self.dtype, self.shape = given, library, view, dtype, shape
        self.memory = memory

    @property
    def stream(self) -> Stream | None:
        """The stream on which its library works now, in the calling thread; None if no work can be queued there."""
        return None if self.view is not None else self.library.stream(self.given)

    def host(self) -> Array:
        """Return the values as a NumPy array; those of a device are copied, after what its stream was given."""
        return self.library.fetch(self.given) if self.view is None else self.view

    def build(self, values: Array) -> Any:
        """Return a new array of the same library and device, made of a NumPy array that nobody else writes to."""
        return self.library.build(values, self.given)

    def holds(self, values: Array) -> bool:
        """Tell whether ``values`` are the memory of this array."""
        return self.view is not None and np.may_share_memory(values, self.view)

    def store(self, values: Array) -> Any:
        """Write ``values`` where they do not lie already, and return what the caller handed in."""
        if self.view is None:
            self.library.put(values, self.given)
        elif not self.holds(values):
            self.view[...] = values
        self.library.wrote(self.given)
        return self.given


class Library(ABC):
    """One array library, or one protocol that several speak.

    Attributes
    ----------
    name : str
        As error messages call it.

    Notes
    -----
    A library that is not loaded owns nothing, and is never imported for that.
    """

    name: str

    @abstractmethod
    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is an array of this library."""

    @abstractmethod
    def open(self, operation: str, x: Any) -> Operand:
        """Return an array whose values are to be read.

        Raises
        ------
        InputError, DtypeError
            It has no values that can be read now; ``operation`` goes into the message.
        """

    def target(self, operation: str, out: Any, what: str = "out") -> Operand:
        """Return an array that is to be written; messages call it ``what``.

        Raises
        ------
        InputError
            It must not be written to.
        """
        operand = self.open(operation, out)
        if operand.view is not None:
            _check_writeable(operation, operand.view, what)
        return operand

    @abstractmethod
    def build(self, values: Array, like: Any) -> Any:
        """Return a new array on the device of ``like``, over the memory of ``values`` where that will do."""

    def show(self, values: Array) -> Any:
        """Return an array over read-only memory that changes with every call of a plan; NumPy's unless overridden."""
        return values

    def stream(self, x: Any) -> Stream | None:
        """Return the stream on which work on an array of a device is to be queued; None if that cannot be."""
        return None

    def wrap(self, memory: Array, dtype: DType, like: Any) -> Any:
        """Return a new array of ``dtype`` over words on the device of ``like``, in the shape that they have."""
        raise NotImplementedError  # only asked of libraries with a stream

    def fetch(self, x: Any) -> Array:
        """Return a copy on the host of an array on a device."""
        raise NotImplementedError  # only asked of libraries whose operands have no view

    def put(self, values: Array, out: Any) -> None:
        """Copy values of the host into an array on a device."""
        raise NotImplementedError

    def wrote(self, out: Any) -> None:
        """Take note that the memory of ``out`` has been written to; nothing to do unless overridden."""
        return


def _check_writeable(operation: str, view: Array, what: str) -> None:
    if not view.flags.writeable:
        raise InputError(f"{what} is read-only", operation=operation, remedy="pass a copy, or leave out= away")
    if not view.flags.c_contiguous and _may_overlap_itself(view):
        raise InputError(
            f"elements of {what} share memory", operation=operation, got=f"shape {view.shape}, strides {view.strides}",
            remedy="pass a copy, or leave out= away",
        )  # fmt: skip


def _may_overlap_itself(view: Array) -> bool:
    """Tell whether two elements may lie in one place: an axis steps by less than what those below it span."""
    if not view.size:
        return False
    span_bytes = view.itemsize
    for step_bytes, extent in sorted((abs(step), n) for step, n in zip(view.strides, view.shape, strict=True) if n > 1):
        if step_bytes < span_bytes:
            return True
        span_bytes += step_bytes * (extent - 1)
    return False
