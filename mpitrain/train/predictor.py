"""A trained model, ready for new inputs: the run's job file gives the model, its checkpoint the parameters."""

from __future__ import annotations

from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from mpitrain import data
from mpitrain._errors import CheckpointError, DataError, InputError
from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer
from mpitrain.method.state import fill
from mpitrain.train import checkpoint
from mpitrain.train.facts import Facts
from mpitrain.train.job import Job
from mpitrain.train.models import build_model
from mpitrain.train.rundir import RunDirectory


class Predictor:
    """Predicts with the model of a run, on this process alone.

    Parameters
    ----------
    run : path
        A run directory.
    latest : bool
        Take the newest checkpoint instead of the best.

    Raises
    ------
    InputError
        The directory holds no run.
    CheckpointError
        It holds no checkpoint, or a damaged one.

    Attributes
    ----------
    checkpoint : str
        Name of the checkpoint.
    job : Job
        What was run.
    facts : Facts
        What the model knows of its data.
    model : Model
        The model.
    params : FlatBuffer
        Its parameters.
    """

    def __init__(self, run: str | PathLike[str], latest: bool = False) -> None:
        directory = RunDirectory(Path(run))
        if not directory.job.is_file():
            raise InputError(f"{run}: holds no run", expected="the directory with its job.toml")
        self.job = Job.load(directory.job)
        found = None if latest else checkpoint.best(directory.checkpoints)
        found = found or checkpoint.latest(directory.checkpoints)
        if found is None:
            raise CheckpointError(f"{run}: holds no checkpoint", remedy="train the job first")
        self.checkpoint = found.name
        self.facts = Facts.read(directory.path)
        self.model = build_model(self.job, self.facts)
        self.params = FlatBuffer(self.model.layout)
        saved = checkpoint.load(found, None, self.model.layout)
        fill("params", self.params.flat, self.model.layout.whole(), saved.read)

    def read(self, path: Path) -> Array:
        """Return the inputs in a file (.npy, .npz, .csv), shape (n, …); a flat sample gets the model's shape."""
        raw = data.read_inputs(path, feature_names=self.facts.feature_names)
        if raw.shape[1:] != self.facts.sample_shape and raw.shape[1:] == (prod(self.facts.sample_shape),):
            raw = np.asarray(raw).reshape(-1, *self.facts.sample_shape)
        return raw

    def outputs(self, inputs: Array) -> Array:
        """Return the model's outputs, shape (n, outputs).

        Raises
        ------
        DataError
            The inputs are not finite.
        """
        prepared = self.facts.prepare(inputs)
        if prepared.dtype.kind == "f" and not np.isfinite(prepared).all():
            row = int(np.argwhere(~np.isfinite(prepared))[0][0])
            raise DataError("predict: the inputs are not finite", got=f"row {row}", remedy="mend or leave out that row")
        return self.model.predict(self.params, prepared)

    def answers(self, outputs: Array) -> list[Any]:
        """Return the name of the likeliest class of each sample, or its predicted numbers."""
        if self.facts.task == "regression":
            values: list[Any] = outputs.tolist()
            return values
        labels = outputs.argmax(-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > 0).astype(int)
        names = self.facts.class_names
        return [names[label] if names else int(label) for label in labels.reshape(-1)]
