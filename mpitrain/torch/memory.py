"""Where a module's parameters and summed gradients lie, and who updates them: each rank a shard, or all everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mpitrain._errors import InputError
from mpitrain.arrays import FlatBuffer, Shard
from mpitrain.comm import Communicator
from mpitrain.optim import finite
from mpitrain.torch.shards import Saved, ShardedGroups


class ReplicatedMemory:
    """Every rank has all sums and updates its own parameters.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        What updates.
    grads : FlatBuffer
        Of this rank; the sums replace them.
    comm : Communicator
        Who sums.

    Attributes
    ----------
    sums : NumPy array, shape (shard.size,)
        The summed gradients that this rank updates by.
    shard : Shard
        Which part of the flat range that is.
    writes : bool
        Whether this rank writes when parameters are edited.
    """

    writes = True

    def __init__(self, optimizer: Any, grads: FlatBuffer, comm: Communicator) -> None:
        self._optimizer, self._grads = optimizer, grads
        self.shard = grads.layout.whole()
        self.sums = grads.flat
        self._plan = comm.allreduce_plan(grads.flat, in_place=True)
        self._own_finite = True
        self._made_of = _members(optimizer)

    def check(self) -> None:
        """Require that the optimizer has no other parameters than before; its own, a rank may change at any time.

        Raises
        ------
        InputError
            It has: those it would update by gradients that no rank has summed.
        """
        now = _members(self._optimizer)
        if len(now) != len(self._made_of) or any(a is not b for a, b in zip(now, self._made_of, strict=True)):
            raise _other_groups()

    def note(self) -> None:
        """Do nothing: changes are not watched."""

    def reduce(self) -> None:
        """Sum over ranks; collective."""
        self._own_finite = finite(self.sums)  # afterwards nobody could tell whose it was
        self._plan()

    def total(self, partial: float) -> float:
        """Return a sum over all shards of what this rank found in its own."""
        return partial

    def update(self) -> None:
        """Run the optimizer."""
        self._optimizer.step()

    def own_finite(self) -> bool:
        """Tell whether this rank's own gradients were finite."""
        return self._own_finite

    def bad_tensors(self) -> set[str]:
        """Return the tensors of the shard whose sums are not finite."""
        return _bad_tensors(self.shard, self.sums)

    def state(self) -> Saved:
        """Return the optimizer's state."""
        found: Saved = self._optimizer.state_dict()
        return found

    def load(self, saved: Saved) -> None:
        """Go on from a saved state."""
        self._optimizer.load_state_dict(saved)


class ShardedMemory:
    """Each rank sums and updates a shard; ranks of a node that share memory have one copy of the parameters.

    Parameters
    ----------
    optimizer, grads, comm
        As for `ReplicatedMemory`, whose attributes it has too.
    names : list of list of str
        The trained parameters of each group of the optimizer.
    params : list of torch.nn.Parameter
        In the order of the layout; their memory is replaced.
    """

    def __init__(
        self, optimizer: Any, names: list[list[str]], params: list[Any], grads: FlatBuffer, comm: Communicator
    ) -> None:
        layout = grads.layout
        self._optimizer, self._grads, self._comm, self._params = optimizer, grads, comm, params
        self._reduce = comm.reduce_scatter_plan(grads.flat)
        begin, end = self._reduce.begin, self._reduce.end
        self.shard, self.sums = layout.shard(begin, end), self._reduce.shard
        self.writes = comm.transport != "shared" or comm.node.rank == 0
        whole = FlatBuffer(layout, comm.shared)
        self._publish = comm.allgather_plan(whole.flat, begin, end)
        self._adopt(whole)
        self._groups = ShardedGroups(optimizer, names, layout, begin, whole.flat[begin:end], self.sums, comm)
        self._pieces = [group["params"] for group in optimizer.param_groups]
        self._piece_sums = [piece.grad for piece in self._all_pieces()]
        self._note_sums()
        self._one_node = comm.node.size == comm.size
        self._own_finite: bool | None = None

    def _adopt(self, whole: FlatBuffer) -> None:
        """Move the parameters into the flat memory: each rank writes its shard, then all see everything."""
        own = FlatBuffer(whole.layout)
        for parameter, segment in zip(self._params, whole.layout, strict=True):
            own.views[segment.name][...] = parameter.detach().numpy()
        whole.flat[self.shard.start : self.shard.stop] = own.flat[self.shard.start : self.shard.stop]
        self._publish()
        for parameter, segment in zip(self._params, whole.layout, strict=True):
            parameter.data = torch.from_numpy(whole.views[segment.name])
        self._addresses = [parameter.data_ptr() for parameter in self._params]
        self.note()

    def note(self) -> None:
        """Take the parameters as they are now for what `check` expects."""
        self._versions = [parameter._version for parameter in self._params]

    def check(self) -> None:
        """Require that the parameters lie where they did, and are unchanged, since the last step.

        Raises
        ------
        InputError
            They were moved, changed, or a group was added.
        """
        moved = [parameter.data_ptr() for parameter in self._params] != self._addresses
        changed = [parameter._version for parameter in self._params] != self._versions
        groups = [group["params"] for group in self._optimizer.param_groups]
        other = len(groups) != len(self._pieces) or any(a is not b for a, b in zip(groups, self._pieces, strict=True))
        for wrong, what, remedy in (
            (moved, "parameters lie elsewhere", "convert and move the module before making the optimizer"),
            (changed, "parameters were changed in place, which all ranks of a node would do to one memory",
             "change them in opt.edit(lambda: ...), or use shard=False"),
        ):  # fmt: skip
            if wrong:
                raise InputError(what, operation="DistributedOptimizer", remedy=remedy)
        if other:
            raise _other_groups()

    def _all_pieces(self) -> list[Any]:
        return [piece for pieces in self._pieces for piece in pieces]

    def _note_sums(self) -> None:
        self._sum_versions = [sums._version for sums in self._piece_sums]

    def _check_sums(self) -> None:
        """Require that the optimizer still has this rank's sums: without them it would leave its shard as it is."""
        dropped = any(piece.grad is not sums for piece, sums in zip(self._all_pieces(), self._piece_sums, strict=True))
        if dropped or [sums._version for sums in self._piece_sums] != self._sum_versions:
            raise InputError(
                "the sums of this rank's shard were dropped or changed", operation="DistributedOptimizer",
                got="zero_grad() of the optimizer that was handed in, or the like",
                remedy="call zero_grad() of the DistributedOptimizer, or use shard=False",
            )  # fmt: skip

    def reduce(self) -> None:
        """Sum over ranks; collective."""
        if not self._one_node:  # sums of a node overwrite more than this rank's shard
            self._own_finite = finite(self._grads.flat)
        self._reduce()

    def total(self, partial: float) -> float:
        """Return a sum over all shards of what this rank found in its own.  Collective."""
        return float(self._comm.allreduce(np.float64(partial)))

    def update(self) -> None:
        """Run the optimizer on this rank's shard, and give all ranks the parameters.  Collective.

        Raises
        ------
        InputError
            Somebody but this object dropped or changed the sums.
        """
        self._check_sums()
        self._optimizer.step()
        self._note_sums()
        self._publish()
        for parameter in self._params:  # PyTorch 2.4 takes no list
            torch.autograd.graph.increment_version(parameter)  # a graph from before the step is stale
        self.note()

    def own_finite(self) -> bool:
        """Tell whether this rank's own gradients were finite, as far as they were not overwritten by sums."""
        if self._own_finite is not None:
            return self._own_finite
        flat, shard = self._grads.flat, self.shard
        if self._comm.size == 1 or not np.may_share_memory(flat, self.sums):
            return finite(flat)
        return finite(flat[: shard.start]) and finite(flat[shard.stop :])

    def bad_tensors(self) -> set[str]:
        """Return the tensors of the shard whose sums are not finite."""
        return _bad_tensors(self.shard, self.sums)

    def state(self) -> Saved:
        """Return the optimizer's state of all shards, as if it updated whole tensors.  Collective."""
        return self._groups.state()

    def load(self, saved: Saved) -> None:
        """Go on from a saved state of whole tensors."""
        self._groups.load(saved)


def _members(optimizer: Any) -> list[Any]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _other_groups() -> InputError:
    return InputError(
        "the optimizer has other parameter groups than before", operation="DistributedOptimizer",
        remedy="add them before it is handed in",
    )  # fmt: skip


def _bad_tensors(shard: Shard, sums: Any) -> set[str]:
    segments = shard.layout.segments
    return {segments[number].name for number, cut in shard.pieces if not finite(sums[cut])}
