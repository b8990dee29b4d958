"""From a file's bytes, or the command line's overrides, to nested tables of plain values; knows no section."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpitrain._errors import JobError
from mpitrain._names import did_you_mean
from mpitrain.train.job.errors import dotted
from mpitrain.train.job.section import Problem

_DEEPEST = 16
_INTEGERS = range(-(2**63), 2**63)

_EXCLUSIVE = (
    ("train.steps", "train.epochs"),
    ("train.evaluate_every_steps", "train.evaluate_every_epochs"),
    ("train.checkpoint.every_steps", "train.checkpoint.every_epochs"),
)
_EXCLUDED_BY = {one: other for pair in _EXCLUSIVE for one, other in (pair, pair[::-1])}
"""An override of one key takes the other, which cannot stand beside it, out of the file."""


def read_text(path: Path) -> str:
    """Return the text of a job file.

    Raises
    ------
    JobError
        The file is missing, is not a file, cannot be read, or is not UTF-8.
    """
    try:
        if path.is_dir():
            raise JobError("is a directory", operation=str(path), expected="a job file (TOML)")
        if not path.is_file():
            remedy = did_you_mean(path.name, _neighbours(path))
            raise JobError("no such file", operation=str(path), expected="a job file (TOML)", remedy=remedy)
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, JobError):
            raise
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise JobError(f"cannot be read: {reason}", operation=repr(str(path))) from error
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{content[error.start]:02x} on line {line}"
        raise JobError("is not text in UTF-8", operation=str(path), got=got) from error


def _neighbours(path: Path) -> list[str]:
    return [other.name for other in path.parent.glob("*.toml")]


def parse(text: str, source: str) -> dict[str, Any]:
    """Return the tables of a TOML text.

    Raises
    ------
    JobError
        The text is not TOML; line and column are named.
    """
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise JobError("is nested too deeply", operation=source) from error
    except ValueError as error:  # TOMLDecodeError, and Python's own limit on the digits of an integer
        reason = " ".join(str(error).split())
        raise JobError(f"is not TOML: {reason}", operation=source) from error


def override(
    tables: dict[str, Any], overrides: Iterable[str], option: str = "--set"
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Return the tables with ``key=value`` settings put in, and the dotted keys that were set.

    A value is read as TOML and, where it is none, taken as a string: ``optimizer.kind=adam``.  ``option`` is where the
    settings were given.

    Raises
    ------
    JobError
        A setting has no ``=``, an empty key, or goes below a key that is no table.
    """
    keys = []
    for setting in overrides:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise JobError(
                "cannot be understood", operation=f"{option} {setting}", expected="KEY=VALUE, e.g. optimizer.lr=0.01"
            )
        tables = _without(tables, _EXCLUDED_BY.get(key, "").split("."))
        tables = _with(tables, key.split("."), read_value(text), f"{option} {setting}")
        keys.append(key)
    return tables, keys


def read_value(text: str) -> Any:
    """Return what a value on the command line means: TOML, or else a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _with(tables: dict[str, Any], path: list[str], value: Any, source: str) -> dict[str, Any]:
    name, *rest = path
    if not rest:
        return {**tables, name: value}
    inner = tables.get(name, {})
    if not isinstance(inner, dict):
        raise JobError(f'"{name}" is not a table', operation=source)
    return {**tables, name: _with(inner, rest, value, source)}


def _without(tables: dict[str, Any], path: list[str]) -> dict[str, Any]:
    name, *rest = path
    if name not in tables:
        return tables
    if not rest:
        return {key: value for key, value in tables.items() if key != name}
    inner = tables[name]
    return {**tables, name: _without(inner, rest)} if isinstance(inner, dict) else tables


def unusable(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[Problem]:
    """Yield the values that no job can hold: not finite, beyond 64 bits, dates, what is not TOML, endless nesting."""
    key = dotted(path)
    if len(path) > _DEEPEST:
        yield Problem(key, "is nested too deeply", expected=f"at most {_DEEPEST} levels")
    elif isinstance(value, dict):
        for name, inner in value.items():
            if isinstance(name, str) and _is_unicode(name):
                yield from unusable(inner, (*path, name))
            else:
                yield Problem(key, "has a key that is not a string of Unicode text", ascii(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from unusable(inner, (*path, number))
    elif what := _fault(value):
        yield Problem(key, what)


def _fault(value: Any) -> str:
    match value:
        case bool():
            return ""
        case int():
            return "" if value in _INTEGERS else "is an integer beyond 64 bits"
        case float():
            return "" if math.isfinite(value) else "is not finite"
        case str():
            return "" if _is_unicode(value) else "is not Unicode text"
        case _:
            return f"is a {type(value).__name__}, which no key of a job takes"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
