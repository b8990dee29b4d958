"""Where the ranks of a node wait for each other, in memory that they share; and the few numbers that they post there.

Each rank has one cache line.  It alone writes it: first what it posts, then the number of the fence that it has come
to.  The others only read, so that no atomic read-modify-write is needed.

Ordering.  What a rank wrote before a fence must be seen by all after it, and what it read must have been read.  On
x86 stores become visible in program order, loads happen in program order, and no store overtakes an earlier load
(Intel SDM vol. 3, section 9.2.2), so that aligned 8-byte stores and loads of the line suffice; the interpreter, a
function call for every access, keeps the compiler from reordering them.  Other machines (Arm, POWER) may reorder any
two; there ``order``, a full memory barrier, runs before a rank writes its line and after it has seen the others'.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from zlib import crc32

from mpitrain import _env
from mpitrain._errors import MismatchError
from mpitrain._typing import Array, DType

LINE_BYTES = 128
"""Apart far enough for machines whose caches fetch lines of 64 bytes in pairs."""

POSTED = 4
"""Numbers that a rank posts: its kind of call, where its array lies (block, offset), and how many elements it has."""

_SPINS = 2000
_POLITE_S = 0.05
_NAP_S = 50e-6


class Fence:
    """A barrier among the ranks of a node.

    Parameters
    ----------
    lines : array of uint8, shape (size, at least LINE_BYTES)
        Shared and zero at first; row r belongs to rank r.
    rank : int
        This rank.
    order : callable, optional
        A full memory barrier; None on x86.
    spins : bool
        Whether a waiting rank has a CPU to itself; if not, it yields at once.

    Notes
    -----
    It waits for as long as it takes: the watchdog ends what waits too long.
    """

    def __init__(self, lines: Array, rank: int, order: Callable[[], None] | None, spins: bool) -> None:
        cells = [memoryview(line[:LINE_BYTES]).cast("q") for line in lines]
        self._own = cells[rank]
        self._all = cells
        self._others = [cell for peer, cell in enumerate(cells) if peer != rank]
        self._order = order
        self._spins = _SPINS if spins else 0
        self._number = 0
        self._exchanges = 0

    def wait(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Return once every rank has come here as often as this one.  Collective over the node.

        Parameters
        ----------
        meanwhile : callable, optional
            Called again and again while waiting.
        """
        self._number = number = self._number + 1
        if self._order is not None:
            self._order()
        self._own[0] = number
        for cell in self._others:
            left = self._spins
            while cell[0] < number:
                left -= 1
                if meanwhile is not None:
                    meanwhile()
                if left < 0:
                    self._wait_politely(cell, number, meanwhile)
        if self._order is not None:
            self._order()

    def exchange(self, kind: int, block: int, offset: int, elements: int) -> list[list[int]]:
        """Wait, and return what every rank posted: ``POSTED`` numbers each.

        Raises
        ------
        MismatchError
            On all ranks: they came with different kinds of calls, or numbers of elements.
        """
        # Two places in turn: whoever posts again in the same one has passed a fence since, hence all have read it.
        self._exchanges += 1
        first = 1 + self._exchanges % 2 * POSTED
        for position, number in enumerate((kind, block, offset, elements)):
            self._own[first + position] = number
        self.wait()
        return self.posts(kind, elements)

    def posts(self, kind: int, elements: int) -> list[list[int]]:
        """Return what every rank posted in the last exchange, if all are the same kind of call."""
        first = 1 + self._exchanges % 2 * POSTED
        posts = [cell[first : first + POSTED].tolist() for cell in self._all]
        if any(post[0] != kind or post[3] != elements for post in posts):
            raise _mismatch(posts)
        return posts

    def _wait_politely(self, cell: memoryview, number: int, meanwhile: Callable[[], object] | None) -> None:
        """Give the CPU to others while waiting; nap when it takes long."""
        begun = time.monotonic()
        while cell[0] < number:
            if meanwhile is not None:
                meanwhile()
            if time.monotonic() - begun < _POLITE_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)


def needs_barrier() -> bool:
    """Tell whether this machine needs a memory barrier where x86, in 64 bits, keeps loads and stores in order."""
    return platform.machine() not in ("x86_64", "AMD64")


@cache
def kind_of(dtype: DType, op: str) -> int:
    """Return a number for a dtype and a reduction that is the same in every process."""
    return crc32(f"{dtype.name} {op}".encode())


def _mismatch(posts: list[list[int]]) -> MismatchError:
    seen = "; ".join(f"rank {rank} of the node: {post[3]} elements" for rank, post in enumerate(posts))
    kinds = ", but another dtype or op" if len({post[0] for post in posts}) > 1 else ""
    return MismatchError(
        "ranks reduce different arrays", operation="allreduce", got=seen + kinds,
        remedy=None if _env.debug() else "MPITRAIN_DEBUG=1 names their calls and lines",
    )  # fmt: skip
