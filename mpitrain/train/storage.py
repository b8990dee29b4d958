"""Files that survive a crash: written whole or not at all, and every failure of the disk is a `StorageError`."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpitrain._errors import JobError, StorageError

_REMEDIES = dict.fromkeys(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or choose a directory that every rank can write to"
)


@contextmanager
def disk(action: str, path: Path) -> Iterator[None]:
    """Turn the operating system's complaints about a file into one clear `StorageError`.

    Parameters
    ----------
    action : str
        What was being done, e.g. ``"write checkpoint"``.
    path : Path
        The file or directory concerned.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}",
            operation=action,
            remedy=_REMEDIES.get(error.errno or 0, "choose a directory that every rank can write to"),
        ) from error


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other jobs from a run's directory for the time of the block.

    Raises
    ------
    JobError
        Another job has it.

    Notes
    -----
    A lock of the operating system's, which goes with the process that holds it.  File systems that are mounted over a
    network may hold a directory's lock among the processes of one node only (NFS does), or have none at all.
    """
    with disk("open run directory", path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError(
                f"{path}: another job writes to this run", operation="open run directory",
                remedy="wait for its end, or end it",
            ) from error  # fmt: skip
        except OSError:  # there are no such locks
            pass
        yield
    finally:
        os.close(handle)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory (a new file, a rename) last through a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk; a crash may leave a part of it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a small file: at every moment readers see the old contents or the new, never a part.

    Raises
    ------
    StorageError
        The disk is full or the directory cannot be written; the old contents are still there.
    """
    beside = path.with_name(f".{path.name}.writing")
    with disk("write", path):
        try:
            write_synced(beside, data)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
