"""8-bit integers on the wire, with one scale per block of values, rounded at random so that the mean is right."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import numpy as np

from mpitrain._options import Interval, option
from mpitrain._typing import Array, DType
from mpitrain.arrays import Key, namespace
from mpitrain.arrays.random import unit_interval
from mpitrain.comm.codecs import kernel
from mpitrain.comm.codecs.format import Format, Wire, saturate

_LARGEST = 127
_LARGEST_STEP = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """Each value as a whole number of steps, 127 of which are its block's largest size: w(n) = n + 4·⌈n/block⌉ bytes.

    Parameters
    ----------
    block : int
        Values that share a step, itself a float32.
    min_size : int
        As in `Codec`.

    Notes
    -----
    A value of y steps becomes ⌊y + u⌋ with u uniform on [0, 1), the expectation of which is y.  The u of an element
    follows from (seed, step, rank, element), so that nothing about them need be saved.  Source: Alistarh, Grubic, Li,
    Tomioka, Vojnovic, "QSGD", NeurIPS 2017, section 3.1, with the maximum norm and the buckets of its variants.
    """

    name: ClassVar[str] = "int8"

    block: int = option(Interval(8, inf, whole=True), 256)

    def encode(self, rows: Array, key: Key, start: int) -> Wire:
        """See `Format.encode`."""
        xp, block = namespace(rows), self.block
        count, n = rows.shape
        codes, steps = xp.empty((count, n), np.int8), xp.empty((count, -(-n // block)), np.float32)
        for row in range(count):
            words = key.bits(xp.zeros(1, np.int64), (start + row * n, start + (row + 1) * n))[0]
            if not kernel.quantise(rows[row], words, block, codes[row], steps[row]):
                codes[row], steps[row] = self._round(rows[row], unit_interval(words))
        return codes, steps

    @property
    def unit(self) -> int:
        """See `Format.unit`."""
        return self.block

    def part(self, wire: Wire, begin: int, end: int) -> Wire:
        """See `Format.part`."""
        codes, steps = wire
        return codes[..., begin:end], steps[..., begin // self.block : -(-end // self.block)]

    def _round(self, values: Array, noise: Array) -> tuple[Array, Array]:
        """Return the codes of some values, the first of which begins a block, and the step of each block."""
        xp = namespace(values)
        blocks = xp.zeros((-(-values.size // self.block), self.block), values.dtype)
        blocks.reshape(-1)[: values.size] = values
        steps = saturate(xp.abs(blocks).max(axis=1) / _LARGEST, _LARGEST_STEP).astype(np.float32)
        blocks /= xp.where(steps == 0, 1, steps)[:, None]
        scaled = blocks.reshape(-1)[: values.size]
        scaled += noise
        xp.floor(scaled, out=scaled)
        xp.clip(scaled, -_LARGEST, _LARGEST, out=scaled)  # rounding may carry the largest value one step too far
        return scaled.astype(np.int8), steps  # where a step is not finite, no code makes its value finite

    def decode(self, wire: Wire, dtype: DType) -> Array:
        """See `Format.decode`."""
        codes, steps = wire
        xp = namespace(codes)
        values: Array = xp.empty(codes.shape, dtype)
        if not kernel.dequantise(codes, steps, self.block, values):
            sizes = xp.repeat(steps.astype(dtype, copy=False), self.block, axis=-1)
            xp.multiply(codes, sizes[:, : codes.shape[1]], out=values)
        return values
