"""How a flat array is cut into the ranks' shares, and collectives that are made of moves of shares.

Many algorithms are a *scatter* (reduce in place, so that each rank ends with its own share reduced) and a *gather* (in
place: each rank begins with its own share and ends with all).  Here is what follows from such a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

from mpitrain._typing import Array
from mpitrain.comm.algorithms.links import Links
from mpitrain.comm.calls import Call
from mpitrain.comm.dtypes import UFUNCS

Bounds: TypeAlias = Sequence[int]
"""Where shares begin, and the end of the last: share i of ``words`` is ``words[bounds[i]:bounds[i + 1]]``."""

Combine: TypeAlias = Callable[..., Any]
"""Of two words each, and ``out``, which may be one of them: a NumPy ufunc, or what queues such work on a device."""

Scatter: TypeAlias = Callable[[Links, Array, Bounds, Combine], None]
Gather: TypeAlias = Callable[[Links, Array, Bounds], None]


def even(elements: int, parts: int) -> Bounds:
    """Cut into parts whose sizes differ by at most one element, the larger ones first."""
    size, larger = divmod(elements, parts)
    return [i * size + min(i, larger) for i in range(parts + 1)]


def share(words: Array, bounds: Bounds, index: int) -> Array:
    """Return one share; indices wrap around."""
    index %= len(bounds) - 1
    return words[bounds[index] : bounds[index + 1]]


def ufunc(call: Call) -> Combine:
    """Return what combines the values of two ranks, where they lie."""
    op, stream = call.op or "", call.stream
    return UFUNCS[op] if stream is None else partial(stream.combine, op)


def in_place(call: Call) -> Array:
    """Return the words of an operation that works in place."""
    assert call.recv is not None
    return call.recv


def allreduce(scatter: Scatter, gather: Gather, links: Links, call: Call) -> None:
    """Reduce so that each rank has a share of the result, then collect the shares."""
    words = in_place(call)
    bounds = even(words.size, links.size)
    scatter(links, words, bounds, ufunc(call))
    gather(links, words, bounds)


def reduce(scatter: Scatter, links: Links, call: Call) -> None:
    """Reduce so that each rank has a share of the result, then send the shares to the root."""
    words, root = in_place(call), call.root or 0
    bounds = even(words.size, links.size)
    scatter(links, words, bounds, ufunc(call))
    if links.rank == root:
        links.exchange([], [(share(words, bounds, i), i) for i in range(links.size) if i != root])
    else:
        links.send(share(words, bounds, links.rank), root)


def broadcast(gather: Gather, links: Links, call: Call) -> None:
    """Send each rank a share, then collect the shares."""
    words, root = in_place(call), call.root or 0
    bounds = even(words.size, links.size)
    if links.rank == root:
        links.exchange([(share(words, bounds, i), i) for i in range(links.size) if i != root], [])
    else:
        links.recv(share(words, bounds, links.rank), root)
    gather(links, words, bounds)


def reduce_scatter(scatter: Scatter, links: Links, call: Call) -> None:
    """Reduce in a copy, for the caller's memory is only read, and keep the own share."""
    assert call.send is not None
    words = links.scratch("copy", call.send.size, call.send.dtype)
    links.copy(call.send, words)
    bounds = _bounds(call, words.size, links.size)
    scatter(links, words, bounds, ufunc(call))
    links.copy(share(words, bounds, links.rank), in_place(call))


def allgather(gather: Gather, links: Links, call: Call) -> None:
    """Put the own share in its place, then collect the others."""
    assert call.send is not None
    words = in_place(call)
    bounds = _bounds(call, words.size, links.size)
    links.copy(call.send, share(words, bounds, links.rank))
    gather(links, words, bounds)


def _bounds(call: Call, elements: int, size: int) -> Bounds:
    return even(elements, size) if call.counts is None else list(accumulate(call.counts, initial=0))
