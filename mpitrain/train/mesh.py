"""From a job's mesh to the communicators along its axes.  One more axis: a field, a length, a communicator."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.train.job import Job


@dataclass(frozen=True)
class Axes:
    """The groups of this rank along the axes of the mesh.

    Parameters
    ----------
    data : Communicator
        The ranks that share each batch.
    tensor : Communicator, optional
        The ranks that divide the model's tensors; None: this rank has all of the model.
    pipes : ProcessMesh, optional
        The whole mesh, where the model's layers are divided.
    """

    data: Communicator
    tensor: Communicator | None = None
    pipes: ProcessMesh | None = None

    @property
    def words(self) -> str:
        """The lengths of the axes in words, e.g. ``data 2 × tensor 2``; empty if only the data are divided."""
        pipe = {"pipe": self.pipes["pipe"]} if self.pipes else {}
        groups = {"data": self.data, **pipe, **({"tensor": self.tensor} if self.tensor else {})}
        return " × ".join(f"{name} {group.size}" for name, group in groups.items()) if len(groups) > 1 else ""


def axes_of(job: Job, comm: Communicator) -> Axes:
    """Put the ranks on the job's mesh.  Collective.

    Raises
    ------
    JobError
        They are not as many as the mesh needs.
    """
    lengths = _lengths(job, comm.size)
    if prod(lengths.values()) != comm.size:
        raise JobError(
            f"mesh {'×'.join(map(str, lengths.values()))} needs {prod(lengths.values())} ranks, got {comm.size}",
            operation=", ".join(f"mesh.{name} = {length}" for name, length in lengths.items()),
            remedy=f"start {prod(lengths.values())} ranks, or leave out mesh.data",
        )  # fmt: skip
    if not job.mesh.divides_model and not job.in_stages:
        return Axes(comm)
    mesh = ProcessMesh(comm, **lengths)
    tensor = mesh["tensor"] if job.mesh.divides_model else None
    return Axes(mesh["data"], tensor, mesh if job.in_stages else None)


def _lengths(job: Job, ranks: int) -> dict[str, int]:
    """Return the lengths of the job's axes, outermost first: neighbouring ranks lie along the last."""
    mesh, tensor = job.mesh, {"tensor": job.mesh.tensor}
    if not job.in_stages:
        return {"data": mesh.data or _left(ranks, tensor), **tensor}
    tensor = tensor if mesh.divides_model else {}
    if mesh.pipe is None:
        rest = {"data": mesh.data or 1, **tensor}
        return {"pipe": _left(ranks, rest), **rest}
    pipe = {"pipe": mesh.pipe}
    return {**pipe, "data": mesh.data or _left(ranks, pipe | tensor), **tensor}


def _left(ranks: int, lengths: dict[str, int]) -> int:
    """Return the length that is left for an axis when the others have theirs."""
    others = prod(lengths.values())
    if ranks % others:
        named = [f"mesh.{name} = {length}" for name, length in lengths.items() if length > 1]
        raise JobError(
            f"{'1 rank is' if ranks == 1 else f'{ranks} ranks are'} no multiple of {' × '.join(named)}",
            remedy=f"start a multiple of {others} ranks",
        )  # fmt: skip
    return ranks // others
