"""Private lines between the ranks of a communicator and all that are split from it, for the guard's own messages.

Three kinds travel: what a rank calls (debug mode), questions what a rank is doing with their answers, and that a rank
has left.  Sending never waits for the other side, and nothing here waits without a deadline.

A rank that has come to its end tells rank 0, whom others ask, and stays until all have come to theirs, as in
``MPI_Finalize`` it would anyhow; meanwhile it answers.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpi4py import MPI

from mpitrain._errors import INTERRUPTED
from mpitrain.comm.absence import Answer
from mpitrain.comm.watchdog import print_stacks, say, watchdog

_POLL_S = 0.002
_FIRST_NAP_S = 0.0001
_LONGEST_NAP_S = 0.05
_PID = os.getpid()
_channels: set[Channel]


class Channel:
    """The lines of one family of communicators.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm
        Becomes this object's own.

    Attributes
    ----------
    rank, size : int
        In the family.
    open : bool
        It can be used: neither freed nor MPI finalised.
    checks : bool
        A communicator of the family is in debug mode.
    left : dict of int to str
        Ranks that have ended, and how.
    alarmed : float
        When another rank last began to end the job, on the monotonic clock.
    any_thread : bool
        Threads other than the main one may use MPI, and so this.

    Notes
    -----
    Making one is collective: one gather of where each process runs.  It ends with the communicator that the family was
    split from; what is left of the family then works unguarded.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.group = comm.Get_group()
        self.checks = False
        self.left: dict[int, str] = {}
        self.alarmed = self._asked = float("-inf")
        self._leaving = False
        self._homes: list[tuple[str, int]] = comm.allgather(_home())
        self._lock = threading.RLock()
        self.open = True
        self._sending: list[tuple[MPI.Request, bytes]] = []
        self._notes: dict[tuple[int, str], dict[str, Any]] = {}
        self._answers: dict[int, Answer] = {}
        self._questions = 0
        self.any_thread = MPI.Query_thread() == MPI.THREAD_MULTIPLE
        _channels.add(self)

    def post(self, ranks: Sequence[int], key: str, note: dict[str, Any]) -> None:
        """Tell ranks what this one calls."""
        self._say(ranks, {"key": key, "note": note})

    def take(self, rank: int, key: str) -> dict[str, Any] | None:
        """Return what a rank has posted under this key, once; None if that has not come."""
        return self._notes.pop((rank, key), None)

    def listen(self) -> None:
        """Take in all messages that have come, and answer questions."""
        status = MPI.Status()
        with self._lock:
            while self.open and (message := self._comm.Improbe(status=status)) is not None:
                data = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([data, MPI.BYTE])
                self._file(status.Get_source(), json.loads(data))

    def answer(self) -> None:
        """Listen, from a thread that is not the main one."""
        if self.any_thread:
            self.listen()

    def inquire(self, ranks: Sequence[int], patience_s: float, alarm: bool = False) -> dict[int, str]:
        """Return what each of some ranks is doing, or why it does not answer.

        Parameters
        ----------
        ranks : sequence of int
            Whom to ask.
        patience_s : float
            How long to wait for answers.
        alarm : bool
            This rank will end the job: each is to print the stacks of its process first.
        """
        heard = self.hear(ranks, patience_s, alarm)
        texts = {rank: answer.text for rank, answer in heard.items()}
        return {rank: self.left.get(rank) or texts.get(rank) or self._silence(rank) for rank in ranks}

    def hear(self, ranks: Sequence[int], patience_s: float, alarm: bool = False) -> dict[int, Answer]:
        """Return the answers that come, as `inquire`: to this question, never to an earlier one."""
        if not (self.any_thread or threading.current_thread() is threading.main_thread()):
            return {}
        with self._lock:
            self._questions = number = self._questions + 1
        self._say(ranks, {"ask": alarm, "number": number})
        deadline = time.monotonic() + patience_s
        while not (heard := self._heard(ranks, number)).keys() >= set(ranks) and time.monotonic() < deadline:
            self.listen()
            time.sleep(_POLL_S)
        return heard

    def departed(self, every_s: float) -> dict[int, str]:
        """Return the ranks that are known to have ended, and how; at most every so many seconds, ask rank 0."""
        now = time.monotonic()
        if now - self._asked > every_s:
            self._asked = now
            self._say([0], {"who": "left"})
        return self.left

    def status(self) -> str:
        """Return what this rank is doing."""
        return _ending() if self._leaving else watchdog.status()

    def start_leaving(self) -> MPI.Request:
        """Tell that this rank ends; return what is complete when all ranks do.  Collective."""
        self._leaving = True
        self._say([rank for rank in range(self.size) if rank != self.rank] if self.checks else [0], {"left": _ending()})
        return self._comm.Ibarrier()

    def close(self) -> None:
        """Stop using MPI."""
        with self._lock:
            self.open = False

    def free(self) -> None:
        """Release the lines.  Collective."""
        with self._lock:
            self.open = False
            self._comm.Free()
        _channels.discard(self)

    def abort(self, code: int = 1) -> None:
        """End all ranks of the job, with this exit code."""
        MPI.COMM_WORLD.Abort(code)

    def _heard(self, ranks: Sequence[int], number: int) -> dict[int, Answer]:
        found = {rank: self._answers.get(rank) for rank in ranks}
        return {rank: answer for rank, answer in found.items() if answer is not None and answer.question >= number}

    def _say(self, ranks: Sequence[int], message: dict[str, Any]) -> None:
        data = json.dumps(message).encode()
        with self._lock:
            if self.open:
                self._sending = [each for each in self._sending if not each[0].Test()]
                self._sending += [(self._comm.Isend([data, MPI.BYTE], rank), data) for rank in ranks]

    def _file(self, source: int, message: dict[str, Any]) -> None:
        match message:
            case {"key": key, "note": note}:
                self._notes[source, key] = note
            case {"ask": alarm, "number": number}:
                self._say([source], {"answer": Answer(number, self.status(), watchdog.waits(self))})
                if alarm:
                    self.alarmed = time.monotonic()
                    print_stacks(self)
            case {"answer": answer}:
                self._answers[source] = Answer.received(*answer)
            case {"left": how}:
                self.left[source] = how
            case {"who": _}:
                self._say([source], {"gone": list(self.left.items())})
            case {"gone": ranks}:
                self.left.update(ranks)

    def _silence(self, rank: int) -> str:
        """Return why a rank does not answer, as far as its process can be seen from here."""
        host, pid = self._homes[rank]
        if host != _home()[0]:
            return f"does not answer: stopped, dead or at the end of its program (process {pid} on {host.split()[0]})"
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return f"is dead: process {pid} is gone"
        states = {"Z": f"is dead: process {pid} has ended", "T": f"is stopped: process {pid} waits for SIGCONT"}
        return states.get(state, f"does not answer, as after the end of its program (process {pid} is alive)")


_channels = set()  # none is forgotten by some ranks only: all of them leave it together


def _home() -> tuple[str, int]:
    """Return where this process can be looked at, and its number there."""
    space = os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else ""
    return f"{socket.gethostname()} {space}", os.getpid()


def _ending() -> str:
    error = getattr(sys, "last_value", None)  # set before an uncaught error is printed
    if error is None:
        return "has exited"
    return f"has ended by {type(error).__name__}: {error}".split("\n")[0]  # one line for each rank


def _leave_all() -> None:
    if os.getpid() != _PID:  # a forked child must not speak for its parent
        return
    try:
        channels = [channel for channel in _channels if channel.open and channel.size > 1]
        try:
            watchdog.stop()
            _answer_until([channel.start_leaving() for channel in channels], channels)
        except KeyboardInterrupt:  # which on any other line ends the job as well; others may wait for this rank in vain
            if not channels:
                raise
            say(channels[0], "error: interrupted at its end, where it waits for the other ranks; the job ends here")
            channels[0].abort(INTERRUPTED)
    finally:  # a second beginning of this would meet nobody
        for channel in _channels:
            channel.close()


def _answer_until(all_leave: list[MPI.Request], channels: list[Channel]) -> None:
    """Answer other ranks until they end too: as long as ``MPI_Finalize``, which then comes, would wait for them."""
    nap_s = _FIRST_NAP_S
    while not MPI.Request.Testall(all_leave):
        for channel in channels:
            channel.listen()
        time.sleep(nap_s)
        nap_s = min(2 * nap_s, _LONGEST_NAP_S)


def _before_finalize(*_: object) -> None:
    """Let MPI be finalised by whoever does it: it deletes the attributes of this communicator first of all."""
    _leave_all()


atexit.register(_leave_all)
MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_before_finalize), True)
