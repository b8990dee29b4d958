"""Finds the rank that a call waits for in vain because it has come to the end of its program.

A collective cannot complete once each rank of its communicator either waits in it or has ended, at least one of them
the latter; and no message can come from a rank that has ended.  So when a call takes long, the watchdog's thread asks
the ranks concerned what they are doing; the call itself pays nothing.  What an ended rank sent before may still be on
its way, so that all must be found waiting twice, in the same calls, with time for the bytes to travel in between.  In
doubt nothing is said: a call that waits for ever then runs into its timeout.

This file knows what ranks say (`Channel`), not how a job is ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mpitrain.comm.calls import Prepared
from mpitrain.comm.direct import Doing
from mpitrain.comm.tables import table

if TYPE_CHECKING:
    from mpitrain.comm.watchdog import Watch

FIRST_S = 1.0
"""How long a call waits before anybody is asked."""

SETTLE_S = 1.5
"""How long after the first time all must be found waiting again, besides the time that the bytes may take."""

_AGAIN = 0.1
"""The others are asked again when the call has waited this much longer, as a part of what it has waited."""

_PATIENCE_S = 2.5
"""How long ranks that are asked what they do have to answer: longer than any rank's watchdog sleeps."""

_SLOWEST_BYTES_PER_S = 10e6
"""How slowly bytes may travel: as many as the largest share of a rank has, once for each rank, one after the other."""


class Wait(NamedTuple):
    """A call that a rank waits in, told from all others of this rank.

    Parameters
    ----------
    communicator : str
        Its name, the same on all its ranks.
    number : str
        Which call of this rank's on it.
    operation : str
        E.g. ``allreduce``.
    nbytes : int
        What it moves, as the ledger counts it.
    """

    communicator: str
    number: str
    operation: str
    nbytes: int


class Answer(NamedTuple):
    """What a rank says of itself.

    Parameters
    ----------
    question : int
        Number of the question that it answers.
    text : str
        What it is doing.
    waits : list of Wait
        The calls that it waits in, on communicators of the family that asks.
    """

    question: int
    text: str
    waits: list[Wait]

    @classmethod
    def received(cls, question: int, text: str, waits: Iterable[Iterable[Any]]) -> Answer:
        """Return an answer from what JSON makes of one."""
        return cls(question, text, [Wait(*each) for each in waits])


@dataclass(frozen=True)
class Heard:
    """What other ranks said when they were asked about a call.

    Parameters
    ----------
    own : Wait
        The call.
    waits : dict of int to Wait
        The call of each rank that it needs and that has not ended; empty if not all of these wait in it.
    until_s : float
        When they may be asked again, on the monotonic clock.
    """

    own: Wait
    waits: dict[int, Wait]
    until_s: float


def waiting(watch: Watch) -> Wait | None:
    """Return the call that this rank waits in on a communicator.

    None if there is no call, or one in which a rank may be busy by itself: on memory of a device, whose queue may be
    long, or one that makes or frees communicators.
    """
    way = "" if watch.current is not None else "aside "  # the two are counted apart
    call, number = watch.present()
    if isinstance(call, Doing):
        call = call.prepared()
    if not isinstance(call, Prepared) or not call.calls or any(each.stream is not None for each in call.calls):
        return None
    return Wait(watch.name, f"{way}{number}", call.operation, sum(each.logical_bytes for each in call.calls))


def find(watch: Watch, waited_s: float) -> str | None:
    """Return what is to be said of a call that cannot complete, as ranks that it needs have ended; None of any other.

    Parameters
    ----------
    watch : Watch
        Of the communicator, which is in a call.
    waited_s : float
        For how long.

    Notes
    -----
    Not collective: ranks are asked, and answer from their watchdogs' threads.
    """
    channel = watch.channel
    if waited_s < FIRST_S or channel is None or not (channel.open and channel.any_thread):
        return None
    own, last = waiting(watch), watch.heard
    if own is None or (last is not None and last.own == own and time.monotonic() < last.until_s):
        return None
    again_s = max(FIRST_S / 2, _AGAIN * waited_s)
    left, needed = channel.departed(again_s), _needed(watch)
    ended = [rank for rank in needed if rank in left]
    others = [rank for rank in needed if rank not in left and rank != channel.rank]
    if not ended or (others and (channel.rank not in needed or min(others) < channel.rank)):
        return None  # the first of those that wait speaks for all
    told = channel.hear([*ended, *others], _PATIENCE_S)
    waits = _in_vain(watch, own, told, ended, others)
    if waits and last is not None and last.waits == waits:
        return _sentence(watch, told, ended)
    pause_s = SETTLE_S + _travel_s(waits, needed) if waits else again_s
    watch.heard = Heard(own, waits, time.monotonic() + pause_s)
    return None


def _needed(watch: Watch) -> list[int]:
    """Return the ranks that a call needs, as the channel numbers them: all, or those whose message is awaited."""
    call, _ = watch.present()
    messages = [each for each in call.calls if each.peer is not None] if isinstance(call, Prepared) else []
    awaited = [each for each in messages if each.operation == "recv"] or messages
    return [watch.members[peer] for peer in sorted({each.peer for each in awaited if each.peer is not None})] or [
        *watch.members
    ]


def _in_vain(watch: Watch, own: Wait, told: dict[int, Answer], ended: list[int], others: list[int]) -> dict[int, Wait]:
    """Return the call that each rank waits in; empty if one is in no such call, does not answer, or has gone on."""
    assert watch.channel is not None
    silent = any(rank not in told for rank in (*ended, *others))
    if silent or any(told[rank].waits for rank in ended) or waiting(watch) != own:
        return {}
    found = {rank: [each for each in told[rank].waits if _same_call(each, own)] for rank in others}
    if not all(found.values()):
        return {}
    return {watch.channel.rank: own} | {rank: calls[0] for rank, calls in found.items()}


def _same_call(theirs: Wait, own: Wait) -> bool:
    """Tell whether two ranks wait in one call; each counts its own, and shares may differ."""
    return (theirs.communicator, theirs.operation) == (own.communicator, own.operation)


def _travel_s(waits: dict[int, Wait], needed: list[int]) -> float:
    return max(each.nbytes for each in waits.values()) * len(needed) / _SLOWEST_BYTES_PER_S


def _sentence(watch: Watch, told: dict[int, Answer], ended: list[int]) -> str:
    channel = watch.channel
    assert channel is not None
    texts = {rank: answer.text for rank, answer in told.items()} | {channel.rank: channel.status()}
    waiting_ranks = sorted(texts.keys() - set(ended))
    numbers = "" if watch.axis == "world" else " (ranks of the world)"
    return (
        f"error: {_ranks(ended, 'has', 'have')} come to the end of the program, and "
        f"{_ranks(waiting_ranks, 'waits', 'wait')} for that in vain{numbers}, in {watch}; the job ends here\n"
        + table({rank: (text, "") for rank, text in texts.items()})
    )


def _ranks(ranks: list[int], one: str, many: str) -> str:
    return f"rank {ranks[0]} {one}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} {many}"
