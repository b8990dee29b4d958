"""The ``[data]`` section: which samples there are, how they are split, and how ranks and batches share them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, field_validator

from mpitrain._names import did_you_mean
from mpitrain.data import DATASETS, Task, Unit
from mpitrain.train.job.section import (
    BuildText,
    Count,
    Fraction,
    NonNegative,
    PathText,
    Problem,
    Section,
    in_folder,
    rejected,
)


class Known(NamedTuple):
    """What is known of a data set before it is read."""

    task: Task
    classes: int = 0
    images: bool = False


KNOWN = {
    "digits": Known("classification", 10, images=True),
    "breast_cancer": Known("classification", 2),
    "wine": Known("classification", 3),
    "diabetes": Known("regression"),
    "pydoc": Known("sequence"),
    "text": Known("sequence"),
    "tokens": Known("sequence"),
}

_FILE_OPTIONS = {"npy": ("inputs", "targets")}


def _source_of_build(value: Any) -> Any:
    return {"source": "build", **value} if isinstance(value, dict) and "build" in value else value


def _name_or_number(value: Any) -> str | int:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise rejected(Problem("", "is neither a name nor a number", value, _FEATURE))


_FEATURE = "string or integer ≥ 0"


Capacities = Annotated[tuple[NonNegative, ...], Field(strict=False)]


class PartitionOptions(Section):
    """What the chosen partition needs to know."""

    feature: Annotated[str | int, PlainValidator(_name_or_number), _FEATURE] | None = Field(
        None,
        description="For `by_feature`: name or number of the column whose equal values stay together; without it, the "
        "labels' do.",
    )
    capacities: Capacities | None = Field(
        None, description="For `weighted`: the ranks' shares, one number a rank, in any unit."
    )


class Data(Section):
    """The samples, what is held out for testing, and how the rest is dealt out to the ranks."""

    source: Literal[
        "digits", "breast_cancer", "wine", "diabetes", "pydoc", "npy", "npz", "csv", "text", "tokens", "build"
    ] = Field(
        description="Which data set: one that comes with scikit-learn, the texts of Python's `help()` (`pydoc`), a "
        "kind of file, or your own (`build`)."
    )
    build: BuildText | None = Field(
        None, description='Your own data: `"my_data.py:build"`, a function that is called with `options`.'
    )
    path: PathText | None = Field(None, description="The file; a relative path starts at the job file's folder.")
    options: dict[str, Any] = Field({}, description="Further arguments of the source, e.g. the column of the labels.")
    test: float = Field(0.2, gt=0, lt=1, description="Fraction of the samples that is held out for testing.")
    hold_out: Literal["random", "end"] = Field(
        "random", description="Which samples are held out: random ones, or the last ones, as of a text."
    )
    folds: Count | None = Field(
        None, description="Cross-validation: cut the samples into so many folds and test on one of them, not on `test`."
    )
    fold: int = Field(0, ge=0, description="Which fold to test on, from 0.")
    valid: Fraction = Field(
        0.0,
        description="Fraction of the samples that is held out for choosing: with it, stopping and the best checkpoint "
        "go by these samples and not by the test part.",
    )
    stratified: bool | None = Field(
        None,
        description="Whether both parts hold the classes in equal proportions; by default where there are classes.",
    )
    standardise: bool = Field(
        False, description="Whether each feature is brought to mean 0 and deviation 1 (of the training part)."
    )
    partition: Literal["none", "block", "random", "by_feature", "weighted"] = Field(
        "none",
        description="Which rank trains on which rows: any (`none`: each batch is dealt out anew), contiguous blocks, "
        "random ones, rows that share a value together, or shares in proportion to capacities.",
    )
    partition_options: PartitionOptions = PartitionOptions()
    sampling: Literal["shuffle", "sequential", "importance"] = Field(
        "shuffle", description="Order of the samples in an epoch; `importance` draws them in proportion to `weights`."
    )
    weights: PathText | None = Field(
        None, description="For `importance`: a `.npy` file with a number > 0 for each training sample."
    )

    @property
    def known(self) -> Known | None:
        """What is known of the data before they are read; None for files of unknown content."""
        return KNOWN.get(self.source)

    @property
    def held_out(self) -> float:
        """Fraction of the samples that is tested on."""
        return 1 / self.folds if self.folds else self.test

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the source's function."""
        return {"path": self.path, **self.options} if self.path else dict(self.options)

    @property
    def unit(self) -> Unit:
        """What a token of a text is; of no meaning for other data."""
        if self.source not in ("pydoc", "text"):
            return "token"
        return "byte" if self.options.get("unit") == "byte" else "character"

    @field_validator("options")
    @classmethod
    def _file_options_in_folder(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        files = _FILE_OPTIONS.get(info.data.get("source", ""), ())
        return {
            name: in_folder(value, info) if name in files and isinstance(value, str) else value
            for name, value in options.items()
        }

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        yield from self._problems_of_source()
        yield from self._problems_of_options()
        yield from self._problems_of_partition()
        if self.hold_out == "end" and (self.folds is not None or self.stratified):
            yield Problem("hold_out", "cannot go together with folds or stratified", "end", '"random"')
        if self.folds is not None and not self.fold < self.folds >= 2:
            yield Problem(
                "fold", "is not one of the folds", self.fold, f"less than data.folds = {self.folds}, at least 2"
            )
        if self.held_out + self.valid >= 1:
            expected = f"less than {1 - self.held_out:.6g}"
            yield Problem("valid", "leaves nothing to train on", self.valid, expected)
        if self.sampling == "importance" and self.weights is None:
            yield Problem("weights", "is missing", expected='a .npy file, as sampling = "importance"')
        if self.sampling != "importance" and self.weights is not None:
            yield Problem("weights", 'is of no use without sampling = "importance"', self.weights)

    def _problems_of_source(self) -> Iterator[Problem]:
        if self.source == "build" and self.build is None:
            yield Problem("build", "is missing", expected='"file.py:name", as source = "build"')
        if self.source != "build" and self.build is not None:
            yield Problem("source", "cannot go together with data.build", self.source, "one of the two")
        takes_path = "path" in self._parameters()
        if takes_path and self.path is None:
            yield Problem("path", "is missing", expected=f'a file, as source = "{self.source}"')
        if self.path is not None and not takes_path:
            yield Problem("path", f'is of no use with source = "{self.source}"', self.path, remedy="leave it out")

    def _parameters(self) -> dict[str, bool]:
        """Return the names of the source's arguments, and whether each must be given; a build's are its own."""
        if self.source == "build":
            return {}
        parameters = inspect.signature(DATASETS[self.source]).parameters.values()
        return {parameter.name: parameter.default is parameter.empty for parameter in parameters}

    def _problems_of_options(self) -> Iterator[Problem]:
        if self.source == "build":
            return
        parameters = self._parameters()
        allowed = [name for name in parameters if name != "path"]
        for name in self.options:
            if name not in allowed:
                what, expected = f'unknown option of source = "{self.source}"', ", ".join(allowed) or "none"
                yield Problem(f"options.{name}", what, expected=expected, remedy=did_you_mean(name, allowed))
        for name in allowed:
            if parameters.get(name) and name not in self.options:
                yield Problem(f"options.{name}", "is missing", expected=f'a value, as source = "{self.source}"')

    def _problems_of_partition(self) -> Iterator[Problem]:
        used = {"by_feature": "feature", "weighted": "capacities"}.get(self.partition)
        for name in PartitionOptions.model_fields:
            value = getattr(self.partition_options, name)
            if value is not None and name != used:
                what = f'is of no use with partition = "{self.partition}"'
                yield Problem(f"partition_options.{name}", what, value, remedy="leave it out")
        if self.partition == "weighted" and not self.partition_options.capacities:
            expected = 'an array, one number a rank, as partition = "weighted"'
            yield Problem("partition_options.capacities", "is missing", expected=expected)


DataSection = Annotated[Data, BeforeValidator(_source_of_build)]
