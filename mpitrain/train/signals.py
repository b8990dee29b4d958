"""Signals that ask a run, or a sweep of runs, to save what there is and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what launchers send to the ranks when they get it, and what Slurm is told to send ahead of a time limit."""

NameSignal = Callable[[signal.Signals], str]
"""Names the signal that a user sent, given the one that arrived: `mpitrain run -n` passes Ctrl-C on as SIGUSR1."""


def own_name(number: signal.Signals) -> str:
    """Return a signal's own name."""
    return number.name


@contextmanager
def stop_on_signals(ask: Callable[[signal.Signals], object]) -> Iterator[None]:
    """Call ``ask`` with each signal that arrives inside and asks for a stop; put the handlers back afterwards.

    A second signal of a kind does what it did before at once, so that Ctrl-C twice ends a run.  That is not so for
    SIGUSR1, of which launchers may send two.  On other threads than the main one (ranks of a `LocalWorld`), for which
    Python has no signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _STOPS}

    def arrived(number: int, frame: FrameType | None) -> None:
        found = signal.Signals(number)
        ask(found)
        if found != signal.SIGUSR1:
            signal.signal(found, before[found])

    for number in _STOPS:
        signal.signal(number, arrived)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
