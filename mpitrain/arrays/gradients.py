"""Gradients that are zeroed when they are first added to, or never, where a layer overwrites them instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpitrain._typing import Array, Tree
from mpitrain.arrays.flatbuffer import Allocator, FlatBuffer, nest, plain
from mpitrain.arrays.layout import Layout
from mpitrain.arrays.tensors import LazyTree


class GradientTree(LazyTree):
    """Gradients, each of which is made ready when it is asked for.

    Parameters
    ----------
    names : nested dict
        The full name of each tensor, at its place.
    ready : callable
        Returns the array of a full name, to be added to.
    unwritten : callable
        Returns the array of a full name as it is, if nothing has been added to it yet; else None.
    """

    def __init__(
        self, names: Mapping[str, Any], ready: Callable[[str], Array], unwritten: Callable[[str], Array | None]
    ) -> None:
        self._unwritten = unwritten
        super().__init__(names, ready)

    def _below(self, names: Mapping[str, Any]) -> GradientTree:
        return GradientTree(names, self._fetch, self._unwritten)

    def unwritten(self, key: str) -> Array | None:
        """Return the gradient for the caller to overwrite, if nothing was added to it yet; else None.

        What the array holds at first means nothing: the caller has to set all of it.
        """
        node = self._nodes[key]
        return self._unwritten(node) if isinstance(node, str) else None


def unwritten(grads: Tree, key: str) -> Array | None:
    """Return a gradient that may be overwritten instead of added to, see `GradientTree.unwritten`.

    A layer that overwrites saves a pass that zeroes and a pass that adds.  None for gradients of any other kind.
    """
    return grads.unwritten(key) if isinstance(grads, GradientTree) else None


class GradientBuffer:
    """All gradients of a model in one memory, each zeroed no sooner than it is needed; see `Gradients`.

    Parameters
    ----------
    layout : Layout
        What lies where.
    allocator : Allocator
        Where the memory comes from.
    """

    def __init__(self, layout: Layout, allocator: Allocator = plain) -> None:
        self.layout = layout
        self._buffer = FlatBuffer(layout, allocator)
        self._unset: set[str] = set()  # names of those to which nothing was added in this step
        self._padding = [self._buffer.flat[start:stop] for start, stop in layout.padding()]
        names = {name: layout.ties.get(name, name) for name in self._buffer.views}
        self._tree = GradientTree(nest(names), self._ready, self._unwritten)

    @property
    def buffer(self) -> FlatBuffer:
        """The same memory as an ordinary buffer; what nothing was added to is zeroed first."""
        for name in self._unset:
            self._buffer.views[name][...] = 0
        self._unset.clear()
        return self._buffer

    @property
    def flat(self) -> Array:
        """Everything, shape (layout.size,)."""
        return self.buffer.flat

    @property
    def views(self) -> Mapping[str, Array]:
        """Every tensor under each of its names."""
        return self.buffer.views

    @property
    def tree(self) -> GradientTree:
        """The tensors, nested along the dots of their names."""
        return self._tree

    def zero(self) -> None:
        """Begin a step: every gradient is zero."""
        self._unset.update(segment.name for segment in self.layout.segments)
        for gap in self._padding:  # an update may have written there
            gap[...] = 0

    def complete(self, prefix: str) -> None:
        """See `FlatBuffer.complete`; nothing follows."""

    def end_pass(self) -> None:
        """See `FlatBuffer.end_pass`; what no layer has added to is zero."""
        _ = self.buffer

    def _ready(self, name: str) -> Array:
        view = self._buffer.views[name]
        if name in self._unset:
            self._unset.remove(name)
            view[...] = 0
        return view

    def _unwritten(self, name: str) -> Array | None:
        if name not in self._unset:
            return None
        self._unset.remove(name)
        return self._buffer.views[name]
