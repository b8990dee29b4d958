"""How vectors of floats lie on the wire, and the sum that any such format gives.

Each rank owns an equal share of the elements: it gets every rank's values of them in the format, adds them in full
precision, and gives the sum to all in the format again.  So each value is rounded twice, however many ranks there are,
and what the owner rounds away is left in its own error.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.arrays import FlatBuffer, Key, namespace
from mpitrain.arrays.namespace import is_cupy
from mpitrain.comm.codecs.codec import Codec, State
from mpitrain.comm.communicator import Communicator

Wire = tuple[Array, ...]
"""What travels instead of an array of shape (rows, n): arrays that have as many rows."""

_CHUNK = 1 << 16
"""At least so many values are rounded at a time."""


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

    @property
    def unit(self) -> int:
        """How many values, from the first of a row on, must be written together."""
        return 1

    def part(self, wire: Wire, begin: int, end: int) -> Wire:
        """Return what travels instead of the elements ``begin`` to ``end`` of each row; ``begin`` is whole units."""
        return tuple(array[..., begin:end] for array in wire)

    def sum(
        self,
        comm: Communicator,
        values: FlatBuffer,
        state: State,
        key: Key,
        out: Mapping[str, Array],
        others: list[Array],
    ) -> None:
        """See `Codec.sum`."""
        flat, xp = values.flat, namespace(values.flat)
        width = -(-flat.size // comm.size)
        padded = comm.size * width > flat.size
        rows = xp.zeros((comm.size, width), flat.dtype) if padded else flat.reshape(comm.size, width)
        if padded:
            rows.reshape(-1)[: flat.size] = flat

        owned = xp.empty((1, width), flat.dtype)  # row r: the elements that rank r owns
        sent = self._take(rows, key.child(f"rank{comm.rank}"), 0)
        wire = from_bytes(comm.alltoall(as_bytes(sent)), sent)
        for begin, end in self._chunks(rows, 0, width):
            found = self.decode(self.part(wire, begin, end), flat.dtype)
            found.sum(axis=0, keepdims=True, out=owned[:, begin:end])

        sent = self._take(owned, key.child("sum"), comm.rank * width)
        rows[comm.rank] += owned[0]
        wire = from_bytes(comm.allgather(as_bytes(tuple(part[0] for part in sent))), sent)
        for segment in values.layout:
            self._read(wire, segment.offset, out[segment.name].reshape(-1))
        if padded:
            flat[...] = rows.reshape(-1)[: flat.size]
        if others:
            comm.allreduce(others, out=others)

    def _take(self, rows: Array, key: Key, start: int) -> Wire:
        """Return what travels instead of rows, and leave there what is rounded away."""
        n, found = rows.shape[1], []
        for row in range(len(rows)):
            for begin, end in self._chunks(rows, 0, n):
                chunk = rows[row : row + 1, begin:end]
                found.append(self.encode(chunk, key, start + row * n + begin))
                chunk -= self.decode(found[-1], rows.dtype)
        join = namespace(rows).concatenate
        return tuple(join(parts, axis=1).reshape(len(rows), -1) for parts in zip(*found, strict=True))

    def _read(self, wire: Wire, offset: int, out: Array) -> None:
        """Write the values of a tensor, which may begin and end anywhere in the rows that were encoded."""
        width = wire[0].shape[1]
        for row in range(offset // width, -(-(offset + out.size) // width)):
            own = tuple(array[row : row + 1] for array in wire)
            first = row * width - offset  # where in the tensor the row begins
            start, stop = max(-first, 0), min(out.size - first, width)
            for begin, end in self._chunks(wire[0], start // self.unit * self.unit, stop):
                values = self.decode(self.part(own, begin, end), out.dtype)[0]
                out[first + max(begin, start) : first + end] = values[max(begin, start) - begin :]

    def _chunks(self, array: Array, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut columns, at least into one part, so that what is computed on the way stays in a CPU's cache."""
        step = max(1, stop - start) if is_cupy(array) else self.unit * -(-_CHUNK // self.unit)
        return [(begin, min(begin + step, stop)) for begin in range(start, max(start + 1, stop), step)]


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


def as_bytes(arrays: Wire) -> Wire:
    """Return arrays as bytes: they travel in one message, whatever their types."""
    return tuple(array.view(np.uint8) for array in arrays)


def from_bytes(arrays: Wire, sent: Wire) -> Wire:
    """Return bytes as arrays of the types that were sent."""
    return tuple(array.view(each.dtype) for array, each in zip(arrays, sent, strict=True))


def saturate(values: Array, largest: float) -> Array:
    """Return ``values`` with finite ones clipped to ±``largest``; those that are not finite must be found out."""
    xp = namespace(values)
    if bool((xp.abs(values) <= largest).all()):
        return values
    clipped: Array = xp.where(xp.isfinite(values), xp.clip(values, -largest, largest), values)
    return clipped
