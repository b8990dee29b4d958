"""Which element types and reductions the collectives accept, and as what they travel; it knows no backend."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from mpitrain._errors import DtypeError, InputError
from mpitrain._options import brief
from mpitrain._typing import DType

Op: TypeAlias = Literal["and", "max", "mean", "min", "or", "prod", "sum"]
"""Reductions.  ``and``, ``or``: bitwise on integers, logical on bool.  ``min``, ``max``: undefined for NaN."""

OPS: tuple[str, ...] = get_args(Op)

UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}
"""What combines two values on the host; ``mean`` is a sum, divided at the end."""

_INTEGERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_COMPLEX = {"complex64", "complex128"}
_SUPPORTED = {"bool"} | _INTEGERS | _FLOATS | _COMPLEX

_REMEDIES = {
    "O": "use the *_object methods for Python objects",
    "U": "use the *_object methods for strings",
    "S": "use the *_object methods for strings",
    "T": "use the *_object methods for strings",
    "M": "send array.view('int64')",
    "m": "send array.view('int64')",
    "f": "cast to float64",
    "c": "cast to complex128",
}


@cache
def check(operation: str, dtype: DType) -> None:
    """Refuse an element type that MPI has no name for, or would misread.

    Raises
    ------
    DtypeError
        Objects, strings, dates, structures, extended precision, 8-bit floats, foreign byte order.
    """
    if not dtype.isnative:
        raise DtypeError(
            "array in foreign byte order", operation=operation, got=dtype,
            remedy="convert it with array.astype(array.dtype.newbyteorder('='))",
        )  # fmt: skip
    if dtype.name not in _SUPPORTED:
        remedy = "send each field by itself" if dtype.names else _REMEDIES.get(dtype.kind, "cast it")
        raise DtypeError(
            "unsupported dtype", operation=operation, got=dtype, remedy=remedy,
            expected="bool, an integer, float16, bfloat16, float32, float64, complex64 or complex128",
        )  # fmt: skip


def memory(operation: str, dtype: Any) -> DType:
    """Return the dtype of memory to allocate.

    Raises
    ------
    DtypeError
        It is none, or cannot travel.
    """
    try:
        found: DType = np.dtype(dtype)
    except TypeError as error:
        raise DtypeError("not a dtype", operation=operation, got=repr(dtype)) from error
    check(operation, found)
    return found


def check_op(operation: str, op: object) -> None:
    """Refuse an unknown reduction."""
    if not (isinstance(op, str) and op in OPS):
        raise InputError("unknown reduction", operation=operation, got=brief(op), expected=", ".join(map(repr, OPS)))


@cache
def check_op_dtype(operation: str, op: str, dtype: DType) -> None:
    """Refuse a reduction that has no meaning for an element type.

    Raises
    ------
    DtypeError
        mean of integers or bool, sum or prod of bool, min or max of complex, and/or of anything but integers and bool.
    """
    is_integer = dtype.name in _INTEGERS
    is_bool = dtype.name == "bool"
    remedy = None
    if op == "mean" and (is_integer or is_bool):
        remedy = 'cast to float64, or use "sum" and divide'
    elif op in ("sum", "prod") and is_bool:
        remedy = 'use "or" (any rank) or "and" (all ranks), or cast to an integer to count'
    elif op in ("min", "max") and dtype.name in _COMPLEX:
        remedy = "complex numbers have no order: reduce the real and imaginary parts, or abs()"
    elif op in ("and", "or") and not (is_integer or is_bool):
        remedy = "compare first: bool and integers have and/or"
    if remedy:
        raise DtypeError(f"{op!r} is not defined for this dtype", operation=operation, got=dtype, remedy=remedy)
