"""PyTorch's collectives by its backend gloo, in the same processes; no other file of the benchmark knows torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from mpitrain import _env
from mpitrain._errors import MissingExtraError
from mpitrain._typing import Array
from mpitrain.comm.bench.cases import Call
from mpitrain.comm.bench.meeting import Place

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

NAME = "gloo"
_TIMEOUT_S = 60.0


@contextmanager
def group(comm: Communicator, place: Place) -> Iterator[Callable[[str, Array, Array, bool], Call]]:
    """Start gloo on all ranks of the job; yields what turns an operation and its arrays into a call.

    Parameters
    ----------
    comm : Communicator
        The world's.
    place : Place
        Where they meet.

    Notes
    -----
    Collective, after `check` on all ranks.  ``GLOO_SOCKET_IFNAME`` overrides the interface.
    """
    from torch import distributed

    _env.set_default("GLOO_SOCKET_IFNAME", place.interface)
    store = _store(distributed, comm, place.address)
    distributed.init_process_group(
        "gloo", store=store, rank=comm.rank, world_size=comm.size, timeout=timedelta(seconds=_TIMEOUT_S)
    )
    try:
        yield partial(_bind, distributed)
    finally:
        distributed.destroy_process_group()


def check() -> None:
    """Look whether PyTorch is there, on this rank.

    Raises
    ------
    MissingExtraError
        It cannot be imported, or was built without gloo.
    """
    try:
        from torch import distributed
    except ImportError as error:
        raise MissingExtraError(
            "gloo needs PyTorch", got=str(error), remedy="pip install 'mpitrain[torch]', or leave out --peers"
        ) from error
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise MissingExtraError("this PyTorch was built without gloo", remedy="install a wheel of PyTorch's own")


def _store(distributed: Any, comm: Communicator, host: str) -> Any:
    """Open the store that ranks meet in: rank 0 serves it, at a port that the system chooses."""
    make = partial(distributed.TCPStore, host, world_size=comm.size, wait_for_workers=False)
    own = make(port=0, is_master=True) if comm.rank == 0 else None
    port = comm.broadcast_object(own.port if own else 0)
    return own or make(port=port, is_master=False)


def _bind(distributed: Any, operation: str, x: Array, y: Array, in_place: bool) -> Call:
    """Return a call; gloo knows allreduce in place only."""
    assert in_place or operation != "allreduce"
    import torch

    send, recv = torch.from_numpy(x), torch.from_numpy(y)
    flat = (recv.reshape(-1), send.reshape(-1))
    match operation:
        case "allreduce":
            return partial(distributed.all_reduce, send)
        case "broadcast":
            return partial(distributed.broadcast, send, 0)
        case "reduce_scatter":
            return partial(_named(distributed, "reduce_scatter_single", "reduce_scatter_tensor"), *flat)
        case _:
            return partial(_named(distributed, "all_gather_single", "all_gather_into_tensor"), *flat)


def _named(distributed: Any, *names: str) -> Any:
    """Return the first of these that this release of PyTorch has."""
    return next(getattr(distributed, name) for name in names if hasattr(distributed, name))
