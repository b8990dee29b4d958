"""An optimizer of PyTorch's that updates a shard of the flat range, and is saved as if it updated whole tensors.

Its parameter groups keep their hyperparameters, which learning-rate schedulers may change.  Their tensors are replaced
by the one stretch of this rank's shard that belongs to the group.  The result is the same only for rules that treat
each element by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from mpitrain._errors import CheckpointError
from mpitrain._typing import Array
from mpitrain.arrays import Layout
from mpitrain.comm import Communicator
from mpitrain.torch.groups import runs_of

ELEMENTWISE = (
    torch.optim.ASGD, torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
    torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
)  # fmt: skip
"""Optimizers whose rule treats each element by itself."""

_ONE_PER_TENSOR = frozenset({"step", "mu_product", "eta", "mu"})
"""State of theirs that is one number for each tensor; all else has the tensor's shape."""

Saved = dict[str, Any]
"""A ``state_dict`` of PyTorch's optimizers."""


@dataclass(frozen=True)
class _Group:
    """A parameter group as it was handed in, and where it lies in the flat range."""

    numbers: list[int]
    """What a ``state_dict`` calls its parameters, the frozen ones too."""

    trained: dict[str, int]
    """The same by name, without the frozen ones."""

    run: tuple[int, int]
    """Where its trained parameters begin and end."""

    own: tuple[int, int]
    """This rank's stretch of them, perhaps empty."""


class ShardedGroups:
    """The parameter groups of an optimizer, on one rank's shard.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Changed: its groups hold this rank's stretches from now on, its state is cut to them.
    names : list of list of str
        The trained parameters of each group.
    layout : Layout
        Where they lie.
    begin : int
        Where the shard begins in the flat range.
    params, grads : NumPy array, shape (size of the shard,)
        The shard's memory.
    comm : Communicator
        Of the ranks that own the other shards.
    """

    def __init__(
        self, optimizer: Any, names: list[list[str]], layout: Layout, begin: int, params: Array, grads: Array,
        comm: Communicator,
    ) -> None:  # fmt: skip
        self._optimizer, self._layout, self._comm = optimizer, layout, comm
        before = optimizer.state_dict()
        self._groups = _groups_of(optimizer, names, runs_of(layout, names), begin, begin + len(params))
        optimizer.state.clear()
        for group, now in zip(self._groups, optimizer.param_groups, strict=True):
            start, stop = group.own
            cut = slice(start - begin, stop - begin)
            now["params"] = [_piece(params[cut], grads[cut])] if start < stop else []
        if before["state"]:
            self.load(before)

    def state(self) -> Saved:
        """Return what the optimizer's ``state_dict`` would be if it updated whole tensors.  Collective."""
        own = self._optimizer.state_dict()
        state: dict[int, dict[str, Any]] = {}
        groups = []
        for group, now in zip(self._groups, own["param_groups"], strict=True):
            mine = own["state"].get(now["params"][0], {}) if now["params"] else {}
            wholes = self._gathered(group, mine)
            for name, number in group.trained.items() if wholes else ():
                state[number] = {key: self._of_tensor(key, value, group, name) for key, value in wholes.items()}
            groups.append({**now, "params": group.numbers})
        return {"state": state, "param_groups": groups}

    def _gathered(self, group: _Group, mine: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of a whole group: per element as one array over its run, the rest as it is."""
        kinds = {key: value if _one(key, value) else value.dtype for key, value in mine.items()}
        everyones: list[dict[str, Any]] = self._comm.allgather_object(kinds)
        return {
            key: self._whole(group, mine.get(key), kind) if isinstance(kind, torch.dtype) else kind
            for key, kind in max(everyones, key=len).items()
        }

    def _whole(self, group: _Group, mine: Any, dtype: torch.dtype) -> Any:
        (start, stop), (own_start, own_stop) = group.run, group.own
        whole = torch.zeros(stop - start, dtype=dtype)
        if mine is not None:
            whole[own_start - start : own_stop - start] = mine
        return self._comm.allreduce(whole)

    def _of_tensor(self, key: str, value: Any, group: _Group, name: str) -> Any:
        """Return a tensor's own copy of its part of the group's state."""
        if _one(key, value):
            return deepcopy(value)
        segment, start = self._layout[name], group.run[0]
        return value[segment.offset - start : segment.stop - start].view(segment.shape).clone()

    def load(self, saved: Saved) -> None:
        """Take over a ``state_dict`` of whole tensors.  Local.

        Raises
        ------
        CheckpointError
            It is of other parameter groups, or its tensors were not all updated as often.
        """
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        expected = [len(group.numbers) for group in self._groups]
        if sizes != expected:
            raise CheckpointError(
                "the saved optimizer had other parameter groups", operation="load_state_dict",
                got=f"groups of {sizes} parameters", expected=expected,
            )  # fmt: skip
        state, groups = {}, []
        for number, (group, theirs) in enumerate(zip(self._groups, saved["param_groups"], strict=True)):
            mine = self._cut(group, theirs["params"], saved["state"])
            here = group.own[0] < group.own[1]
            groups.append({**theirs, "params": [number] if here else []})
            if mine and here:
                state[number] = mine
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _cut(self, group: _Group, saved_as: list[int], state: Mapping[int, Any]) -> dict[str, Any]:
        """Return this rank's stretch of a group's state."""
        theirs = dict(zip(group.numbers, saved_as, strict=True))
        found = {name: state.get(theirs[number], {}) for name, number in group.trained.items()}
        keys: list[str] = list(max(found.values(), key=len, default={}))
        return {key: self._cut_one(group, key, {name: each.get(key) for name, each in found.items()}) for key in keys}

    def _cut_one(self, group: _Group, key: str, values: dict[str, Any]) -> Any:
        given = [value for value in values.values() if value is not None]
        if not given or _one(key, given[0]):
            if any(float(value) != float(given[0]) for value in given):
                raise CheckpointError(
                    f"tensors of one parameter group have different {key!r}", operation="load_state_dict",
                    got=sorted({float(value) for value in given}), remedy="DistributedOptimizer(..., shard=False)",
                )  # fmt: skip
            return deepcopy(given[0]) if given else None
        (start, stop), (own_start, own_stop) = group.run, group.own
        whole = torch.zeros(stop - start, dtype=given[0].dtype)
        for name, value in values.items():
            if value is not None:
                segment = self._layout[name]
                whole[segment.offset - start : segment.stop - start] = value.reshape(-1)
        return whole[own_start - start : own_stop - start].clone()


def _groups_of(
    optimizer: Any, names: list[list[str]], runs: list[tuple[int, int]], begin: int, end: int
) -> list[_Group]:
    """Return the groups of an optimizer that has not been changed yet, on the shard from ``begin`` to ``end``."""
    groups, saved = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    found = []
    for group, numbered, own, run in zip(groups, saved, names, runs, strict=True):
        both = zip(group["params"], numbered["params"], strict=True)
        numbers = [number for parameter, number in both if parameter.requires_grad]
        trained = dict(zip(own, numbers, strict=True))
        found.append(_Group(numbered["params"], trained, run, _overlap(run, begin, end)))
    return found


def _one(key: str, value: Any) -> bool:
    """Tell whether an entry of the state is one for the whole tensor."""
    return key in _ONE_PER_TENSOR or not isinstance(value, torch.Tensor)


def _overlap(run: tuple[int, int], begin: int, end: int) -> tuple[int, int]:
    start, stop = max(run[0], begin), min(run[1], end)
    return (start, stop) if start < stop else (begin, begin)


def _piece(params: Array, grads: Array) -> Any:
    """Return a stretch as a parameter over its memory, with its gradient."""
    piece = torch.nn.Parameter(torch.from_numpy(params))
    piece.grad = torch.from_numpy(grads)
    return piece


__all__ = ["ELEMENTWISE", "ShardedGroups"]
