"""Finds the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return ``'did you mean "lr"?'`` where a name is near, else nothing."""
    near = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.6)
    return f'did you mean "{near[0]}"?' if near else ""
