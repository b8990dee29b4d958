"""Recursive doubling of whole arrays: log₂p swaps, the fewest steps that an allreduce can have; for short messages.

R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19, 2005,
section 4.5.
"""

from __future__ import annotations

from mpitrain.comm.algorithms.core import Core
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.algorithms.shares import in_place, ufunc
from mpitrain.comm.calls import Call


def allreduce(links: Links, call: Call) -> None:
    """Swap partial results with partners at distances 1, 2, 4 and so on."""
    words, combine, core = in_place(call), ufunc(call), Core(links)
    core.join(words, combine)
    distance = 1
    while core.inside and distance < core.size:
        arrived = links.scratch("landing", words.size, words.dtype)
        peer = core.peer(distance)
        links.sendrecv(words, peer, arrived, peer)
        # Both partners combine in the same order, so that even signed zeros and NaNs agree on all ranks.
        lower, upper = (arrived, words) if peer < links.rank else (words, arrived)
        combine(lower, upper, out=words)
        distance *= 2
    core.hand_back(words)
