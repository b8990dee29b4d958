"""Objects of any library that show host memory: by DLPack, by the buffer protocol or by ``__array_interface__``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays.libraries.library import Library, Operand


class DlpackObjects(Library):
    """What speaks DLPack and is no array of a library that has a file of its own.

    Results are made by ``from_dlpack`` of the object's ``__array_namespace__()``; NumPy arrays where it has none, or
    cannot make them.
    """

    name = "DLPack"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` speaks DLPack."""
        return hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__")

    def open(self, operation: str, x: Any) -> Operand:
        """Return the object's own memory."""
        try:
            view = np.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                "array cannot be read through DLPack", operation=operation, got=f"{type(x).__name__} ({error})",
                remedy="convert it with numpy.asarray",
            ) from error  # fmt: skip
        return Operand(x, self, view, view.dtype, view.shape)

    def build(self, values: Array, like: Any) -> Any:
        """Return an array of the object's library, or else a NumPy array."""
        try:
            return like.__array_namespace__().from_dlpack(values)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return values


class Buffers(Library):
    """``bytes``, ``bytearray``, ``memoryview``, ``array.array`` …, and what has an ``__array_interface__``.

    Results are NumPy arrays.
    """

    name = "buffer"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` shows its memory."""
        if hasattr(x, "__array_interface__"):
            return True
        try:
            memoryview(x)  # type: ignore[arg-type]  # that is the question
        except (TypeError, ValueError):  # has no buffer; has been released
            return False
        return True

    def open(self, operation: str, x: Any) -> Operand:
        """Return the object's own memory."""
        try:
            view = np.asarray(x if hasattr(x, "__array_interface__") else memoryview(x))
        except (BufferError, TypeError, ValueError) as error:
            raise InputError(
                "buffer of an unknown format", operation=operation, got=f"{type(x).__name__} ({error})",
                remedy="convert it with numpy.frombuffer",
            ) from error  # fmt: skip
        return Operand(x, self, view, view.dtype, view.shape)

    def build(self, values: Array, like: Any) -> Array:
        """Return ``values`` as they are."""
        return values
