"""Says in plain words, one line per problem, what is wrong with a job.

Pydantic reports types and locations; here they become the dotted key as written in the file, what was wrong, what was
got, what is allowed, and the nearest name when one was probably misspelt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpitrain._errors import JobError
from mpitrain._names import did_you_mean
from mpitrain.train.job.reference import type_words
from mpitrain.train.job.section import UNSET, Problem, Section, choices, kind_of

_LONGEST_VALUE = 60
_IN_JSON = (str, bool, int, float, list, tuple)

_WORDS = {
    "int_type": "is not an integer",
    "float_type": "is not a number",
    "bool_type": "is neither true nor false",
    "string_type": "is not a string",
    "tuple_type": "is not an array",
    "dict_type": "is not a table",
    "literal_error": "is not one of the choices",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than": "is too large",
    "less_than_equal": "is too large",
    "finite_number": "is not finite",
    "too_short": "has too few items",
    "too_long": "has too many items",
    "string_too_short": "is too short",
    "string_too_long": "is too long",
    "string_pattern_mismatch": "has characters that are not allowed",
}


def show(value: Any) -> str:
    """Return a value as TOML would write it, on one line and not too long."""
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, _IN_JSON) else str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def dotted(parts: Iterable[str | int]) -> str:
    """Return a location as a dotted TOML key: ``model.hidden[1]``; odd names are quoted."""
    key = ""
    for part in parts:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            name = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else json.dumps(part, ensure_ascii=False)
            key += f".{name}" if key else name
    return key


def job_error(problems: Iterable[Problem], source_of: Callable[[str], str]) -> JobError:
    """Return the error that lists ``problems``, a line each; ``source_of`` says where a key was given."""
    return JobError("\n".join(_line(problem, source_of(problem.key)) for problem in problems))


def _line(problem: Problem, source: str) -> str:
    message = JobError(
        problem.what,
        operation=f"{source}: {problem.key}" if problem.key else source,
        **({} if problem.got is UNSET else {"got": show(problem.got)}),
        **({"expected": problem.expected} if problem.expected else {}),
        remedy=problem.remedy or None,
    )
    return str(message)


def translate(error: ValidationError, root: type[Section]) -> Iterator[Problem]:
    """Yield the problems of a validation error of ``root``."""
    for details in error.errors(include_url=False):
        yield from _problems(details, _locate(root, details["loc"]), root)


class _Place(NamedTuple):
    """Where an error is: the keys from the top, the section that has the last one, and the sections it may hold."""

    keys: tuple[str | int, ...]
    owner: type[Section]
    held: tuple[type[Section], ...]

    @property
    def key(self) -> str:
        return dotted(self.keys)

    @property
    def expected(self) -> str:
        """What the field may hold, from its declaration."""
        if self.held:
            return "a table"
        name = next((str(key) for key in reversed(self.keys) if isinstance(key, str)), "")
        return type_words(self.owner.model_fields[name])


def _locate(root: type[Section], location: tuple[int | str, ...]) -> _Place:
    """Follow a location down the sections; the ``kind`` that pydantic puts between the keys is left out."""
    owner = root
    held: tuple[type[Section], ...] = (root,)
    keys: list[str | int] = []
    parts = iter(location)
    for part in parts:
        if not held:
            keys.append(part)
            continue
        owner = held[0] if len(held) == 1 else next(section for section in held if kind_of(section) == part)
        if len(held) > 1:
            held = (owner,)
            continue
        keys.append(part)
        field = owner.model_fields.get(str(part))
        held = tuple(choices(field.annotation)) if field else ()
    return _Place(tuple(keys), owner, held)


def _problems(details: ErrorDetails, place: _Place, root: type[Section]) -> Iterator[Problem]:
    kind, got = details["type"], details["input"]
    if kind == "problems":
        for problem in details["ctx"]["problems"]:
            yield problem._replace(key=".".join(filter(None, (place.key, problem.key))))
    elif kind == "extra_forbidden":
        yield _unknown_key(place, root)
    elif kind == "missing":
        yield Problem(place.key, "is missing", expected=place.expected)
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        yield _no_such_kind(place, got)
    elif kind in ("model_type", "model_attributes_type"):
        yield Problem(place.key, "is not a table", got, place.expected)
    else:
        remedy = did_you_mean(got, _quoted(place.expected)) if kind == "literal_error" and isinstance(got, str) else ""
        yield Problem(place.key, _WORDS.get(kind, "cannot be used"), got, place.expected, remedy)


def _quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def _unknown_key(place: _Place, root: type[Section]) -> Problem:
    name = str(place.keys[-1])
    names = list(place.owner.model_fields)
    remedy = did_you_mean(name, names)
    elsewhere = [key for key in _all_keys(root) if key.rpartition(".")[2] == name and key != place.key]
    if not remedy and elsewhere:
        remedy = f'did you mean "{elsewhere[0]}"?'
    what = "unknown key"
    if "kind" in names and len(place.keys) > 1:
        what += f' with kind = "{kind_of(place.owner)}"'
    return Problem(place.key, what, expected="one of " + ", ".join(names), remedy=remedy)


def _no_such_kind(place: _Place, table: dict[str, Any]) -> Problem:
    kinds = [kind_of(section) for section in place.held]
    expected = "one of " + ", ".join(f'"{kind}"' for kind in kinds)
    key = f"{place.key}.kind"
    if "kind" not in table:
        return Problem(key, "is missing", expected=expected)
    got = table["kind"]
    remedy = did_you_mean(got, kinds) if isinstance(got, str) else ""
    return Problem(key, _WORDS["literal_error"], got, expected, remedy)


def _all_keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for held in choices(field.annotation):
            yield from _all_keys(held, f"{prefix}{name}.")
