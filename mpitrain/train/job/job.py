"""`Job`: the validated description of what to run, read from a TOML file before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from mpitrain.train.job import file as job_file
from mpitrain.train.job.data import KNOWN, DataSection
from mpitrain.train.job.errors import job_error, translate
from mpitrain.train.job.fit import misfits
from mpitrain.train.job.mesh import MeshSection
from mpitrain.train.job.model import LOSS_OF_TASK, ModelSection
from mpitrain.train.job.optimizer import OptimizerSection
from mpitrain.train.job.precision import PrecisionSection
from mpitrain.train.job.reference import reference
from mpitrain.train.job.section import Count, Problem, Section
from mpitrain.train.job.train import MethodSection, Train

_NAME_WORDS = "at most 100 letters, digits, spaces and any of _ . + -, a letter or digit first"
DEFAULT_LANES = 12
"""Dealt out evenly on 1, 2, 3, 4, 6 and 12 ranks."""

Name = Annotated[str, Field(max_length=100, pattern=r"^\w[\w .+-]*\Z"), _NAME_WORDS]


class Job(Section):
    """What to run.

    A job is made by `load`, `from_toml` or `from_dict`; it is immutable, and paths in it are absolute, so that it
    means the same wherever it is read.
    """

    name: Name = Field("job", description="Name of the run's directory; by default the file's name.")
    seed: int = Field(0, ge=0, description="What all random values follow from.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Type of parameters and gradients.")
    device: Literal["cpu", "gpu"] = Field("cpu", description="Where the arrays live.")
    reproducible: bool = Field(
        False, description="Whether the trained weights are the same bits on every number of ranks, up to `lanes`."
    )
    lanes: Count | None = Field(
        None,
        description=f"Of a reproducible job: the parts into which each batch is cut, wherever they are computed; "
        f"{DEFAULT_LANES} if not given. BatchNorm normalises each by itself.",
    )
    data: DataSection
    model: ModelSection
    optimizer: OptimizerSection
    method: MethodSection = MethodSection()
    mesh: MeshSection = MeshSection()
    precision: PrecisionSection = PrecisionSection()
    train: Train

    @classmethod
    def load(
        cls, path: str | PathLike[str], overrides: Iterable[str] = (), grid: Iterable[str] = ()
    ) -> Self:  # fmt: skip
        """Read a job file.

        Parameters
        ----------
        path : path
            The file; relative paths in it start at its folder.
        overrides : iterable of str
            Settings ``key=value`` that replace what the file says, e.g. ``"optimizer.lr=0.01"``.
        grid : iterable of str
            More of them, those of a point of a grid.

        Raises
        ------
        JobError
            With one line for each problem: the file, the key, what was wrong, what was got, what is allowed.

        Notes
        -----
        Not collective: on many ranks, read on one and give the others `to_toml`.
        """
        path = Path(path)
        return cls.from_toml(job_file.read_text(path), path, overrides, grid)

    @classmethod
    def from_toml(
        cls, text: str, source: str | PathLike[str], overrides: Iterable[str] = (), grid: Iterable[str] = ()
    ) -> Self:
        """Read a job from the text of the file ``source``; see `load`."""
        return cls._read(job_file.parse(text, str(source)), Path(source), overrides, grid)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str | PathLike[str] = "job") -> Self:
        """Make a job from the tables of a job file; see `load`.

        Parameters
        ----------
        data : mapping
            Strings, numbers, booleans, lists and dictionaries, as in TOML.
        source : path
            What messages call the job; its folder is where relative paths start, and its stem the default name.
        """
        return cls._read(dict(data), Path(source), (), ())

    @classmethod
    def _read(cls, data: dict[str, Any], source: Path, overrides: Iterable[str], grid: Iterable[str]) -> Self:
        given: dict[str, list[str]] = {}
        for option, settings in (("--set", overrides), ("--grid", grid)):
            data, given[option] = job_file.override(data, settings, option)

        def source_of(key: str) -> str:
            for option in ("--grid", "--set"):  # as they replace each other
                if any(key == each or key.startswith((f"{each}.", f"{each}[")) for each in given[option]):
                    return option
            return str(source)

        if problems := list(job_file.unusable(data)):
            raise job_error(problems, source_of)
        data = {"name": _name_from(source), **data}
        try:
            return cls.model_validate(data, context={"folder": source.absolute().parent})
        except ValidationError as error:
            raise job_error(translate(error, cls), source_of) from None

    @model_validator(mode="before")
    @classmethod
    def _lanes_by_default(cls, value: Any) -> Any:
        match value:
            case {"reproducible": True} if "lanes" not in value:
                return {**value, "lanes": DEFAULT_LANES}
        return value

    @model_validator(mode="before")
    @classmethod
    def _loss_by_task(cls, value: Any) -> Any:
        """Fill in the loss of a preset on a known data set, so that the resolved file says it."""
        match value:
            case {"data": {"source": str(source)}, "model": dict(model)} if source in KNOWN and not {
                "loss",
                "build",
            } & set(model):
                return {**value, "model": {"loss": LOSS_OF_TASK[KNOWN[source].task], **model}}
        return value

    @property
    def in_stages(self) -> bool:
        """Whether the model's layers are divided, be it that one rank has all of them."""
        return self.method.kind == "pipeline" or (self.mesh.pipe or 1) > 1

    def problems(self) -> Iterator[Problem]:
        """Yield where two sections do not fit together."""
        yield from misfits(self)

    def to_toml(self) -> str:
        """Return the job file with every key resolved; it loads back to an equal job, from any folder."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def _name_from(source: Path) -> str:
    name = re.sub(r"[^\w .+-]+", "-", source.stem).lstrip(" .+-")
    return name[:100] or "job"


def job_reference() -> str:
    """Return a Markdown reference of the job file: every key, its type, default and meaning."""
    return reference(Job)
