"""What happens to gradients between reduction and update: the check that they are finite, and clipping.

Running statistics travel in the same buffer; they are checked, but never clipped.  Nothing here is collective: a
method reduces `squared_norm` and `finite` over the shards' owners.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator

import numpy as np

from mpitrain._options import POSITIVE, check
from mpitrain._typing import Array
from mpitrain.arrays import Shard, namespace
from mpitrain.optim.chunks import chunks, scratch, sum_of_squares, trained_chunks


def finite(grads: Array) -> bool:
    """Tell whether all elements are finite; one pass where they are.

    Notes
    -----
    A finite sum of squares has only finite terms.  One that is not may be an overflow of large but finite values, so
    then each element is looked at.
    """
    if squares_finite(grads):
        return True
    xp = namespace(grads)
    return all(bool(xp.isfinite(grads[chunk]).all()) for chunk in chunks(slice(0, grads.size), grads))


def squares_finite(grads: Array) -> bool:
    """Tell whether the sum of all squares is finite; so are then sums of as many such gradients as there are ranks."""
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(float(namespace(grads).dot(grads, grads)))


def squared_norm(grads: Array, shard: Shard, without: Container[int] = ()) -> float:
    """Return the sum of squares of a shard's gradients, ``statistics`` left out.

    Parameters
    ----------
    grads : array, shape (shard.size,)
        The shard of the gradients.
    shard : Shard
        Which part of the layout this is.
    without : container of int
        Numbers of tensors that are left out, too: another rank, which has them as well, counts them.

    Returns
    -------
    float
        Summed in float64; to be added up over the owners of the other shards.
    """
    wide = scratch(grads, np.float64)
    parts = _but_for(without, grads, shard) if without else _trained(grads, shard)
    return float(sum(sum_of_squares(grads[chunk], wide) for chunk in parts))


def scale(grads: Array, shard: Shard, factor: float) -> None:
    """Multiply a shard's gradients by ``factor`` in place, ``statistics`` left alone.

    Notes
    -----
    With ``factor = max_norm / norm`` where the global norm is above ``max_norm``, this is clipping by global norm:
    Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", ICML 2013, algorithm 1.
    """
    for chunk in _trained(grads, shard):
        grads[chunk] *= factor


def clip_value(grads: Array, shard: Shard, limit: float) -> None:
    """Bring each gradient of a shard into [-limit, limit] in place, ``statistics`` left alone."""
    check("clipping", "limit", limit, POSITIVE)
    xp = namespace(grads)
    for chunk in _trained(grads, shard):
        xp.clip(grads[chunk], -limit, limit, out=grads[chunk])


def _but_for(without: Container[int], grads: Array, shard: Shard) -> Iterator[slice]:
    """Yield chunks of what is trained, tensor by tensor, some tensors left out."""
    return (chunk for number, chunk in trained_chunks(shard, grads) if number not in without)


def _trained(grads: Array, shard: Shard) -> Iterator[slice]:
    """Yield chunks of what is trained, in runs of several tensors."""
    return (chunk for group, run in shard.runs if group != "statistics" for chunk in chunks(run, grads))
