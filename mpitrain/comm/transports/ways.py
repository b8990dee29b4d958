"""How two ranks of a node hand arrays to each other: which way is the fastest depends on the processor, so they try.

Where each core has a large cache of its own, pieces that stay there are best; where it is small, and the one that cores
share is fast, pieces that do not.  Results have the same bits either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mpitrain.arrays.flatbuffer import plain

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator
    from mpitrain.comm.transports.kernel import Kernel

TRIED_BYTES = 1024 * 1024
_TRIALS = 8


class Way(NamedTuple):
    """One way.

    Parameters
    ----------
    trades : bool
        Whether the same lines carry one rank's values there and the other's back, or each rank has lines of its own.
    chunk_bytes : int
        What passes through the workspace at once.
    """

    trades: bool
    chunk_bytes: int


WAYS = (Way(True, 128 * 1024), Way(True, 640 * 1024), Way(False, 640 * 1024))
"""What is tried; the first where ranks share a core, which tells nothing."""


_known: list[int] = []
"""Which way this process has found to be the fastest, if it has tried: programs make thousands of communicators."""


def settle(kernel: Kernel, node: Communicator, can_tell: bool) -> None:
    """Let the two ranks of a node use the fastest way from now on.  Collective over them.

    They try unless both have done so before, which takes some milliseconds.

    Parameters
    ----------
    kernel : Kernel
        Their compiled loops.
    node : Communicator
        The two ranks.
    can_tell : bool
        Whether each has a core to itself; the same on both.
    """
    chosen = int(node.allgather(np.array(_known or [-1])).min()) if can_tell else 0
    if chosen < 0:
        chosen = _fastest(kernel, node)
        _known[:] = [chosen]
    kernel.use(*WAYS[chosen])


def _fastest(kernel: Kernel, node: Communicator) -> int:
    values = plain(TRIED_BYTES // 4, np.dtype(np.float32))
    run = kernel.plan("sum", values, values, 0)
    seconds = [_seconds(kernel, way, run) for way in WAYS]
    return int(node.allgather(np.array(seconds)).max(axis=0).argmin())


def _seconds(kernel: Kernel, way: Way, run: Callable[[], object]) -> float:
    """Return the shortest of some times."""
    kernel.use(*way)
    found = []
    for _ in range(1 + _TRIALS):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found[1:])
