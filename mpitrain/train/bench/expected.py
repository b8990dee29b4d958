"""What the ranks of a job should hold, by kind: by the formulas of the methods, from the model's shapes alone."""

from __future__ import annotations

from itertools import pairwise
from math import prod

from mpitrain._typing import Shape
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import Communicator
from mpitrain.nn import Layer, Network, Sequential
from mpitrain.nn.costs import Cost, cost
from mpitrain.nn.cutting import part, units
from mpitrain.parallel import (
    DataParallel,
    GradientParallel,
    GradientPipelineParallel,
    PipelineParallel,
    Synchronous,
)
from mpitrain.train.bench.memory import predicted

_KNOWN = (DataParallel, GradientParallel, PipelineParallel, GradientPipelineParallel)


def expected(comm: Communicator, network: Network, method: Synchronous, shared: bool, shape: Shape) -> dict[str, float]:
    """Return the bytes that a rank should hold, the mean over all; nothing of a method that has no formula here.

    Parameters
    ----------
    comm : Communicator
        All ranks of the job.
    network : Network
        The model, or this rank's part of one whose tensors are divided.
    method : Synchronous
        Set up with it.
    shared : bool
        Whether the ranks that share a batch have their parameters in one memory.
    shape : tuple of int
        Of the largest microbatch of a rank.

    Notes
    -----
    Collective.  Activations are what the forward passes keep that are in flight at a time, in a pipeline with the
    inputs of its stages; the workspace of the backward pass comes on top.
    """
    if type(method) not in _KNOWN or method.precision is not None:
        return {}
    item = network.layout.dtype.itemsize
    n: float = model_bytes(network.layout, method.across.size if method.across else 1)
    states = len(method.parts[0].state)
    ranks = method.comm.size
    if isinstance(method, PipelineParallel):
        tied = _tied_bytes(network.layout) if method.sizes.ranks > 1 else 0
        n, ranks = (n + tied) / method.sizes.ranks, ranks // method.sizes.ranks
    found = predicted(method, n, ranks, shared, states)
    kept = comm.allreduce(float(item * _kept(network.layer, method, shape)), "mean")
    return {**found, "activations": float(kept)}


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


def _kept(layer: Layer, method: Synchronous, shape: Shape) -> float:
    """Return the elements that this rank's forward passes keep."""
    if not isinstance(method, PipelineParallel):
        return cost(layer, shape).kept
    assert isinstance(layer, Sequential)
    sizes, before, kept = method.sizes, Cost(shape), list[int]()
    for cut in pairwise((0, *method.cuts, len(units(layer)))):
        stage = cost(part(layer, *cut), before.shape)
        kept.append(stage.kept + (prod(before.shape) if cut[0] else 0))
        before = stage
    own = [kept[stage] for stage in sizes.stages_of(method.pipe.rank)]
    return method.schedule.peaks[method.pipe.rank] * sum(own) / len(own)
