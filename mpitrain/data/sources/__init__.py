"""Where data sets come from: one file a source, and a registry of their names.

Nothing is read before `load` is called, and a source's own library is imported only then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpitrain._options import check_kind, choose
from mpitrain.data.dataset import Dataset
from mpitrain.data.options import call
from mpitrain.data.sources.numpy_files import npy, npz
from mpitrain.data.sources.scikit import breast_cancer, diabetes, digits, wine
from mpitrain.data.sources.table import csv
from mpitrain.data.sources.text import pydoc, text
from mpitrain.data.sources.token_file import tokens

DATASETS: dict[str, Callable[..., Dataset]] = {
    "breast_cancer": breast_cancer,
    "csv": csv,
    "diabetes": diabetes,
    "digits": digits,
    "npy": npy,
    "npz": npz,
    "pydoc": pydoc,
    "text": text,
    "tokens": tokens,
    "wine": wine,
}
"""Each source by name: a function of keyword options that returns a `Dataset`."""


def load(name: str, options: Mapping[str, Any] | None = None, *, check: bool = True) -> Dataset:
    """Return a data set of the registry.

    Parameters
    ----------
    name : str
        A key of `DATASETS`.
    options : mapping, optional
        Options of that source.
    check : bool
        Also check every value (`Dataset.check`).  A caller with many ranks and a large file may switch this off and
        let each rank check its share of the rows.

    Raises
    ------
    InputError
        The name or an option is unknown.
    DataError
        The data are missing, unreadable or unusable.
    """
    source = choose(DATASETS, "data set", name)
    options = {} if options is None else options
    check_kind("load", "options", options, Mapping, "a mapping of the source's options")
    dataset = call(source, f"data set {name!r}", options=options)
    if check:
        dataset.cover().check()
    return dataset
