"""Where each tensor of a model lies in one flat range; holds no memory.

Everything that stores, updates, sends or checkpoints parameters speaks of them through a `Layout`.  It says of each
tensor its name, its global shape and which box of it is held here, the mesh axes over which its gradient is summed,
and its group.  A layout has one dtype: a model with float32 masters and bfloat16 copies has two layouts with the same
offsets (`Layout.astype`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, Literal, get_args

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import check_kind, check_whole
from mpitrain._typing import DType, Shape
from mpitrain.arrays.box import Box, box_size, inside
from mpitrain.arrays.dtypes import known_dtype

Group = Literal["decay", "no_decay", "statistics"]
"""``decay``: weights, shrunk by weight decay.  ``no_decay``: biases and normalisation scales.  ``statistics``: not
trained; running averages that travel with the gradients (see `Segment.rate`)."""

ALIGNMENT_BYTES = 64
"""Each tensor starts on a cache line."""


@dataclass(frozen=True)
class Segment:
    """One tensor of a layout.

    Parameters
    ----------
    name : str
        Dotted path, e.g. ``"0.weight"``; unique in a layout and the same on every rank.
    global_shape : tuple of int
        Shape of the whole tensor.
    box : tuple of (int, int)
        Which part of it is held here; all of it unless a method splits tensors.
    group : {"decay", "no_decay", "statistics"}
        Parameter group.
    axes : frozenset of str
        Mesh axes over which the gradient is summed.
    rate : float
        ``statistics`` only.  What backward leaves in the gradient's place is a sum of statistics, weighted as the
        loss is; after reduction and division it is their mean ``g``, and the update is ``p += rate * (g - p)``.
    offset : int
        Where it starts in the flat range, in elements.
    """

    name: str
    global_shape: Shape
    box: Box = ()
    group: Group = "decay"
    axes: frozenset[str] = frozenset({"data"})
    rate: float = 0.0
    offset: int = 0

    def __post_init__(self) -> None:
        check_kind("Segment", "name", self.name, str, 'a dotted path, e.g. "0.weight"')
        check_kind("Segment", "global_shape", self.global_shape, tuple, "a tuple of whole numbers")
        for length in self.global_shape:
            check_whole("Segment", "a length in global_shape", length, 0)
        if not self.box:
            object.__setattr__(self, "box", tuple((0, n) for n in self.global_shape))
        if self.group not in get_args(Group):
            raise InputError("unknown parameter group", got=self.group, expected=" or ".join(get_args(Group)))
        if not inside(self.box, self.global_shape):
            raise InputError(f"tensor {self.name!r}: box lies outside", got=self.box, expected=self.global_shape)

    @property
    def shape(self) -> Shape:
        """Shape of the part that is held here."""
        return tuple(stop - start for start, stop in self.box)

    @property
    def is_whole(self) -> bool:
        """Whether all of the tensor is held here."""
        return self.shape == self.global_shape

    @property
    def size(self) -> int:
        """Number of elements held here."""
        return box_size(self.box)

    @property
    def stop(self) -> int:
        """Where it ends in the flat range, in elements."""
        return self.offset + self.size


@dataclass(frozen=True)
class Layout:
    """Tensors in one flat range of one dtype.  Make one with `Layout.build`.

    Parameters
    ----------
    segments : tuple of Segment
        In the order in which they lie.
    dtype : numpy.dtype
        Type of every element.
    size : int
        Length of the flat range in elements, padding included.
    ties : mapping of str to str
        Further names of a tensor that is used in more than one place.
    """

    segments: tuple[Segment, ...]
    dtype: DType
    size: int
    ties: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def build(
        cls, segments: Iterable[Segment], dtype: Any = np.float32, ties: Mapping[str, str] | None = None
    ) -> Layout:
        """Lay segments out one after another, group by group, each on a cache line.

        Groups lie together so that an update walks long runs that obey one rule.

        Raises
        ------
        InputError
            Two segments have one name, or a tie names no segment.
        DtypeError
            The dtype is none.
        """
        dtype = known_dtype(dtype, "Layout")
        check_kind("Layout", "segments", segments, Iterable, "the Segments of its tensors")
        segments = list(segments)
        for each in segments:
            check_kind("Layout", "one of segments", each, Segment, "a Segment")
        order = get_args(Group)
        placed, size = _placed(sorted(segments, key=lambda s: order.index(s.group)), 0, dtype)
        layout = cls(placed, dtype, size, dict(ties or {}))
        layout._check_names()
        return layout

    def _check_names(self) -> None:
        names = [segment.name for segment in self.segments]
        twice = sorted({name for name in names if names.count(name) > 1} | (set(names) & set(self.ties)))
        if twice:
            raise InputError("two tensors have one name", got=", ".join(twice))
        within = sorted({name for name in names if not _beginnings(name).isdisjoint(names)})
        if within:
            raise InputError("a tensor lies within another's name", got=", ".join(within), remedy="rename one of them")
        lost = sorted(set(self.ties.values()) - set(names))
        if lost:
            raise InputError("a tie names a tensor that is not there", got=", ".join(lost))

    @cached_property
    def _by_name(self) -> dict[str, Segment]:
        return {segment.name: segment for segment in self.segments}

    def __getitem__(self, name: str) -> Segment:
        return self._by_name[self.ties.get(name, name)]

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    def __hash__(self) -> int:
        return hash((self.segments, self.dtype, self.size))

    @property
    def nbytes(self) -> int:
        """Length of the flat range in bytes."""
        return self.size * self.dtype.itemsize

    @property
    def parameter_count(self) -> int:
        """Number of trained elements held here."""
        return sum(segment.size for segment in self.segments if segment.group != "statistics")

    @property
    def global_parameter_count(self) -> int:
        """Number of trained elements of the whole tensors, wherever they are."""
        return sum(prod(segment.global_shape) for segment in self.segments if segment.group != "statistics")

    def astype(self, dtype: Any) -> Layout:
        """Return the layout of the same tensors, at the same offsets, in another dtype."""
        return replace(self, dtype=known_dtype(dtype, "Layout"))

    def select(self, names: Iterable[str]) -> Layout:
        """Return a layout of its own for some of the tensors (a pipeline stage, an adapter's subset).

        Raises
        ------
        InputError
            A name is not there.
        """
        asked = set(names)
        unknown = sorted(asked - set(self._by_name) - set(self.ties))
        if unknown:
            raise InputError("layout: no such tensor", got=", ".join(unknown), expected=", ".join(self._by_name))
        wanted = {self.ties.get(name, name) for name in asked}
        kept = [segment for segment in self.segments if segment.name in wanted]
        ties = {alias: name for alias, name in self.ties.items() if name in wanted}
        return Layout.build(kept, self.dtype, ties)

    def untied(self, aliases: Iterable[str]) -> Layout:
        """Return this layout with a place of its own for each of some further names, behind all that it has."""
        parted = {alias: self[alias] for alias in aliases}
        added, size = _placed((replace(each, name=alias) for alias, each in parted.items()), self.size, self.dtype)
        ties = {alias: name for alias, name in self.ties.items() if alias not in parted}
        return Layout((*self.segments, *added), self.dtype, size, ties)

    def shard(self, start: int, stop: int) -> Shard:
        """Return the part ``[start, stop)`` of the flat range."""
        return Shard(self, start, stop)

    def whole(self) -> Shard:
        """Return the whole flat range as one shard."""
        return Shard(self, 0, self.size)

    def shards(self, parts: int) -> tuple[Shard, ...]:
        """Cut the flat range into ``parts`` contiguous shards of nearly equal size, each on a cache line."""
        step = _line(self.dtype)
        lines = -(-self.size // step)
        cuts = [min(self.size, lines * part // parts * step) for part in range(parts + 1)]
        return tuple(Shard(self, start, stop) for start, stop in pairwise(cuts))

    def padding(self) -> tuple[tuple[int, int], ...]:
        """Return the ``(start, stop)`` ranges of the flat range that lie between tensors, and belong to none."""
        ends = [*(segment.offset for segment in self.segments[1:]), self.size] if self.segments else []
        gaps = ((segment.stop, end) for segment, end in zip(self.segments, ends, strict=True))
        return tuple((start, stop) for start, stop in gaps if start < stop)

    def buckets(self, bucket_bytes: int) -> tuple[tuple[int, int], ...]:
        """Cut the flat range into ``(start, stop)`` ranges of at most ``bucket_bytes`` (at least one element)."""
        step = max(1, bucket_bytes // self.dtype.itemsize)
        return tuple((start, min(start + step, self.size)) for start in range(0, self.size, step))

    def manifest(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {
            "dtype": self.dtype.name,
            "ties": dict(self.ties),
            "tensors": {s.name: {"shape": list(s.global_shape), "group": s.group} for s in self.segments},
        }

    def fingerprint(self) -> str:
        """Return a SHA-256 of the manifest: equal where two models have the same tensors."""
        return hashlib.sha256(json.dumps(self.manifest(), sort_keys=True).encode()).hexdigest()


def _placed(segments: Iterable[Segment], offset: int, dtype: DType) -> tuple[tuple[Segment, ...], int]:
    """Lay segments out from ``offset`` on, each on a cache line; return them, and where the next one would begin."""
    placed, step = [], _line(dtype)
    for segment in segments:
        placed.append(replace(segment, offset=offset))
        offset += -(-segment.size // step) * step
    return tuple(placed), offset


def _beginnings(name: str) -> set[str]:
    """Return the names of the branches in which a tensor lies: of ``a.b.c`` those are ``a`` and ``a.b``."""
    return {name[:at] for at, letter in enumerate(name) if letter == "."}


def _line(dtype: DType) -> int:
    """Return the number of elements on a cache line."""
    return max(1, ALIGNMENT_BYTES // dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """A contiguous part of a layout's flat range: what one owner updates.

    Parameters
    ----------
    layout : Layout
        The whole.
    start, stop : int
        The part, in elements of the flat range.
    """

    layout: Layout
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.layout.size:
            raise InputError("shard lies outside its layout", got=(self.start, self.stop), expected=self.layout.size)

    @property
    def size(self) -> int:
        """Length in elements."""
        return self.stop - self.start

    @cached_property
    def runs(self) -> tuple[tuple[Group, slice], ...]:
        """Maximal stretches of one group, as slices relative to the shard; padding belongs to what precedes it."""
        starts: list[tuple[int, Group]] = []
        for segment in self.layout.segments:
            if segment.size and (not starts or starts[-1][1] != segment.group):
                starts.append((segment.offset, segment.group))
        ends = [*(offset for offset, _ in starts), self.layout.size][1:]
        found = []
        for (offset, group), end in zip(starts, ends, strict=True):
            low, high = max(offset, self.start), min(end, self.stop)
            if low < high:
                found.append((group, slice(low - self.start, high - self.start)))
        return tuple(found)

    @cached_property
    def pieces(self) -> tuple[tuple[int, slice], ...]:
        """Number of each segment that the shard touches, and the slice (relative to the shard) that it takes."""
        found = []
        for number, segment in enumerate(self.layout.segments):
            low, high = max(segment.offset, self.start), min(segment.stop, self.stop)
            if low < high:
                found.append((number, slice(low - self.start, high - self.start)))
        return tuple(found)
