"""The exceptions of the package, as one tree; it knows nothing about what raises them.

Every message says, in this order: the operation, what was wrong, what was got, what was expected, the remedy.  The
rank is added by whoever prints it.  ``exit_code`` is what the command line ends with: 2 for what a user can mend in
the input, 1 else.

    MpitrainError
    ├── InputError (ValueError)         what the caller handed in cannot be used
    │   ├── JobError                    a job file, or an option of the command line
    │   ├── DataError                   a data set
    │   ├── CheckpointError             a checkpoint that is damaged or of another model
    │   ├── DtypeError (TypeError)      an element type that an operation cannot handle
    │   └── MissingExtraError (ImportError)
    ├── LaunchError (RuntimeError)      the ranks were not started as one world
    ├── CommunicationError (RuntimeError)
    │   ├── MismatchError               ranks called different collectives
    │   ├── PeerError                   another rank failed
    │   └── AbortError                  the world was aborted while this rank waited
    ├── TaskError (RuntimeError)        a task failed, whose value is asked for
    ├── NonFiniteError (ArithmeticError)
    └── StorageError (OSError)          a full disk, a read-only directory
"""

from __future__ import annotations

from typing import Any

INTERRUPTED = 130
"""What a program ends with that Ctrl-C has ended, as shells report it."""

_UNSET: Any = object()


class MpitrainError(Exception):
    """Root of every error that mpitrain raises.

    Parameters
    ----------
    problem : str
        What was wrong.
    operation : str, optional
        What was being done, e.g. ``"allreduce"``.
    got, expected : object, optional
        The offending value, and what would have been right.
    remedy : str, optional
        What the user can do about it.
    """

    exit_code: int = 1

    def __init__(
        self,
        problem: str,
        *,
        operation: str | None = None,
        got: Any = _UNSET,
        expected: Any = _UNSET,
        remedy: str | None = None,
    ) -> None:
        parts = [f"{operation}: {problem}" if operation else problem]
        if got is not _UNSET:
            parts.append(f"got {got}")
        if expected is not _UNSET:
            parts.append(f"expected {expected}")
        if remedy:
            parts.append(remedy)
        super().__init__("; ".join(parts))


class InputError(MpitrainError, ValueError):
    """What the caller handed in cannot be used."""

    exit_code = 2


class JobError(InputError):
    """A job file or a command-line option is wrong."""


class DataError(InputError):
    """A data set is missing, unreadable, or holds values that cannot be used."""


class CheckpointError(InputError):
    """A checkpoint is damaged, missing, or belongs to another model."""


class DtypeError(InputError, TypeError):
    """An element type that the operation cannot handle."""


class MissingExtraError(InputError, ImportError):
    """A feature needs a package that is not installed."""


class LaunchError(MpitrainError, RuntimeError):
    """The launcher did not start the ranks as one world."""

    exit_code = 2


class CommunicationError(MpitrainError, RuntimeError):
    """A message or collective failed."""


class MismatchError(CommunicationError):
    """Ranks called different collectives, or the same one with different arguments."""


class PeerError(CommunicationError):
    """Another rank failed; this one is well."""


class AbortError(CommunicationError):
    """The world was aborted while this rank waited."""


class TaskError(MpitrainError, RuntimeError):
    """The value of a task is asked for that failed."""


class NonFiniteError(MpitrainError, ArithmeticError):
    """A loss or gradient is infinite or not a number."""


class StorageError(MpitrainError, OSError):
    """A file could not be written: full disk, read-only directory."""
