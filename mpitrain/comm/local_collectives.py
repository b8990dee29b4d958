"""What each collective does to the buffers of all ranks at once, computed in rank order by one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

import numpy as np

from mpitrain._typing import Array
from mpitrain.comm.calls import Call
from mpitrain.comm.dtypes import UFUNCS


def _fold(calls: list[Call], payloads: list[Any]) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(reduce(UFUNCS[calls[0].op or "sum"], payloads))


def _hand_out(calls: list[Call], value: Array) -> None:
    for call in calls:
        if call.recv is not None:
            call.recv[...] = value


def _cut(values: Array, counts: tuple[int, ...] | None, size: int) -> list[Array]:
    """Cut values into the ranks' shares."""
    return np.split(values, size if counts is None else np.cumsum(counts)[:-1])


def _allreduce(calls: list[Call], payloads: list[Any]) -> None:
    _hand_out(calls, _fold(calls, payloads))


def _reduce(calls: list[Call], payloads: list[Any]) -> None:
    _hand_out([calls[calls[0].root or 0]], _fold(calls, payloads))


def _broadcast(calls: list[Call], payloads: list[Any]) -> None:
    _hand_out(calls, payloads[calls[0].root or 0])


def _reduce_scatter(calls: list[Call], payloads: list[Any]) -> None:
    for call, part in zip(calls, _cut(_fold(calls, payloads), calls[0].counts, len(calls)), strict=True):
        _hand_out([call], part)


def _gather(calls: list[Call], payloads: list[Any]) -> None:
    _hand_out([call for call in calls if call.recv is not None], np.concatenate(payloads))


def _scatter(calls: list[Call], payloads: list[Any]) -> None:
    root = calls[0].root or 0
    for call, part in zip(calls, _cut(payloads[root], calls[0].counts, len(calls)), strict=True):
        _hand_out([call], part)


def _alltoall(calls: list[Call], payloads: list[Any]) -> None:
    parts = [_cut(payload, call.counts, len(calls)) for call, payload in zip(calls, payloads, strict=True)]
    for rank, call in enumerate(calls):
        _hand_out([call], np.concatenate([part[rank] for part in parts]))


def unequal(calls: list[Call], names: Sequence[int]) -> str:
    """Tell where a rank of an alltoall takes other than what another gives it; empty if nowhere.

    Parameters
    ----------
    calls : list of Call
        Of all ranks; the same but for what they give and take.
    names : sequence of int
        How the ranks are called.
    """
    for (giver, gives), (taker, takes) in product(enumerate(calls), repeat=2):
        given, taken = gives.counts, takes.recv_counts
        if given is not None and taken is not None and given[taker] != taken[giver]:
            return (
                f"{gives.operation}: rank {names[giver]} gives {given[taker]} elements to rank {names[taker]}, "
                f"which takes {taken[giver]}"
            )
    return ""


def _barrier(calls: list[Call], payloads: list[Any]) -> None:
    """Nothing is exchanged: that all ranks are here is what was asked for."""


COLLECTIVES: dict[str, Callable[[list[Call], list[Any]], None]] = {
    "allreduce": _allreduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "reduce_scatter": _reduce_scatter,
    "allgather": _gather,
    "gather": _gather,
    "scatter": _scatter,
    "alltoall": _alltoall,
    "barrier": _barrier,
}
"""By operation: fills the ``recv`` of every call from copies of what the ranks contributed."""
