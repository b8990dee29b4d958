"""A long sequence of tokens as samples: windows, and the token that follows each of theirs."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.lib.stride_tricks import sliding_window_view

from mpitrain._errors import DataError, InputError
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset


def windows(tokens: Array, name: str, context: int, stride: int | None, vocabulary: Sequence[str]) -> Dataset:
    """Return the next-token pairs of a sequence.

    Parameters
    ----------
    tokens : array of int, shape (m,)
        May be memory-mapped: windows are views.
    name : str
        What messages call the data set.
    context : int
        1: inputs and targets are (n,), a token and its successor (the pairs of a bigram model).  More: they are
        windows (n, context), the targets one token further on.
    stride : int, optional
        Tokens from the start of one window to the next; ``context`` (windows side by side) if None.
    vocabulary : sequence of str
        Name of each token.
    """
    step = context if stride is None else stride
    if context < 1 or step < 1:
        raise InputError(f"{name}: context and stride are too small", got=(context, step), expected="1 or more")
    if len(tokens) <= context:
        expected = f"more than the context of {context}"
        raise DataError(f"{name}: the text is too short", got=f"{len(tokens)} tokens", expected=expected)
    inputs, targets = (_windows(part, context, step) for part in (tokens[:-1], tokens[1:]))
    overlap = -(-context // step) - 1
    return Dataset(inputs, targets, "sequence", name, class_names=tuple(vocabulary), overlap=overlap)


def _windows(tokens: Array, context: int, step: int) -> Array:
    return tokens[::step] if context == 1 else sliding_window_view(tokens, context)[::step]
