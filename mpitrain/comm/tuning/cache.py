"""Where tables are kept: a file per key in the user's cache, read by rank 0 and given to all.

A file that is damaged or of another machine is never used; whoever asks is told why.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpitrain import _env
from mpitrain._errors import InputError
from mpitrain.comm import cache
from mpitrain.comm.machine import machine
from mpitrain.comm.tuning.table import Key, Table

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

_KIND = "tuning"


@dataclass(frozen=True)
class Found:
    """What the cache holds for a communicator.

    Parameters
    ----------
    table : Table or None
        None: there is none, or none that can be used.
    note : str
        One line that says which.
    refused : bool
        There is a file, which cannot be used.
    """

    table: Table | None
    note: str
    refused: bool = False


def key_of(comm: Communicator, transport: str = "host") -> Key:
    """Return what a table for this communicator must hold for.  Collective."""
    first = int(comm.node.broadcast(comm.rank))
    facts = comm.allgather_object((first, machine()))
    nodes = [len(list(ranks)) for _, ranks in groupby(sorted(node for node, _ in facts))]
    layout = "+".join(f"{len(list(alike))}x{ranks}" for ranks, alike in groupby(nodes))
    return Key(", ".join(sorted({kind for _, kind in facts})), comm.library, transport, layout)


def path_of(key: Key) -> Path:
    """Return the file of a key, whether it exists or not."""
    return cache.path_of(_KIND, astuple(key))


def save(table: Table) -> Path:
    """Write a table to its file, which is replaced in one step; on one rank only.

    Raises
    ------
    StorageError
        The cache cannot be written.
    """
    return cache.write(path_of(table.key), table.to_json(), "the tuning table")


def load(comm: Communicator, transport: str = "host") -> Found:
    """Return what the cache holds for a communicator, the same on all ranks.  Collective: rank 0 reads."""
    key = key_of(comm, transport)
    found = _read(key) if comm.rank == 0 else None
    result: Found = comm.broadcast_object(found)
    return result


def install(comm: Communicator, transport: str = "host") -> Found:
    """Let the table in the cache choose the algorithms of a communicator from now on.  Collective.

    Without a table, the backend goes on to perform all calls; a file that cannot be used is warned of on rank 0.
    """
    return _use(comm, transport, stacklevel=3)


def adopt(comm: Communicator) -> None:
    """Install the table that was kept for this launch, if there is one, unless ``MPITRAIN_TUNING=off``.

    Collective: a byte where no table was ever kept.  To be called by `mpitrain.world`, whose caller a warning names.
    """
    if comm.broadcast(np.uint8(comm.rank == 0 and _env.tuning() and bool(cache.files(_KIND)))):
        _use(comm, chosen_transport(), stacklevel=4)


def chosen_transport() -> str:
    """Return under which name of a transport tables of `mpitrain.world` are kept: the user's choice, or ``auto``."""
    return _env.transport() or "auto"


def kept() -> dict[Path, Table | None]:
    """Return all tables in the cache, None for a file that cannot be read; on one rank only."""
    found: dict[Path, Table | None] = dict.fromkeys(cache.files(_KIND))
    for path in found:
        with suppress(InputError, OSError, UnicodeDecodeError):
            found[path] = Table.from_json(path.read_text())
    return found


def folder() -> Path:
    """Return where tables are kept, whether it exists or not."""
    return cache.folder(_KIND)


def _use(comm: Communicator, transport: str, stacklevel: int) -> Found:
    found = load(comm, transport)
    comm.tuning = found.table
    if found.refused and comm.rank == 0:
        warnings.warn(found.note, RuntimeWarning, stacklevel)
    return found


def _read(key: Key) -> Found:
    path = path_of(key)
    try:
        table = Table.from_json(path.read_text())
    except FileNotFoundError:
        note = "no tuning table for this machine, MPI library and layout; mpitrain bench collectives --tune makes one"
        return Found(None, note)
    except (InputError, OSError, UnicodeDecodeError) as error:
        return Found(None, f"tuning table ignored: {path} cannot be read: {error}", refused=True)
    differences = key.differences(table.key)
    if differences:
        return Found(None, f"tuning table ignored: {path} is of {'; '.join(differences)}", refused=True)
    return Found(table, f"tuning table {path} with {len(table.rows)} rows")
