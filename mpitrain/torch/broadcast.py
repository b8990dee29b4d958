"""Makes the copies of a module the same on all ranks, and tells when they are not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from mpitrain._errors import MismatchError
from mpitrain.comm import Communicator

Named = tuple[str, Any]
"""A tensor and its dotted name."""


def broadcast_parameters(model: Any, comm: Communicator, root: int = 0) -> None:
    """Give all ranks the parameters and buffers of one.

    Parameters
    ----------
    model : torch.nn.Module
        Of the same tensors on all ranks; written in place on all but ``root``.
    comm : Communicator
        The ranks.
    root : int
        Whose values count.

    Raises
    ------
    MismatchError
        On all ranks, naming those whose tensors have other names, shapes or dtypes than rank 0's.

    Notes
    -----
    Collective; one broadcast per dtype, and a round of hashes.  To be called before `DistributedOptimizer`, which may
    put the parameters into memory that a node shares; see there for changes later on.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    check_same_tensors(tensors, comm, "broadcast_parameters")
    send([tensor for _, tensor in tensors], comm, root)


def send(tensors: list[Any], comm: Communicator, root: int = 0) -> None:
    """Broadcast tensors in place.  Collective."""
    with torch.no_grad():
        packed = [tensor.detach().contiguous() for tensor in tensors]
        received = comm.broadcast(packed, root) if packed else []
        if comm.rank != root:
            for tensor, values in zip(tensors, received, strict=True):
                tensor.copy_(values)


def check_same_tensors(named: Iterable[Named], comm: Communicator, operation: str) -> None:
    """Require the same names, shapes and dtypes on all ranks.  Collective."""
    own = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in named]
    differing = _differing(comm, hashlib.sha256(repr(own).encode()).hexdigest())
    if differing:
        counts = comm.allgather_object(len(own))
        raise MismatchError(
            "the ranks have different modules", operation=operation,
            got=f"other names, shapes or dtypes than rank 0's on ranks {differing} (tensors per rank: {counts})",
            expected="the same module on all ranks",
        )  # fmt: skip


def check_same_values(named: Iterable[Named], comm: Communicator, operation: str) -> None:
    """Require the same bits on all ranks.  Collective."""
    digest = hashlib.sha256()
    for _, tensor in named:
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    differing = _differing(comm, digest.hexdigest())
    if differing:
        raise MismatchError(
            "the parameters differ between ranks", operation=operation,
            got=f"other values than rank 0's on ranks {differing}",
            remedy="call mpitrain.torch.broadcast_parameters(model, comm) before",
        )  # fmt: skip


def _differing(comm: Communicator, digest: str) -> list[int]:
    """Return the ranks whose digest is not rank 0's."""
    digests = comm.allgather_object(digest)
    return [rank for rank, each in enumerate(digests) if each != digests[0]]
