"""Finds the rank that a call waits for in vain because it has come to the end of its program.

Nobody can come any more once all ranks of a communicator either wait in the same collective or have ended; and a rank
that has ended sends nothing.  That is found by asking, from the watchdog's thread, about a call that takes long; a call
pays nothing.  Since what an ended rank sent before may still be on its way, it must be found twice, nobody having moved
in between.  In doubt nothing is said: a call that waits for ever then runs into its timeout.

It knows what ranks say (`Channel`), not how a job is ended.
"""

from __future__ import annotations

import time
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
"""How long, and for the time of its bytes, all are to be seen to wait."""

_AGAIN = 0.1
"""After which part of the time that it has waited others are asked again."""

_PATIENCE_S = 2.5
"""How long ranks that are asked what they do have to answer: longer than the watchdog of any sleeps."""

_SLOWEST_BYTES_PER_S = 10e6
"""The largest part of any rank may have to travel at this rate, once for each of the ranks."""


class Answer(NamedTuple):
    """What a rank says of itself.

    Parameters
    ----------
    question : int
        Number of the question that it answers.
    text : str
        What it is doing.
    waits : list of list
        Calls that it waits in on communicators of the family that asks, each as `waiting` has it.
    """

    question: int
    text: str
    waits: list[list[Any]]


@dataclass(frozen=True)
class Heard:
    """What other ranks said when they were asked about a call.

    Parameters
    ----------
    own : list
        The call, as `waiting` has it.
    waits : dict of int to list
        That of each rank that it takes and that has not ended; none if not all of them wait in it.
    until_s : float
        When they may be asked again, on the monotonic clock.
    """

    own: list[Any]
    waits: dict[int, list[Any]]
    until_s: float


def waiting(watch: Watch) -> list[Any] | None:
    """Return what tells a call of this rank's from any other.

    Returns
    -------
    list of str, str, str and int, or None
        Name of the communicator, which call of this rank's on it, the operation, and its bytes.  None if there is no
        call, or one in which a rank may be busy by itself: on memory of a device, whose queue may be long, or one that
        makes or frees communicators.
    """
    number = "" if watch.current is not None else "aside "  # the two ways are counted apart
    call, count = watch.present()
    if isinstance(call, Doing):
        call = call.prepared()
    if not isinstance(call, Prepared) or not call.calls or any(each.stream is not None for each in call.calls):
        return None
    return [watch.name, f"{number}{count}", call.operation, sum(each.logical_bytes for each in call.calls)]


def find(watch: Watch, waited_s: float) -> str | None:
    """Return what is to be said of a call that cannot end, as ranks that it needs have ended; None of any other.

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
    """Return the ranks that a call takes, as the channel numbers them: all, or those whose message is awaited."""
    call, _ = watch.present()
    messages = [each for each in call.calls if each.peer is not None] if isinstance(call, Prepared) else []
    awaited = [each for each in messages if each.operation == "recv"] or messages
    return [watch.members[peer] for peer in sorted({each.peer for each in awaited if each.peer is not None})] or [
        *watch.members
    ]


def _in_vain(
    watch: Watch, own: list[Any], told: dict[int, Answer], ended: list[int], others: list[int]
) -> dict[int, list[Any]]:
    """Return the call that each rank waits in; none if one is in no such call, or not heard of, or has gone on."""
    assert watch.channel is not None
    silent = any(rank not in told for rank in (*ended, *others))
    if silent or any(told[rank].waits for rank in ended) or waiting(watch) != own:
        return {}
    name, _, operation, _ = own
    found = {rank: [each for each in told[rank].waits if (each[0], each[2]) == (name, operation)] for rank in others}
    if not all(found.values()):
        return {}
    return {watch.channel.rank: own} | {rank: calls[0] for rank, calls in found.items()}


def _travel_s(waits: dict[int, list[Any]], needed: list[int]) -> float:
    largest_bytes = max(nbytes for *_, nbytes in waits.values())
    return float(largest_bytes) * len(needed) / _SLOWEST_BYTES_PER_S


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
