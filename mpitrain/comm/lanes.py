"""Sums of lanes: a fixed number of terms that any number of ranks share out as they like, always with the same bits.

A lane is a fixed part of a global batch, and its term the gradient of that part.  There are two ways to know the
exponents that a reproducible sum needs: from lanes that are kept until the last is there (`lane_sum`,
`lane_reduce_scatter`), or predicted from the sum before, with lanes added as they come (`LaneSum`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from mpitrain._errors import DtypeError, InputError, MismatchError
from mpitrain._typing import Array, DType, Shape
from mpitrain.arrays.fixed_point import TERMS_MAX, FixedPoint, Pieces, as_reals, exponents, zero_exponent
from mpitrain.arrays.flatbuffer import Allocator, plain
from mpitrain.arrays.layout import Layout
from mpitrain.arrays.namespace import is_cupy, namespace
from mpitrain.comm import checks
from mpitrain.comm.buffers import accept
from mpitrain.comm.reproducible import MIN_TERMS, Reduction, is_inexact

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator


def lane_sum(
    comm: Communicator,
    lanes: Sequence[Array],
    total_lanes: int,
    *,
    op: str = "sum",
    layout: Layout | None = None,
    out: Array | None = None,
) -> Array:
    """Sum the lanes of all ranks, for all: the same bits however they are shared out, and in whatever order.

    Parameters
    ----------
    comm : Communicator
        The ranks.
    lanes : sequence of array
        This rank's lanes; it may have none.  Floats or complex, of the same dtype and shape everywhere.
    total_lanes : int
        How many lanes all ranks have together.
    op : {"sum", "mean"}
        ``mean`` divides by ``total_lanes``.
    layout : Layout, optional
        Of flat lanes, shape (layout.size,): each tensor then has an exponent of its own, so that small ones lose
        nothing beside large ones.  Padding is not summed.
    out : array, optional
        Where the result goes; may be one of the lanes.  Needed on a rank without lanes, to tell dtype and shape.

    Returns
    -------
    array, like a lane
        The same on all ranks.

    Raises
    ------
    InputError, DtypeError
        Lanes that do not fit together.
    MismatchError
        On all ranks: there are not ``total_lanes`` lanes.
    NonFiniteError
        On all ranks: a lane holds an infinity or NaN, or the result is beyond the range of its dtype.

    Notes
    -----
    Collective.  With L lanes, and M the largest magnitude of a tensor in any lane, an element of its sum is off by at
    most L·2^−53·M (by L²·2^−62·M for more than 1023 lanes) before it is rounded, once, to the dtype; see `FixedPoint`.

    Costs an allreduce of 4 (tensors + p + 2) bytes, then allreduces of 8 bytes per element in all, 4 MiB at a time.
    The lanes are kept by the caller; besides them, only those 4 MiB are taken.
    """
    like = _like("lane_sum", lanes, out)
    kept = _Kept(comm, "lane_sum", op, lanes, total_lanes, like, like.shape, layout)
    result = _result("lane_sum", out, like, like.shape)
    kept.reduction.sum_lanes(kept.code(), kept.flats, kept.pieces, as_reals(result.reshape(-1)))
    return _deliver(result, out)


def lane_reduce_scatter(
    comm: Communicator,
    lanes: Sequence[Array],
    total_lanes: int,
    counts: Sequence[int],
    *,
    op: str = "sum",
    layout: Layout | None = None,
    out: Array | None = None,
) -> Array:
    """Sum flat lanes of all ranks, and give each rank its share: the same bits as `lane_sum`.

    Parameters
    ----------
    lanes : sequence of array, shape (n,)
        As for `lane_sum`, like the other parameters.
    counts : sequence of int
        Elements that each rank gets, n in all; zeros are allowed.
    out : array, shape (counts[rank],), optional
        Where the result goes.  Needed on a rank without lanes.

    Returns
    -------
    array, shape (counts[rank],)

    Notes
    -----
    Collective.  Takes 8 bytes per element of memory, and moves as much in one reduce_scatter.  Raises as `lane_sum`,
    but that a result is out of range is seen only by the rank that gets it.
    """
    operation = "lane_reduce_scatter"
    shares = checks.counts(operation, counts, comm.size)
    like = _like(operation, lanes, out)
    kept = _Kept(comm, operation, op, lanes, total_lanes, like, (sum(shares),), layout)
    result = _result(operation, out, like, (shares[comm.rank],))
    table = (sum(shares), _width(like.dtype))
    kept.reduction.scatter_lanes(kept.code(), kept.flats, kept.pieces, table, shares, as_reals(result))
    return _deliver(result, out)


class LaneSum:
    """A sum of lanes that are added as they come, with exponents predicted from the sum before.

    For gradients that are too many to keep: 8 bytes per element, however many lanes a rank has.

    Parameters
    ----------
    comm : Communicator
        The ranks.
    layout : Layout
        Of the lanes; each tensor has an exponent of its own.
    total_lanes : int
        How many lanes all ranks have together.
    op : {"sum", "mean"}
        ``mean`` divides by ``total_lanes``.
    exponents : array of int32, shape (tensors,), optional
        What `exponents` was when the run was saved; None: nothing is known yet.
    headroom_bits : int
        A tensor may grow by this many powers of two from one sum to the next.
    slack_bits : int
        And shrink until the prediction is this many powers of two too large.  The error bound of `lane_sum` times
        2^slack_bits holds.
    allocator : Allocator
        Where the integers are kept: where the lanes are.

    Attributes
    ----------
    exponents : array of int32, shape (tensors,), or None
        The prediction for the next sum, the same on all ranks.  The bits of a sum depend on it, so that it must be
        saved and restored with the run.

    Examples
    --------
    >>> while True:
    ...     for lane in own_lanes:
    ...         total.add(gradient(lane))
    ...     if total.finish(out):
    ...         break

    Notes
    -----
    The very first sum has no prediction and is always repeated.
    """

    def __init__(
        self,
        comm: Communicator,
        layout: Layout,
        total_lanes: int,
        *,
        op: str = "sum",
        exponents: Array | None = None,
        headroom_bits: int = 4,
        slack_bits: int = 12,
        allocator: Allocator = plain,
    ) -> None:
        if not 0 <= headroom_bits <= slack_bits:
            raise InputError(
                "headroom outside of the slack", operation="LaneSum", got=f"{headroom_bits} and {slack_bits} bits",
                expected="0 <= headroom_bits <= slack_bits",
            )  # fmt: skip
        self.exponents = exponents
        self._reduction = Reduction(comm, "LaneSum", op, _count("LaneSum", total_lanes))
        self._layout = layout
        self._pieces, self._names = _tensors(layout, layout.dtype, (layout.size,))
        self._headroom_bits, self._slack_bits = headroom_bits, slack_bits
        self._total = allocator(layout.size, np.dtype(np.int64))
        self._reset()

    def _reset(self) -> None:
        self._lanes = 0
        self._seen = np.full(len(self._names), zero_exponent(self._layout.dtype), np.int32)
        self._code = None if self.exponents is None else _code(self.exponents, self._reduction.terms)
        self._total[...] = 0

    def add(self, lane: Array) -> None:
        """Add one of this rank's lanes; a flat array of the layout's size and dtype, which may be changed afterwards.

        A lane that the prediction does not fit is only looked at: `finish` will say that the sum must be repeated.
        """
        like = _like("LaneSum.add", [lane], None)
        _check("LaneSum.add", "a lane", lane, like, (self._layout.size,), self._layout)
        own = exponents(lane, self._pieces, len(self._names))
        self._lanes += 1
        np.maximum(self._seen, own, out=self._seen)
        if self._code is not None and bool((own <= self._code.exponents).all()):
            self._code.add(lane, self._pieces, self._total)

    def finish(self, out: Array) -> bool:
        """Sum what all ranks have added, if the prediction fits; then begin anew.

        Parameters
        ----------
        out : array, shape (layout.size,)
            Where the result goes; left alone if the sum must be repeated.  Padding is not written.

        Returns
        -------
        bool
            Whether ``out`` holds the sum.  If not, all ranks must add the same lanes again and call this again,
            which will then succeed: the new prediction is made from these lanes.  The same on all ranks, and however
            the lanes are shared out.

        Raises
        ------
        MismatchError
            On all ranks: there are not ``total_lanes`` lanes.
        NonFiniteError
            On all ranks: a lane holds an infinity or NaN, or the result is beyond the range of its dtype.

        Notes
        -----
        Collective.  Costs as `lane_sum`, in one message; a sum that must be repeated costs only the small allreduce.
        """
        _check_out("LaneSum.finish", out, _like("LaneSum.finish", [], out), (self._layout.size,), self._layout)
        try:
            seen = _agree(self._reduction, self._seen, self._lanes, self._names)
            code, fits = self._code, self._fits(seen)
            self._predict(seen)
            if code is not None and fits:
                self._reduction.sum_integers(self._total)
                code.decode(self._total, self._pieces, out, self._reduction.divisor)
            return fits
        finally:
            self._reset()

    def _fits(self, seen: Array) -> bool:
        """Tell whether a prediction holds, and is not so large that precision is lost."""
        if self.exponents is None:
            return False
        zero = seen == zero_exponent(self._layout.dtype)  # a sum of zeros is exact under any exponent
        spare = self.exponents - seen
        return bool((zero | ((spare >= 0) & (spare <= self._slack_bits))).all())

    def _predict(self, seen: Array) -> None:
        """Expect the next sum to be like this one; a tensor of zeros tells nothing."""
        zero = zero_exponent(self._layout.dtype)
        before = np.full_like(seen, zero) if self.exponents is None else self.exponents
        self.exponents = np.where(seen == zero, before, seen + self._headroom_bits).astype(np.int32)


class _Kept:
    """Lanes of this rank, checked and flat, and the code that fits those of all ranks."""

    def __init__(
        self,
        comm: Communicator,
        operation: str,
        op: str,
        lanes: Sequence[Array],
        total_lanes: int,
        like: Array,
        shape: Shape,
        layout: Layout | None,
    ) -> None:
        for lane in lanes:
            _check(operation, "a lane", lane, like, shape, layout)
        self.reduction = Reduction(comm, operation, op, _count(operation, total_lanes))
        self.flats = [as_reals(lane.reshape(-1)) for lane in lanes]
        self.pieces, self._names = _tensors(layout, like.dtype, shape)
        self._floor = zero_exponent(like.real.dtype)

    def code(self) -> FixedPoint:
        """Return the code.  Collective."""
        own = np.full(len(self._names), self._floor, np.int32)
        for flat in self.flats:
            np.maximum(own, exponents(flat, self.pieces, own.size), out=own)
        agreed = _agree(self.reduction, own, len(self.flats), self._names)
        return _code(agreed, self.reduction.terms)


def _code(agreed: Array, terms: int) -> FixedPoint:
    return FixedPoint(agreed, max(terms, MIN_TERMS))


def _agree(reduction: Reduction, own: Array, lanes: int, names: Sequence[str]) -> Array:
    """Return the exponents of all ranks' lanes, having seen that all lanes are there.  Collective."""
    comm, total = reduction.comm, reduction.terms
    facts = np.full(2 + comm.size, -1, np.int32)
    facts[:2] = total, -total
    facts[2 + comm.rank] = lanes
    agreed, facts = np.split(comm.allreduce(np.concatenate([own, facts]), "max"), [own.size])
    most, least, given = facts[0], -facts[1], facts[2:].tolist()
    if most != least:
        raise MismatchError(
            "total_lanes differs between ranks", operation=reduction.operation, got=f"{least} to {most}"
        )  # fmt: skip
    if sum(given) != total:
        raise MismatchError(
            "wrong number of lanes", operation=reduction.operation, got=f"{given} on the ranks, {sum(given)} in all",
            expected=f"{total} in all (total_lanes)",
        )  # fmt: skip
    reduction.check_finite(agreed, own, names)
    return agreed


def _tensors(layout: Layout | None, dtype: DType, shape: Shape) -> tuple[Pieces, list[str]]:
    """Return where the tensors of a flat lane lie, counted in reals, and their names."""
    if layout is not None:
        return layout.whole().pieces, [segment.name for segment in layout]
    return [(0, slice(0, _width(dtype) * prod(shape)))], [f"{dtype}{list(shape)}"]


def _width(dtype: DType) -> int:
    """Return how many reals an element holds."""
    return 2 if dtype.kind == "c" else 1


def _count(operation: str, total_lanes: int) -> int:
    expected = f"1 to {TERMS_MAX}"
    try:
        found = operator.index(total_lanes)
    except TypeError as error:
        raise InputError(
            "total_lanes is not an integer", operation=operation, got=repr(total_lanes), expected=expected
        ) from error
    if not 1 <= found <= TERMS_MAX:
        raise InputError("total_lanes out of range", operation=operation, got=found, expected=expected)
    return found


def _like(operation: str, lanes: Sequence[Array], out: Array | None) -> Array:
    """Return an array of the lanes' dtype and library."""
    given = [*lanes, *([] if out is None else [out])]
    if not given:
        raise InputError("a rank without lanes needs out=", operation=operation, remedy="pass an array like a lane")
    like = _native(operation, given[0])
    if not is_inexact(like.dtype):
        raise DtypeError(
            "lanes are of floats or complex numbers", operation=operation, got=like.dtype,
            remedy="sums of integers are exact: add them up, and allreduce",
        )  # fmt: skip
    return like


def _native(operation: str, x: Any) -> Array:
    """Return a lane if it is of a library that lanes compute in."""
    if not isinstance(x, np.ndarray) and not is_cupy(x):
        raise InputError(
            "lanes are NumPy or CuPy arrays", operation=operation, got=type(x).__name__,
            remedy="convert it with numpy.asarray",
        )  # fmt: skip
    accept(operation, x)
    lane: Array = x
    return lane


def _check(operation: str, what: str, array: Array, like: Array, shape: Shape, layout: Layout | None) -> None:
    """Refuse a lane, or ``out``, that does not fit the others."""
    if is_cupy(_native(operation, array)) != is_cupy(like):
        raise InputError(f"{what} is of another library", operation=operation, got=type(array).__name__)
    if array.shape != shape:
        raise InputError(f"{what} has the wrong shape", operation=operation, got=array.shape, expected=shape)
    if array.dtype != like.dtype:
        raise DtypeError(f"{what} has the wrong dtype", operation=operation, got=array.dtype, expected=like.dtype)
    if layout is not None and (array.dtype != layout.dtype or shape != (layout.size,)):
        raise InputError(
            f"{what} does not fit the layout", operation=operation, got=f"{array.dtype}{list(array.shape)}",
            expected=f"{layout.dtype}[{layout.size}]",
        )  # fmt: skip


def _check_out(operation: str, out: Array, like: Array, shape: Shape, layout: Layout | None) -> None:
    _check(operation, "out", out, like, shape, layout)
    if not is_cupy(out) and not out.flags.writeable:
        raise InputError("out is read-only", operation=operation, remedy="pass an array that can be written")


def _result(operation: str, out: Array | None, like: Array, shape: Shape) -> Array:
    """Return contiguous memory for a result: ``out`` itself where that will do."""
    if out is not None:
        _check_out(operation, out, like, shape, None)
        if out.flags.c_contiguous:
            return out
    zeros: Array = namespace(like).zeros(shape, like.dtype)
    return zeros


def _deliver(result: Array, out: Array | None) -> Array:
    if out is None or out is result:
        return result
    out[...] = result
    return out
