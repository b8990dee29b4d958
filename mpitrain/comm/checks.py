"""What a caller can get wrong about ranks, tags and row counts, each told in one line."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from mpitrain._errors import InputError, MismatchError
from mpitrain._options import brief

if TYPE_CHECKING:
    from mpitrain.comm.calls import Call

TAG_MAX = 32766
"""Largest tag of callers."""

OWN_TAG = 32767
"""Of messages that a collective is made of, so that they never meet the callers': the largest that every MPI library
supports."""


_INT_MAX = 2**31 - 1  # MPI takes colours and keys as ints
_LARGEST_BYTES = 2**63 - 1  # what NumPy can count


def _index(operation: str, what: str, value: Any, expected: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise InputError(
            f"{what} is not an integer", operation=operation, got=repr(value), expected=expected
        ) from error


def rank(operation: str, what: str, value: Any, size: int) -> int:
    """Return ``value`` as a rank below ``size``; ``what`` is root, dest or source."""
    expected = f"0 to {size - 1}"
    found = _index(operation, what, value, expected)
    if not 0 <= found < size:
        raise InputError(f"no such {what}", operation=operation, got=found, expected=expected)
    return found


def tag(operation: str, value: Any) -> int:
    """Return ``value`` as a message tag."""
    expected = f"0 to {TAG_MAX}"
    found = _index(operation, "tag", value, expected)
    if not 0 <= found <= TAG_MAX:
        raise InputError("tag out of range", operation=operation, got=found, expected=expected)
    return found


def counts(operation: str, values: Sequence[int], size: int) -> tuple[int, ...]:
    """Return ``values`` as one non-negative number of rows per rank."""
    expected = f"{size} numbers of rows, one per rank"
    try:
        each = iter(values)
    except TypeError as error:
        raise InputError(
            "counts are not a sequence", operation=operation, got=brief(values), expected=expected
        ) from error
    found = tuple(_index(operation, "a count", value, expected) for value in each)
    if len(found) != size or min(found) < 0:
        raise InputError("unusable counts", operation=operation, got=list(found), expected=expected)
    return found


def rows(operation: str, shape: tuple[int, ...], expected: int, why: str) -> None:
    """Refuse an array that does not have ``expected`` rows along axis 0."""
    if not shape or shape[0] != expected:
        raise InputError(
            "wrong number of rows", operation=operation, got=f"shape {shape}", expected=f"{expected} {why}"
        )


def color(value: Any) -> int | None:
    """Return ``value`` as the colour of a split; None stays None."""
    if value is None:
        return None
    expected = f"0 to {_INT_MAX}, or None to stay out"
    found = _index("split", "color", value, expected)
    if not 0 <= found <= _INT_MAX:
        raise InputError("color out of range", operation="split", got=found, expected=expected)
    return found


def key(value: Any) -> int:
    """Return ``value`` as what ranks are ordered by in a split."""
    expected = f"{-_INT_MAX} to {_INT_MAX}"
    found = _index("split", "key", value, expected)
    if not -_INT_MAX <= found <= _INT_MAX:
        raise InputError("key out of range", operation="split", got=found, expected=expected)
    return found


def shape(operation: str, value: int | Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """Return ``value`` as the shape of an array; a number stands for one dimension."""
    expected = "numbers of 0 or more"
    extents = value if isinstance(value, Sequence) else (value,)
    found = tuple(_index(operation, "an extent", extent, expected) for extent in extents)
    if any(extent < 0 for extent in found):
        raise InputError("negative extent", operation=operation, got=found, expected=expected)
    if prod(extent or 1 for extent in found) * item_bytes > _LARGEST_BYTES:  # NumPy too passes over the zeros
        raise InputError(
            "shape too large", operation=operation, got=f"{found} of {item_bytes} bytes each",
            expected="less than 2^63 bytes",
        )  # fmt: skip
    return found


def bucket_bytes(operation: str, value: Any) -> int | None:
    """Return ``value`` as the most bytes that one message may have; None stays None."""
    if value is None:
        return None
    expected = "1 or more bytes, or None"
    found = _index(operation, "bucket_bytes", value, expected)
    if found < 1:
        raise InputError("unusable bucket_bytes", operation=operation, got=found, expected=expected)
    return found


def own_message(operation: str, sent: Sequence[Call], awaited: Sequence[Call]) -> None:
    """Refuse a message of a rank to itself that is of another size than what it awaits."""
    sizes = [[call.send.nbytes for call in sent if call.send is not None]]
    sizes.append([call.recv.nbytes for call in awaited if call.recv is not None])
    if sizes[0] != sizes[1]:
        raise MismatchError(
            "a rank sends itself another size than it awaits", operation=operation, got=f"{sizes[0]} bytes",
            expected=f"{sizes[1]}",
        )  # fmt: skip
