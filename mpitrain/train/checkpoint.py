"""Checkpoints: a method's state on disk, written by n ranks, read by m.

A checkpoint is a directory, ``step-00000120``, with ``manifest.json`` and one file of raw values per rank that wrote
any.  It is made under a hidden name and renamed when all of it is on the disk, so that a crash at any moment leaves
the earlier checkpoints as they were, and the new one whole or hidden.  What hidden names a crash leaves behind,
`clean_up` resolves.  This file knows state and files; what the state means, the methods know.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np

from mpitrain._errors import CheckpointError, InputError, MpitrainError
from mpitrain._typing import Array
from mpitrain.arrays import Layout, to_host
from mpitrain.arrays.box import box_size, boxed
from mpitrain.arrays.dtypes import accumulator
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.method.state import Piece, State
from mpitrain.train.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    LayoutEntry,
    Manifest,
    PieceEntry,
    Score,
    TensorEntry,
    checksum,
    dtype_of,
    file_name,
    read_manifest,
    seal,
    unseal,
)
from mpitrain.train.retention import (
    best,
    checkpoints,
    clean_up,
    discard_after,
    hidden,
    latest,
    name_of,
    prune,
    publish,
)
from mpitrain.train.storage import disk, sync_directory, write_synced

__all__ = [
    "Checkpoint",
    "Score",
    "best",
    "checkpoints",
    "clean_up",
    "discard_after",
    "latest",
    "load",
    "save",
    "verify",
]

_CHUNK_BYTES = 1 << 20

OnPhase: TypeAlias = Callable[[str], None]
"""Told what has just been done: ``created``, ``piece`` (for each), ``data``, ``manifest``, ``replaced`` (only where the
step was there before), ``renamed``, ``recorded``, ``discarded`` (for each), ``pruned``."""


def save(
    directory: Path,
    step: int,
    state: State,
    comm: Communicator,
    layout: Layout,
    *,
    score: Score | None = None,
    keep: int = 3,
    on_phase: OnPhase | None = None,
) -> Path:
    """Write a checkpoint, then remove those that are no longer to be kept.

    Parameters
    ----------
    directory : Path
        Where the checkpoints of a run lie, on a file system that all ranks share; made if missing.
    step : int
        Names the checkpoint; one of the same step is replaced.
    state : State
        This rank's pieces; the scalars of rank 0 are written.
    comm : Communicator
        All ranks that hold state.
    layout : Layout
        Of the whole model, the same on all ranks: what `load` compares with.
    score : Score, optional
        How good the model is: the best checkpoint is never removed.  One that is not finite does not count.
    keep : int
        How many of the newest to keep, besides the best.
    on_phase : callable, optional
        Called on each rank after each phase (tests kill the process there).

    Returns
    -------
    Path
        The checkpoint.

    Raises
    ------
    StorageError
        The disk is full or the directory cannot be written; nothing half-written is left to be seen.
    InputError
        The ranks' pieces do not make up their tensors.

    Notes
    -----
    Collective over ``comm``: two gathers of names and ranges, and a few agreements.  Each rank writes the pieces that
    it is the first to hold; the values never travel.
    """
    if keep < 1:
        raise InputError("keep: the newest checkpoint is always kept", got=keep, expected="at least 1")
    tell: OnPhase = on_phase or (lambda phase: None)
    target = Path(directory) / name_of(step)
    writing = hidden(target, "writing")
    lead = comm.rank == 0
    try:
        with agree(comm):
            if lead:
                _begin(writing)
        tell("created")
        pieces = _owned(state.pieces, comm)
        with agree(comm):
            written = _write_pieces(writing / file_name(comm.rank), pieces, tell)
        gathered = comm.gather_object(written)
        tell("data")
        with agree(comm):
            if lead:
                tensors = _merge(gathered or ())
                _write_manifest(writing, _manifest(step, comm.size, state.scalars, layout, score, tensors))
                tell("manifest")
                publish(target, tell)
                prune(target, keep, tell)
        tell("pruned")
    except MpitrainError:
        if lead:
            with suppress(OSError):
                clean_up(target.parent)
        raise
    return target


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


def _begin(writing: Path) -> None:
    with disk("write checkpoint", writing):
        writing.parent.mkdir(parents=True, exist_ok=True)
        sync_directory(writing.parent.parent)
        clean_up(writing.parent)
        writing.mkdir()


def _owned(pieces: Sequence[Piece], comm: Communicator) -> list[Piece]:
    """Return the pieces that this rank writes: of a replicated one, only the first rank that holds it."""

    def key(piece: Piece) -> tuple[Any, ...]:
        return (piece.name, piece.box, piece.span)

    held = comm.allgather_object([key(piece) for piece in pieces if piece.kind == "replicated"])
    earlier = {name for names in held[: comm.rank] for name in names}
    return [piece for piece in pieces if piece.kind != "replicated" or key(piece) not in earlier]


def _write_pieces(path: Path, pieces: Sequence[Piece], on_phase: OnPhase) -> list[dict[str, Any]]:
    """Write this rank's file and return what is in it: a tensor's description and one piece of it each."""
    written = []
    with disk("write checkpoint", path), path.open("wb") as file:
        for piece in pieces:
            host = to_host(piece.array)
            values = np.ascontiguousarray(host, dtype_of(host.dtype.name)).reshape(-1)
            data = values.view(np.uint8).data
            entry = {
                "file": path.name, "offset": file.tell(), "nbytes": data.nbytes, "box": piece.box, "flat": piece.span,
                "checksum": checksum([data]),
            }  # fmt: skip
            tensor = {"dtype": values.dtype.name, "shape": piece.global_shape, "kind": piece.kind}
            written.append({"name": piece.name, "tensor": tensor, "piece": entry})
            file.write(data)
            on_phase("piece")
        file.flush()
        os.fsync(file.fileno())
    return written


def _merge(gathered: Sequence[list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Put the pieces of all ranks together, tensor by tensor."""
    tensors: dict[str, dict[str, Any]] = {}
    for item in (item for written in gathered for item in written):
        found = tensors.setdefault(item["name"], item["tensor"] | {"pieces": []})
        told = {key: found[key] for key in item["tensor"]}
        if told != item["tensor"]:
            raise InputError(
                f"tensor {item['name']!r}: pieces disagree on what it is", got=item["tensor"], expected=told
            )
        if item["piece"]["nbytes"]:
            found["pieces"].append(item["piece"])
    return tensors


def _manifest(
    step: int, ranks: int, scalars: dict[str, Any], layout: Layout, score: Score | None, tensors: dict[str, Any]
) -> dict[str, Any]:
    if score and not isfinite(score.value):
        score = None
    return {
        "format": FORMAT, "version": VERSION, "byteorder": sys.byteorder, "step": step, "ranks": ranks,
        "fingerprint": layout.fingerprint(), "layout": layout.manifest(), "score": score and asdict(score),
        "scalars": scalars, "tensors": tensors,
    }  # fmt: skip


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    text = seal(manifest)
    unseal(text)  # what `load` would refuse is not written
    with disk("write checkpoint", directory):
        write_synced(directory / MANIFEST, text)
        sync_directory(directory)


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
