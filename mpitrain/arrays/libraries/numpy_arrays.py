"""NumPy arrays: what everything else is turned into."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.arrays.libraries.library import Library, Operand


class NumpyArrays(Library):
    """Arrays of NumPy's, of subclasses too."""

    name = "NumPy"

    def owns(self, x: object) -> bool:
        """Tell whether ``x`` is a NumPy array."""
        return isinstance(x, np.ndarray)

    def open(self, operation: str, x: Array) -> Operand:
        """Return the array itself."""
        if isinstance(x, np.ma.MaskedArray):
            raise InputError("masked array", operation=operation, remedy="fill it with array.filled(value)")
        return Operand(x, self, x, x.dtype, x.shape)

    def build(self, values: Array, like: Any) -> Array:
        """Return ``values`` as they are."""
        return values
