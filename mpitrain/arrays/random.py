"""Randomness that does not depend on the layout: vectorised Philox4x32-10.

A value is a function of (seed, purpose, step, row, column) and of nothing else, so that it is the same on every rank,
for every number of ranks, on CPU and GPU.  There is no state to save.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.3; the constants
are those of the authors' Random123.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_whole
from mpitrain._typing import Array, Shape
from mpitrain.arrays import kernel, philox_cuda
from mpitrain.arrays.box import Box
from mpitrain.arrays.namespace import is_cupy

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Array, Array, Array, Array], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Encrypt counters: ten rounds of Philox4x32.

    Parameters
    ----------
    counter : four arrays of uint64, broadcastable
        The counter's 32-bit words, each in the low half of a uint64.
    key : two ints
        The key's 32-bit words.

    Returns
    -------
    four arrays of uint64
        Random 32-bit words, each in the low half of a uint64.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (low >> _SHIFT) ^ c1 ^ np.uint64(k0),
            low & _LOW,
            (high >> _SHIFT) ^ c3 ^ np.uint64(k1),
            high & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Key:
    """Names one stream of random values.

    Parameters
    ----------
    seed : int
        The job's seed, at least 0.
    purpose : str
        What the values are for, e.g. ``"init/0.weight"``; different purposes give independent streams.
    step : int
        Training step or epoch, below 2³².
    """

    seed: int
    purpose: str = ""
    step: int = 0

    def child(self, name: str) -> Key:
        """Return the key of a stream of its own below this one."""
        return replace(self, purpose=f"{self.purpose}/{name}")

    def at(self, step: int) -> Key:
        """Return the same stream's key at another step."""
        return replace(self, step=step)

    def __post_init__(self) -> None:
        check_whole("Key", "seed", self.seed, 0)
        check_whole("Key", "step", self.step, 0)
        if self.step > _MASK:
            raise InputError("key: the step is out of range", got=self.step, expected="0 to 2³² − 1")

    @property
    def words(self) -> tuple[int, int]:
        """The cipher's key: 64 bits of a hash of seed and purpose."""
        digest = hashlib.blake2b(f"{self.seed}\0{self.purpose}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def bits(self, rows: Array, columns: tuple[int, int]) -> Array:
        """Return random 32-bit words.

        Parameters
        ----------
        rows : array of int, shape (n,)
            Global row numbers (of samples, say); NumPy or CuPy.
        columns : (int, int)
            First and last-plus-one column.

        Returns
        -------
        array of uint32, shape (n, columns[1] - columns[0])
            In the library of ``rows``.
        """
        first, last = columns
        low, high = first // 4, -(-last // 4)
        counters = rows, low, high, self.step, self.words
        table = philox_cuda.philox(*counters) if is_cupy(rows) else kernel.philox(*counters)
        if table is None:
            table = self._blocks(rows, low, high)
        found: Array = table[:, first - 4 * low : last - 4 * low]
        return found

    def _blocks(self, rows: Array, low: int, high: int) -> Array:
        """Return the words of blocks of four, shape (n, 4 * (high - low))."""
        index = rows.astype(np.uint64)[:, None]
        blocks = np.arange(low, high, dtype=np.uint64)[None, :]
        words = philox4x32((blocks, index & _LOW, index >> _SHIFT, np.asarray(self.step, np.uint64)), self.words)
        shape = (rows.shape[0], high - low)
        table: Array = np.stack([np.broadcast_to(w, shape) for w in words], axis=-1).astype(np.uint32)
        return table.reshape(shape[0], 4 * (high - low))

    def uniform(self, rows: Array, columns: tuple[int, int], dtype: Any = np.float32) -> Array:
        """Return values in [0, 1): 24 random bits each for float32, 53 for float64 (shape as `bits`)."""
        if np.dtype(dtype) == np.float32:
            return unit_interval(self.bits(rows, columns))
        words = self.bits(rows, (2 * columns[0], 2 * columns[1])).astype(np.uint64)
        return ((words[:, ::2] >> np.uint64(5)) * 2.0**26 + (words[:, 1::2] >> np.uint64(6))) * 2.0**-53

    def permutation(self, n: int) -> Array:
        """Return a random order of ``0 … n-1`` (int64), by sorting 64-bit keys."""
        words = self.bits(np.arange(n), (0, 2)).astype(np.uint64)
        return np.argsort((words[:, 0] << _SHIFT) | words[:, 1], kind="stable")

    def tensor(self, global_shape: Shape, box: Box, kind: str = "uniform") -> Array:
        """Return a box of a random tensor: the same values whichever box they are asked for in.

        Parameters
        ----------
        global_shape : tuple of int
            Shape of the whole tensor; its last axis gives the columns.
        box : tuple of (int, int)
            The part wanted.
        kind : {"uniform", "normal"}
            Uniform on [0, 1), or standard normal by Box–Muller.

        Returns
        -------
        array of float64, shape of the box
        """
        *leading, columns = box if box else ((0, 1),)
        axes = [np.arange(start, stop) for start, stop in leading]
        lead_shape = tuple(len(axis) for axis in axes)
        grid = np.meshgrid(*axes, indexing="ij")
        rows = np.ravel_multi_index(grid, global_shape[:-1]).ravel() if axes else np.zeros(1, np.int64)
        if kind == "uniform":
            values = self.uniform(rows, columns, np.float64)
        else:
            values = _box_muller(self.bits(rows, (2 * columns[0], 2 * columns[1])))
        return values.reshape(*lead_shape, columns[1] - columns[0]) if box else values.reshape(())


def unit_interval(words: Array) -> Array:
    """Turn random 32-bit words into float32 values in [0, 1), by the upper 24 bits of each."""
    return (words >> 8).astype(np.float32) * np.float32(2.0**-24)


def _box_muller(words: Array) -> Array:
    """Turn pairs of 32-bit words into standard normals, one a pair so that no value leans on its neighbour."""
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    normal: Array = np.sqrt(-2.0 * np.log(uniform[:, ::2])) * np.cos(2.0 * np.pi * uniform[:, 1::2])
    return normal
