"""Text as tokens, of which each is to be predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mpitrain._errors import DataError, InputError
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset
from mpitrain.data.sources.files import PathLike, reading

_NAMES: dict[str, Callable[[int], str]] = {"byte": "{:02x}".format, "character": chr}
"""How a unit's code is named in the vocabulary."""


def text(
    *,
    path: PathLike,
    unit: Literal["character", "byte"] = "character",
    context: int = 1,
    stride: int | None = None,
    vocabulary: Sequence[str] = (),
) -> Dataset:
    """Return the next-token pairs of a text file; every rank reads it.

    Parameters
    ----------
    path : path
        The file; UTF-8 if the unit is the character.
    unit : {"character", "byte"}
        What a token is.
    context : int
        1: inputs and targets are (n,), a token and its successor (the pairs of a bigram model).  More: they are
        windows (n, context) of the text, the targets one token further on.  Windows are views, not copies.
    stride : int, optional
        Tokens from the start of one window to the next; ``context`` (windows side by side) if None.
    vocabulary : sequence of str, optional
        The tokens of a vocabulary made before, in its order; by default the sorted tokens of this text.  Bytes are
        named in hexadecimal: ``"0a"``.

    Returns
    -------
    Dataset
        A ``sequence``; its ``class_names`` are the vocabulary.
    """
    step = context if stride is None else stride
    if unit not in _NAMES:
        raise InputError(f"{path}: unknown unit of text", got=repr(unit), expected=" or ".join(_NAMES))
    if context < 1 or step < 1:
        raise InputError(f"{path}: context and stride are too small", got=(context, step), expected="1 or more")
    with reading(path, "text in UTF-8" if unit == "character" else "bytes") as file:
        codes = _codes(file.read_bytes(), unit)
    if len(codes) <= context:
        expected = f"more than the context of {context}"
        raise DataError(f"{path}: the text is too short", got=f"{len(codes)} tokens", expected=expected)
    distinct, inverse = np.unique(codes, return_inverse=True)
    names = tuple(_NAMES[unit](code) for code in distinct)
    positions = _positions(names, vocabulary, str(path)) if vocabulary else np.arange(len(names))
    tokens = positions.astype(np.int32)[inverse]
    inputs, targets = (_windows(part, context, step) for part in (tokens[:-1], tokens[1:]))
    return Dataset(inputs, targets, "sequence", str(path), class_names=tuple(vocabulary) or names)


def _codes(content: bytes, unit: str) -> Array:
    if unit == "byte":
        return np.frombuffer(content, np.uint8)
    return np.frombuffer(content.decode("utf-8-sig").encode("utf-32-le"), np.uint32)


def _positions(names: Sequence[str], vocabulary: Sequence[str], path: str) -> Array:
    """Return where each name stands in a given vocabulary."""
    position = {name: number for number, name in enumerate(vocabulary)}
    strange = [name for name in names if name not in position]
    if strange:
        got = " ".join(map(repr, strange[:10]))
        raise DataError(f"{path}: the text has tokens that are not in the vocabulary", got=got)
    return np.array([position[name] for name in names])


def _windows(tokens: Array, context: int, step: int) -> Array:
    return tokens[::step] if context == 1 else sliding_window_view(tokens, context)[::step]
