"""Ranks as threads of one process: for tests, for debugging, and to show what a program does wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NoReturn

from mpitrain._errors import AbortError
from mpitrain._options import check_whole
from mpitrain.comm.calls import Call, Handle
from mpitrain.comm.communicator import Communicator
from mpitrain.comm.ledger import Ledger
from mpitrain.comm.local_hub import Group, Hub, Post, Slot


class LocalWorld:
    """Runs a function on n ranks, each a thread.

    Parameters
    ----------
    size : int
        Ranks.
    ranks_per_node : int, optional
        How many successive ranks share a node; all if None.
    rendezvous : bool
        ``send`` blocks until the message is received, as MPI may: shows deadlocks that buffering hides.
    timeout_s : float
        A rank that waits longer raises `CommunicationError`, which tells what every rank is doing.

    Examples
    --------
    >>> LocalWorld(3).run(lambda comm: int(comm.allreduce(comm.rank)))
    [3, 3, 3]
    """

    def __init__(
        self, size: int, *, ranks_per_node: int | None = None, rendezvous: bool = False, timeout_s: float = 60.0
    ) -> None:
        check_whole("LocalWorld", "size", size, 1)
        if ranks_per_node is not None:
            check_whole("LocalWorld", "ranks_per_node", ranks_per_node, 1)
        self.size = int(size)
        self._ranks_per_node = self.size if ranks_per_node is None else int(ranks_per_node)
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``fn(comm, *args)`` on every rank and return the results in rank order.

        Raises
        ------
        Exception
            The first that any rank raised, with a note that names the rank; the others were woken with `AbortError`.
        """
        hub = Hub(self.size, self._rendezvous, self._timeout_s)
        results: list[Any] = [None] * self.size

        def rank_main(rank: int) -> None:
            comm = LocalCommunicator(hub, (), tuple(range(self.size)), rank, self._ranks_per_node, Ledger())
            try:
                results[rank] = fn(comm, *args)
            except BaseException as error:
                hub.fail(rank, error)
            finally:
                hub.leave(rank)

        threads = [
            threading.Thread(target=rank_main, args=(r,), name=f"rank {r}", daemon=True) for r in range(self.size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        hub.raise_first()
        return results


def alone() -> Communicator:
    """Return a communicator of one rank, this thread, which takes no part in MPI: for serial work within a rank."""
    return LocalCommunicator(Hub(1, rendezvous=False, timeout_s=0.0), (), (0,), 0, 1, Ledger())


class LocalCommunicator(Communicator):
    """One rank of a `LocalWorld`, or of a part of it.

    Parameters
    ----------
    hub : Hub
        What all threads share.
    group : tuple
        Name of the communicator, the same on all its ranks.
    members : tuple of int
        World ranks, in the order of this communicator's.
    world_rank : int
        This thread's rank in the world.
    ranks_per_node : int
        How many successive world ranks share a node.
    ledger : Ledger
        Where it is counted.
    """

    def __init__(
        self, hub: Hub, group: Group, members: tuple[int, ...], world_rank: int, ranks_per_node: int, ledger: Ledger
    ) -> None:
        super().__init__(members.index(world_rank), len(members), ledger)
        self._hub, self._group, self._members = hub, group, members
        self._world_rank = world_rank
        self._ranks_per_node = ranks_per_node
        self._number = 0
        self._splits = 0

    def _run(self, call: Call) -> None:
        self._post(call, str(call)).wait()

    def _begin(self, call: Call) -> Handle:
        # MPI does not match a nonblocking collective with a blocking one.
        return self._post(call, f"i{call}")

    def _meet(self, call: Call) -> None:
        self._post(Call("barrier"), str(call)).wait()

    def _post(self, call: Call, name: str) -> Handle:
        hub, me = self._hub, self._world_rank
        if call.peer is not None:
            peer = self._members[call.peer]
            source, dest = (me, peer) if call.operation == "send" else (peer, me)
            name = f"{name} with rank {call.peer}"
            return _LocalHandle(hub, me, name, hub.post(self._group, source, dest, call), lambda: {peer})
        self._number += 1
        slot = hub.deposit(self._group, self._number, self._members, me, name, call)
        return _LocalHandle(hub, me, name, slot, lambda: set(self._members) - set(slot.calls))

    def _split(self, color: int | None, key: int, axis: str) -> Communicator | None:
        wishes = self.allgather_object((color, key))
        self._splits += 1
        if color is None:
            return None
        order = sorted((key, rank) for rank, (their, key) in enumerate(wishes) if their == color)
        members = tuple(self._members[rank] for _, rank in order)
        group = (*self._group, self._splits, color)
        return LocalCommunicator(
            self._hub, group, members, self._world_rank, self._ranks_per_node, self.ledger.child(axis)
        )  # fmt: skip

    def _split_node(self) -> Communicator:
        node = self._split(self._world_rank // self._ranks_per_node, 0, "node")
        assert node is not None
        return node

    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks of this world, whose ``run`` then raises."""
        raise AbortError(f"rank {self.rank} of {self.size} aborted with code {code}")

    def _free(self) -> None:
        """Nothing to release: the hub goes with the world."""


class _LocalHandle:
    """A message or collective that this rank has joined."""

    def __init__(
        self, hub: Hub, rank: int, name: str, item: Post | Slot, needs: Callable[[], set[int]]
    ) -> None:  # fmt: skip
        self._hub, self._rank, self._name, self._item, self._needs = hub, rank, name, item, needs

    def wait(self) -> None:
        self._hub.wait(self._rank, self._name, self._item, self._needs)

    def test(self) -> bool:
        return self._hub.ready(self._item)
