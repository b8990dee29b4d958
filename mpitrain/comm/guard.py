"""An error on one rank ends the job, or is agreed on by all; never a hang."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from mpitrain import _env
from mpitrain._errors import (
    INTERRUPTED,
    AbortError,
    CommunicationError,
    LaunchError,
    MismatchError,
    MpitrainError,
    PeerError,
)
from mpitrain.comm.callsite import call_site

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that ends with this error: 2 for what a user can mend, 1 else."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, MpitrainError) else 1


def report(error: BaseException, comm: Communicator) -> str:
    """Return what is printed of an uncaught error: one line for a user's error, else the traceback.

    Every line tells the rank, since the launcher mixes those of all ranks.
    """
    return "\n".join(f"[rank {comm.rank} of {comm.size}] {line}" for line in describe(error).splitlines())


def describe(error: BaseException) -> str:
    """Return an error as a person should see it.

    One line for one of ours, as it says what to do; the traceback for any other, and where the MPI library failed, as
    that says where to look.
    """
    return f"error: {error}" if _says_what_to_do(error) else "".join(traceback.format_exception(error)).rstrip()


def _says_what_to_do(error: BaseException) -> bool:
    failed_below = isinstance(error, CommunicationError) and error.__cause__ is not None
    return isinstance(error, MpitrainError) and (isinstance(error, MismatchError) or not failed_below)


def _site(error: BaseException) -> str:
    """Return where in the user's program an error came from that is shown without its traceback, as words to add."""
    trace = error.__traceback__
    if trace is None or not _says_what_to_do(error) or "\n" in str(error):  # a table of ranks has lines of its own
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"; at {call_site(trace.tb_frame)}"


def abort_on_uncaught(comm: Communicator) -> None:
    """From now on, let an uncaught exception on this rank end all ranks within seconds.

    It is printed with the rank before every line, in any thread, and the job ends with its `exit_code`.  One of
    mpitrain's own is one line that ends with where in the program it came from, any other its traceback.  Without
    this, the other ranks wait for ever.

    Parameters
    ----------
    comm : Communicator
        The world's.
    """

    def leave(error: BaseException) -> None:
        sys.stdout.flush()
        print(report(error, comm) + _site(error), file=sys.stderr, flush=True)
        if comm.size > 1:
            comm.abort(exit_code(error))

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        leave(error)
        if exit_code(error) != 1:
            raise SystemExit(exit_code(error))

    def thread_hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            leave(args.exc_value)

    sys.excepthook = hook
    threading.excepthook = thread_hook


@contextmanager
def agree(comm: Communicator) -> Iterator[None]:
    """Let all ranks leave a block together when it fails on some of them.

    For work that each rank does by itself and that may fail on some only: reading a file, building a model.

    Parameters
    ----------
    comm : Communicator
        The ranks that must agree.

    Raises
    ------
    PeerError
        On ranks where the block succeeded, naming those where it failed, their first lines, and the exit code.
        Where it failed, its own error is raised.

    Notes
    -----
    Collective at the end of the block, where it costs one allreduce of a byte.  The block itself must communicate
    nothing, or ranks that fail leave the others waiting in it.
    """
    failure: BaseException | None = None
    try:
        yield
    except AbortError:
        raise  # nothing can be agreed on any more
    except BaseException as error:
        failure = error
    if comm.allreduce(np.uint8(failure is not None), "max"):
        failures = comm.allgather_object(None if failure is None else (_first_line(failure), exit_code(failure)))
        if failure is None:
            raise _peer_error({rank: found for rank, found in enumerate(failures) if found is not None})
    if failure is not None:
        raise failure


def check_launch(size: int) -> None:
    """Refuse a world of one rank where the launcher says that it started several.

    Parameters
    ----------
    size : int
        Ranks in ``MPI.COMM_WORLD``.

    Raises
    ------
    LaunchError
        The launcher and the MPI library do not belong together: each of N processes would do the whole work.
    """
    launched = _env.launched_size()
    if launched is None or size > 1 or launched[1] <= 1:
        return
    variable, expected = launched
    raise LaunchError(
        f"the launcher started {expected} processes, but MPI sees each as a world of its own",
        operation="world", got=f"{variable}={expected} and 1 rank", expected=f"{expected} ranks",
        remedy="start with the mpiexec of the MPI library that mpi4py loads (mpitrain run -n N JOB finds it); "
        "under srun, use --mpi=pmix for Open MPI and --mpi=pmi2 for MPICH",
    )  # fmt: skip


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def _peer_error(failures: dict[int, tuple[str, int]]) -> PeerError:
    ranks = ", ".join(map(str, failures))
    lines = "; ".join(f"rank {rank}: {line}" for rank, (line, _) in failures.items())
    error = PeerError(f"failed on rank {ranks}; {lines}")
    error.exit_code = next(code for _, code in failures.values())  # that of its cause
    return error
