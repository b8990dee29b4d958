"""Files in the user's cache: one for each key, replaced in one step, and held to what was written when read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpitrain import _env
from mpitrain._errors import InputError, StorageError


def folder(kind: str) -> Path:
    """Return where files of a kind are kept, whether it exists or not."""
    return Path(_env.cache_directory()) / "mpitrain" / kind


def path_of(kind: str, key: Iterable[str]) -> Path:
    """Return the file of a key, whether it exists or not."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    return folder(kind) / f"{digest}.json"


def files(kind: str) -> list[Path]:
    """Return all files of a kind; none where the folder may not be read."""
    try:
        return sorted(folder(kind).glob("*.json"))
    except OSError:  # which is no reason to leave other ranks waiting
        return []


def write(path: Path, text: str, what: str) -> Path:
    """Write a file, which is replaced in one step; on one rank only.

    Raises
    ------
    StorageError
        The cache cannot be written; the message calls what was to be kept ``what``.
    """
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{what} cannot be kept", got=str(error), remedy="set XDG_CACHE_HOME to a folder with room"
        ) from error
    return path


def parse(text: str, version: int, kinds: dict[str, type], what: str) -> dict[str, Any]:
    """Return the members of a JSON object, and ``version`` not among them.

    Raises
    ------
    InputError
        The text is anything else: damaged, or of another version.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError("not JSON", operation=what, got=str(error)) from error
    found = typed(found, {"version": int, **kinds}, "the file", what)
    if found["version"] != version:
        raise InputError("of another version", operation=what, got=found["version"], expected=version)
    return {name: found[name] for name in kinds}


def typed(found: Any, kinds: dict[str, type], part: str, what: str) -> dict[str, Any]:
    """Return a JSON object that has exactly these members."""
    if not isinstance(found, dict) or {name: type(value) for name, value in found.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise InputError(f"{part} is not as it was written", operation=what, expected=expected)
    return found
