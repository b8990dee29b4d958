"""What the ranks that divide a model's tensors, those ``across``, do besides their passes.

Some tensors are divided, and others all of these ranks hold alike.  In place of their communicator there is None where
each rank has all of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Layout, Segment, to_host
from mpitrain.arrays.box import box_size, boxed
from mpitrain.comm import Communicator
from mpitrain.method.state import Piece
from mpitrain.method.steps import Reach


def reach(across: Communicator | None, layout: Layout, *groups: Communicator, elsewhere: Collection[str] = ()) -> Reach:
    """Return over which ranks a sum over the model goes, of which ``groups`` divide what is laid out here.

    Tensors ``elsewhere`` are counted by another rank, and so are those that all ranks ``across`` hold.
    """
    counted = across is not None and across.rank > 0  # by the first rank
    numbers = (
        number for number, segment in enumerate(layout) if segment.name in elsewhere or (counted and segment.is_whole)
    )
    return Reach((*groups, across) if across else groups, frozenset(numbers))


def given_here(across: Communicator | None, pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Return those pieces of a state that this rank gives to a checkpoint: what all hold, the first rank gives."""
    if across is None or across.rank == 0:
        return tuple(pieces)
    return tuple(piece for piece in pieces if box_size(piece.box) < prod(piece.global_shape))


def whole_tensor(across: Communicator | None, segment: Segment, part: Array) -> Array:
    """Return a whole tensor, in host memory.

    Parameters
    ----------
    across : Communicator, optional
        The ranks that hold its parts, or each all of it.
    segment : Segment
        Says which part is here.
    part : array, shape (segment.shape)
        Its values.

    Notes
    -----
    Collective, but for a tensor that all ranks hold: an allgather of boxes, and one of values.
    """
    if across is None or segment.is_whole:
        return to_host(part)
    boxes = across.allgather_object(segment.box)
    values = across.allgather(to_host(part).reshape(-1), counts=[box_size(box) for box in boxes])
    whole, begin = np.empty(segment.global_shape, values.dtype), 0
    for box in boxes:
        place = boxed(whole, box)
        place[...] = values[begin : begin + place.size].reshape(place.shape)
        begin += place.size
    return whole
