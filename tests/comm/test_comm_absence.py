"""Ranks that end early: those that others wait for are named (see also `test_comm_misuse`), the others are let go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conformance import same

from mpitrain.arrays.devices import Stream
from mpitrain.comm import Communicator, absence
from mpitrain.comm.absence import Answer, Wait
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.direct import Doing
from mpitrain.comm.watchdog import Watch, watchdog

Launch = Callable[..., tuple[int | None, str]]
Answers = dict[int, list[Wait]]

LEAVES = """
import sys, time
import numpy as np
from mpitrain import world
from mpitrain.comm import absence, watchdog

PAUSE_S = 1.2
absence.FIRST_S = absence.SETTLE_S = 0.3
watchdog._LONGEST_NAP_S = 0.05
comm = world()
comm.timeout_s = 60.0  # of which nothing is used up under load
part = comm.split(comm.rank // 2)
if comm.rank == 2:
    comm.gather(np.ones(1))  # which takes a part of it, and no more
    sys.exit(0)
late = comm.rank == 1
time.sleep(PAUSE_S * late)
comm.gather(np.ones(1))
time.sleep(PAUSE_S * late)
comm.send(np.ones(1), 0) if late else comm.recv(np.ones(1), 1)
time.sleep(PAUSE_S * late)
print("sum", part.allreduce(np.ones(1)))
"""

MESSAGE = """
import time
import numpy as np
from mpitrain import world
from mpitrain.comm import absence

absence.FIRST_S = absence.SETTLE_S = 0.3
comm = world()
comm.timeout_s = 20.0
if comm.rank == 2:
    comm.recv(np.ones(3), 1)
elif comm.rank == 0:  # whom the others ask
    time.sleep(600)
"""


def test_a_rank_may_end_while_others_go_on_without_it(launch: Launch) -> None:
    code, output = launch(3, LEAVES)
    assert (code, output.count("sum [2.]")) == (0, 2), output


def test_a_message_from_a_rank_that_has_ended(launch: Launch) -> None:
    code, output = launch(3, MESSAGE, timeout_s=30.0)
    assert code not in (None, 0), output
    assert "rank 1 has come to the end of the program, and rank 2 waits for that in vain, in recv(float64[3])" in output


@dataclass
class _Told:
    """A channel to four ranks, of which the last has ended, and what they say when asked."""

    waits: Answers
    rank: int = 0
    ended: tuple[int, ...] = (3,)
    silent: tuple[int, ...] = ()
    open: bool = True
    any_thread: bool = True
    asked: list[list[int]] = field(default_factory=list)

    def departed(self, every_s: float) -> dict[int, str]:
        return dict.fromkeys(self.ended, "has exited")

    def hear(self, ranks: list[int], patience_s: float) -> dict[int, Answer]:
        self.asked.append(ranks)
        return {
            rank: Answer(1, f"told by {rank}", self.waits.get(rank, [])) for rank in ranks if rank not in self.silent
        }

    def status(self) -> str:
        return f"told by {self.rank}"


class _Case:
    """A rank whose call has waited for long, and a clock that only it moves."""

    def __init__(self, channel: _Told, call: Call | Doing | list[Call], axis: str = "world") -> None:
        self.channel, self.now = channel, 1000.0
        self.watch = Watch(axis, name="/1", members=[0, 1, 2, 3])
        self.watch.channel = channel  # type: ignore[assignment]
        self.watch.current = call if isinstance(call, Doing) else _prepared(call if isinstance(call, list) else [call])

    def find(self, after_s: float = 0.0, waited_s: float = 100.0) -> str | None:
        self.now += after_s
        return absence.find(self.watch, waited_s)

    def finds(self) -> bool:
        """Tell whether it finds something after any time."""
        return any(self.find(1000.0) for _ in range(5))


def _prepared(calls: list[Call]) -> Prepared:
    return Prepared("sendrecv" if len(calls) > 1 else calls[0].operation, calls, lambda: None)


CaseMaker = Callable[..., _Case]
BARRIER = Call("barrier")


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> CaseMaker:
    def make(*args: Any, **options: Any) -> _Case:
        made = _Case(*args, **options)
        monkeypatch.setattr(absence, "time", SimpleNamespace(monotonic=lambda: made.now))
        return made

    return make


def _in(*others: str, count: str = "7", operation: str = "barrier", nbytes: int = 0) -> Answers:
    """Return what ranks 1 and 2 say that wait in communicators of these names."""
    return {1 + i: [Wait(name, count, operation, nbytes)] for i, name in enumerate(others)}


def _message(operation: str, peer: int) -> Call:
    return Call(operation, np.dtype("f8"), recv=np.zeros(3), peer=peer)


def test_all_others_must_wait_in_the_same_communicator(case: CaseMaker) -> None:
    waits = case(_Told(_in("/1", "/1")), BARRIER)
    assert waits.find() is None
    assert waits.find(absence.SETTLE_S) == (
        "error: rank 3 has come to the end of the program, and ranks 0, 1, 2 wait for that in vain, in barrier(); "
        "the job ends here\n  rank 0: told by 0\n  rank 1: told by 1\n  rank 2: told by 2\n  rank 3: told by 3"
    )
    assert not case(_Told(_in("/1", "/2")), BARRIER).finds()
    assert not case(_Told(_in("/1")), BARRIER).finds()
    assert not case(_Told(_in("/1", "/1", operation="recv")), BARRIER).finds()


def test_a_part_says_whose_ranks_it_names(case: CaseMaker) -> None:
    waits = case(_Told(_in("/1", "/1")), BARRIER, axis="data")
    waits.find()
    told = waits.find(absence.SETTLE_S)
    assert told is not None
    assert "in vain (ranks of the world), in barrier() on 'data'; " in told


def test_nobody_is_asked_about_a_call_that_needs_no_rank_that_has_ended(case: CaseMaker) -> None:
    without = case(_Told(_in("/1", "/1")), BARRIER)
    without.watch.members = [0, 1, 2]
    assert not without.finds()
    early = case(_Told(_in("/1", "/1")), BARRIER)
    assert [early.find(1000.0, waited_s=0.9) for _ in range(3)] == [None] * 3
    assert (without.channel.asked, early.channel.asked) == ([], [])


def test_they_must_have_waited_so_for_a_while_and_not_only_since_now(case: CaseMaker) -> None:
    waits = case(_Told(_in("/1")), BARRIER)
    assert waits.find() is None
    waits.channel.waits = _in("/1", "/1")  # rank 2 has come: what it brought is on its way
    assert waits.find(1000.0) is None
    assert waits.find(absence.SETTLE_S - 0.1) is None
    assert waits.find(0.1) is not None


@pytest.mark.parametrize("change", [{"count": "8"}, {"operation": "gather"}, {"nbytes": 8}])
def test_a_rank_that_goes_on_from_call_to_call_is_alive(change: dict[str, Any], case: CaseMaker) -> None:
    waits = case(_Told(_in("/1", "/1")), BARRIER)
    for _ in range(3):
        assert waits.find(1000.0) is None
        waits.channel.waits = _in("/1", "/1", **change)
        assert waits.find(1000.0) is None
        waits.channel.waits = _in("/1", "/1")


def test_this_rank_must_wait_in_the_same_call_too(case: CaseMaker) -> None:
    waits = case(_Told(_in("/1", "/1")), BARRIER)
    waits.find()
    waits.watch.count += 1
    assert waits.find(1000.0) is None
    waits.watch.current = None
    for returned in (5, 6, 7):
        waits.watch.aside = partial(lambda count: (Doing("barrier", np.zeros(0)), count), returned)
        assert waits.find(1000.0) is None
    assert waits.find(1000.0) is not None


def test_this_rank_may_go_on_while_others_are_asked(case: CaseMaker) -> None:
    waits = case(_Told(_in("/1", "/1")), BARRIER)
    hear = waits.channel.hear

    def hear_late(ranks: list[int], patience_s: float) -> dict[int, Answer]:
        waits.watch.count += 1
        return hear(ranks, patience_s)

    assert waits.find() is None
    waits.channel.hear = hear_late  # type: ignore[method-assign]
    assert waits.find(1000.0) is None


def test_calls_of_the_short_way_are_counted_apart() -> None:
    watch = Watch("world", name="/1")
    watch.current = call = Doing("barrier", np.zeros(0))
    told = absence.waiting(watch)
    watch.current, watch.aside = None, lambda: (call, 0)
    assert absence.waiting(watch) not in (None, told)


def test_who_does_not_answer_or_is_in_a_call_after_its_end_is_no_proof(case: CaseMaker) -> None:
    assert not case(_Told(_in("/1", "/1"), silent=(1,)), BARRIER).finds()
    assert not case(_Told(_in("/1", "/1"), silent=(3,)), BARRIER).finds()
    assert not case(_Told({**_in("/1", "/1"), 3: [Wait("/2", "0", "send", 0)]}), BARRIER).finds()


def test_the_first_that_waits_asks_for_all(case: CaseMaker) -> None:
    wait = Wait("/1", "7", "barrier", 0)
    second = case(_Told({0: [wait], 2: [wait]}, rank=1), BARRIER)
    assert not second.finds()
    assert second.channel.asked == []
    assert case(_Told({2: [wait]}, rank=1, ended=(0, 3)), BARRIER).finds()


def test_others_are_asked_seldom(case: CaseMaker) -> None:
    waits = case(_Told(_in("/2", "/2")), BARRIER)
    for _ in range(100):
        waits.find(0.1)
    assert len(waits.channel.asked) == 1  # after 100 s, every 10 s


@pytest.mark.parametrize("closed", ["open", "any_thread"])
def test_nobody_can_be_asked(closed: str, case: CaseMaker) -> None:
    assert not case(_Told(_in("/1", "/1"), **{closed: False}), BARRIER).finds()  # type: ignore[arg-type]


def test_many_bytes_may_still_be_on_their_way(case: CaseMaker) -> None:
    """The largest part of any rank, once for each rank."""
    large = 25_000_000  # bytes: 4 of them at 10 MB/s are 10 s
    own = Doing("allreduce", np.zeros(large // 8), "sum")
    for call, theirs in [(own, 8), (Doing("allreduce", np.zeros(1), "sum"), large)]:
        waits = case(_Told(_in("/1", "/1", operation="allreduce", nbytes=theirs)), call)
        assert waits.find() is None
        assert waits.find(absence.SETTLE_S + 9.9) is None
        assert waits.find(0.2) is not None


def test_a_message_concerns_its_two_ranks(case: CaseMaker) -> None:
    assert not case(_Told(_in("/1", "/1")), _message("recv", 1)).finds()
    for operation in ("recv", "send"):
        waits = case(_Told({}), _message(operation, 3))
        assert waits.find() is None
        assert waits.find(absence.SETTLE_S + 0.01) is not None


def test_who_sends_and_receives_awaits_the_sender(case: CaseMaker) -> None:
    def exchange(dest: int, source: int) -> _Case:
        waits = _in("/1", "/1", operation="sendrecv")
        return case(_Told(waits), [_message("recv", source), _message("send", dest)])

    assert not exchange(dest=3, source=1).finds()  # rank 3 has received, and may end
    assert exchange(dest=1, source=3).finds()


def test_a_rank_may_be_busy_in_a_call() -> None:
    """On a device, or making a communicator: such a call is not taken for one that only waits."""
    watch = Watch("world", name="/1")
    watch.current = Prepared("barrier", [BARRIER], lambda: None)
    assert absence.waiting(watch) == Wait("/1", "0", "barrier", 0)
    watch.current = Prepared("split(axis='data')", [], lambda: None)
    assert absence.waiting(watch) is None
    stream: Any = Stream
    watch.current = Prepared("gather", [Call("gather", np.dtype("f8"), np.zeros(3), stream=stream)], lambda: None)
    assert absence.waiting(watch) is None
    watch.current = None
    assert absence.waiting(watch) is None


@pytest.mark.mpi
def test_a_wait_is_told_to_those_of_its_own_family(world: Communicator) -> None:
    """Communicators of two families have the same names; who is in them is known after they were freed, too."""
    from mpi4py import MPI

    with Communicator.from_mpi(MPI.COMM_WORLD) as one, Communicator.from_mpi(MPI.COMM_WORLD) as other:
        channels: list[Any] = [one._watch.channel, other._watch.channel]
        with one._watch.during(Prepared("barrier", [BARRIER], lambda: None)):
            found = [[operation for *_, operation, _ in watchdog.waits(channel)] for channel in channels]
        assert found == [["barrier"], []]
        world.barrier()
    assert one._watch.members == list(range(world.size))


@pytest.mark.mpi
def test_only_the_answer_to_this_question_counts(world: Communicator) -> None:
    with world.split(0) as comm:  # type: ignore[union-attr]
        channel: Any = comm._watch.channel
        channel._answers[world.rank] = Answer(channel._questions, "of before", [])
        assert channel._heard([world.rank], channel._questions + 1) == {}
        told = channel.hear([world.rank], 5.0)
        assert told[world.rank].question == channel._questions
        assert told[world.rank].text != "of before"
        same(comm.allreduce(1), world.size)


class _Lines:
    """A channel that counts what is done with it."""

    rank, size = 1, 2

    def __init__(self) -> None:
        self.open, self.begun, self.listened, self.aborted = True, 0, 0, 0

    def start_leaving(self) -> None:
        self.begun += 1

    def listen(self) -> None:
        self.listened += 1

    def close(self) -> None:
        self.open = False

    def abort(self, code: int = 1) -> None:
        self.aborted += 1


@pytest.fixture
def lines(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> _Lines:
    """The only channel of this process, as far as its end is concerned."""
    from mpitrain.comm import channel

    made = _Lines()
    monkeypatch.setattr(channel, "_channels", {made})
    monkeypatch.setattr("mpitrain.comm.watchdog.watchdog.stop", lambda: None)
    return made


@pytest.mark.mpi
def test_an_end_that_is_interrupted_ends_the_job_and_does_not_begin_again(
    lines: _Lines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What begins it again would wait for ranks that come once."""
    from mpitrain.comm import channel

    def interrupted(_: object, channels: list[object]) -> None:
        if channels:
            raise KeyboardInterrupt

    monkeypatch.setattr(channel, "_answer_until", interrupted)
    channel._leave_all()
    channel._leave_all()
    assert (lines.begun, lines.open, lines.aborted) == (1, False, 1)
    assert capsys.readouterr().err.startswith("[rank 1 of 2] error: interrupted at its end")


@pytest.mark.mpi
def test_a_forked_child_does_not_end_for_its_parent(lines: _Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpitrain.comm import channel

    monkeypatch.setattr(channel, "_answer_until", lambda *_: None)
    monkeypatch.setattr(channel, "_PID", -1)  # of the parent
    channel._leave_all()
    assert (lines.begun, lines.open) == (0, True)


@pytest.mark.mpi
def test_a_rank_that_has_ended_answers_until_all_have(lines: _Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpitrain.comm import channel

    hours, complete = count(), iter([False] * 5 + [True])
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * next(hours), sleep=lambda _: None)
    monkeypatch.setattr(channel, "time", clock)
    monkeypatch.setattr(channel, "MPI", SimpleNamespace(Request=SimpleNamespace(Testall=lambda _: next(complete))))
    others: list[Any] = [lines]
    channel._answer_until([], others)
    assert lines.listened == 5


@pytest.mark.mpi
def test_an_end_is_told_in_one_line(world: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpitrain.comm import channel

    monkeypatch.setattr("sys.last_value", ValueError("of one\nand two"), raising=False)
    assert channel._ending() == "has ended by ValueError: of one"
    assert world.size
