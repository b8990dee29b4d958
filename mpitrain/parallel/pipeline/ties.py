"""Tensors that stages on different ranks share: each holds a copy, and all copies take the same steps."""

from __future__ import annotations

from collections.abc import Sequence

from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator


class Ties:
    """The tensors that more than one rank of a pipeline holds.

    Parameters
    ----------
    comm : Communicator
        Along the pipeline.
    held : sequence of collection of str
        Names of the tensors that each rank holds.

    Attributes
    ----------
    copies : frozenset of str
        Those of this rank's that belong to a rank before it.

    Notes
    -----
    Collective, as is `sum`; a communicator for each such tensor.
    """

    def __init__(self, comm: Communicator, held: Sequence[frozenset[str]]) -> None:
        holders = {name: [rank for rank, names in enumerate(held) if name in names] for names in held for name in names}
        shared = {name: ranks for name, ranks in sorted(holders.items()) if len(ranks) > 1}
        self._groups = {
            name: comm.split(0 if comm.rank in ranks else None, axis="tied") for name, ranks in shared.items()
        }
        self.copies = frozenset(name for name, ranks in shared.items() if comm.rank in ranks[1:])
        self.owners = {name: ranks[0] for name, ranks in holders.items()}

    def sum(self, grads: FlatBuffer) -> None:
        """Sum the gradients of the copies, in place: every holder gets the gradient of the one tensor."""
        for name, group in self._groups.items():
            if group is not None:
                group.allreduce(grads.views[name], out=grads.views[name])

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
