"""Floats as 64-bit integers, so that a sum has the same bits in whatever order its terms are added.

Float addition rounds at every step and is not associative; integer addition is.  Each tensor gets one exponent, from
the largest magnitude in any of its terms; every term is rounded once to a multiple of one quantum, the multiples are
added, and the sum is rounded once to the tensor's dtype.  This file knows no ranks: who calls it reduces exponents and
integers over them.

Source: pre-rounding to a common quantum is J. Demmel, H. D. Nguyen, "Fast reproducible floating-point summation",
ARITH 2013, section 3; here the multiples are kept as integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ldexp
from typing import Any, TypeAlias

import numpy as np

from mpitrain._errors import InputError, NonFiniteError
from mpitrain._typing import Array, DType
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.namespace import is_cupy, namespace, to_host

Pieces: TypeAlias = Sequence[tuple[int, slice]]
"""Number of a tensor, and where it lies in a flat array: what `Shard.pieces` gives."""

NON_FINITE = 1 << 15
"""Exponent of a tensor with an infinity or NaN: above all others, so that it survives a maximum over ranks."""

TERMS_MAX = (1 << 31) - 1
"""Most terms of a sum: 32 bits remain for each."""

CHUNK_SIZE = 1 << 15
"""Elements that are scaled, rounded and added at a time: a float and an integer copy of them stay in cache."""


def zero_exponent(dtype: DType) -> int:
    """Return the exponent of a tensor of zeros: the largest ``e`` such that only zero is below 2**e in magnitude."""
    info = np.finfo(accumulator(dtype))
    return int(info.minexp) - int(info.nmant)


def exponents(values: Array, pieces: Pieces, tensors: int) -> Array:
    """Return for each tensor the smallest exponent ``e`` such that all magnitudes are below 2**e.

    Parameters
    ----------
    values : array, shape (n,)
        float16, bfloat16, float32 or float64; NumPy or CuPy.
    pieces : sequence of (int, slice)
        Where the tensors, or parts of them, lie.
    tensors : int
        How many tensors there are.

    Returns
    -------
    NumPy array of int32, shape (tensors,)
        `zero_exponent` for tensors of zeros and for those that ``pieces`` leaves out; `NON_FINITE` where a value is
        infinite or not a number.  The exponents of all terms of a sum are the maximum over those of each.
    """
    floor = zero_exponent(values.dtype)
    found = np.full(tensors, floor, np.int32)
    chunks = list(_chunks(values, pieces))
    if not chunks:
        return found
    wide = accumulator(values.dtype)
    largest = [_largest(values[where].astype(wide, copy=False)) for _, where in chunks]
    peaks = to_host(namespace(values).stack(largest)).astype(np.float64)
    powers = np.where(peaks == 0, floor, np.frexp(peaks)[1])
    np.maximum.at(found, [number for number, _ in chunks], np.where(np.isfinite(peaks), powers, NON_FINITE))
    return found


@dataclass(frozen=True, eq=False)
class FixedPoint:
    """How the terms of a sum are held as integers, and their sum read back.

    Parameters
    ----------
    exponents : NumPy array of int32, shape (tensors,)
        Of each tensor: all terms are below 2**e in magnitude.
    terms : int
        How many terms may be added at most; room is kept for them.

    Raises
    ------
    InputError
        More terms than there is room for, or none.
    NonFiniteError
        An exponent says that a value is infinite or not a number.

    Notes
    -----
    Let T = ``terms``, b = `bits` = 63 − (bits of T), and e a tensor's exponent.  A term x is held as the integer
    nearest to x·2^(b−e), ties to even, which is at most 2^b in magnitude.  T·2^b < 2^63, so that no partial sum, in
    any order, overflows.

    *Error.*  Scaling by a power of two is exact, thus each term is off by at most half a quantum, 2^(e−b−1), and the
    sum of n ≤ T terms by n·2^(e−b−1) (`error_bound`).  With M the largest magnitude in any term, M ≥ 2^(e−1), that is
    n·2^−b·M: a bound relative to the tensor's largest term, not to each element.  Terms whose lowest bit is a multiple
    of the quantum, 2^(e−b), are held exactly.  `decode` then rounds the exact sum of the integers once to the nearest
    value of the dtype (ties to even); a subnormal result, and one of 16 bits (by way of float32), is rounded twice.

    *Zeros.*  Negative zero is held as zero: a sum that is zero is +0.0.

    *Scaling* is two multiplications, as 2^(b−e) itself may be outside the dtype's range.  It takes subnormal values
    for what they are, unless a library has told the CPU to flush them to zero.
    """

    exponents: Array
    terms: int

    def __post_init__(self) -> None:
        if not 1 <= self.terms <= TERMS_MAX:
            raise InputError("fixed point: unusable number of terms", got=self.terms, expected=f"1 to {TERMS_MAX}")
        bad = np.flatnonzero(self.exponents == NON_FINITE)
        if bad.size:
            raise NonFiniteError(
                "fixed point: a value is infinite or not a number", got=f"tensors number {bad.tolist()}"
            )

    @property
    def bits(self) -> int:
        """Each term takes this many bits, without its sign."""
        return 63 - self.terms.bit_length()

    def error_bound(self, added: int) -> Array:
        """Return the largest error of a sum of ``added`` terms before it is rounded; float64, shape (tensors,)."""
        bound: Array = np.ldexp(float(added), self.exponents - self.bits - 1)
        return bound

    def add(self, values: Array, pieces: Pieces, total: Array) -> None:
        """Add a term to a sum.

        Parameters
        ----------
        values : array, shape (n,)
            float16, bfloat16, float32 or float64; NumPy or CuPy.
        pieces : sequence of (int, slice)
            Where the tensors lie in ``values`` and ``total``; what lies between them is left alone.
        total : array of int64, shape (n,)
            The sum, in the same library; zeros before the first term.

        Raises
        ------
        InputError
            A value is beyond 2**e in magnitude, or not a number; the contents of ``total`` are then meaningless.
        """
        xp = namespace(values, total)
        work, whole = _scratch(values, accumulator(values.dtype)), _scratch(values, np.int64)
        peaks = []
        with np.errstate(over="ignore", invalid="ignore"):  # told by the peaks
            for number, where in _chunks(values, pieces):
                scaled, rounded = work[: where.stop - where.start], whole[: where.stop - where.start]
                scaled[...] = values[where]
                _scale(scaled, self.bits - int(self.exponents[number]))
                xp.rint(scaled, out=scaled)
                peaks.append(_largest(scaled))
                rounded[...] = scaled
                total[where] += rounded
        if peaks and not bool(xp.stack(peaks).max() <= 2.0**self.bits):
            raise InputError("fixed point: a value is beyond 2**exponent", remedy="take exponents() over all terms")

    def decode(self, total: Array, pieces: Pieces, out: Array, divisor: int = 1) -> None:
        """Turn a sum of integers into floats.

        Parameters
        ----------
        total : array of int64, shape (n,)
            The sum of terms that `add` made.
        pieces : sequence of (int, slice)
            Where the tensors lie in ``total`` and ``out``; what lies between them is left alone.
        out : array, shape (n,)
            Where the sums go; the terms' dtype and library.
        divisor : int
            The sum is rounded, then divided by this and rounded again: for a mean.

        Raises
        ------
        NonFiniteError
            A sum is beyond the range of the dtype.
        """
        xp = namespace(total, out)
        work = _scratch(out, accumulator(out.dtype))
        good = []
        with np.errstate(over="ignore", under="ignore"):
            for number, where in _chunks(out, pieces):
                scaled = work[: where.stop - where.start]
                scaled[...] = total[where]
                if divisor != 1:
                    scaled /= divisor
                _scale(scaled, int(self.exponents[number]) - self.bits)
                out[where] = scaled
                good.append(xp.isfinite(out[where]).all())
        if good and not bool(xp.stack(good).all()):
            raise NonFiniteError(f"a sum is beyond the range of {out.dtype}", remedy="scale the terms down")


def cut(pieces: Pieces, start: int, stop: int) -> list[tuple[int, slice]]:
    """Return the pieces of the stretch ``[start, stop)`` of a flat array, relative to it."""
    bounds = ((number, max(part.start, start), min(part.stop, stop)) for number, part in pieces)
    return [(number, slice(low - start, high - start)) for number, low, high in bounds if low < high]


def as_reals(values: Array) -> Array:
    """Return a flat complex array as the real and imaginary parts that it holds, a real one as itself; no copy."""
    return values.view(values.real.dtype) if values.dtype.kind == "c" else values


def _chunks(array: Array, pieces: Pieces) -> Iterator[tuple[int, slice]]:
    """Cut pieces into slices that stay in cache; on a GPU, where launching kernels costs more, they stay whole."""
    step = _chunk_size(array)
    for number, part in pieces:
        for start in range(part.start, part.stop, step):
            yield number, slice(start, min(start + step, part.stop))


def _chunk_size(array: Array) -> int:
    return max(1, int(array.size)) if is_cupy(array) else CHUNK_SIZE


def _scratch(like: Array, dtype: Any) -> Array:
    """Return uninitialised memory for the largest chunk of ``like``, in its library."""
    found: Array = namespace(like).empty(min(int(like.size), _chunk_size(like)), dtype)
    return found


def _scale(values: Array, power: int) -> None:
    """Multiply by 2**power in place, exactly wherever the result is normal and in range."""
    half = power // 2
    values *= ldexp(1.0, half)
    values *= ldexp(1.0, power - half)


def _largest(values: Array) -> Array:
    """Return the largest magnitude without a copy of all magnitudes."""
    largest: Array = namespace(values).maximum(values.max(), -values.min())
    return largest
