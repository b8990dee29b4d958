"""Which arrays use the same memory, on the host or on a device."""

from __future__ import annotations

from collections.abc import Sequence

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


def _memory(operand: Operand | None) -> Array | None:
    if operand is None:
        return None
    return operand.memory if operand.view is None else operand.view


def _span(array: Array) -> tuple[int, int]:
    """Return the addresses between which the elements of an array lie; devices and host share one address space."""
    steps = [step * (n - 1) for step, n in zip(array.strides, array.shape, strict=True)]
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    first = int(interface["data"][0])
    return first + sum(s for s in steps if s < 0), first + sum(s for s in steps if s > 0) + array.itemsize
