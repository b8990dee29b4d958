"""From a job's mesh to the communicators along its axes.  One more axis: a field, a length, a communicator."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from mpitrain._errors import JobError
from mpitrain.comm import Communicator, ProcessMesh
from mpitrain.train.job import Job


@dataclass(frozen=True)
class Axes:
    """What a rank is in along each axis of the mesh.

    Parameters
    ----------
    data : Communicator
        The ranks that share each batch.
    tensor : Communicator, optional
        The ranks that divide the model's tensors; None: this rank has all of the model.
    """

    data: Communicator
    tensor: Communicator | None = None


def axes_of(job: Job, comm: Communicator) -> Axes:
    """Put the ranks on the job's mesh.  Collective.

    Raises
    ------
    JobError
        They are not as many as the mesh needs.
    """
    lengths = {"tensor": job.mesh.tensor}
    lengths = {"data": job.mesh.data or _left(comm.size, lengths), **lengths}
    if prod(lengths.values()) != comm.size:
        raise JobError(
            f"mesh {'×'.join(map(str, lengths.values()))} needs {prod(lengths.values())} ranks, got {comm.size}",
            operation=", ".join(f"mesh.{name} = {length}" for name, length in lengths.items()),
            remedy=f"start {prod(lengths.values())} ranks, or leave out mesh.data",
        )  # fmt: skip
    if not job.mesh.divides_model:
        return Axes(comm)
    mesh = ProcessMesh(comm, **lengths)
    return Axes(mesh["data"], mesh["tensor"])


def _left(ranks: int, lengths: dict[str, int]) -> int:
    """Return the length of the data axis that the others leave."""
    others = prod(lengths.values())
    if ranks % others:
        raise JobError(
            f"mesh {'×'.join(map(str, lengths.values()))} does not divide {ranks} ranks",
            operation=", ".join(f"mesh.{name} = {length}" for name, length in lengths.items()),
            remedy=f"start a multiple of {others} ranks",
        )  # fmt: skip
    return ranks // others
