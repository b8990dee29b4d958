"""What can be wrong with a layer's options or with the input that it gets, each said in one line."""

from __future__ import annotations

from math import prod
from operator import index
from typing import Any

from mpitrain._errors import InputError
from mpitrain._options import EPSILON, FRACTION, POSITIVE, Interval
from mpitrain._typing import Array, Shape


def positive(what: str, value: Any) -> int:
    """Return ``value`` if it is a whole number of at least 1."""
    return at_least(what, value, 1)


def at_least(what: str, value: Any, least: int) -> int:
    """Return ``value`` if it is a whole number of at least ``least``."""
    try:
        number = least - 1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{what} is wrong", got=repr(value), expected=f"a whole number of at least {least}")
    return number


def number(what: str, value: Any, allowed: Interval) -> float:
    """Return ``value``, a number of Python's or NumPy's, if it lies in an interval."""
    if not allowed.admits(value):
        raise InputError(f"{what} is wrong", got=repr(value), expected=allowed)
    return float(value)


def fraction(what: str, value: Any) -> float:
    """Return ``value`` if it lies in [0, 1)."""
    return number(what, value, FRACTION)


def epsilon(what: str, value: Any) -> float:
    """Return ``value`` if it is a finite number that float32 does not round to 0."""
    return number(what, value, EPSILON)


def spread(what: str, value: Any) -> float:
    """Return ``value`` if it is a finite number above 0."""
    return number(what, value, POSITIVE)


def pair(what: str, value: Any, least: int = 1) -> tuple[int, int]:
    """Return (height, width) from one whole number for both, or two."""
    values = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(values) != 2:
        raise InputError(f"{what} is wrong", got=repr(value), expected="a whole number, or two (height, width)")
    return at_least(what, values[0], least), at_least(what, values[1], least)


def last_axis(layer: str, x: Array, size: int) -> None:
    """Require that the last axis of a layer's input holds ``size`` features."""
    if x.ndim < 2 or x.shape[-1] != size:
        flat = x.ndim > 2 and prod(x.shape[1:]) == size
        remedy = "put Flatten() before it, or, of digits, set data.options.flat = true" if flat else None
        raise InputError(
            f"{layer}: the input does not fit", got=f"shape {x.shape}", expected=f"shape (n, …, {size})", remedy=remedy
        )


def images(layer: str, x: Array, window: tuple[int, int], padding: tuple[int, int] = (0, 0)) -> None:
    """Require that a layer's input is images that are no smaller than its window."""
    if x.ndim != 4:
        raise InputError(
            f"{layer}: the input is not images", got=f"shape {x.shape}", expected="shape (n, height, width, channels)"
        )
    height, width = x.shape[1] + 2 * padding[0], x.shape[2] + 2 * padding[1]
    if height < window[0] or width < window[1]:
        raise InputError(
            f"{layer}: the images are smaller than the window",
            got=f"{height} × {width} with padding",
            expected=f"at least {window[0]} × {window[1]}",
        )


def same_shape(layer: str, found: Shape, expected: Shape) -> None:
    """Require that two branches give arrays of one shape."""
    if found != expected:
        raise InputError(f"{layer}: the branches differ in shape", got=found, expected=expected)


def gradient(layer: str, found: Shape, expected: Shape) -> None:
    """Require that the gradient that a layer is handed has the shape of its output."""
    if found != expected:
        raise InputError(
            f"{layer}: the gradient is not of the output's shape", got=found, expected=expected,
            remedy="let the layer after it return a gradient of its input's shape",
        )  # fmt: skip
