"""What a launch is asked to measure; the same on all its ranks, and handed to them as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter

OPERATIONS = ("allreduce", "broadcast", "reduce_scatter", "allgather")
DTYPES = ("float32", "float64", "int32", "int64")
BUFFERS = ("resident", "rewritten", "rotating")


@dataclass(frozen=True)
class Spec:
    """A launch's task.

    Parameters
    ----------
    sizes_bytes : tuple of int
        Of the whole array.
    operations : tuple of str
        Some of `OPERATIONS`.
    dtype : str
        One of `DTYPES`.
    repeats : int, optional
        Turns of each race; None: as many as fit into ``time_s``.
    time_s : float
        Seconds for each race, with all that is done between its turns.
    buffers : {"resident", "rewritten", "rotating"}
        Whether calls use the same arrays each time, as the call just before or written anew by each rank, or walk
        through more of them than the last cache holds.
    variants : tuple of str
        Names of our ways to call; empty: all.
    leading : bool
        Only the ways that are compared with all rivals.
    gloo : bool
        Whether PyTorch's gloo takes part.
    component : str
        How the MPI library was set up.
    round : int
        Which repetition this launch is.
    command : tuple of str
        What the user typed, for the record.
    """

    sizes_bytes: tuple[int, ...]
    operations: tuple[str, ...] = OPERATIONS
    dtype: str = "float32"
    repeats: int | None = None
    time_s: float = 0.2
    buffers: str = "resident"
    variants: tuple[str, ...] = ()
    leading: bool = False
    gloo: bool = False
    component: str = "default"
    round: int = 1
    command: tuple[str, ...] = field(default=())

    def to_json(self) -> bytes:
        """Return the task as text."""
        return TypeAdapter(Spec).dump_json(self)

    @classmethod
    def from_json(cls, text: bytes) -> Spec:
        """Return the task that `to_json` wrote."""
        return TypeAdapter(cls).validate_json(text)
