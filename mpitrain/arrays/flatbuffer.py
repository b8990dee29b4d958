"""A layout plus memory: one flat array, and a view of it per tensor."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from mpitrain._options import check_kind
from mpitrain._typing import Array, DType
from mpitrain.arrays.layout import Layout
from mpitrain.arrays.namespace import by_device, namespace, to_host

_HUGE_PAGE_BYTES = 2 * 1024 * 1024


class Allocator(Protocol):
    """Gives zeroed memory, page-aligned where that serves.  `comm` offers one for memory that a node's ranks share."""

    def __call__(self, size: int, dtype: DType, /) -> Array:
        """Return a zeroed one-dimensional array of ``size`` elements."""
        ...


def plain(size: int, dtype: DType) -> Array:
    """Allocate this process's own memory; page-aligned, and backed by the kernel when first touched.

    Notes
    -----
    In huge pages from 2 MiB on, where the kernel gives them to those who ask, as NumPy does for its large arrays: MPI
    libraries read another process's memory page by page, and take up to 1.4 times as long for 16 MiB in pages of
    4 KiB.  For less memory none are asked for: it would get one only by chance, with what happens to lie beside it.
    """
    nbytes = size * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared ones have small pages
    if nbytes >= _HUGE_PAGE_BYTES:
        with suppress(AttributeError, OSError):  # another system, or a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, count=nbytes).view(dtype)


def device(size: int, dtype: DType) -> Array:
    """Allocate memory of the current GPU through CuPy."""
    array: Array = by_device("gpu").zeros(size, dtype)
    return array


class FlatBuffer:
    """Memory for the tensors of a layout.

    Parameters
    ----------
    layout : Layout
        What lies where.
    allocator : Allocator
        Where the memory comes from.

    Attributes
    ----------
    flat : array, shape (layout.size,), layout.dtype
        Everything; padding is zero.
    views : dict of str to array
        A view of each tensor, under each of its names.
    tree : nested dict
        The same views, nested along the dots of the names: ``tree["0"]["weight"]``.
    """

    def __init__(self, layout: Layout, allocator: Allocator = plain) -> None:
        check_kind("FlatBuffer", "layout", layout, Layout, "a Layout, e.g. that of a model")
        self.layout = layout
        self.flat = allocator(layout.size, layout.dtype)
        self.views = views(layout, self.flat)
        self.tree = nest(self.views)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy, or pickle, layout and values: a plain buffer, whose tensors are views of its own memory."""
        return _copied, (self.layout, self.flat)

    @property
    def xp(self) -> Any:
        """The library of the arrays: ``numpy`` or ``cupy``."""
        return namespace(self.flat)

    def zero(self) -> None:
        """Set every element to zero."""
        self.flat[...] = 0

    def complete(self, prefix: str) -> None:
        """Take note that this pass is done with every tensor whose name begins with ``prefix``.

        A prefix that is itself the name of a tensor means that tensor alone.  A model may call this layer by layer, as
        it finishes their gradients, so that a method can reduce them early.  A plain buffer does nothing.
        """

    def end_pass(self) -> None:
        """Take note that all gradients of a microbatch have been added.  A plain buffer does nothing."""

    def sha256(self) -> str:
        """Return a hash of the values of all tensors, in the order of their names; padding does not count."""
        return sha256(self.views[name] for name in sorted(segment.name for segment in self.layout))


def _copied(layout: Layout, values: Array) -> FlatBuffer:
    return FlatBuffer(layout, lambda *_: values.copy())


def sha256(arrays: Iterable[Array]) -> str:
    """Return a hash of the values of some arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(to_host(array)).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def views(layout: Layout, flat: Array) -> dict[str, Array]:
    """Return a view of ``flat`` for each tensor of ``layout``, ties included."""
    found = {s.name: flat[s.offset : s.stop].reshape(s.shape) for s in layout.segments}
    found.update({alias: found[name] for alias, name in layout.ties.items()})
    return found


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted names into nested dictionaries."""
    tree: dict[str, Any] = {}
    for name, array in named.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree
