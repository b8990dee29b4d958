"""Low-rank gradients on the wire: each matrix as the product of two thin ones, found by one step of power iteration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import ClassVar

import numpy as np

from mpitrain._options import COUNT, option
from mpitrain._typing import Array, Shape
from mpitrain.arrays import Allocator, FlatBuffer, Key, Layout, Segment, namespace, plain
from mpitrain.comm.codecs import kernel
from mpitrain.comm.codecs.codec import Codec, State, known_finite
from mpitrain.comm.communicator import Communicator

_BLOCK_BYTES = 1 << 18
"""Rows of a product are made so many bytes at a time: they stay in cache."""


@dataclass(frozen=True, kw_only=True)
class PowerSGD(Codec):
    """Each tensor as an a × b matrix M (its last axis are the columns), summed as P̂ Qᵀ with ``rank`` columns each.

    Parameters
    ----------
    rank : int
        Columns r of the factors.  Tensors with (a + b)·r ≥ a·b travel uncompressed.
    min_size : int
        As in `Codec`.

    Notes
    -----
    P = Σ M Q; P̂ an orthonormal basis of P; Q ← Σ Mᵀ P̂; each rank's error is M − P̂ (Mᵀ P̂)ᵀ.  Q is kept for the next
    step (warm start), and is the same on all ranks.

    With e bytes an element: a reduce of ``e·Σ a·r`` bytes to rank 0, which alone makes P̂, a broadcast of as many, and
    an allreduce of ``e·Σ b·r`` (each tensor padded to whole cache lines) and what is uncompressed; reduce and broadcast
    together cost what an allreduce would.  Rank 0 for all, because LAPACK's last bits depend on CPU and threads; the
    product P̂ Qᵀ, which every rank makes, is taken element by element for the same reason.

    Source: Vogels, Karimireddy, Jaggi, "PowerSGD", NeurIPS 2019, algorithms 1 and 2, with Householder's QR for
    Gram–Schmidt: it gives a basis where P has lower rank, and where it is zero, too.
    """

    name: ClassVar[str] = "powersgd"

    rank: int = option(COUNT, 4)

    def takes(self, segment: Segment) -> bool:
        """See `Codec.takes`; only where the factors are smaller than the matrix."""
        rows, columns = _matrix_shape(segment.shape)
        return super().takes(segment) and (rows + columns) * self.rank < rows * columns

    def init(self, layout: Layout, key: Key, allocator: Allocator = plain) -> State:
        """Return Q of each tensor, shape (b, rank): standard normals, the same on all ranks."""
        factors = [Segment(s.name, (_matrix_shape(s.shape)[1], self.rank)) for s in layout]
        q = FlatBuffer(Layout.build(factors, layout.dtype), allocator)
        xp = namespace(q.flat)
        for factor in q.layout:
            normal = key.child(factor.name).tensor(factor.global_shape, factor.box, "normal")
            q.views[factor.name][...] = xp.asarray(normal)
        return {"q": q}

    def remembered(self, segment: Segment) -> int:
        """See `Codec.remembered`: b·rank, for Q."""
        return _matrix_shape(segment.shape)[1] * self.rank

    def sum(
        self,
        comm: Communicator,
        values: FlatBuffer,
        state: State,
        key: Key,
        out: Mapping[str, Array],
        others: list[Array],
    ) -> bool:
        """See `Codec.sum`; P̂ is orthonormal, so that sums are finite where squares of Q are."""
        xp, q = namespace(values.flat), state["q"]
        matrices = {s.name: _as_matrix(values.views[s.name]) for s in values.layout}
        p, left = self._left_factors(matrices, values.flat)
        for name, matrix in matrices.items():
            xp.matmul(matrix, q.views[name], out=left[name])
        if comm.reduce(p, out=p if comm.rank == 0 else None) is not None:
            for each in left.values():
                each[...] = xp.linalg.qr(each)[0]
        comm.broadcast(p, out=p)

        for name, matrix in matrices.items():
            xp.matmul(matrix.T, left[name], out=q.views[name])
            _multiply(left[name], q.views[name], out=matrix, takes_away=True)  # this rank's term
        sums = [q.flat, *(other.reshape(-1) for other in others)]
        fused = xp.concatenate(sums)
        comm.allreduce(fused, out=fused)
        for each, end in zip(sums, accumulate(each.size for each in sums), strict=True):
            each[...] = fused[end - each.size : end]
        for name in matrices:
            _multiply(left[name], q.views[name], out=_as_matrix(out[name]))
        return known_finite(fused)

    def _left_factors(self, matrices: Mapping[str, Array], like: Array) -> tuple[Array, dict[str, Array]]:
        """Return memory for all P, one after the other, and each of them, shape (a, rank)."""
        p = namespace(like).empty((sum(map(len, matrices.values())), self.rank), like.dtype)
        ends = np.cumsum([len(matrix) for matrix in matrices.values()]).tolist()
        views = (p[end - len(matrix) : end] for end, matrix in zip(ends, matrices.values(), strict=True))
        return p, dict(zip(matrices, views, strict=True))


def _matrix_shape(shape: Shape) -> tuple[int, int]:
    return prod(shape[:-1]), (shape[-1] if shape else 1)


def _as_matrix(view: Array) -> Array:
    return view.reshape(_matrix_shape(view.shape))


def _multiply(left: Array, right: Array, out: Array, takes_away: bool = False) -> None:
    """Write ``left @ right.T``, or take it away; summed term by term in order: the same bits on any machine."""
    xp = namespace(out)
    left, terms = xp.ascontiguousarray(left), xp.ascontiguousarray(right.T)
    if kernel.multiply(left, terms, out, takes_away):
        return
    step = max(1, _BLOCK_BYTES // (out.itemsize * out.shape[1]))
    for start in range(0, len(out), step):
        block, factors = out[start : start + step], left[start : start + step]
        product = xp.multiply(factors[:, :1], terms[0], out=None if takes_away else block)
        for column in range(1, len(terms)):
            product += factors[:, column : column + 1] * terms[column]
        if takes_away:
            block -= product
