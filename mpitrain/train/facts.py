"""What a model needs to know of its data, once they are gone: shapes, names, and how inputs were scaled.

Kept in the run directory, so that a prediction needs the run and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mpitrain._errors import InputError
from mpitrain._typing import Array
from mpitrain.data import Dataset, Standardise, Task
from mpitrain.train.storage import write_atomic

_FILE = "data.json"
_Size = Annotated[int, Field(ge=0, lt=1 << 63)]


@dataclass(frozen=True)
class Facts:
    """What is known of a data set without its rows.

    Parameters
    ----------
    task : {"classification", "regression", "sequence"}
        What the targets mean.
    sample_shape : tuple of int
        Shape of one input.
    outputs : int
        Numbers that a model gives for a sample: classes, tokens, or values.
    class_names, feature_names : tuple of str
        Names, where there are any.
    mean, scale : list of float, optional
        Inputs were standardised as ``(inputs - mean) / scale``; nested as the sample is.
    fingerprint : str
        SHA-256 of the rows that were trained on.
    also_read : dict of str to str
        SHA-256 of what else was read, by name: each held-out set, and ``weights``.  Empty in runs that kept none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")  # of what is read back

    task: Task
    sample_shape: tuple[_Size, ...]
    outputs: _Size
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    mean: list[Any] | None = None
    scale: list[Any] | None = None
    fingerprint: str = ""
    also_read: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, standardise: Standardise | None = None, **also_read: str) -> Facts:
        """Return the facts of a data set that has been standardised so, beside which something else was read."""
        scaling = standardise.inputs if standardise else None
        return cls(
            dataset.task,
            dataset.sample_shape,
            dataset.outputs,
            dataset.class_names,
            dataset.feature_names,
            scaling.mean.tolist() if scaling else None,
            scaling.scale.tolist() if scaling else None,
            rows_sha256(dataset),
            also_read,
        )

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of all that was read, by name."""
        return {"train": self.fingerprint, **self.also_read}

    def prepare(self, inputs: Array) -> Array:
        """Return raw inputs as the model was trained on.

        Raises
        ------
        InputError
            The samples are no array, have another shape, or are not numbers.
        """
        if not hasattr(inputs, "dtype"):
            raise InputError(
                "the samples are no array", operation="predict", got=type(inputs).__name__,
                remedy="convert them with numpy.asarray",
            )  # fmt: skip
        if inputs.dtype.kind not in "fiub":
            raise InputError(
                "the samples are not numbers", operation="predict", got=inputs.dtype, expected="floats or integers"
            )
        if inputs.shape[1:] != self.sample_shape:
            whole = ", ".join(map(str, ("n", *self.sample_shape)))
            raise InputError(
                "the samples have the wrong shape", operation="predict", got=inputs.shape[1:],
                expected=self.sample_shape, remedy=f"hand in n samples, as the model was trained on, as ({whole})",
            )  # fmt: skip
        if self.mean is None or self.scale is None:
            return inputs
        prepared: Array = (np.asarray(inputs) - np.asarray(self.mean)) / np.asarray(self.scale)
        return prepared

    def write(self, directory: Path) -> None:
        """Keep the facts in a run directory; floats are written so that they are read back to the bit."""
        write_atomic(directory / _FILE, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, directory: Path) -> Facts:
        """Return the facts kept in a run directory.

        Raises
        ------
        InputError
            They are missing or damaged.
        """
        path = directory / _FILE
        try:
            found: Facts = TypeAdapter(cls).validate_json(path.read_bytes())
            found._check_scaling()
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be read", got=_first(error), remedy="name a run directory that mpitrain wrote"
            ) from error
        return found

    def _check_scaling(self) -> None:
        """Raise a ValueError unless inputs can be scaled as it says, or are not to be."""
        if self.mean is None and self.scale is None:
            return
        mean, scale = (np.asarray(each, np.float64) for each in (self.mean, self.scale))
        if not mean.shape == scale.shape == self.sample_shape:
            raise ValueError(f"mean and scale of shapes {mean.shape} and {scale.shape}, not {self.sample_shape}")
        if not (np.isfinite(mean) & np.isfinite(scale) & (scale > 0)).all():
            raise ValueError("a mean or scale that inputs cannot be scaled by")


def _first(error: Exception) -> str:
    """Return what is wrong, on one line: the first of all complaints."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return ": ".join([*(str(part) for part in first["loc"]), first["msg"]])


def rows_sha256(dataset: Dataset) -> str:
    """Return the SHA-256 of a data set's inputs and targets, which are read a block at a time."""
    blocks = dataset.cover().blocks()
    return arrays_sha256(block for _, inputs, targets in blocks for block in (inputs, targets))


def arrays_sha256(arrays: Iterable[Array]) -> str:
    """Return the SHA-256 of arrays: of their dtypes, shapes and values."""
    digest = hashlib.sha256()
    for each in arrays:
        digest.update(f"{each.dtype} {each.shape}".encode())
        digest.update(np.ascontiguousarray(each).view(np.uint8).data)
    return digest.hexdigest()
