"""Tensors that stages on different ranks share: each holds a copy, and all copies take the same steps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from mpitrain._typing import Array
from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator


class Ties:
    """The tensors that more than one rank of a pipeline holds.

    Parameters
    ----------
    comm : Communicator
        Along the pipeline.
    used : sequence of collection of str
        Names under which each rank uses tensors.
    ties : mapping of str to str
        Further names of tensors, see `Layout`.

    Attributes
    ----------
    shared : frozenset of str
        This rank's.
    copies : frozenset of str
        Of these, the ones that belong to a rank before it.
    owners : dict of str to int
        Of each tensor the first rank that holds it.
    uses : dict of str to list of (str, int)
        Of each tied tensor of this rank's all names, its own first, each with the rank that uses it so.

    Notes
    -----
    Collective, as is `sum`; a communicator for each such tensor.
    """

    def __init__(self, comm: Communicator, used: Sequence[Collection[str]], ties: Mapping[str, str]) -> None:
        self._holders = _holders(used, ties)
        shared = {name: ranks for name, ranks in sorted(self._holders.items()) if len(ranks) > 1}
        self._groups = {
            name: comm.split(0 if comm.rank in ranks else None, axis="tied") for name, ranks in shared.items()
        }
        self.shared = frozenset(name for name, ranks in shared.items() if comm.rank in ranks)
        self.copies = frozenset(name for name, ranks in shared.items() if comm.rank in ranks[1:])
        self.owners = {name: ranks[0] for name, ranks in self._holders.items()}
        users = {use: rank for rank, names in enumerate(used) for use in names}
        tied = [name for name in dict.fromkeys(ties.values()) if comm.rank in self._holders[name]]
        self.uses = {name: [(use, users[use]) for use in (name, *ties) if ties.get(use, use) == name] for name in tied}

    def sum(self, grads: Mapping[str, Array]) -> None:
        """Sum the gradients of the copies, in place: every holder gets that of the one tensor, or of a part of it.

        Parameters
        ----------
        grads : mapping of str to array
            Of each shared tensor, this rank's gradient of the part that all of ``comm`` are at.
        """
        for name, group in self._groups.items():
            if group is not None:
                group.allreduce(grads[name], out=grads[name])

    def everyones(self, name: str, values: Array, rank: int) -> Array:
        """Return what one holder of a tensor has, on all of them; the others hand in an array like it."""
        group = self._groups.get(name)
        if group is None:
            return values
        found: Array = group.broadcast(values, self._holders[name].index(rank))
        return found

    def publish(self, params: FlatBuffer) -> None:
        """Give all holders of a tensor the values of the first one."""
        for name, group in self._groups.items():
            if group is not None:
                group.broadcast(params.views[name], out=params.views[name])

    def free(self) -> None:
        """Release the communicators."""
        for group in self._groups.values():
            if group is not None:
                group.free()
        self._groups = {}


def _holders(used: Sequence[Collection[str]], ties: Mapping[str, str]) -> dict[str, list[int]]:
    """Return of each tensor the ranks that hold it."""
    found: dict[str, list[int]] = {}
    for rank, uses in enumerate(used):
        for name in {ties.get(use, use) for use in uses}:
            found.setdefault(name, []).append(rank)
    return found
