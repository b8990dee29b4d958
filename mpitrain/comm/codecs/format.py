"""How vectors of floats lie on the wire, and the sum that any such format gives.

Each rank owns an equal share of the elements: it gets every rank's values of them in the format, adds them in full
precision, and gives the sum to all in the format again.  So each value is rounded twice, however many ranks there are,
and what the owner rounds away is left in its own error.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from mpitrain._typing import Array, DType
from mpitrain.arrays import FlatBuffer, Key, namespace
from mpitrain.comm.codecs.codec import Codec, State
from mpitrain.comm.communicator import Communicator

Wire = tuple[Array, ...]
"""What travels instead of an array of shape (rows, n): arrays that have as many rows."""


@dataclass(frozen=True, kw_only=True)
class Format(Codec):
    """A codec that writes each value, or block of values, with fewer bits.

    Notes
    -----
    `sum` of n elements on p ranks is an alltoall and an allgather of ``p·w(⌈n/p⌉)`` bytes each, of which a rank sends
    ``(p−1)·w(⌈n/p⌉)`` to others; w(n) are the bytes that the format takes for n values, and n counts the padding of
    each tensor to whole cache lines.  An allreduce moves as many values, in full.  Source of the rounding on the way
    there and back, with an error kept on both sides: Tang, Lian, Yu, Zhang, Liu, "DoubleSqueeze", ICML 2019,
    algorithm 1.
    """

    @abstractmethod
    def encode(self, rows: Array, key: Key, start: int) -> Wire:
        """Return what travels instead of ``rows``, shape (rows, n).

        Parameters
        ----------
        rows : array of float32 or float64, shape (rows, n)
            Not overwritten.  Values too large for the format become its largest; those that are not finite stay so.
        key : Key
            For rounding at random.
        start : int
            Number of the first element, in C order, among those that ``key`` is for.
        """

    @abstractmethod
    def decode(self, wire: Wire, dtype: DType) -> Array:
        """Return the values of `encode`'s arrays, shape (rows, n): the same bits wherever it runs."""

    def sum(self, comm: Communicator, values: FlatBuffer, state: State, key: Key) -> Array:
        """See `Codec.sum`."""
        flat, xp = values.flat, namespace(values.flat)
        width = -(-flat.size // comm.size)
        rows = xp.zeros((comm.size, width), flat.dtype)  # row r: the elements that rank r owns
        rows.reshape(-1)[: flat.size] = flat

        sent = self.encode(rows, key.child(f"rank{comm.rank}"), 0)
        rows -= self.decode(sent, flat.dtype)
        owned = self.decode(comm.alltoall(sent), flat.dtype).sum(axis=0, keepdims=True)

        sent = self.encode(owned, key.child("sum"), comm.rank * width)
        rows[comm.rank] += (owned - self.decode(sent, flat.dtype))[0]
        total = self.decode(comm.allgather(tuple(part[0] for part in sent)), flat.dtype)

        flat[...] = rows.reshape(-1)[: flat.size]
        return total.reshape(-1)[: flat.size]


@dataclass(frozen=True, kw_only=True)
class Full(Format):
    """Values as they are: w(n) = 4n bytes of float32, 8n of float64.  A part of other codecs, of no use by itself."""

    name: ClassVar[str] = "full"

    def encode(self, rows: Array, key: Key, start: int) -> Wire:
        """See `Format.encode`."""
        return (rows,)

    def decode(self, wire: Wire, dtype: DType) -> Array:
        """See `Format.decode`."""
        return wire[0]


def saturate(values: Array, largest: float) -> Array:
    """Return ``values`` with finite ones clipped to ±``largest``; those that are not finite must be found out."""
    xp = namespace(values)
    clipped: Array = xp.where(xp.isfinite(values), xp.clip(values, -largest, largest), values)
    return clipped
