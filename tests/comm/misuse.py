"""Programs that misuse a communicator; the last rank is the odd one.  Run by `test_comm_misuse` under ``mpiexec``.

``python misuse.py survivors`` goes through `SURVIVORS`, each on a communicator of its own, and prints what every rank
was told as a line of JSON.  ``python misuse.py NAME`` runs one of `FATAL`, after which there is no going on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpitrain._errors import MpitrainError
from mpitrain.comm import Communicator, world

SHORT_S = 1.0
TIMEOUT_S = 2.0
X = np.arange(6.0)
LATE = "has not come within 1 s"

Program = Callable[[Communicator], object]


@dataclass(frozen=True)
class Case:
    """What most ranks do, what the odd one does, words of the error, and which ranks are told it."""

    usual: Program
    odd: Program
    words: Sequence[str]
    told: str = "all"


def nothing(comm: Communicator) -> None:
    """Do nothing."""


def last(comm: Communicator) -> int:
    return comm.size - 1


def from_first(send: Program) -> Program:
    """What rank 0 alone does, of those that are not odd."""
    return lambda comm: send(comm) if comm.rank == 0 else None


def twice(first: Program, second: Program) -> Program:
    return lambda comm: (first(comm), second(comm))


def drop(comm: Communicator) -> None:
    told: list[str] = []
    sys.unraisablehook = lambda failure: told.append(f"{type(failure.exc_value).__name__}: {failure.exc_value}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        comm.iallreduce(X)
        gc.collect()
    sys.unraisablehook = sys.__unraisablehook__
    raise RuntimeError(told[0])


def use_freed(comm: Communicator) -> None:
    comm.free()
    comm.allreduce(X)


def wait_in_part(comm: Communicator) -> None:
    part = comm.split(0, axis="part")
    assert part is not None
    part.barrier()


def wait_in_whole(comm: Communicator) -> None:
    comm.split(0, axis="part")
    comm.barrier()


def give(comm: Communicator, receiver: int) -> None:
    """Reduce and scatter, all for one rank."""
    comm.reduce_scatter(X, counts=[6 * (rank == receiver) for rank in range(comm.size)])


def exchange(comm: Communicator, first: int) -> None:
    """Exchange one row with each rank, and believe that ``first`` come from rank 0."""
    ones = [1] * comm.size
    comm.alltoall(X[: comm.size], ones, [first, *ones[1:]])


SURVIVORS: dict[str, Case] = {
    "operation": Case(lambda c: c.allreduce(X), lambda c: c.barrier(), ["#1 allreduce(float64[6], op=sum)", "#1 b"]),
    "op": Case(lambda c: c.allreduce(X), lambda c: c.allreduce(X, "max"), ["op=sum", "op=max"]),
    "size": Case(lambda c: c.allreduce(X), lambda c: c.allreduce(X[:5]), ["float64[6]", "float64[5]"]),
    "shape": Case(lambda c: c.allreduce(X.reshape(3, 2)), lambda c: c.allreduce(X.reshape(2, 3)), ["(3, 2)", "(2, 3)"]),
    "dtype": Case(lambda c: c.allreduce(X), lambda c: c.allreduce(X.astype("f4")), ["float64[6]", "float32[6]"]),
    "root": Case(lambda c: c.reduce(X, root=0), lambda c: c.reduce(X, root=1), ["root=0", "root=1"]),
    "root of objects": Case(lambda c: c.gather_object("x"), lambda c: c.gather_object("x", 1), ["root=0", "root=1"]),
    "broadcast shape": Case(lambda c: c.broadcast(X), lambda c: c.broadcast(X[:2]), ["float64[6]", "float64[2]"]),
    "order": Case(
        twice(lambda c: c.allreduce(X), lambda c: c.broadcast(X)),
        twice(lambda c: c.broadcast(X), lambda c: c.allreduce(X)),
        ["#1 allreduce(", "#1 broadcast("],
    ),
    "blocking": Case(lambda c: c.allreduce(X), lambda c: c.iallreduce(X).wait(), ["#1 allreduce", "#1 iallreduce"]),
    "nonblocking op": Case(
        lambda c: c.iallreduce(X).wait(), lambda c: c.iallreduce(X, "max").wait(), ["iallreduce(float64[6], op=max)"],
    ),
    "objects or not": Case(lambda c: c.broadcast_object(1), lambda c: c.barrier(), ["broadcast_object", "barrier()"]),
    "counts": Case(lambda c: give(c, 0), lambda c: give(c, 1), ["counts=[6, 0", "counts=[0, 6"]),
    "counts of alltoall": Case(lambda c: exchange(c, 1), lambda c: exchange(c, 2), ["gives (1, 1", "takes (2, 1"]),
    "tree": Case(
        lambda c: c.allreduce({"a": X, "b": X}), lambda c: c.allreduce({"a": X, "c": X}),
        ["{'a': (6,), 'b': (6,)}", "{'a': (6,), 'c': (6,)}"],
    ),
    "buckets": Case(lambda c: c.allgather([X, X]), lambda c: c.allgather([X]), ["[6]) + (float64[6])", "of [(6,)]"]),
    "algorithm": Case(
        lambda c: c.allreduce(X, algorithm="tree"), lambda c: c.allreduce(X, algorithm="ring"), ["=tree", "=ring"],
    ),
    "plan": Case(lambda c: c.allreduce_plan(X.copy())(), lambda c: c.allreduce(X), ["#1 allreduce("]),
    "reproducible": Case(lambda c: c.allreduce(X), lambda c: c.allreduce(X, reproducible=True), ["#1 allreduce("]),
    "split on one": Case(lambda c: c.barrier(), lambda c: c.split(1), ["barrier()", "split(axis='split')"]),
    "free on one": Case(lambda c: c.barrier(), lambda c: c.free(), ["barrier()", "free()"]),
    "missing": Case(lambda c: c.barrier(), nothing, [LATE, "in split(axis='next')", "script.py:"], "others"),
    "extra": Case(
        lambda c: c.allreduce(X), twice(lambda c: c.allreduce(X), lambda c: c.allreduce(X)),
        [LATE, "#2 allreduce("], "odd",
    ),
    "error on one": Case(lambda c: c.allreduce(X), lambda c: c.allreduce("x"), [LATE, "axis='next'"], "others"),
    "message for collective": Case(lambda c: c.barrier(), lambda c: c.send(X, 0), [LATE, "send(float64[6])"]),
    "two communicators": Case(wait_in_part, wait_in_whole, [LATE, "in barrier() on 'case'"], "others"),
    "tag": Case(
        from_first(lambda c: c.send(X, last(c), 1)), lambda c: c.recv(X, 0, 2), [LATE, "tag 1", "tag 2"], "pair",
    ),
    "message size": Case(
        from_first(lambda c: c.send(X, last(c))), lambda c: c.recv(X[:5], 0),
        ["send(float64[6])", "recv(float64[5])"], "pair",
    ),
    "message dtype": Case(
        from_first(lambda c: c.send(X, last(c))), lambda c: c.recv(X.view("i8"), 0), ["float64[6]", "int64[6]"], "pair",
    ),
    "send alone": Case(from_first(lambda c: c.send(X, last(c))), nothing, [LATE, "send(float64[6]) to rank"], "first"),
    "receive alone": Case(nothing, lambda c: c.recv(X, 0), [LATE, "recv(float64[6]) from rank 0"], "odd"),
    "both receive": Case(from_first(lambda c: c.recv(X, last(c))), lambda c: c.recv(X, 0), [LATE, "recv("], "pair"),
    "both send": Case(from_first(lambda c: c.send(X, last(c))), lambda c: c.send(X, 0), [LATE, "send("], "pair"),
    "partner": Case(
        lambda c: c.sendrecv(X, (c.rank + 1) % c.size, (c.rank - 1) % c.size), lambda c: c.sendrecv(X, 0, last(c)),
        [LATE, "sendrecv"], "odd",
    ),
    "freed": Case(use_freed, use_freed, ["the communicator was freed"]),
    "dropped": Case(drop, drop, ["iallreduce(float64[6], op=sum) was dropped without wait(), begun at", "script.py:"]),
}  # fmt: skip
"""By what is wrong."""


def fail(comm: Communicator) -> None:
    raise KeyError("a bug")


def stop_inside(comm: Communicator) -> None:
    """Stop when the collective has been checked and is to be performed."""
    comm._run = lambda call: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore[method-assign]
    comm.barrier()


def loop(comm: Communicator) -> None:
    while True:
        time.sleep(0.1)


def finalize(comm: Communicator) -> None:
    from mpi4py import MPI

    MPI.Finalize()


def wait_unchecked(comm: Communicator) -> None:
    comm.debug = False
    comm.barrier()


FATAL: dict[str, Program] = {
    "raises": fail,
    "exits with 0": lambda comm: sys.exit(0),
    "exits with 1": lambda comm: sys.exit(1),
    "leaves with 0": lambda comm: os._exit(0),
    "leaves with 1": lambda comm: os._exit(1),
    "is killed": lambda comm: os.kill(os.getpid(), signal.SIGKILL),
    "crashes": lambda comm: ctypes.string_at(0),
    "is stopped": lambda comm: os.kill(os.getpid(), signal.SIGSTOP),
    "is stopped inside": stop_inside,
    "loops": loop,
    "finalises": finalize,
    "is not in debug mode": wait_unchecked,
    "calls another": lambda comm: comm.allgather(X),
}
"""What the odd rank does while the others are in a barrier."""

ENDINGS = ("exits with 0", "exits with 1", "finalises")
"""Those that are told with any timeout, that of ten minutes too."""


def survive(comm: Communicator, name: str) -> None:
    part = comm.split(0, axis="case")
    assert part is not None
    case = SURVIVORS[name]
    begun = time.monotonic()
    told = "nothing"
    try:
        (case.odd if comm.rank == last(comm) else case.usual)(part)
    except (MpitrainError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    line = {"case": name, "rank": comm.rank, "told": told, "seconds": time.monotonic() - begun}
    sys.stdout.write(f"{json.dumps(line)}\n")
    sys.stdout.flush()
    comm.timeout_s = 30.0  # some are told later than others
    comm.split(0, axis="next")
    comm.timeout_s = SHORT_S


def main(name: str) -> None:
    comm = world()
    if name == "survivors":
        comm.timeout_s = SHORT_S
        for case in SURVIVORS:
            survive(comm, case)
        return
    if name not in ENDINGS or comm.debug:
        comm.timeout_s = TIMEOUT_S
    comm.barrier()
    print("begun", time.time(), flush=True)
    (FATAL[name] if comm.rank == last(comm) else Communicator.barrier)(comm)


if __name__ == "__main__":
    main(sys.argv[1])
