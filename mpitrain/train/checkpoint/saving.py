"""Writes checkpoints: each rank its own pieces, and rank 0 the manifest that makes them one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mpitrain._errors import InputError, MpitrainError
from mpitrain.arrays import Layout, to_host
from mpitrain.comm import Communicator
from mpitrain.comm.guard import agree
from mpitrain.method.state import Piece, State
from mpitrain.train.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    Score,
    checksum,
    dtype_of,
    file_name,
    seal,
    unseal,
)
from mpitrain.train.checkpoint.retention import clean_up, hidden, name_of, prune, publish
from mpitrain.train.storage import disk, sync_directory, write_synced

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
