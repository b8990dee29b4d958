"""A tensor that ranks hold in parts, put together again."""

from __future__ import annotations

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays import Segment, to_host
from mpitrain.arrays.box import box_size, boxed
from mpitrain.comm import Communicator


def whole_tensor(comm: Communicator, segment: Segment, part: Array) -> Array:
    """Return a whole tensor, in host memory.

    Parameters
    ----------
    comm : Communicator
        The ranks that hold its parts, or each all of it.
    segment : Segment
        Says which part is here.
    part : array, shape (segment.shape)
        Its values.

    Notes
    -----
    Collective, but for a tensor that all ranks hold: an allgather of boxes, and one of values.
    """
    if segment.is_whole:
        return to_host(part)
    boxes = comm.allgather_object(segment.box)
    values = comm.allgather(to_host(part).reshape(-1), counts=[box_size(box) for box in boxes])
    whole, begin = np.empty(segment.global_shape, values.dtype), 0
    for box in boxes:
        place = boxed(whole, box)
        place[...] = values[begin : begin + place.size].reshape(place.shape)
        begin += place.size
    return whole
