"""Turns: some steps of each contestant, round after round, so that a busy moment of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm import Communicator
from mpitrain.train.bench.tasks import Steps

_WARM_STEPS = 3


def contest(comm: Communicator, contestants: Mapping[str, Steps], rounds: int, round_s: float) -> dict[str, Array]:
    """Time all contestants in turn.

    Parameters
    ----------
    comm : Communicator
        The ranks, all of which take every contestant's steps together.
    contestants : dict of str to callable
        In this order, and backwards in every second round.
    rounds : int
        Turns of each.
    round_s : float
        About how long a turn is; one step at least.

    Returns
    -------
    dict of str to array of float64, shape (rounds,)
        Seconds a step in each round, of the slowest rank; the same on all ranks.

    Notes
    -----
    Collective.
    """
    counts = {name: _steps_of(comm, steps, round_s) for name, steps in contestants.items()}
    seconds = {name: np.empty(rounds) for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            contestants[name](1)  # not timed: the first and the last one have two turns in a row, and warm caches
            seconds[name][number] = timed(comm, contestants[name], counts[name])
    return seconds


def timed(comm: Communicator, steps: Steps, count: int) -> float:
    """Return the seconds that a step takes, the mean over ``count`` of them, on the slowest rank.  Collective."""
    comm.barrier()
    began = time.perf_counter()
    steps(count)
    return float(comm.allreduce((time.perf_counter() - began) / count, "max"))


def _steps_of(comm: Communicator, steps: Steps, round_s: float) -> int:
    """Warm up, and return how many steps fit into a turn; the same on all ranks."""
    steps(_WARM_STEPS)
    return max(1, int(round_s / timed(comm, steps, _WARM_STEPS)))
