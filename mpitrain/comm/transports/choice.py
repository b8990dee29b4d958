"""Which transport a communicator uses: decided once, by all its ranks together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from mpitrain import _env
from mpitrain._errors import InputError, StorageError
from mpitrain._typing import Array
from mpitrain.comm.transports import kernel
from mpitrain.comm.transports.fence import Fence, needs_barrier
from mpitrain.comm.transports.host import HostTransport
from mpitrain.comm.transports.kernel import Kernel
from mpitrain.comm.transports.network import NetworkTransport
from mpitrain.comm.transports.pages import PAGE_BYTES
from mpitrain.comm.transports.shared import SharedTransport
from mpitrain.comm.transports.transport import Transport
from mpitrain.comm.transports.ways import settle

if TYPE_CHECKING:
    from mpitrain.comm.communicator import Communicator

TRANSPORTS = (HostTransport.name, SharedTransport.name, NetworkTransport.name)


def choose(comm: Communicator, barrier: Callable[[], Callable[[], None]]) -> Transport:
    """Return the transport of a communicator.

    ``shared`` where every node has the same number of its ranks, two or more, which can map each other's memory;
    ``network`` where every rank has a node to itself; else ``host``.

    Parameters
    ----------
    comm : Communicator
        Its ranks.
    barrier : callable
        Makes a full memory barrier, for machines that need one.  Called on all ranks of a node, or on none.

    Raises
    ------
    InputError
        ``MPITRAIN_TRANSPORT`` (rank 0's) names no transport, or asks for ``shared`` where it cannot be had.

    Notes
    -----
    Collective.
    """
    wish = comm.broadcast_object(_env.transport())
    if wish is not None and wish not in TRANSPORTS:
        raise InputError(
            "unknown transport", operation="MPITRAIN_TRANSPORT", got=wish, expected=" or ".join(TRANSPORTS)
        )
    if wish == HostTransport.name:
        return _for(HostTransport(), f"MPITRAIN_TRANSPORT={wish}")
    if comm.size == 1:
        return _for(HostTransport(), "there is one rank")
    sizes = {int(size) for size in comm.allgather(comm.node.size)}
    if wish == NetworkTransport.name:
        return _for(NetworkTransport(comm), f"MPITRAIN_TRANSPORT={wish}")
    if wish is None and sizes == {1}:
        return _for(NetworkTransport(comm), "every rank has a node of its own")
    obstacle = _obstacle(sizes)
    if obstacle is None:
        try:
            return _for(_shared(comm, barrier), f"the {comm.node.size} ranks of each node map each other's memory")
        except StorageError as error:
            obstacle = str(error)
    if wish == SharedTransport.name:
        raise InputError(
            "shared memory cannot be used", operation="MPITRAIN_TRANSPORT", got=obstacle,
            remedy="unset it, or set it to host",
        )  # fmt: skip
    return _for(HostTransport(), obstacle)


def _for(transport: Transport, why: str) -> Transport:
    transport.why = why
    return transport


def ranks_per_node() -> int | None:
    """Return ``MPITRAIN_RANKS_PER_NODE`` as a number; None where it is not set."""
    text = _env.ranks_per_node()
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise InputError("unusable number", operation="MPITRAIN_RANKS_PER_NODE", got=repr(text), expected="1 or more")
    return int(text)


def _obstacle(sizes: set[int]) -> str | None:
    """Return what forbids shared memory, given how many ranks nodes have; the same on all ranks."""
    if sizes == {1}:
        return "no two ranks are on one node"
    return None if len(sizes) == 1 else f"nodes have {min(sizes)} to {max(sizes)} ranks"


def _shared(comm: Communicator, barrier: Callable[[], Callable[[], None]]) -> Transport:
    """Make the shared transport; what fails on one node is raised on all."""
    across = comm.split(comm.node.rank, axis="across") if comm.size > comm.node.size else None
    comm._keep(across)
    compiled = across is None and all(comm.allgather_object(kernel.available()))
    order = barrier() if needs_barrier() else None
    spins = _cores(comm.node) >= comm.node.size

    def fence(lines: Array) -> Fence:
        return Fence(lines, comm.node.rank, order, spins)

    def loops(memory: Array) -> Kernel:
        made = Kernel(memory, comm.node.rank, PAGE_BYTES, kernel.SPINS if spins else 0, comm._progress)
        if comm.node.size == 2:
            settle(made, comm.node, spins)
        return made

    shared, failure = None, None
    try:
        shared = SharedTransport(comm, across, fence, loops if compiled else None)
    except StorageError as error:
        failure = error
    messages = comm.allgather_object(None if failure is None else str(failure))
    found = next((message for message in messages if message is not None), None)
    if shared is None or found is not None:
        raise failure or StorageError(str(found))
    return shared


def _cores(node: Communicator) -> int:
    """Return how many cores the ranks of a node may run on, all together."""
    return len(set().union(*node.allgather_object(os.sched_getaffinity(0))))
