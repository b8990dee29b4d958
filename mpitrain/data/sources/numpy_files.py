"""Data sets in NumPy's own files, memory-mapped wherever the file allows it; nothing is ever unpickled."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from mpitrain._errors import DataError
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset, Task
from mpitrain.data.sources.files import PathLike, reading

_ARRAY = "an array of numbers as numpy.save writes it"
_ARCHIVE = "an archive of arrays as numpy.savez writes it"


def npy(*, inputs: PathLike, targets: PathLike, task: Task = "classification", tokens: bool = False) -> Dataset:
    """Return a data set of two memory-mapped ``.npy`` files.

    Parameters
    ----------
    inputs, targets : path
        The files.
    task : {"classification", "regression", "sequence"}
        Targets of a regression may also be (n,).
    tokens : bool
        Integer inputs are tokens for an embedding, not numbers.
    """
    return _dataset(open_npy(inputs), open_npy(targets), task, str(inputs), tokens)


def npz(
    *,
    path: PathLike,
    inputs: str = "inputs",
    targets: str = "targets",
    task: Task = "classification",
    tokens: bool = False,
) -> Dataset:
    """Return a data set of two arrays of an ``.npz`` file.

    Parameters
    ----------
    path : path
        The archive.  Arrays that lie in it uncompressed (`numpy.savez`) are memory-mapped; compressed ones
        (`numpy.savez_compressed`) are loaded whole by every rank.
    inputs, targets : str
        Their names in the archive.
    task, tokens
        As for `npy`.
    """
    return _dataset(open_npz(path, inputs), open_npz(path, targets), task, str(path), tokens)


def open_npy(path: PathLike) -> Array:
    """Return the array of an ``.npy`` file, memory-mapped read-only."""
    with reading(path, _ARRAY) as file:
        return _map(file, 0)


def open_npz(path: PathLike, name: str) -> Array:
    """Return one array of an ``.npz`` file, memory-mapped read-only if it is stored uncompressed."""
    with reading(path, _ARCHIVE) as file, zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if name not in members:
            raise DataError(f"{path}: no array {name!r} in the archive", got=", ".join(members), expected=name)
        info = members[name]
        if info.compress_type == zipfile.ZIP_STORED:
            return _map(file, info.header_offset)
        with archive.open(info) as stream:
            array: Array = npy_format.read_array(stream, allow_pickle=False)
        return array


def _map(path: Path, offset: int) -> Array:
    """Memory-map the array at ``offset``, past the header that a zip archive puts before each member."""
    with path.open("rb") as file:
        file.seek(offset)
        if file.read(4) == b"PK\3\4":
            name_bytes, extra_bytes = struct.unpack("<22xHH", file.read(26))
            offset += 30 + name_bytes + extra_bytes
        file.seek(offset)
        shape, fortran_order, dtype = _header(file)
        if dtype.hasobject:
            raise DataError(f"{path}: holds Python objects, which are not read", got=dtype, expected=_ARRAY)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran_order else "C")


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = npy_format.read_magic(file)
    readers = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
    if version not in readers:
        raise DataError(f"{file.name}: unknown version of the format", got=version, expected="(1, 0) or (2, 0)")
    return readers[version](file)


def _dataset(inputs: Array, targets: Array, task: Task, name: str, tokens: bool) -> Dataset:
    if task == "regression" and targets.ndim == 1:
        targets = targets.reshape(-1, 1)
    return Dataset(inputs, targets, task, name, tokens=tokens)
