"""Writes the reference of the job file from the sections themselves, so that it cannot be out of date."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from mpitrain.train.job.section import Section, choices, kind_of

_NAMES = {int: "integer", float: "number", str: "string", bool: "true or false", dict: "table"}


def type_words(field: FieldInfo) -> str:
    """Return in words what a field may hold: ``"number > 0"``, ``'"block" or "random"'``."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, notes: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    stated = next((note for note in notes if isinstance(note, str)), None)
    if stated:
        return stated
    if origin is Annotated:
        return _words(arguments[0], _flat(arguments[1:]))
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in arguments)
    if origin is tuple:
        return _array_words(arguments, notes)
    if NoneType in arguments:
        return " or ".join(_words(part, notes) for part in arguments if part is not NoneType)
    if choices(annotation):
        return "table"
    return f"{_NAMES[origin or annotation]} {_limits(notes)}".rstrip()


def _array_words(items: tuple[Any, ...], notes: Sequence[Any]) -> str:
    count = "" if items[-1] is Ellipsis else f"{len(items)} "
    least = next((note.min_length for note in notes if isinstance(note, annotated_types.MinLen)), 0)
    return f"array of {count or (f'at least {least} ' if least else '')}({_words(items[0])})"


def _flat(notes: Sequence[Any]) -> list[Any]:
    return [note for each in notes for note in (each.metadata if isinstance(each, FieldInfo) else [each])]


def _limits(notes: Sequence[Any]) -> str:
    limits = []
    for note in notes:
        match note:
            case annotated_types.Gt(gt=bound):
                limits.append(f"> {bound}")
            case annotated_types.Ge(ge=bound):
                limits.append(f"≥ {bound}")
            case annotated_types.Lt(lt=bound):
                limits.append(f"< {bound}")
            case annotated_types.Le(le=bound):
                limits.append(f"≤ {bound}")
            case _:
                pass
    return " and ".join(limits)


def reference(root: type[Section]) -> str:
    """Return a Markdown reference of every key below ``root``: type, default, meaning."""
    return "\n".join(_tables("", [root]))


def _tables(path: str, sections: Sequence[type[Section]]) -> Iterator[str]:
    heading = f"`[{path}]`" if path else "Top level"
    common = _common(sections)
    yield from _table(heading, sections[0].__mro__[1] if len(sections) > 1 else sections[0], common)
    for section in sections if len(sections) > 1 else ():
        own = {name: field for name, field in section.model_fields.items() if name not in (*common, "kind")}
        yield from _table(f'{heading} with `kind = "{kind_of(section)}"`', section, own)
    inner = {name: choices(field.annotation) for name, field in sections[0].model_fields.items()}
    for name, held in inner.items():
        if held:
            yield from _tables(f"{path}.{name}" if path else name, held)


def _common(sections: Sequence[type[Section]]) -> dict[str, FieldInfo]:
    """Return the fields that all sections have alike."""
    rows = [{name: _row(name, field) for name, field in section.model_fields.items()} for section in sections]
    first = sections[0].model_fields
    return {name: field for name, field in first.items() if all(row.get(name) == rows[0][name] for row in rows)}


def _table(heading: str, section: type[Section], fields: dict[str, FieldInfo]) -> Iterator[str]:
    rows = [_row(name, field) for name, field in fields.items() if not choices(field.annotation)]
    yield from (f"## {heading}", "", inspect.cleandoc(section.__doc__ or ""), "")
    if rows:
        yield from ("| key | type | default | meaning |", "|---|---|---|---|", *rows, "")


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", type_words(field), _default(field), field.description or "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=False)
    return "" if value is None or isinstance(value, Section) else f"`{json.dumps(value)}`"
