"""Sums over ranks that have the same bits for every order of the ranks, algorithm and backend.

A maximum over all ranks gives each tensor its exponent, the terms become 64-bit integers
(`mpitrain.arrays.fixed_point`), and an ordinary sum of integers does the rest.  So whatever reduces integers, over
whatever memory, serves here too; this file knows no backend.

A call costs an allreduce of 4 bytes per tensor, then moves 8 bytes per element (16 for complex) where the ordinary
sum moves the dtype's 4 or 8; and it passes over the data three times: magnitudes, encoding, decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import InputError, NonFiniteError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.dtypes import accumulator, is_float, is_half
from mpitrain.arrays.fixed_point import NON_FINITE, FixedPoint, Pieces, as_reals, cut, exponents
from mpitrain.arrays.namespace import namespace
from mpitrain.comm import checks, dtypes, objects, trees
from mpitrain.comm.buffers import Fused, Parcel, accept, apart, outgoing
from mpitrain.comm.prepare import Counts, share_shape

if TYPE_CHECKING:
    from mpitrain.comm.collectives import Collectives

MIN_TERMS = 1023
"""Room is kept for this many terms at least, so that up to there the number of ranks or lanes changes no bit: a sum
over 2 ranks equals one over 4 of which two hold zeros.  It leaves 53 bits for each term."""

BUCKET_BYTES = 4 * 1024 * 1024
"""Integers are summed this much at a time, in memory that is used again."""


def allreduce(
    comm: Collectives, x: Any, op: str, out: Any, algorithm: str | None, bucket_bytes: int | None
) -> Any:  # fmt: skip
    """Reduce over all ranks, for all: `Communicator.allreduce` with ``reproducible=True``."""
    return Reduction(comm, "allreduce", op, comm.size, None, algorithm, bucket_bytes).of_tree(x, out)


def reduce(
    comm: Collectives, x: Any, op: str, root: int, out: Any, algorithm: str | None, bucket_bytes: int | None
) -> Any:  # fmt: skip
    """Reduce over all ranks, for the root: `Communicator.reduce` with ``reproducible=True``."""
    root = checks.rank("reduce", "root", root, comm.size)
    return Reduction(comm, "reduce", op, comm.size, root, algorithm, bucket_bytes).of_tree(x, out)


def reduce_scatter(comm: Collectives, x: Any, op: str, counts: Counts, out: Any, algorithm: str | None) -> Any:
    """Reduce over all ranks, and give each its rows: `Communicator.reduce_scatter` with ``reproducible=True``."""
    shares = None if counts is None else checks.counts("reduce_scatter", counts, comm.size)
    return Reduction(comm, "reduce_scatter", op, comm.size, None, algorithm).of_rows(x, shares, out)


@dataclass(frozen=True, eq=False)
class Term:
    """What a rank adds to some tensors of one dtype.

    Parameters
    ----------
    values : array, one-dimensional, real
        The tensors, in one flat array.
    pieces : sequence of (int, slice)
        Where each lies.
    names : sequence of str
        Of each, for the messages of errors.
    """

    values: Array
    pieces: Pieces
    names: Sequence[str]

    @classmethod
    def of(cls, values: Array, shapes: Sequence[Shape], dtype: DType) -> Term:
        """Return the term for arrays that lie one after the other; complex ones count as twice as many reals."""
        reals = as_reals(values)
        width = 2 if values.dtype.kind == "c" else 1
        ends = np.cumsum([0, *(width * prod(shape) for shape in shapes)]).tolist()
        pieces = [(number, slice(*bounds)) for number, bounds in enumerate(pairwise(ends))]
        return cls(reals, pieces, [f"{dtype}{list(shape)}" for shape in shapes])

    def exponents(self) -> Array:
        """Return the exponent of each tensor; int32."""
        return exponents(self.values, self.pieces, len(self.names))


@dataclass(frozen=True)
class Reduction:
    """One reproducible sum: who takes part, and what is made of it.

    Parameters
    ----------
    comm : Communicator
        The ranks.
    operation : str
        For the messages of errors.
    op : {"sum", "mean"}
        What is asked for.
    terms : int
        How many terms all ranks have together.
    root : int, optional
        The rank that gets the result; all if None.
    algorithm : str, optional
        Of the sums of integers.
    bucket_bytes : int, optional
        The most that one of their messages has; `BUCKET_BYTES` if None.

    Raises
    ------
    InputError
        Another reduction, which has no reproducible form, or needs none.
    """

    comm: Collectives
    operation: str
    op: str
    terms: int
    root: int | None = None
    algorithm: str | None = None
    bucket_bytes: int | None = None

    def __post_init__(self) -> None:
        checks.bucket_bytes(self.operation, self.bucket_bytes)
        dtypes.check_op(self.operation, self.op)
        if self.op not in ("sum", "mean"):
            why = "rounds at every step" if self.op == "prod" else "gives the same bits in any order anyway"
            raise InputError(
                f"reproducible=True is for sums; {self.op!r} {why}", operation=self.operation,
                expected="'sum' or 'mean'", remedy="leave reproducible=True away",
            )  # fmt: skip

    @property
    def receives(self) -> bool:
        """Whether this rank gets the result."""
        return self.root is None or self.root == self.comm.rank

    @property
    def divisor(self) -> int:
        """By what the sum is divided."""
        return self.terms if self.op == "mean" else 1

    def of_tree(self, x: Any, out: Any) -> Any:
        """Sum a tree of every rank, packed as for an ordinary reduction; integers are summed as they are."""
        fused = Fused(self.operation, x, out if self.receives else None, True, self.bucket_bytes, on_host=True)
        for parcel in fused.parcels:
            dtypes.check_op_dtype(self.operation, self.op, parcel.dtype)
        fused.fill()
        rounded = [parcel for parcel in fused.parcels if is_inexact(parcel.dtype)]
        terms = [Term.of(parcel.values, [part.shape for part in parcel.parts], parcel.dtype) for parcel in rounded]
        for parcel, term, code in zip(rounded, terms, self.agree(terms), strict=True):
            self.sum_lanes(code, [term.values], term.pieces, term.values)
            self._check_half(parcel)
        for parcel in fused.parcels:
            if not is_inexact(parcel.dtype):
                self.sum_integers(parcel.values)
        return fused.result() if self.receives else None

    def of_rows(self, x: Any, shares: tuple[int, ...] | None, out: Any) -> Any:
        """Sum each array of a tree, and give every rank its rows; integers are summed as they are."""
        outs = trees.leaves_like(self.operation, x, out)
        arrays = apart(self.operation, [accept(self.operation, leaf) for leaf in trees.leaves(x, self.operation)], outs)
        parcels = []
        for array, into in zip(arrays, outs, strict=True):
            dtypes.check_op_dtype(self.operation, self.op, array.dtype)
            shape = share_shape(self.operation, array.shape, self.comm.rank, self.comm.size, shares)
            parcels.append(Parcel(self.operation, [shape], [array], [into], reduces=True))
        terms = [
            Term.of(outgoing(array, accumulator(array.dtype), on_host=True), [array.shape], array.dtype)
            for array in arrays
            if is_inexact(array.dtype)
        ]
        coded = zip(terms, self.agree(terms), strict=True)
        for array, parcel in zip(arrays, parcels, strict=True):
            if is_inexact(array.dtype):
                term, code = next(coded)
                table = (array.shape[0], int(term.values.size) // max(1, array.shape[0]))
                self.scatter_lanes(code, [term.values], term.pieces, table, shares, as_reals(parcel.values))
                self._check_half(parcel)
            else:
                self.comm.reduce_scatter(array.host(), counts=shares, out=parcel.parts[0], algorithm=self.algorithm)
        return trees.rebuild(x, (parcel.results()[0] for parcel in parcels))

    def agree(self, terms: Sequence[Term]) -> list[FixedPoint]:
        """Return the code of each term, which fits those of all ranks.  Collective, unless there are none.

        Raises
        ------
        NonFiniteError
            On all ranks, if any has an infinity or NaN.
        """
        if not terms:
            return []
        found = [term.exponents() for term in terms]
        own = np.concatenate(found)
        agreed = self.comm.allreduce(own, "max")
        self.check_finite(agreed, own, [name for term in terms for name in term.names])
        cuts = np.cumsum([len(each) for each in found])[:-1]
        return [FixedPoint(part, max(self.terms, MIN_TERMS)) for part in np.split(agreed, cuts)]

    def check_finite(self, agreed: Array, own: Array, names: Sequence[str]) -> None:
        """Refuse exponents that tell of an infinity or NaN.

        Parameters
        ----------
        agreed, own : array of int32, shape (tensors,)
            Of all ranks, and of this one.
        names : sequence of str
            Of the tensors.

        Raises
        ------
        NonFiniteError
            On all ranks, naming the tensors and the ranks that have such values.
        """
        bad = np.flatnonzero(agreed == NON_FINITE).tolist()
        if not bad:
            return
        everyones = objects.gather(self.comm, bool((own == NON_FINITE).any()), None) or []
        ranks = [rank for rank, found in enumerate(everyones) if found]
        raise NonFiniteError(
            "a value is infinite or not a number", operation=self.operation,
            got=f"such values on ranks {ranks}, in {', '.join(names[number] for number in bad)}",
        )  # fmt: skip

    def sum_lanes(self, code: FixedPoint, lanes: Sequence[Array], pieces: Pieces, out: Array) -> None:
        """Sum flat real arrays of all ranks, bucket by bucket.  Collective.

        Parameters
        ----------
        code : FixedPoint
            The same on all ranks, with exponents that fit the terms of all.
        lanes : sequence of array, shape (n,)
            This rank's terms: as many as it has.
        pieces : sequence of (int, slice)
            Where the tensors lie; what lies between them is left alone.
        out : array, shape (n,)
            Where the result goes if this rank gets it; may be one of ``lanes``.
        """
        step, size = max(1, (self.bucket_bytes or BUCKET_BYTES) // 8), int(out.size)
        bucket = namespace(out, *lanes).empty(min(step, size), np.int64)
        for start in range(0, size, step):
            stop = min(start + step, size)
            total, inside = bucket[: stop - start], cut(pieces, start, stop)
            total[...] = 0
            for lane in lanes:
                code.add(lane[start:stop], inside, total)
            self.sum_integers(total)
            if self.receives:
                code.decode(total, inside, out[start:stop], self.divisor)

    def scatter_lanes(
        self,
        code: FixedPoint,
        lanes: Sequence[Array],
        pieces: Pieces,
        table: tuple[int, int],
        shares: tuple[int, ...] | None,
        out: Array,
    ) -> None:
        """Sum flat real arrays of all ranks, and give each its rows.  Collective; as `sum_lanes`, in one message.

        Parameters
        ----------
        table : (int, int)
            Rows, and elements in each: the shape of the arrays, were they not flat.
        shares : tuple of int, optional
            How many rows each rank gets; one if None.
        out : array, shape (m,)
            Where this rank's rows go.
        """
        total = namespace(out, *lanes).zeros(table, np.int64)
        for lane in lanes:
            code.add(lane, pieces, total.reshape(-1))
        own = self.comm.reduce_scatter(total, counts=shares, algorithm=self.algorithm).reshape(-1)
        first = table[1] * (self.comm.rank if shares is None else sum(shares[: self.comm.rank]))
        code.decode(own, cut(pieces, first, first + int(own.size)), out, self.divisor)

    def sum_integers(self, values: Array) -> None:
        """Sum over all ranks, in place."""
        if self.root is None:
            self.comm.allreduce(values, out=values, algorithm=self.algorithm)
        else:
            self.comm.reduce(values, root=self.root, out=values, algorithm=self.algorithm)

    def _check_half(self, parcel: Parcel) -> None:
        """Refuse a float32 result that the caller's 16 bits cannot hold."""
        if not is_half(parcel.dtype) or not self.receives:
            return
        with np.errstate(over="ignore"):
            good = bool(np.isfinite(parcel.values.astype(parcel.dtype)).all())
        if not good:
            raise NonFiniteError(f"a sum is beyond the range of {parcel.dtype}", operation=self.operation)


def is_inexact(dtype: DType) -> bool:
    """Tell whether sums in this dtype round: floats and complex."""
    return is_float(dtype) or dtype.kind == "c"
