"""What a model adds its gradients to: as a method sees it, not all of them need exist at the same time.

A `FlatBuffer` is the simplest.  Others hand out the memory of a tensor when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mpitrain._typing import Array, Tree
from mpitrain.arrays.layout import Layout


class Gradients(Protocol):
    """Where a model adds its gradients; `FlatBuffer` says what each member is."""

    @property
    def layout(self) -> Layout:
        """What lies where."""
        ...

    @property
    def flat(self) -> Array:
        """Everything, shape (layout.size,); an InputError where it is never there all at once."""
        ...

    @property
    def views(self) -> Mapping[str, Array]:
        """Every tensor under each of its names; an InputError as above."""
        ...

    @property
    def tree(self) -> Tree:
        """The tensors, nested along the dots of their names."""
        ...

    def zero(self) -> None:
        """Begin a step: every gradient is zero."""
        ...

    def complete(self, prefix: str) -> None:
        """See `FlatBuffer.complete`."""
        ...

    def end_pass(self) -> None:
        """See `FlatBuffer.end_pass`."""
        ...


class GradientTree(Mapping[str, Any]):
    """Gradients nested along the dots of their names, each made ready when it is asked for.

    Parameters
    ----------
    names : nested dict
        The full name of each tensor, at its place.
    ready : callable
        Returns the array of a full name.
    """

    def __init__(self, names: Mapping[str, Any], ready: Callable[[str], Array]) -> None:
        self._ready = ready
        self._nodes = {key: node if isinstance(node, str) else GradientTree(node, ready) for key, node in names.items()}

    def __getitem__(self, key: str) -> Any:
        node = self._nodes[key]
        return self._ready(node) if isinstance(node, str) else node

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)
