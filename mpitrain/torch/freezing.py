"""Which of an optimizer's parameters require a gradient: that is settled when the optimizer is taken over."""

from __future__ import annotations

from typing import Any

from mpitrain._errors import InputError
from mpitrain.comm import Communicator

_SHOWN = 3


class Freezing:
    """Notes which of an optimizer's parameters are frozen, and tells whether that has changed.

    Parameters
    ----------
    model : torch.nn.Module
        Whose parameters the optimizer has.
    optimizer : torch.optim.Optimizer
        Before its parameter groups are changed.  Parameters of the module that it has not may be frozen and unfrozen
        at any time, as a discriminator's while its generator is trained.

    Notes
    -----
    Only the gradients of those that required one have a place where ranks sum them.  A parameter frozen later would go
    on being moved by weight decay and momentum; one unfrozen later would never be trained, or on each rank by that
    rank's gradient alone.
    """

    def __init__(self, model: Any, optimizer: Any) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._before = [(names[id(each)], each, each.requires_grad) for each in found]

    def changed(self) -> list[str]:
        """Return the names of those that were frozen or unfrozen since."""
        return [name for name, parameter, before in self._before if parameter.requires_grad != before]

    def drop_gradients(self) -> None:
        """Drop gradients of frozen parameters, which no rank has summed, and PyTorch's optimizers would step by."""
        for _, parameter, trained in self._before:
            if not trained:
                parameter.grad = None

    def refuse(self, comm: Communicator, operation: str) -> None:
        """Raise the InputError, in the same words on all ranks.  Collective."""
        everyones = comm.allgather_object(self.changed())
        ranks = [rank for rank, names in enumerate(everyones) if names]
        names = list(dict.fromkeys(name for found in everyones for name in found))
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise InputError(
            "parameters were frozen or unfrozen since the optimizer was made", operation=operation,
            got=f"{', '.join(names[:_SHOWN])}{more} on ranks {ranks}",
            remedy="make another: freeze first, then optimizer and DistributedOptimizer",
        )  # fmt: skip
