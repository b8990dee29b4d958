"""16-bit floats on the wire: float16 has the finer steps, bfloat16 the range of float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpitrain._typing import Array, DType
from mpitrain.arrays import Key, namespace
from mpitrain.comm.codecs import kernel
from mpitrain.comm.codecs.format import Format, Wire, saturate

_FLOAT16_MAX = 65504.0
_BFLOAT16_MAX = 2.0**128 - 2.0**120
_QUIET_NAN = 0x7FC0


@dataclass(frozen=True, kw_only=True)
class Fp16(Format):
    """IEEE float16, rounded to nearest: w(n) = 2n bytes.

    Parameters
    ----------
    min_size : int
        As in `Codec`.

    Notes
    -----
    What of a sum of gradients is beyond ±65,504 is left for later steps, by error feedback; where sums are often that
    large, `Bf16` is the better choice.
    """

    name: ClassVar[str] = "fp16"

    def encode(self, rows: Array, key: Key, start: int) -> Wire:
        """See `Format.encode`."""
        words = namespace(rows).empty(rows.shape, np.float16)
        if not kernel.convert("to_fp16", rows, words):
            words[...] = saturate(rows, _FLOAT16_MAX)
        return (words,)

    def decode(self, wire: Wire, dtype: DType) -> Array:
        """See `Format.decode`."""
        values: Array = namespace(wire[0]).empty(wire[0].shape, dtype)
        if not kernel.convert("from_fp16", wire[0], values):
            values[...] = wire[0]
        return values


@dataclass(frozen=True, kw_only=True)
class Bf16(Format):
    """bfloat16, the upper half of a float32, rounded to nearest with ties to even: w(n) = 2n bytes.

    Parameters
    ----------
    min_size : int
        As in `Codec`.

    Notes
    -----
    On the bits of float32, so that no package for the type is needed; it travels as uint16.
    """

    name: ClassVar[str] = "bf16"

    def encode(self, rows: Array, key: Key, start: int) -> Wire:
        """See `Format.encode`."""
        words = namespace(rows).empty(rows.shape, np.uint16)
        if not kernel.convert("to_bf16", rows, words):
            words[...] = _upper_halves(saturate(rows, _BFLOAT16_MAX).astype(np.float32, copy=False))
        return (words,)

    def decode(self, wire: Wire, dtype: DType) -> Array:
        """See `Format.decode`."""
        values: Array = namespace(wire[0]).empty(wire[0].shape, dtype)
        if not kernel.convert("from_bf16", wire[0], values):
            values[...] = (wire[0].astype(np.uint32) << 16).view(np.float32)
        return values


def _upper_halves(single: Array) -> Array:
    bits = single.view(np.uint32)
    half_way = (bits >> 16) & 1  # an odd upper half is rounded up at the half, an even one just above it
    half_way += 0x7FFF
    words = ((bits + half_way) >> 16).astype(np.uint16)
    words[namespace(single).isnan(single)] = _QUIET_NAN  # the carry may have run through all of a NaN's bits
    return words
