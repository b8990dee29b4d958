"""Memory that all ranks of a node map: one block per allocation, a part per rank.  It knows nothing of reductions.

A block is an anonymous file in memory (``memfd``): it has no name, so that nothing is left behind however a process
ends, and it does not count against the size of ``/dev/shm``, which containers limit to 64 MiB.  Every rank backs its
own part with pages before anyone uses it: a node without the memory gets an error here, never SIGBUS later, and the
pages lie in the NUMA domain of the rank that writes them.  No kernel refuses such pages, it would end processes
instead; so the lowest rank looks first whether there is room.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import numpy as np

from mpitrain._errors import StorageError
from mpitrain._typing import Array
from mpitrain.arrays.compiled import address
from mpitrain.comm.transports.headroom import headroom_bytes
from mpitrain.comm.transports.pages import map_file, whole_pages

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


class Place(NamedTuple):
    """Where an array lies: the number of its block, and its first byte within the rank's part; −1, −1 for nowhere."""

    block: int
    offset_bytes: int


NOWHERE = Place(-1, -1)


class Memory(np.ndarray):
    """The bytes of a block, as an array that can be referred to weakly; arrays on it keep the block alive.

    Attributes
    ----------
    own : range
        The addresses of this rank's part.
    """

    own: range


class Arena:
    """The blocks of one node.

    Parameters
    ----------
    node : Communicator
        The ranks that share memory.

    Attributes
    ----------
    changed : callable
        Called when a block has come, and when one is about to go.

    Raises
    ------
    StorageError
        From `allocate`, on all ranks: the memory cannot be had, or not be mapped by all.
    """

    def __init__(self, node: Communicator) -> None:
        self._node = node
        self.changed: Callable[[], object] = lambda: None
        self._blocks: dict[int, ref[Memory]] = {}
        self._count = 0

    def allocate(self, part_bytes: int) -> tuple[int, Memory]:
        """Return the number of a new block of zeros, and its bytes: shape (ranks of the node, part), uint8.

        Parameters
        ----------
        part_bytes : int
            Of each rank, the same on all; rounded up to whole pages.

        Notes
        -----
        Collective over the node.  Released when no rank holds an array on it any more.
        """
        part_bytes = whole_pages(part_bytes)
        memory = _map(self._node, part_bytes)
        start = address(memory[self._node.rank])
        memory.own = range(start, start + part_bytes)
        number, self._count = self._count, self._count + 1
        self._blocks[number] = ref(memory, partial(self._forget, number))
        self.changed()
        return number, memory

    def parts(self, number: int) -> Memory:
        """Return the bytes of a block that this rank still holds."""
        memory = self._blocks[number]()
        assert memory is not None
        return memory

    def held(self) -> dict[int, Memory]:
        """Return the blocks that are still there, by number.  They stay for as long as what is returned."""
        blocks = self._blocks.copy()  # at once: else the collector may end blocks, which are forgotten, in the middle
        return {number: memory for number, reference in blocks.items() if (memory := reference()) is not None}

    def _forget(self, number: int, _: object) -> None:
        """Take note that a block is about to go, before its addresses can be given to something else."""
        del self._blocks[number]
        self.changed()

    def locate(self, array: Array) -> Place:
        """Return where a C-contiguous array lies within this rank's part of a block."""
        start = address(array)
        for number, memory in self.held().items():
            if start in memory.own and start + array.nbytes <= memory.own.stop:
                return Place(number, start - memory.own.start)
        return NOWHERE


def _map(node: Communicator, part_bytes: int) -> Memory:
    """Make a file, let every rank back its own part and map all; what fails on one rank is raised on all."""
    descriptor, found = -1, 0
    try:
        descriptor = _create(part_bytes * node.size) if node.rank == 0 else -1
    except OSError as error:
        found = error.errno or errno.EIO
    owner = node.broadcast_object(_identity(descriptor) if descriptor >= 0 else None)
    mapped = None
    try:
        if owner is not None:
            descriptor = descriptor if node.rank == 0 else _open(*owner)
            begin = node.rank * part_bytes
            os.posix_fallocate(descriptor, begin, part_bytes)
            mapped = map_file(descriptor, part_bytes * node.size, begin, begin + part_bytes)
    except OSError as error:
        found = error.errno or errno.EIO
    worst = int(node.allgather(found).max())  # all have opened it by now, or never will; allreduce may need this memory
    if descriptor >= 0:
        os.close(descriptor)
    if worst or mapped is None:
        raise _refusal(worst, part_bytes, node.size)
    return mapped.reshape(node.size, part_bytes).view(Memory)


def _create(total_bytes: int) -> int:
    headroom = headroom_bytes()
    if headroom is not None and total_bytes > headroom:
        raise OSError(errno.ENOMEM, "no room")
    descriptor = os.memfd_create("mpitrain")
    try:
        os.ftruncate(descriptor, total_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    """Return the process, the descriptor, the device and the inode of a file."""
    status = os.fstat(descriptor)
    return os.getpid(), descriptor, status.st_dev, status.st_ino


def _open(process: int, descriptor: int, device: int, inode: int) -> int:
    """Open another process's file.  Among containers the same number may name another process, hence the check."""
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    status = os.fstat(opened)
    if (status.st_dev, status.st_ino) != (device, inode):
        with suppress(OSError):
            os.close(opened)
        raise OSError(errno.ENXIO, "another file")
    return opened


def _refusal(number: int, part_bytes: int, ranks: int) -> StorageError:
    full = number in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
    return StorageError(
        "the memory that the ranks of a node share cannot be had" if full
        else "the ranks of a node cannot map each other's memory",
        operation="empty", got=os.strerror(number), expected=f"{ranks} ranks × {part_bytes:,} bytes",
        remedy="ask for more memory (--mem, the container's limit, ulimit -f), or use fewer ranks" if full
        else "start all ranks of a node in one container or PID namespace, or set MPITRAIN_TRANSPORT=host",
    )  # fmt: skip
