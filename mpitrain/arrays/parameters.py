"""What a model reads its parameters from: as a method hands them in, not all of them need be there at the same time.

A `FlatBuffer` is the simplest.  Others bring a layer's tensors when the first of them is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mpitrain._typing import Array, Tree
from mpitrain.arrays.layout import Layout


class ParameterSource(Protocol):
    """Where a model reads its parameters; `FlatBuffer` says what each member is."""

    @property
    def layout(self) -> Layout:
        """What lies where."""
        ...

    @property
    def xp(self) -> Any:
        """The library of the arrays."""
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


class ParameterTree(Mapping[str, Any]):
    """Parameters nested along the dots of their names, each brought when it is asked for.

    Parameters
    ----------
    names : nested dict
        The full name of each tensor, at its place.
    bring : callable
        Returns the array of a full name.
    """

    def __init__(self, names: Mapping[str, Any], bring: Callable[[str], Array]) -> None:
        self._bring = bring
        self._nodes = {
            key: node if isinstance(node, str) else ParameterTree(node, bring) for key, node in names.items()
        }

    def __getitem__(self, key: str) -> Any:
        node = self._nodes[key]
        return self._bring(node) if isinstance(node, str) else node

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)
