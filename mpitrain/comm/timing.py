"""Times calls that all ranks make together: turn by turn, so that a drift of the machine meets all contenders alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.algorithms import DEFAULT

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

Trial: TypeAlias = Callable[[], object]


def race(
    comm: Communicator,
    contenders: Sequence[Sequence[Trial]],
    rounds: int,
    before: Sequence[Sequence[Trial]] | None = None,
) -> Array:
    """Time each contender once per round, the order rotating, after a barrier each time.

    Parameters
    ----------
    comm : Communicator
        All ranks that take part in the calls.
    contenders : sequence of sequences of callable
        Of each contender, its calls, which differ in their buffers only.  Successive turns use successive buffers,
        whoever's turn it is, so that none is used again before all the others were.
    rounds : int
        How often each is timed.
    before : like ``contenders``, optional
        What is done before each of their calls, outside of the time.

    Returns
    -------
    array, float64, shape (rounds, contenders)
        Seconds on the slowest rank, the same on all ranks.

    Notes
    -----
    Collective.
    """
    taken = np.zeros((rounds, len(contenders)))
    used = 0
    for number in range(rounds):
        for turn in range(len(contenders)):
            i = (turn + number) % len(contenders)
            place = used % len(contenders[i])
            trial = contenders[i][place]
            used += 1
            if before is not None:
                before[i][place]()
            comm.barrier()
            start = time.perf_counter()
            trial()
            taken[number, i] = time.perf_counter() - start
    slowest: Array = comm.allreduce(taken, "max", algorithm=DEFAULT)
    return slowest
