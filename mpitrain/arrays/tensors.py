"""The tensors of a layout as a method hands them to a model: by name, and perhaps not all in memory at once.

`FlatBuffer` holds all of them.  Methods that divide a model have other kinds, which fetch or prepare a tensor at the
moment when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mpitrain._typing import Array, Tree
from mpitrain.arrays.layout import Layout


class Tensors(Protocol):
    """What parameters and gradients have in common; `FlatBuffer` says what each member is."""

    @property
    def layout(self) -> Layout:
        """What lies where."""
        ...

    @property
    def flat(self) -> Array:
        """Everything, shape (layout.size,); raises an InputError if it is never in memory all at once."""
        ...

    @property
    def views(self) -> Mapping[str, Array]:
        """Every tensor under each of its names; raises an InputError as ``flat`` does."""
        ...

    @property
    def tree(self) -> Tree:
        """The tensors, nested along the dots of their names."""
        ...


class ParameterSource(Tensors, Protocol):
    """Where a model reads its parameters."""

    @property
    def xp(self) -> Any:
        """The library of the arrays."""
        ...


class Gradients(Tensors, Protocol):
    """Where a model adds its gradients."""

    def zero(self) -> None:
        """Begin a step: every gradient is zero."""
        ...

    def complete(self, prefix: str) -> None:
        """See `FlatBuffer.complete`."""
        ...

    def end_pass(self) -> None:
        """See `FlatBuffer.end_pass`."""
        ...


class LazyTree(Mapping[str, Any]):
    """Tensors nested along the dots of their names, each of which is fetched when it is asked for.

    Parameters
    ----------
    names : nested dict
        The full name of each tensor, at its place.
    fetch : callable
        Returns the array of a full name.
    """

    def __init__(self, names: Mapping[str, Any], fetch: Callable[[str], Array]) -> None:
        self._fetch = fetch
        self._nodes = {key: node if isinstance(node, str) else self._below(node) for key, node in names.items()}

    def _below(self, names: Mapping[str, Any]) -> LazyTree:
        """Return the tree of a branch."""
        return LazyTree(names, self._fetch)

    def __getitem__(self, key: str) -> Any:
        node = self._nodes[key]
        return self._fetch(node) if isinstance(node, str) else node

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)


class ParameterTree(LazyTree):
    """Parameters, each of which is fetched when it is asked for."""
