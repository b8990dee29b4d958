"""How the ranks of a job end together: one message for a failure that all share, an abort for one that is alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mpitrain._errors import AbortError, PeerError
from mpitrain.comm import guard
from mpitrain.comm.communicator import Communicator

PATIENCE_S = 3.0
"""How long a failing rank waits for the others to fail too, before it takes itself to be alone."""


@contextmanager
def leave_together(comm: Communicator, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """End the program when the block fails.

    If all ranks fail within ``patience_s``, rank 0 prints each distinct message once and all exit with the largest exit
    code.  If this rank fails alone, its own message is printed and the job is aborted: the others may be waiting for
    it in a collective.

    Parameters
    ----------
    comm : Communicator
        The world's.
    patience_s : float
        Seconds to wait for the other ranks.

    Notes
    -----
    Collective at the start, where it makes a communicator of its own, which failing ranks then meet on.
    """
    meeting = comm.split(0)
    assert meeting is not None
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # a rank that just exits leaves the others waiting
        if meeting.size == 1 and not isinstance(error, Exception):
            raise
        if isinstance(error, AbortError) or not _met(meeting, patience_s):
            print(guard.report(error, comm), file=sys.stderr, flush=True)
            comm.abort(guard.exit_code(error))
        _print_together(error, meeting)
    else:
        meeting.free()


def _met(meeting: Communicator, patience_s: float) -> bool:
    """Tell whether all ranks came to this point within ``patience_s``."""
    everyone = meeting.ibarrier()
    deadline = time.monotonic() + patience_s
    while not everyone.test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    everyone.wait()
    return True


def _print_together(error: BaseException, meeting: Communicator) -> None:
    own = None if isinstance(error, PeerError) else _describe(error)
    failures = meeting.allgather_object((own, guard.exit_code(error)))
    if meeting.rank == 0:
        texts = [text for text, _ in failures]
        for text in dict.fromkeys(filter(None, texts)):
            ranks = [rank for rank, found in enumerate(texts) if found == text]
            where = "" if len(ranks) == meeting.size else f" (rank {', '.join(map(str, ranks))} of {meeting.size})"
            print(f"mpitrain: {text}{where}", file=sys.stderr, flush=True)
    meeting.barrier()  # launchers end all ranks, rank 0 perhaps before it has spoken, once the first has left
    sys.exit(max(code for _, code in failures))


def _describe(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else guard.describe(error)
