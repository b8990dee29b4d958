"""What every section of a job is made of: the strict base model, the field types, and how a problem is stated.

A section is one table of the job file.  It says in its fields what is allowed and in `Section.problems` what two
fields cannot be together; it knows neither files nor messages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

UNSET: Any = object()


class Problem(NamedTuple):
    """One thing that is wrong with a job.

    ``key`` is dotted and counts from the section that states it; empty: the section itself.
    """

    key: str
    what: str
    got: Any = UNSET
    expected: str = ""
    remedy: str = ""


def rejected(*problems: Problem) -> PydanticCustomError:
    """Return the error by which a validator hands ``problems`` to whoever writes the message."""
    return PydanticCustomError("problems", "see the context", {"problems": problems})


class Section(BaseModel):
    """A table of the job file: frozen, without unknown keys, and ``"32"`` is no number in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, regex_engine="python-re")

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong between fields that are each right."""
        yield from ()

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if found := tuple(self.problems()):
            raise rejected(*found)
        return self


class KindSection(Section):
    """A table whose ``kind`` names an entry of a registry, and whose other keys are mostly that entry's arguments."""

    not_options: ClassVar[frozenset[str]] = frozenset({"kind"})

    kind: str

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the registry's entry: every field but the common ones."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in self.not_options}


def choices(annotation: Any) -> list[type[Section]]:
    """Return the sections that a field of this annotation may hold; several of them are told apart by ``kind``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in choices(part)]


def kind_of(section: type[Section]) -> str:
    """Return the ``kind`` that selects a section among its siblings."""
    return str(get_args(section.model_fields["kind"].annotation)[0])


def in_folder(text: str, info: ValidationInfo) -> str:
    """Return a path from the job file as seen from anywhere."""
    folder: Path | None = (info.context or {}).get("folder")
    return str(folder / text) if folder else text


def is_build(text: str, info: ValidationInfo) -> str:
    """Check ``"file.py:name"`` and resolve the file's path."""
    file, colon, name = text.rpartition(":")
    if not (colon and file.endswith(".py") and name.isidentifier()):
        raise rejected(Problem("", "does not name an object in a Python file", text, '"file.py:name"'))
    return f"{in_folder(file, info)}:{name}"


PathText = Annotated[str, Field(min_length=1), AfterValidator(in_folder)]
"""A path; a relative one starts at the job file's folder, and is absolute from then on."""

BuildText = Annotated[str, AfterValidator(is_build)]
"""``"my_model.py:build"``: an object in a Python file; the path is as in `PathText`."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


Counts = Annotated[tuple[Count, ...], Field(strict=False)]  # TOML's arrays arrive as lists and are kept as tuples


def build_by_default(value: Any) -> Any:
    """Fill in ``kind = "build"`` where only ``build`` is given."""
    return {"kind": "build", **value} if isinstance(value, dict) and "build" in value else value
