"""Which arrays use the same memory, on the host or on a device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpitrain._typing import Array
from mpitrain.arrays.libraries import Operand


def overlap(one: Array, other: Array) -> bool:
    """Tell whether the addresses between which the elements of two arrays lie overlap."""
    if not (one.size and other.size):
        return False
    (start, stop), (first, last) = _span(one), _span(other)
    return start < last and first < stop


def entangled(arrays: Sequence[Operand], outs: Sequence[Operand | None]) -> set[int]:
    """Return the positions in a tree at which memory may be used that another one uses, be it tied or swapped."""
    spans = [
        (*_span(memory), position)
        for operands in (arrays, outs)
        for position, operand in enumerate(operands)
        if (memory := _memory(operand)) is not None and memory.size
    ]
    clusters: list[set[int]] = []
    end = 0
    for start, stop, position in sorted(spans):
        if start >= end:
            clusters.append(set())
        clusters[-1].add(position)
        end = max(end, stop)
    return {position for cluster in clusters if len(cluster) > 1 for position in cluster}


def collision(arrays: Sequence[Operand], outs: Sequence[Operand | None]) -> tuple[int, int] | None:
    """Return the positions in a tree of two results that would be written to one place and may differ; None if none do.

    Results may share memory where they are the same anyway: those of one array that go to one place, as tied parameters
    do, and those that replace their inputs.
    """
    placed = [(array, out) for array, out in zip(arrays, outs, strict=True) if out is not None]
    if all(out.given is array.given for array, out in placed) or _apart([out for _, out in placed]):
        return None
    spans = [
        (*_span(memory), position)
        for position, (_, out) in enumerate(placed)
        if (memory := _memory(out)) is not None and memory.size
    ]
    reaching: list[tuple[int, int]] = []
    for start, stop, position in sorted(spans):
        reaching = [(end, earlier) for end, earlier in reaching if end > start]
        for _, earlier in reaching:
            if _collide(placed[earlier], placed[position]):
                return earlier, position
        reaching.append((stop, position))
    return None


def _apart(outs: Sequence[Operand]) -> bool:
    """Tell whether each is an array of its own that is no view: seen at a glance, where addresses take 1 µs each."""
    return len({id(out.view) for out in outs}) == len(outs) and all(
        out.view is not None and out.view.flags.owndata for out in outs
    )


def _collide(one: tuple[Operand, Operand], other: tuple[Operand, Operand]) -> bool:
    (x, into), (y, also) = one, other
    tied = _is_same(x, y) and _is_same(into, also)
    return not tied and not (_is_same(x, into) and _is_same(y, also)) and _share(_memory(into), _memory(also))


def _is_same(one: Operand, other: Operand) -> bool:
    if one.given is other.given:
        return True
    here, there = _memory(one), _memory(other)
    return here is not None and there is not None and _place(here) == _place(there)


def _share(one: Array | None, other: Array | None) -> bool:
    """Tell whether two arrays whose spans overlap have an element in common; columns of a matrix have none."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.shares_memory(one, other)
    return all(each is not None and each.flags.c_contiguous for each in (one, other))  # else it cannot be told


def _place(array: Array) -> tuple[object, ...]:
    return _first(array), array.shape, array.strides, array.dtype


def _memory(operand: Operand | None) -> Array | None:
    if operand is None:
        return None
    return operand.memory if operand.view is None else operand.view


def _span(array: Array) -> tuple[int, int]:
    """Return the addresses between which the elements of an array lie; devices and host share one address space."""
    first = _first(array)
    if array.flags.c_contiguous:
        return first, first + array.nbytes
    steps = [step * (n - 1) for step, n in zip(array.strides, array.shape, strict=True)]
    return first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0) + array.itemsize


def _first(array: Array) -> int:
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return int(interface["data"][0])
