"""What the ranks of a job should hold, by kind: by the formulas of the methods, from the model's shapes alone."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from mpitrain._errors import InputError
from mpitrain._typing import DType, Shape
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import Communicator
from mpitrain.comm.codecs import Codec
from mpitrain.nn import Layer, Model, Network, Sequential
from mpitrain.nn.costs import cost, kept_bytes
from mpitrain.nn.cutting import part, units
from mpitrain.parallel import DataParallel, PipelineParallel, Synchronous
from mpitrain.parallel.lanes import LaneSteps
from mpitrain.train.bench.memory import CODEC, predicted

_COUNT_BYTES = 8
"""Of the number that says of which sum a codec has left something over."""


def expected(comm: Communicator, model: Model, method: Synchronous, shared: bool, shape: Shape) -> dict[str, float]:
    """Return the bytes that a rank should hold, the mean over all.

    Parameters
    ----------
    comm : Communicator
        All ranks of the job.
    model : Model
        The model, or this rank's part of one whose tensors are divided.
    method : Synchronous
        Set up with it; one of those that a job may have.
    shared : bool
        Whether the ranks that share a batch have their parameters in one memory.
    shape : tuple of int
        Of the largest microbatch of a rank.

    Notes
    -----
    Collective.  Activations are what the forward passes keep that are in flight at a time, in a pipeline with the
    inputs of its stages; the workspace of the backward pass comes on top.  They are left out where nobody has said what
    a layer keeps.
    """
    layout, stages = model.layout, method.sizes.ranks if isinstance(method, PipelineParallel) else 1
    n, tied = model_bytes(layout, method.across.size if method.across else 1), _tied_bytes(layout)
    ranks = method.comm.size // stages
    found = predicted(method, (n + (tied if stages > 1 else 0)) / stages, ranks, shared, len(method.parts[0].state))
    if isinstance(method, LaneSteps):  # in which each use of a tied tensor has a gradient
        found["gradients"] += method.lanes / ranks * (n + tied) / stages
    if isinstance(method, DataParallel) and method.codec:
        found[CODEC] = _codec_bytes(method.codec, layout)
    kept = _kept(model, method, shape)
    return found if kept is None else {**found, "activations": float(comm.allreduce(kept, "mean"))}


def model_bytes(layout: Layout, tensor: int) -> int:
    """Return the bytes of a model's tensors, of which ``tensor`` ranks divide those that none of them has whole.

    The mean over these ranks, padded as in a `FlatBuffer`.
    """
    if tensor == 1:
        return layout.nbytes
    return sum(_bytes(each, layout, 1 if each.is_whole else tensor) for each in layout)


def _bytes(segment: Segment, layout: Layout, parts: int = 1) -> int:
    return prod(segment.global_shape) * layout.dtype.itemsize // parts


def _tied_bytes(layout: Layout) -> int:
    """Return the bytes of tensors that are used under another name as well, which lies on another stage."""
    return sum(layout[name].size * layout.dtype.itemsize for name in layout.ties.values())


def _codec_bytes(codec: Codec, layout: Layout) -> float:
    """Return the bytes of what is left over of the tensors that a codec takes, and of what it remembers of them."""
    taken = [segment for segment in layout if codec.takes(segment)]
    return float(sum(each.size + codec.remembered(each) for each in taken) * layout.dtype.itemsize + _COUNT_BYTES)


def _kept(model: Model, method: Synchronous, shape: Shape) -> float | None:
    """Return the bytes that this rank's forward passes keep; None on all ranks where they cannot be counted."""
    if not isinstance(model, Network):
        return None
    dtype = method.precision.dtype if method.precision else model.layout.dtype
    try:
        if isinstance(method, PipelineParallel):
            return _kept_in_flight(model.layer, method, shape, dtype)
        return float(kept_bytes(model.layer, shape, dtype))
    except InputError:  # a layer that nobody has counted
        return None


def _kept_in_flight(layer: Layer, method: PipelineParallel, shape: Shape, dtype: DType) -> float:
    """Return the bytes that the passes keep which are in a rank's stages at a time."""
    assert isinstance(layer, Sequential)
    sizes, kept = method.sizes, list[int]()
    for cut in pairwise((0, *method.cuts, len(units(layer)))):
        stage = part(layer, *cut)
        kept.append(kept_bytes(stage, shape, dtype) + (prod(shape) * dtype.itemsize if cut[0] else 0))
        shape = cost(stage, shape).shape
    own = [kept[stage] for stage in sizes.stages_of(method.pipe.rank)]
    return method.schedule.peaks[method.pipe.rank] * sum(own) / len(own)
