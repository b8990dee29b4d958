"""Only the largest gradients on the wire, as indices and values; what is left out grows until its turn comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import Choice, Interval, option
from mpitrain._typing import Array
from mpitrain.arrays import Allocator, FlatBuffer, Key, Layout, namespace, plain
from mpitrain.comm.codecs.codec import Codec, State, known_finite
from mpitrain.comm.codecs.format import as_bytes, from_bytes
from mpitrain.comm.codecs.formats import FORMATS
from mpitrain.comm.communicator import Communicator

_STRIDE = 31
"""Between the elements of a sample; coprime to the lengths that rows usually have, lest it see a few columns only."""

_MOST_ELEMENTS = 1 << 32

_SPARE = 8
"""How many elements of a sample may reach its threshold, besides 1.5 times as many as it should have of the chosen."""

_RIDES_BYTES = 1 << 16
"""Up to this size of all ranks together, what is not compressed is gathered too: it saves a message that would wait."""


@dataclass(frozen=True, kw_only=True)
class TopK(Codec):
    """The elements of largest size on each rank: of a tensor of n, max(1, round(ratio·n)).

    Parameters
    ----------
    ratio : float
        Share of the elements that is sent, in (0, 1].
    values : {"full", "fp16", "bf16", "int8"}
        How the values travel; what that rounds away is left over too.
    min_size : int
        As in `Codec`.

    Notes
    -----
    For k elements of all tensors together, an allgather of ``p·(4k + w(k))`` bytes, of which a rank sends
    ``(p−1)·(4k + w(k))``; w(k) are the bytes that the format takes for k values.  That grows with p, and suits few
    ranks or a small ratio.  Each tensor has its share, lest one of large gradients keep the others waiting.  All ranks
    add the same terms in the order of the ranks.  What is uncompressed is gathered with them where that is at most
    64 KiB of all ranks, else it takes an allreduce.

    Source: Aji, Heafield, "Sparse communication for distributed gradient descent", EMNLP 2017, algorithm 1.
    """

    name: ClassVar[str] = "topk"

    ratio: float = option(Interval(0.0, 1.0, "(]"), 0.01)
    values: str = option(Choice(tuple(FORMATS)), "full")

    def init(self, layout: Layout, key: Key, allocator: Allocator = plain) -> State:
        """Return nothing; see `Codec.init`.

        Raises
        ------
        InputError
            There are more elements than indices of 32 bits can tell apart.
        """
        if layout.size > _MOST_ELEMENTS:
            raise InputError(
                "too many elements for indices of 32 bits", operation="topk", got=f"{layout.size:,}",
                expected=f"at most {_MOST_ELEMENTS:,}", remedy="take another codec, or divide the model's parameters",
            )  # fmt: skip
        return super().init(layout, key, allocator)

    def sum(
        self,
        comm: Communicator,
        values: FlatBuffer,
        state: State,
        key: Key,
        out: Mapping[str, Array],
        others: list[Array],
    ) -> bool:
        """See `Codec.sum`; what is not finite is chosen first, so that the terms tell of all."""
        flat, xp, form = values.flat, namespace(values.flat), FORMATS[self.values]()
        chosen = xp.concatenate([s.offset + self._largest(flat[s.offset : s.stop]) for s in values.layout])
        chosen = chosen.astype(np.uint32)
        sent = form.encode(flat[chosen][None], key.child(f"rank{comm.rank}"), 0)
        flat[chosen] -= form.decode(sent, flat.dtype)[0]

        rides = comm.size * sum(each.nbytes for each in others) <= _RIDES_BYTES
        mine = (chosen, *(part[0] for part in sent), *(each.reshape(-1) for each in others if rides))
        everyones, *found = from_bytes(comm.allgather(as_bytes(mine)), mine)
        if rides:
            for other, gathered in zip(others, found[len(sent) :], strict=True):
                _add_up(gathered, other)
        else:
            comm.allreduce(others, out=others)

        terms, begin = form.decode(tuple(found[: len(sent)]), flat.dtype), 0
        for s in values.layout:
            total, end = out[s.name].reshape(-1), begin + self._count(s.size)
            total[...] = 0
            for rank in range(comm.size):
                total[everyones[rank, begin:end] - s.offset] += terms[rank, begin:end]
            begin = end
        return known_finite(terms, *others)

    def _count(self, size: int) -> int:
        """Return how many of a tensor's elements are sent."""
        return max(1, round(self.ratio * size))

    def _largest(self, tensor: Array) -> Array:
        """Return the positions of a tensor's largest elements; NaN counts as larger than any."""
        return largest(tensor, self._count(tensor.size))


def _add_up(rows: Array, out: Array) -> None:
    """Write the sum of rows, in their order: the same bits on all ranks."""
    total = rows[0].copy()
    for row in rows[1:]:
        total += row
    out[...] = total.reshape(out.shape)


def largest(values: Array, count: int) -> Array:
    """Return the positions of the values of largest size, in no order; NaN counts as larger than any.

    Parameters
    ----------
    values : array of float32 or float64, shape (n,)
        NumPy or CuPy.
    count : int
        How many, up to n.

    Returns
    -------
    array of int64, shape (count,)
        Of values of one size, any.

    Notes
    -----
    To order all n is costly.  So a sample gives a threshold that few values reach, and only those are ordered; where
    fewer than ``count`` reach it, because the sample was not like the rest, all values are.  The sizes of floats are in
    the order of their bits.
    """
    xp = namespace(values)
    bits = values.view(f"u{values.itemsize}")
    sizes = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    sample = sizes[::_STRIDE]
    rest = len(sample) - 3 * count * len(sample) // (2 * len(sizes)) - _SPARE
    if rest > len(sample) // 2:
        few = xp.flatnonzero(sizes >= xp.partition(sample, rest)[rest])
        if len(few) >= count:
            chosen: Array = few[_last(sizes[few], count)]
            return chosen
    return _last(sizes, count)


def _last(sizes: Array, count: int) -> Array:
    """Return the positions of the largest of some whole numbers."""
    rest = len(sizes) - count
    positions: Array = namespace(sizes).argpartition(sizes, rest)[rest:]
    return positions
