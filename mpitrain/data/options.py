"""Calls a function with options that a user wrote, so that a wrong option is one clear message."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from mpitrain._errors import InputError
from mpitrain._names import did_you_mean

T = TypeVar("T")


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
            remedy = did_you_mean(str(name), allowed)
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
