"""Inputs without targets: what a trained model is to predict from."""

from __future__ import annotations

from pathlib import Path

from mpitrain._errors import DataError
from mpitrain._typing import Array
from mpitrain.data.sources.files import PathLike
from mpitrain.data.sources.numpy_files import open_npy, open_npz
from mpitrain.data.sources.table import read_table


def read_inputs(
    path: PathLike,
    *,
    feature_names: tuple[str, ...] = (),
    header: bool = True,
    delimiter: str = ",",
    key: str = "inputs",
) -> Array:
    """Return the inputs in a file, whose kind is told by its suffix.

    Parameters
    ----------
    path : path
        ``.npy`` or ``.npz`` (memory-mapped where possible), or ``.csv``.
    feature_names : tuple of str
        ``.csv``: the columns wanted, in this order (those of the training set: `Dataset.feature_names`); all of them
        if empty.
    header, delimiter
        ``.csv``: as for the data set ``csv``.
    key : str
        ``.npz``: name of the array in the archive.

    Raises
    ------
    DataError
        The suffix is none of these, or the file is missing, malformed or lacks a column.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".npy":
        return open_npy(path)
    if suffix == ".npz":
        return open_npz(path, key)
    if suffix != ".csv":
        raise DataError(f"{path}: unknown kind of file", got=repr(suffix), expected=".npy, .npz or .csv")
    table = read_table(path, header=header, delimiter=delimiter)
    return table.numbers([table.find(name) for name in feature_names or table.names])
