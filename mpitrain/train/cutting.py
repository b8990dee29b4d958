"""Where a job's pipeline is cut: as its file says, or balanced by what the layers cost, counted or measured.

Times differ from rank to rank and from run to run.  So they are taken once, before training, and all ranks of a run go
by the same; what is trained does not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from mpitrain.arrays import Batch
from mpitrain.comm import ProcessMesh
from mpitrain.comm.threads import set_blas_threads
from mpitrain.data import Batches
from mpitrain.method import Method, Precision
from mpitrain.nn import Network, Sequential
from mpitrain.nn.cutting import units
from mpitrain.nn.model import Model
from mpitrain.parallel import PipelineParallel
from mpitrain.parallel.pipeline import Sizes, counted, measured, partition
from mpitrain.train.job import Job

_REPEATS = 9


def cutting(
    job: Job, mesh: ProcessMesh, model: Model, whole: Model, feed: Batches, precision: Precision | None
) -> dict[str, Any]:
    """Return the options that tell a pipeline where to cut.

    Parameters
    ----------
    mesh : ProcessMesh
        The job's ranks.
    model, whole : Model
        What this rank computes with, and the same not divided along ``tensor``.
    feed : Batches
        What it is trained on.
    precision : Precision, optional
        Of the passes.

    Returns
    -------
    dict
        ``cuts`` or ``costs``, the same on all ranks; nothing of a model that cannot be cut, of which the method tells.

    Notes
    -----
    Collective if costs are measured: each rank times the layers that it would have by counted costs, all at once, ten
    times on a microbatch; one allgather of these numbers.  It takes the memory of a rank's training without optimizer
    state.
    """
    chosen = job.method.cuts
    if not isinstance(chosen, str):
        return {"cuts": chosen}
    if not isinstance(whole, Network) or not isinstance(whole.layer, Sequential):
        return {}
    costs = counted(whole, feed.dataset.sample_shape)
    stages = mesh["pipe"].size * job.method.chunks
    if chosen == "measured" and 1 < stages <= len(costs):
        assert isinstance(model, Network)
        set_blas_threads(mesh.comm, 1 if job.reproducible else None)  # as in training
        costs = _measured(model, _microbatch(job, feed, mesh), mesh, partition(costs, stages), precision)
    return {"costs": costs}


def _measured(
    network: Network, batch: Batch, mesh: ProcessMesh, edges: Sequence[int], precision: Precision | None
) -> list[float]:
    """Return the seconds of each layer, the mean of the ranks that have it if the model is cut so."""
    pipe = mesh["pipe"]
    mine = Sizes(pipe.size, (len(edges) - 1) // pipe.size, 1).stages_of(pipe.rank)
    own = [layer for stage in mine for layer in range(edges[stage], edges[stage + 1])]
    mesh.comm.barrier()  # all at once, as they will train
    times = measured(network, batch, _REPEATS, only=own, dtype=precision.dtype if precision else None)
    network.pool.drop_free()
    everyones = mesh.comm.allgather_object({layer: each.total_s for layer, each in zip(own, times, strict=True)})
    return [fmean(found[layer] for found in everyones if layer in found) for layer in range(edges[-1])]


def _microbatch(job: Job, feed: Batches, mesh: ProcessMesh) -> Batch:
    """Return a microbatch of the size of a pipeline's, the same on all ranks."""
    shares = job.lanes or mesh.shape.get("data", 1)
    parts = min(job.method.microbatches * shares, feed.batch_size)
    return replace(feed, owners=None).share(0, 1, parts).batch(0)[0]


def cut_words(job: Job, method: Method) -> str:
    """Return where the model is cut, in words; nothing if it is not."""
    found = cut_facts(job, method)
    if not found or not found["cuts"]:
        return ""
    by = "" if found["by"] == "given" else f" by {found['by']} cost"
    return f", cut at {found['cuts']} of {len(found['layers'])} layers{by}"


def cut_facts(job: Job, method: Method) -> dict[str, Any]:
    """Return where the model of a run is cut, for its record; nothing if its method has no stages.

    Parameters
    ----------
    method : Method
        The job's, set up.

    Returns
    -------
    dict
        ``cuts`` as a job file takes them; ``by``, which is ``"counted"``, ``"measured"`` or ``"given"``; ``layers``,
        their names and classes, numbered from 0; unless the cuts are given, ``costs``: each layer's share of all.
    """
    if not isinstance(method, PipelineParallel) or not isinstance(method.model, Network):
        return {}
    by = job.method.cuts if isinstance(job.method.cuts, str) else "given"
    layers = [f"{path} {type(layer).__name__}" for path, layer in units(method.model.layer)]
    facts: dict[str, Any] = {"cuts": list(method.cuts), "by": by, "layers": layers}
    if method.costs is not None:
        facts["costs"] = [cost / sum(method.costs) for cost in method.costs]
    return facts
