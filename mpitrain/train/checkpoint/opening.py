"""Opens checkpoints: every byte is checked, and any number of ranks read what others have written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpitrain._errors import CheckpointError
from mpitrain._typing import Array
from mpitrain.arrays import Layout
from mpitrain.arrays.box import box_size, boxed
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.train.checkpoint.manifest import (
    LayoutEntry,
    Manifest,
    PieceEntry,
    TensorEntry,
    checksum,
    dtype_of,
    read_manifest,
)
from mpitrain.train.checkpoint.retention import checkpoints

_CHUNK_BYTES = 1 << 20


def load(path: Path, comm: Communicator | None = None, layout: Layout | None = None) -> Checkpoint:
    """Open a checkpoint after checking every byte of it.

    Parameters
    ----------
    path : Path
        A checkpoint, e.g. what `latest` returned.
    comm : Communicator, optional
        The ranks that read it, each of which checks a part of the files; None: this process alone.
    layout : Layout, optional
        Of the model that is to go on; None: any will do.

    Raises
    ------
    CheckpointError
        It is missing, damaged, of an unknown version, or of another model.

    Notes
    -----
    Collective over ``comm``: one broadcast of the manifest.
    """
    path = Path(path)
    rank, size = (comm.rank, comm.size) if comm else (0, 1)
    text = ""
    with _together(comm):
        if rank == 0:
            with _advise(path):
                found = read_manifest(path)
            _compare(path, found, layout)
            text = found.model_dump_json()
    manifest = Manifest.model_validate_json(comm.broadcast_object(text) if comm else text)
    with _together(comm), _advise(path):
        _check_files(path, manifest, rank, size)
    return Checkpoint(path, manifest, rank, size)


def verify(path: Path) -> None:
    """Check every byte of a checkpoint, in this process alone.

    Raises
    ------
    CheckpointError
        It is damaged; the message names the file.
    """
    path = Path(path)
    _check_files(path, read_manifest(path))


class Checkpoint:
    """An open checkpoint; `load` makes it.

    Parameters
    ----------
    path : Path
        Its directory.
    manifest : Manifest
        What is in it.
    rank, size : int
        Who reads: where a tensor is a sum, each rank gets its own term.

    Attributes
    ----------
    step : int
        At which it was written.
    scalars : dict
        As they were handed to `save`.
    score : Score or None
        As it was handed to `save`.
    """

    def __init__(self, path: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
        self.path = path
        self.step = manifest.step
        self.scalars: dict[str, Any] = manifest.scalars
        self.score = manifest.score
        self._manifest = manifest
        self._rank, self._size = rank, size

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._manifest.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._manifest.tensors

    def read(self, name: str) -> Array:
        """Return a whole tensor, in its global shape; not to be written to.

        A tensor that is a sum is given as this rank's term of it: its own, if as many ranks read as wrote; else rank
        0 is given the sum and the others zeros.

        Raises
        ------
        CheckpointError
            There is no such tensor.
        """
        tensor = self._manifest.tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"{self.path}: no tensor {name!r}", got=", ".join(self.names[:8]),
                remedy="it was written by another method or optimizer; resume with that one",
            )  # fmt: skip
        if tensor.kind == "summed":
            return self._term(tensor)
        if len(tensor.pieces) == 1:
            return self._map(tensor.pieces[0], tensor).reshape(tensor.shape)
        return self._assemble(tensor)

    def _assemble(self, tensor: TensorEntry) -> Array:
        whole = np.empty(tensor.shape, dtype_of(tensor.dtype))
        for box in dict.fromkeys(piece.box for piece in tensor.pieces):
            part = np.empty(box_size(box), whole.dtype)
            for piece in tensor.pieces:
                if piece.box == box:
                    part[slice(*piece.flat)] = self._map(piece, tensor)
            view = boxed(whole, box)
            view[...] = part.reshape(view.shape)
        return whole

    def _term(self, tensor: TensorEntry) -> Array:
        dtype = dtype_of(tensor.dtype)
        total = np.zeros(tensor.shape, accumulator(dtype))
        same = self._size == self._manifest.ranks
        for piece in tensor.pieces:
            if piece.rank == self._rank if same else self._rank == 0:
                part = np.zeros(box_size(piece.box), total.dtype)
                part[slice(*piece.flat)] = self._map(piece, tensor)
                view = boxed(total, piece.box)
                view += part.reshape(view.shape)
        return total.astype(dtype, copy=False)

    def _map(self, piece: PieceEntry, tensor: TensorEntry) -> Array:
        file = self.path / piece.file
        try:
            return np.memmap(file, dtype_of(tensor.dtype), "r", piece.offset, (piece.size,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: changed since it was checked", got=str(error)) from error


def _together(comm: Communicator | None) -> AbstractContextManager[None]:
    return agree(comm) if comm else nullcontext()


def _check_files(path: Path, manifest: Manifest, rank: int = 0, size: int = 1) -> None:
    """Check the bytes of every ``size``-th piece, beginning with number ``rank``."""
    pieces = [piece for tensor in manifest.tensors.values() for piece in tensor.pieces]
    for piece in pieces[rank::size]:
        file = path / piece.file
        try:
            with file.open("rb") as stream:
                held = os.fstat(stream.fileno()).st_size
                if held < piece.end:
                    raise CheckpointError(f"{file}: truncated", got=f"{held} bytes", expected=f"{piece.end} or more")
                stream.seek(piece.offset)
                found = checksum(_chunks(stream, piece.nbytes))
        except OSError as error:
            raise CheckpointError(f"{file}: {error.strerror}") from error
        if found != piece.checksum:
            raise CheckpointError(f"{file}: damaged, checksum differs at bytes {piece.offset} to {piece.end}")


def _chunks(stream: BinaryIO, nbytes: int) -> Iterator[bytes]:
    while chunk := stream.read(min(nbytes, _CHUNK_BYTES)):
        nbytes -= len(chunk)
        yield chunk


@contextmanager
def _advise(path: Path) -> Iterator[None]:
    """Add to a complaint about a checkpoint which other one can be used instead."""
    try:
        yield
    except CheckpointError as error:
        whole = next(
            (other for other in reversed(checkpoints(path.parent)) if other != path and _is_whole(other)), None
        )
        remedy = f"remove {path} to go on from {whole.name}, which is whole" if whole else "no other one is whole"
        raise CheckpointError(str(error), operation="load checkpoint", remedy=remedy) from error


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _compare(path: Path, manifest: Manifest, layout: Layout | None) -> None:
    """Complain, tensor by tensor, if a checkpoint is not of this model."""
    if layout is None or manifest.fingerprint == layout.fingerprint():
        return
    ours, theirs = LayoutEntry.model_validate_json(json.dumps(layout.manifest())), manifest.layout
    found = [f"dtype is {theirs.dtype}, not {ours.dtype}"] if theirs.dtype != ours.dtype else []
    found += [f"{name!r} is missing in it" for name in ours.tensors if name not in theirs.tensors]
    found += [f"{name!r} is in it, not in the model" for name in theirs.tensors if name not in ours.tensors]
    for name in [name for name in ours.tensors if name in theirs.tensors]:
        one, two = theirs.tensors[name], ours.tensors[name]
        if one.shape != two.shape:
            found.append(f"{name!r} has shape {one.shape}, not {two.shape}")
        elif one != two:
            found.append(f"{name!r} is of group {one.group!r}, not {two.group!r}")
    if theirs.ties != ours.ties:
        found.append(f"ties are {theirs.ties}, not {ours.ties}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise CheckpointError(
        f"{path}: checkpoint of another model: {', '.join(found[:3])}{more}", operation="load checkpoint",
        remedy="go on with the job that wrote it, or start anew in another run directory",
    )  # fmt: skip
