"""Element types: what they are called, and in which type each is summed.

Answers are kept: NumPy makes up the name of a dtype anew each time, which takes longer than a small message.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from mpitrain._errors import DtypeError, MissingExtraError
from mpitrain._options import brief
from mpitrain._typing import DType


@cache
def is_bfloat16(dtype: DType) -> bool:
    """Tell whether ``dtype`` is the bfloat16 that the package ``ml_dtypes`` registers with NumPy."""
    return dtype.name == "bfloat16"


@cache
def is_float(dtype: DType) -> bool:
    """Tell whether ``dtype`` is a real floating-point type, bfloat16 included."""
    return dtype.kind == "f" or is_bfloat16(dtype)


@cache
def is_half(dtype: DType) -> bool:
    """Tell whether ``dtype`` is a 16-bit float (float16 or bfloat16)."""
    return is_float(dtype) and dtype.itemsize == 2


@cache
def accumulator(dtype: DType) -> DType:
    """Return the type in which values of ``dtype`` are summed: float32 for 16-bit floats, else itself."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


@cache
def storage(dtype: DType) -> DType:
    """Return the type of the same width under which values are sent: unsigned words where MPI lacks the type itself."""
    if is_half(dtype):
        return np.dtype(np.uint16)
    return np.dtype(np.uint8) if dtype.kind == "b" else dtype


def half(name: str, operation: str) -> DType:
    """Return the dtype of 16-bit floats that is called ``"float16"`` or ``"bfloat16"``.

    Raises
    ------
    MissingExtraError
        It is bfloat16, which NumPy has only where ``ml_dtypes`` is installed, and it is not.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401  (it registers bfloat16 with NumPy)
        except ImportError as error:
            raise MissingExtraError(
                "NumPy has no bfloat16 of its own", operation=operation, got=str(error),
                remedy="pip install ml_dtypes, or use float16",
            ) from error  # fmt: skip
    found: DType = np.dtype(name)
    return found


def known_dtype(dtype: Any, what: str, expected: str = 'a dtype, e.g. "float32"') -> DType:
    """Return a NumPy dtype for what stands for one.

    Raises
    ------
    DtypeError
        Nothing does, or its elements have no size.  None is refused, for which NumPy takes float64.
    """
    try:
        found: DType | None = None if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found is None or not found.itemsize:
        raise DtypeError(f"{what}: not a dtype", got=brief(dtype), expected=expected)
    return found


def floating(dtype: Any, what: str) -> DType:
    """Return ``dtype`` as a NumPy dtype.

    Raises
    ------
    DtypeError
        It is not float32 or float64, the types that models compute in.
    """
    found = known_dtype(dtype, what, "float32 or float64")
    if found not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise DtypeError(f"{what}: models do not compute in this dtype", got=found, expected="float32 or float64")
    return found
