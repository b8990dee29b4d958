"""How the arrays of a tree are divided into parcels."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from math import prod
from typing import Any

from mpitrain._typing import DType, Shape
from mpitrain.arrays.dtypes import accumulator
from mpitrain.arrays.libraries import Operand
from mpitrain.comm import trees
from mpitrain.comm.buffers.device_parcels import DeviceParcel
from mpitrain.comm.buffers.operands import accept, distinct, target
from mpitrain.comm.buffers.overlap import entangled
from mpitrain.comm.buffers.parcels import Parcel


def pack(
    operation: str,
    shapes: Sequence[Shape],
    likes: Sequence[Operand],
    outs: Sequence[Any],
    reduces: bool = False,
    direct: bool = True,
) -> Parcel:
    """Return a parcel where the arrays are: in host memory, or on their device; arguments as those of `Parcel`."""
    stream = likes[0].stream
    if stream is None:
        return Parcel(operation, shapes, likes, outs, reduces, direct)
    return DeviceParcel(stream, operation, shapes, likes, outs, reduces, direct)


class Fused:
    """The arrays of a tree, packed into one parcel per dtype and place, or into several of ``bucket_bytes`` at most.

    Parameters
    ----------
    operation : str
        For the messages of errors.
    tree, out : tree of arrays
        What the caller handed in, and where results are to go.
    reduces : bool
        As for `Parcel`.
    bucket_bytes : int, optional
        The most that a parcel has, unless it is one array.
    on_host : bool
        Pack all in host memory, for someone who computes with the values; arrays of a device are copied there whole.
    """

    def __init__(
        self,
        operation: str,
        tree: Any,
        out: Any,
        reduces: bool = False,
        bucket_bytes: int | None = None,
        on_host: bool = False,
    ) -> None:
        self._tree = tree
        arrays = [accept(operation, leaf) for leaf in trees.leaves(tree, operation)]
        pairs = zip(trees.leaves_like(operation, tree, out), arrays, strict=True)
        outs = [target(operation, into, array.shape, array) for into, array in pairs]
        distinct(operation, arrays, outs)
        devices = [None if on_host else _device(array) for array in arrays]
        buckets = _buckets(arrays, devices, reduces, math.inf if bucket_bytes is None else bucket_bytes)
        self._positions = [position for bucket in buckets for position in bucket]
        tangled = entangled(arrays, outs) if len(buckets) > 1 else set()
        make = Parcel if on_host else pack
        self.parcels = []
        for bucket in buckets:
            likes = [arrays[i] for i in bucket]
            shapes = [like.shape for like in likes]
            self.parcels.append(
                make(operation, shapes, likes, [outs[i] for i in bucket], reduces, bucket[0] not in tangled)
            )

    def fill(self) -> None:
        """Copy the tree's values into the parcels."""
        for parcel in self.parcels:
            parcel.fill()

    def result(self) -> Any:
        """Return the tree of results."""
        found = [array for parcel in self.parcels for array in parcel.results()]
        placed = dict(zip(self._positions, found, strict=True))
        return trees.rebuild(self._tree, (placed[i] for i in range(len(placed))))


def _device(array: Operand) -> Hashable:
    stream = array.stream
    return None if stream is None else stream.device


def _buckets(
    arrays: Sequence[Operand], devices: Sequence[Hashable], reduces: bool, bucket_bytes: float
) -> list[list[int]]:  # fmt: skip
    """Divide arrays into messages: by dtype and device, and in their order for as long as the next one fits."""
    groups: dict[tuple[DType, Hashable], list[list[int]]] = {}
    room: dict[tuple[DType, Hashable], float] = {}
    for position, (array, device) in enumerate(zip(arrays, devices, strict=True)):
        dtype, key = array.dtype, (array.dtype, device)
        item_bytes = (accumulator(dtype) if reduces else dtype).itemsize
        nbytes = prod(array.shape) * item_bytes
        buckets = groups.setdefault(key, [])
        if not buckets or nbytes > room[key]:
            buckets.append([])
            room[key] = bucket_bytes
        buckets[-1].append(position)
        room[key] -= nbytes
    return [bucket for buckets in groups.values() for bucket in buckets]
