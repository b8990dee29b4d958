"""The order in which a model goes through its layers: the same on all ranks and in every step, or an error.

Where each layer's parameters are gathered by all ranks together, a rank that takes the layers in another order would be
handed another layer's values.
"""

from __future__ import annotations

from mpitrain._errors import InputError, MismatchError
from mpitrain.comm import Communicator


class Walk:
    """Compares the layers that are visited with those of the first step, which all ranks agree on at its end.

    Parameters
    ----------
    comm : Communicator
        The ranks that have to go together.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._layers: list[str] = []  # of the first step
        self._agreed = False
        self._visited = 0

    def visit(self, layer: str) -> None:
        """Take note of the next layer.

        Raises
        ------
        InputError
            It was another one in the first step.
        """
        if not self._agreed:
            self._layers.append(layer)
        elif self._layers[self._visited : self._visited + 1] != [layer]:
            raise _deviates(layer, self._layers[self._visited : self._visited + 1])
        self._visited += 1

    def end(self) -> None:
        """End a step.  Collective in the first one: one allgather of small objects.

        Raises
        ------
        MismatchError
            Ranks have visited other layers than rank 0.
        InputError
            Layers of the first step are missing.
        """
        if not self._agreed:
            self._agree()
        elif self._visited < len(self._layers):
            raise _deviates("the end of the step", self._layers[self._visited : self._visited + 1])
        self._visited = 0

    def _agree(self) -> None:
        walks = self._comm.allgather_object(self._layers)
        differing = [rank for rank, layers in enumerate(walks) if layers != walks[0]]
        if differing:
            raise MismatchError(
                "ranks use a model's layers in different orders", operation="GradientParallel, stage 3",
                got=f"another order than rank 0's on ranks {differing}", remedy=_REMEDY,
            )  # fmt: skip
        self._agreed = True


_REMEDY = "let the order depend on nothing but the model, or use stage 2"


def _deviates(found: str, expected: list[str]) -> InputError:
    return InputError(
        "a model uses its layers in another order than in the first step", operation="GradientParallel, stage 3",
        got=found, expected=", ".join(expected) or "the end of the step", remedy=_REMEDY,
    )  # fmt: skip
