"""Looks names up, and finds the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from mpitrain._errors import InputError

T = TypeVar("T")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return ``'did you mean "lr"?'`` where a name is near, else nothing."""
    near = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""


def choose(registry: Mapping[str, T], what: str, name: str) -> T:
    """Return ``registry[name]``.

    Raises
    ------
    InputError
        There is no such name; the message lists those that there are, and the nearest one.
    """
    if name in registry:
        return registry[name]
    raise InputError(
        f"unknown {what}", got=repr(name), expected=" or ".join(sorted(registry)),
        remedy=did_you_mean(str(name), registry),
    )  # fmt: skip
