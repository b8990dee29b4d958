"""Options of classes that jobs configure: dataclass fields that say which values they allow, checked when constructed.

A class lists its options as ``beta1: float = option(FRACTION, 0.9)`` and inherits `Checked`; nothing else is needed
for a wrong value, an unknown name or a missing one to end in one clear line.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from inspect import signature
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol, Self, TypeVar

from mpitrain._errors import InputError
from mpitrain._names import did_you_mean

_LONGEST = 60


class Allowed(Protocol):
    """Says which values an option may take; ``str()`` of it completes the sentence "expected …"."""

    def admits(self, value: object) -> bool:
        """Tell whether ``value`` is allowed."""
        ...


@dataclass(frozen=True)
class Interval:
    """Finite numbers between two bounds.

    Parameters
    ----------
    low, high : float
        The bounds.
    brackets : str
        ``"["`` includes the lower bound and ``"]"`` the upper one; ``"("`` and ``")"`` exclude them.
    whole : bool
        Integers only.
    """

    low: float
    high: float
    brackets: str = "[)"
    whole: bool = False

    def admits(self, value: object) -> bool:
        """Tell whether ``value`` is a number inside; a bool is none."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number = float(value)
        above = number >= self.low if self.brackets[0] == "[" else number > self.low
        below = number <= self.high if self.brackets[1] == "]" else number < self.high
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} in {self.brackets[0]}{self.low:g}, {self.high:g}{self.brackets[1]}"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def admits(self, value: object) -> bool:
        """Tell whether ``value`` is one of the words."""
        return isinstance(value, str) and value in self.words

    def __str__(self) -> str:
        return " or ".join(map(repr, self.words))


@dataclass(frozen=True)
class Pair:
    """Two numbers, each inside an interval."""

    each: Interval

    def admits(self, value: object) -> bool:
        """Tell whether ``value`` is a tuple or list of two such numbers."""
        return isinstance(value, tuple | list) and len(value) == 2 and all(map(self.each.admits, value))

    def __str__(self) -> str:
        return f"two numbers, each {self.each}"


FRACTION = Interval(0.0, 1.0)
NON_NEGATIVE = Interval(0.0, math.inf)
POSITIVE = Interval(0.0, math.inf, "()")
COUNT = Interval(1, math.inf, whole=True)
EPSILON = Interval(1e-30, math.inf)
"""What is added to a divisor: not below what float32 can hold, even times a bias correction."""


def option(allowed: Allowed, default: Any = MISSING) -> Any:
    """Return a dataclass field that takes only ``allowed`` values; without a default it must be given."""
    return field(default=default, metadata={"allowed": allowed})


def check(what: str, name: str, value: object, allowed: Allowed) -> None:
    """Raise an InputError unless ``value`` is allowed."""
    if not allowed.admits(value):
        raise InputError(f"{what}: {name} is not allowed", got=repr(value), expected=allowed)


def check_kind(operation: str, what: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise an InputError unless ``value`` is of a kind; ``expected`` says how to get such a thing.

    Parameters
    ----------
    operation : str
        What was called.
    what : str
        Name of the argument.
    """
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}: {brief(value)}"
        raise InputError(f"{what} is of another kind", operation=operation, got=got, expected=expected)


def check_whole(operation: str, what: str, value: object, least: int) -> None:
    """Raise an InputError unless ``value`` is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{what} is not an integer", operation=operation, got=brief(value))
    if value < least:
        raise InputError(f"{what} is too small", operation=operation, got=value, expected=f"at least {least}")


def brief(value: object) -> str:
    """Return how a value shows itself, on one line and not too long."""
    text = " ".join(reprlib.repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Base of classes whose options are checked when they are constructed.

    Raises
    ------
    InputError
        An option is unknown, is not handed over by name, or has a value that is not allowed.
    """

    name: ClassVar[str]
    """What job files call it."""

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """By name, what to do with what other libraries have as an option here."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Check the names of the options, which Python does too, but not in words that help."""
        takes = signature(cls.__init__)
        try:
            if args or options:  # copying and unpickling come with none, and do not initialise
                takes.bind(None, *args, **options)
        except TypeError as error:
            known = list(takes.parameters)[1:]
            strange = next((name for name in options if name not in known), "")
            raise InputError(
                str(error), operation=cls.__name__, expected=f"by name: {', '.join(known)}",
                remedy=cls.elsewhere.get(strange) or did_you_mean(strange, known),
            ) from None  # fmt: skip
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for found in fields(self):
            if "allowed" in found.metadata:
                check(self.name, found.name, getattr(self, found.name), found.metadata["allowed"])


def declared(thing: object) -> dict[str, Any]:
    """Return by name what something holds in fields made by `option`."""
    found = fields(thing) if is_dataclass(thing) and not isinstance(thing, type) else ()
    return {each.name: getattr(thing, each.name) for each in found if "allowed" in each.metadata}


T = TypeVar("T")
C = TypeVar("C", bound=Checked)


def choose(registry: Mapping[str, T], what: str, name: str) -> T:
    """Return ``registry[name]``.

    Raises
    ------
    InputError
        There is no such name; the message lists those that there are, and the nearest one.
    """
    if isinstance(name, str) and name in registry:
        return registry[name]
    raise InputError(
        f"unknown {what}", got=repr(name), expected=" or ".join(sorted(registry)),
        remedy=did_you_mean(str(name), registry),
    )  # fmt: skip


def construct(kind: str, registry: Mapping[str, type[C]], name: str, options: Mapping[str, Any]) -> C:
    """Make the object that ``name`` stands for in ``registry``.

    Raises
    ------
    InputError
        The name or an option is unknown, a needed option is missing, or a value is not allowed.
    """
    made = choose(registry, kind, name)
    known = {found.name: found.default is MISSING for found in fields(made)}
    unknown = sorted(set(options) - set(known))
    if unknown:
        allowed = ", ".join(sorted(known)) or "none"
        remedy = did_you_mean(unknown[0], known)
        raise InputError(f"{kind} {name}: unknown option", got=", ".join(unknown), expected=allowed, remedy=remedy)
    missing = sorted(key for key, needed in known.items() if needed and key not in options)
    if missing:
        raise InputError(f"{kind} {name}: an option is missing", got=sorted(options) or "none", expected=missing)
    return made(**options)
