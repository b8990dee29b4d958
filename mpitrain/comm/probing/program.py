"""What a probe starts on two ranks, as ``python -m mpitrain.comm.probing.program STEP SECONDS``: one thing, checked.

Rank 0 prints one JSON object with what was wrong.  A library that crashes, hangs or moves nothing gives itself away: by
the exit code, at the time limit, or by the values, none of which is zero.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mpitrain import _env
from mpitrain._errors import MpitrainError
from mpitrain._typing import Array
from mpitrain.arrays.gpus import use_gpu
from mpitrain.arrays.namespace import by_device, to_host
from mpitrain.comm.communicator import Communicator
from mpitrain.comm.guard import abort_on_uncaught
from mpitrain.comm.start import world

SIZES = (1, 1000, 1 << 20)
"""Elements: libraries send short and long messages in different ways."""


def _send(comm: Communicator, x: Any) -> Any:
    return comm.sendrecv(x, (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size)


def _broadcast(comm: Communicator, x: Any) -> Any:
    return comm.broadcast(x, root=comm.size - 1)


def _allreduce(comm: Communicator, x: Any) -> Any:
    return comm.allreduce(x)


_Step = tuple[Callable[[Communicator, Any], Any], Callable[[int, int], int]]

STEPS: dict[str, _Step] = {
    "send": (_send, lambda rank, size: (rank - 1) % size + 1),
    "broadcast": (_broadcast, lambda rank, size: size),
    "allreduce": (_allreduce, lambda rank, size: size * (size + 1) // 2),
}
"""By name: what is done with arrays that are multiples of the same values, by the number of the rank plus 1; and which
multiple of them the result is, given the rank and how many there are."""


def main(step: str, limit_s: float) -> None:
    """Try one thing on all ranks and print what came of it; end by itself after ``limit_s`` seconds."""
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        use_gpu(_env.launched_rank() or 0)  # before MPI starts: some libraries look for it then
        comm = world()
    except MpitrainError as error:
        sys.exit(f"error: {error}")
    abort_on_uncaught(comm)
    problems = comm.allgather_object(examine(comm, step))
    if comm.rank == 0:
        found = next((f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem), "")
        print(json.dumps({"step": step, "transport": comm.device_transport, "problem": found}), flush=True)


def examine(comm: Communicator, step: str) -> str:
    """Do it with arrays of several sizes; return what was wrong first, or nothing.  Collective."""
    perform, expected = STEPS[step]
    problem = ""
    for n in SIZES:
        scale = _values(n)
        x = by_device("gpu").asarray((comm.rank + 1) * scale)
        found = _compare(to_host(perform(comm, x)), expected(comm.rank, comm.size) * scale)
        problem = problem or found  # the other ranks go on, whatever this one has found
    return problem


def _values(n: int) -> Array:
    """Return integers that float32 sums exactly, none of them zero."""
    return (np.arange(n) % 1009 + 1).astype(np.float32)


def _compare(found: Array, expected: Array) -> str:
    wrong = np.flatnonzero(found != expected)
    if not wrong.size:
        return ""
    at = int(wrong[0])
    return f"{wrong.size} of {expected.size} values are wrong: [{at}] is {found[at]}, not {expected[at]}"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
