"""Calls what a registry holds under a name, so that a wrong name or option is one clear message."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from mpitrain._errors import InputError

T = TypeVar("T")


def choose(registry: Mapping[str, T], what: str, name: str) -> T:
    """Return ``registry[name]``.

    Raises
    ------
    InputError
        There is no such name; what there is, and what comes near, is said.
    """
    if name in registry:
        return registry[name]
    raise InputError(
        f"unknown {what}", got=repr(name), expected=" or ".join(sorted(registry)), remedy=_nearest(name, registry)
    )


def call(function: Callable[..., T], what: str, *args: Any, options: Mapping[str, Any]) -> T:
    """Return ``function(*args, **options)``.

    Raises
    ------
    InputError
        An option is unknown, of the wrong type by the function's annotations, or required and missing.
    """
    parameters = list(inspect.signature(function).parameters.values())[len(args) :]
    allowed = {parameter.name: parameter.default is parameter.empty for parameter in parameters}
    expected = " or ".join(sorted(allowed)) or "none"
    for name in options:
        if name not in allowed:
            remedy = _nearest(name, allowed)
            raise InputError(f"{what}: unknown option", got=repr(name), expected=expected, remedy=remedy)
    for name, required in allowed.items():
        if required and name not in options:
            raise InputError(f"{what}: the option {name!r} is missing", got=sorted(options) or "none")
    _check_types(function, what, options)
    return function(*args, **options)


def _check_types(function: Callable[..., Any], what: str, options: Mapping[str, Any]) -> None:
    from pydantic import ConfigDict, TypeAdapter, ValidationError  # slow to import, and only needed here

    hints = get_type_hints(function)
    for name, value in options.items():
        try:
            TypeAdapter(hints.get(name, Any), config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            reasons = sorted({detail["msg"].removeprefix("Input should be ") for detail in error.errors()})
            raise InputError(
                f"{what}: the option {name!r} is unusable", got=repr(value), expected=" or ".join(reasons)
            ) from error


def _nearest(name: str, names: Mapping[str, Any]) -> str | None:
    found = get_close_matches(str(name), names, n=1)
    return f"did you mean {found[0]!r}?" if found else None
