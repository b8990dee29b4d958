"""What a job's steps cost on its ranks: time, counted operations, memory by kind, communication, a pipeline's overhead.

The job is trained as it is, on its own data, for as many steps as the measurement takes; nothing is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np

from mpitrain._errors import InputError, JobError
from mpitrain.comm import Communicator
from mpitrain.comm.bench.results import Quantiles
from mpitrain.nn import Network
from mpitrain.nn.costs import training_flops
from mpitrain.parallel import ModelAveraging, PipelineParallel, Synchronous
from mpitrain.train.assembly import Assembly, assemble
from mpitrain.train.bench.communication import share_of, traced
from mpitrain.train.bench.contest import timed
from mpitrain.train.bench.costs import JobCosts
from mpitrain.train.bench.expected import expected
from mpitrain.train.bench.memory import CODEC, Memory, codec_held_bytes, held
from mpitrain.train.bench.overhead import Overhead, overhead
from mpitrain.train.bench.ranks import product_flops_per_s
from mpitrain.train.job import Job
from mpitrain.train.models import build_model
from mpitrain.train.session import settle_arithmetic

_EVER = 10**9
_WARM_STEPS = 3


def measure_job(job: Job, comm: Communicator, rounds: int = 7, round_s: float = 0.3) -> JobCosts:
    """Measure what the steps of a job cost.

    Parameters
    ----------
    job : Job
        On the CPU; the same on all ranks.
    comm : Communicator
        The job's ranks.
    rounds : int
        How often some steps are timed.
    round_s : float
        About how long each time; one step at least.

    Returns
    -------
    JobCosts
        The same on all ranks.

    Raises
    ------
    JobError
        The job is for a GPU.

    Notes
    -----
    Collective.  Besides the steps: a few seconds of products, and a trace of as many steps as were timed at once.
    """
    if job.device != "cpu":
        raise JobError("is measured on the CPU only", operation="device", got=job.device, expected="cpu")
    parts = assemble(job, comm)
    settle_arithmetic(job, comm)
    method = parts.method
    assert isinstance(method, Synchronous)
    method.plan = replace(method.plan, steps=_EVER)
    if isinstance(parts.model, Network):
        parts.model.pool.drop_free()  # of the evaluation that checked the job's metrics
    rate, steps = product_flops_per_s(comm, job.dtype), _Steps(parts)
    every = method.average_every if isinstance(method, ModelAveraging) else 1  # which goes on until then
    warm = ceil(_WARM_STEPS / every) * every
    steps(warm)
    count = max(1, int(round_s / timed(comm, steps, warm) / every)) * every
    before = steps.samples
    seconds = np.array([timed(comm, steps, count) for _ in range(rounds)])
    samples = (steps.samples - before) / (rounds * count)  # fewer than a batch, where these do not divide the epoch
    events = traced(comm, steps, count)
    stages = comm.allgather_object(method.pipe.rank if isinstance(method, PipelineParallel) else 0)
    lost = overhead(method, events, stages) if isinstance(method, PipelineParallel) and events else None
    share, lost = comm.broadcast_object((share_of(events), lost))
    return _costs(job, comm, parts, rate, seconds, samples, share, lost)


@dataclass
class _Steps:
    """Takes steps of a job, and counts their samples, of all ranks together."""

    parts: Assembly
    samples: int = 0

    def __call__(self, steps: int) -> None:
        method = self.parts.method
        self.samples += method.advance(self.parts.feed, method.step + steps).samples


def _costs(
    job: Job, comm: Communicator, parts: Assembly, rate: float, seconds: np.ndarray, samples: float, share: float,
    lost: Overhead | None,
) -> JobCosts:  # fmt: skip
    facts, batch = parts.samples.facts, parts.feed.batch_size
    of_batch, notes = _counted(job, parts)
    flops = round(of_batch * samples / batch) if of_batch else None
    rates = samples / float(np.median(seconds))
    return JobCosts(
        title=parts.title,
        ranks=comm.size,
        batch_size=batch,
        seconds=Quantiles.of(seconds),
        samples_per_s=rates,
        tokens_per_s=rates * prod(facts.sample_shape) if facts.task == "sequence" else None,
        flops=flops,
        product_flops_per_s=rate,
        utilisation=flops / (float(np.median(seconds)) * rate * comm.size) if flops else None,
        communication_share=share,
        memory=memory_of(comm, job, parts),
        pipeline=lost,
        notes=notes,
    )


def _counted(job: Job, parts: Assembly) -> tuple[int | None, list[str]]:
    """Return the operations of a whole batch, or why they cannot be counted."""
    facts, method = parts.samples.facts, parts.method
    divided = isinstance(method, Synchronous) and method.across is not None
    model = build_model(job, facts) if divided else parts.model  # of which a rank may have a part only
    shape = (parts.feed.batch_size, *facts.sample_shape)
    if not isinstance(model, Network):
        what = "neither operations nor activations are counted"
        return None, [f"{what}: the model is no Network of layers but a {type(model).__name__}"]
    try:
        return training_flops(model.layer, shape), []
    except InputError as error:
        return None, [f"operations are not counted: {error}"]


def memory_of(comm: Communicator, job: Job, parts: Assembly) -> dict[str, Memory]:
    """Return what the ranks of a job that has taken steps hold, by kind.  Collective."""
    method, model = parts.method, parts.model
    assert isinstance(method, Synchronous)
    measured, shared = held(comm, model.pool.nbytes if isinstance(model, Network) else 0, method)
    if not isinstance(model, Network):
        del measured["activations"]  # whose memory is its own library's
    if codec_bytes := codec_held_bytes(method):
        measured[CODEC] = float(codec_bytes)
    rows = ceil(ceil(parts.feed.batch_size / method.shares[0][1]) / job.method.microbatches)
    foreseen = expected(comm, model, method, shared, (rows, *parts.samples.facts.sample_shape))
    return {kind: Memory(each, foreseen.get(kind)) for kind, each in measured.items()}
