"""Finds the rank that a call waits for in vain because it has come to the end of its program.

Nobody can come any more once all ranks of a communicator either wait in it or have ended; and a rank that has ended
sends nothing.  That is found by asking, from the watchdog's thread, about a call that takes long; a call pays nothing.
It knows what ranks say (`Channel`), not how a job is ended.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mpitrain.comm.calls import Prepared
from mpitrain.comm.direct import Doing
from mpitrain.comm.tables import table

if TYPE_CHECKING:
    from mpitrain.comm.watchdog import Watch

FIRST_S = 2.0
"""How long a call waits before anybody is asked."""

_AGAIN = 0.1
"""After which part of the time that it has waited rank 0 is asked again: it answers all."""

_PATIENCE_S = 2.5
"""How long ranks that are asked what they do have to answer: longer than the watchdog of any sleeps."""

_SLOWEST_BYTES_PER_S = 10e6
"""A call may take as long as its bytes take at this rate: a rank that has ended may have sent its part."""

_STAGGER_S = 0.1
"""How much later than the one before it each rank speaks: the first ends the job."""


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
    channel, call = watch.channel, watch.present()[0]
    if channel is None or call is None or waited_s < FIRST_S:
        return None
    left = channel.departed(max(FIRST_S / 2, _AGAIN * waited_s))
    needed = _peers(watch, call) or watch.members()
    ended = [rank for rank in needed if rank in left]
    if not ended or waited_s < FIRST_S + _nbytes(call) / _SLOWEST_BYTES_PER_S:
        return None
    return _sentence(watch, ended, needed)


def _sentence(watch: Watch, ended: list[int], needed: list[int]) -> str | None:
    """Return what is to be said, unless a rank is somewhere else and may still come."""
    channel, count = watch.channel, watch.count
    assert channel is not None
    others = [rank for rank in needed if rank not in (*ended, channel.rank)]
    told = channel.inquire([*ended, *others], _PATIENCE_S)
    if any(watch.name not in channel.waits.get(rank, ()) for rank in others):
        return None
    waiting = sorted([channel.rank, *others])
    time.sleep(_STAGGER_S * waiting.index(channel.rank))
    if watch.count != count or watch.present()[0] is None:
        return None
    rows = {rank: (said, "") for rank, said in told.items()} | {channel.rank: (channel.status(), "")}
    return (
        f"error: {_ranks(ended, 'has', 'have')} come to the end of the program, and "
        f"{_ranks(waiting, 'waits', 'wait')} for that in vain, in {watch}; the job ends here\n{table(rows)}"
    )


def _ranks(ranks: list[int], one: str, many: str) -> str:
    return f"rank {ranks[0]} {one}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} {many}"


def _peers(watch: Watch, call: object) -> list[int]:
    """Return the other ranks of a message, as the channel numbers them; none for a collective."""
    calls = call.calls if isinstance(call, Prepared) else ()
    peers = {each.peer for each in calls if each.peer is not None}
    members = watch.members() if peers else []
    return [members[peer] for peer in sorted(peers)]


def _nbytes(call: object) -> int:
    if isinstance(call, Doing):
        call = call.prepared()
    return sum(each.logical_bytes for each in call.calls) if isinstance(call, Prepared) else 0
