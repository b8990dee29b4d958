"""What performs the large reductions of a communicator, allocates its shared memory and plans its hot calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from mpitrain._typing import Array, DType, Shape


@dataclass(frozen=True, eq=False)
class Planned:
    """A reduction that is laid out and only waits to be performed.

    Parameters
    ----------
    run : callable
        Performs it once.
    result : array
        Where the result is afterwards, in the buffer's shape; read-only unless it is the buffer.
    """

    run: Callable[[], object]
    result: Array


class Transport(ABC):
    """One way to move data among the ranks of a communicator.

    Attributes
    ----------
    name : str
        As `MPITRAIN_TRANSPORT` calls it.
    """

    name: str

    @abstractmethod
    def empty(self, shape: Shape, dtype: DType) -> Array:
        """Return zeroed, page-aligned memory of this rank's that the ranks of its node reduce fastest.  Collective."""

    @abstractmethod
    def allreduce(self, values: Array, op: str) -> bool:
        """Reduce a contiguous one-dimensional array in place; tell whether it was done.  Collective.

        False where the communicator's own way is faster; then nothing was communicated.  ``op`` is never ``mean``.
        """

    def allreduce_from(self, source: Array, values: Array, op: str) -> bool:
        """As `allreduce`, of values that are first to be copied from elsewhere; False where that saves nothing.

        The other ranks may call `allreduce` meanwhile, and whether this is done need not be agreed on.
        """
        return False

    @abstractmethod
    def plan(self, buffer: Array, op: str, in_place: bool) -> Planned | None:
        """Plan reductions of a contiguous buffer; None where nothing beats the communicator's own way.  Collective."""

    @abstractmethod
    def free(self) -> None:
        """Release what it holds.  Collective."""
