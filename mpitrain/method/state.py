"""What a method hands to a checkpoint: pieces of tensors in global coordinates, and plain numbers.

A piece says where in the whole tensor it lies, so that what one method wrote on n ranks can be read by another on m.
This file knows layouts, and neither files nor communicators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from mpitrain._errors import CheckpointError, InputError
from mpitrain._typing import Array, Shape
from mpitrain.arrays import Box, Segment, Shard, namespace
from mpitrain.arrays.box import box_size, boxed, inside

Kind = Literal["sharded", "replicated", "summed"]
"""What becomes of a tensor when the number of ranks changes.  ``sharded``: the ranks' pieces tile it, and are cut
anew.  ``replicated``: every rank holds the same values.  ``summed``: every rank holds a term of a sum (what a gradient
compressor has left over), and only the sum must stay."""

Read: TypeAlias = Callable[[str], Array]
"""Returns the whole tensor of a name, in global shape; perhaps a read-only memory map."""


@dataclass(frozen=True)
class Piece:
    """A contiguous part of one tensor of a method's state.

    Parameters
    ----------
    name : str
        Of the tensor, e.g. ``"params/0.weight"`` or ``"optimizer.m/0.weight"``.
    global_shape : tuple of int
        Shape of the whole tensor.
    box : tuple of (int, int)
        A ``(start, stop)`` per axis.
    array : array
        The values, as many as ``flat`` spans, in C order; a view of live memory, not a copy.
    flat : (int, int), optional
        The part of the box's C-order flattening that this is; all of it if None.
    kind : {"sharded", "replicated", "summed"}
        What becomes of it when the number of ranks changes.

    Raises
    ------
    InputError
        The numbers contradict each other.
    """

    name: str
    global_shape: Shape
    box: Box
    array: Array
    flat: tuple[int, int] | None = None
    kind: Kind = "sharded"

    def __post_init__(self) -> None:
        what = f"piece of {self.name!r}"
        if self.kind not in get_args(Kind):
            raise InputError(f"{what}: unknown kind", got=repr(self.kind), expected=" or ".join(get_args(Kind)))
        if not inside(self.box, self.global_shape):
            raise InputError(f"{what}: box lies outside the tensor", got=self.box, expected=self.global_shape)
        start, stop = self.span
        if not 0 <= start <= stop <= box_size(self.box):
            raise InputError(f"{what}: flat range lies outside its box", got=(start, stop), expected=self.box)
        if self.array.size != stop - start:
            raise InputError(f"{what}: wrong number of values", got=self.array.size, expected=stop - start)

    @property
    def span(self) -> tuple[int, int]:
        """``flat``, or the range of the whole box."""
        return self.flat if self.flat is not None else (0, box_size(self.box))


@dataclass(frozen=True)
class State:
    """Everything that a method needs to go on where it was.

    Parameters
    ----------
    pieces : tuple of Piece
        This rank's.
    scalars : dict
        JSON values with string keys, the same on all ranks: step, position of the loader, best metric so far ….
    """

    pieces: tuple[Piece, ...]
    scalars: dict[str, Any] = field(default_factory=dict)


def pieces_of(prefix: str, flat: Array, shard: Shard, kind: Kind = "sharded") -> tuple[Piece, ...]:
    """Describe a shard of a layout's flat range as pieces of tensors, without copying.

    Parameters
    ----------
    prefix : str
        Tensor ``t`` becomes ``"prefix/t"``.
    flat : array, shape (shard.size,)
        The shard's values; padding between tensors is left out.
    shard : Shard
        Which part of the layout it is; it may begin and end within a tensor.
    kind : {"sharded", "replicated", "summed"}
        What becomes of the pieces when the number of ranks changes.
    """
    _check_size(prefix, flat, shard)
    return tuple(
        Piece(f"{prefix}/{segment.name}", segment.global_shape, segment.box, flat[where], span, kind)
        for segment, where, span in _spans(shard)
    )


def fill(prefix: str, flat: Array, shard: Shard, read: Read, reads_all: bool = False) -> None:
    """Fill a shard of a layout's flat range in place: the inverse of `pieces_of`, whoever wrote the tensors.

    Parameters
    ----------
    prefix : str
        Tensor ``t`` is read as ``"prefix/t"``.
    flat : array, shape (shard.size,)
        Filled in place; padding is not touched.
    shard : Shard
        Which part of the layout it is.
    read : callable
        Returns a whole tensor by its name.
    reads_all : bool
        Whether tensors are read that the shard does not touch, too: ranks then ask for the same, and fail alike.

    Raises
    ------
    CheckpointError
        A tensor that was read has another shape, or a dtype whose values do not all fit.
    """
    _check_size(prefix, flat, shard)
    xp, spans = namespace(flat), {segment: (where, span) for segment, where, span in _spans(shard)}
    for segment in (each for each in shard.layout if each.size) if reads_all else spans:
        name = f"{prefix}/{segment.name}"
        whole = read(name)
        if whole.shape != segment.global_shape:
            raise CheckpointError(f"tensor {name!r}: wrong shape", got=whole.shape, expected=segment.global_shape)
        if not np.can_cast(whole.dtype, flat.dtype, "safe"):
            raise CheckpointError(f"tensor {name!r}: values would be rounded", got=whole.dtype, expected=flat.dtype)
        if segment in spans:
            where, (start, stop) = spans[segment]
            flat[where] = xp.asarray(boxed(whole, segment.box).reshape(-1)[start:stop])


def _spans(shard: Shard) -> Iterator[tuple[Segment, slice, tuple[int, int]]]:
    """Give for each tensor that a shard touches: itself, where it lies in the shard, which range of its box it is."""
    for number, where in shard.pieces:
        segment = shard.layout.segments[number]
        start = shard.start + where.start - segment.offset
        yield segment, where, (start, start + where.stop - where.start)


def _check_size(prefix: str, flat: Array, shard: Shard) -> None:
    if flat.shape != (shard.size,):
        raise InputError(f"{prefix}: array and shard differ in size", got=flat.shape, expected=(shard.size,))
