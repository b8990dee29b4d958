"""The surroundings of a pass through a model that ranks divide: those of any pass, and the ranks."""

from __future__ import annotations

from dataclasses import dataclass

from mpitrain._errors import InputError
from mpitrain.comm import Communicator
from mpitrain.nn import Call
from mpitrain.parallel.tensor.portion import Span, spans


@dataclass(frozen=True)
class PeerCall(Call):
    """What one pass needs from outside a tensor-parallel layer.

    Parameters
    ----------
    peers : Communicator
        The ranks that divide the model.
    length : int
        Places of each sample: tokens of a text; what sequence-parallel layers divide.
    **others
        As for `Call`.
    """

    peers: Communicator | None = None
    length: int = 1

    @property
    def ranks(self) -> Communicator:
        """The ranks that divide the model."""
        assert self.peers is not None, "TensorNetwork hands them in"
        return self.peers

    @property
    def places(self) -> Span:
        """Which places of each sample this rank has."""
        return spans(self.length, self.ranks.size)[self.ranks.rank]


def peer_call(call: Call) -> PeerCall:
    """Return a call as one that knows the ranks.

    Raises
    ------
    InputError
        The layer stands in a model that no ranks divide.
    """
    if not isinstance(call, PeerCall):
        raise InputError(
            "a tensor-parallel layer was not told its ranks", operation="tensor-parallel",
            remedy="put it in a TensorNetwork, not a Network",
        )  # fmt: skip
    return call
