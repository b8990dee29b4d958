"""Ranks on a grid with named axes, ``data=2, tensor=2``: which rank is where, and a communicator for each axis.

`Grid` is the arithmetic, and knows no ranks; `ProcessMesh` puts the ranks of a communicator on one and splits it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from mpitrain._errors import InputError, MismatchError
from mpitrain._names import did_you_mean
from mpitrain._options import check_kind
from mpitrain.comm.communicator import Communicator


@dataclass(frozen=True)
class Grid:
    """Positions on a grid, counted along the last axis first.

    Parameters
    ----------
    shape : dict of str to int
        Length of each axis, outermost first.
    """

    shape: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of positions."""
        return prod(self.shape.values())

    def __str__(self) -> str:
        return "×".join(map(str, self.shape.values()))

    def coordinates(self, position: int) -> dict[str, int]:
        """Return the coordinate along each axis of a position, from 0."""
        found = {}
        for name, length in reversed(list(self.shape.items())):
            position, found[name] = divmod(position, length)
        return {name: found[name] for name in self.shape}

    def position(self, coordinates: Mapping[str, int], axes: Iterable[str] | None = None) -> int:
        """Return the number of a position; among those along ``axes``, the first one outermost, where given."""
        number = 0
        for name in self.shape if axes is None else axes:
            number = number * self.shape[name] + coordinates[name]
        return number

    def check_axes(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return axes of this grid.

        Raises
        ------
        InputError
            There are none, one is not there, or is named twice.
        """
        found = tuple(names)
        if not found:
            raise InputError("no axis was named", operation="mesh", expected=", ".join(self.shape))
        for name in found:
            if name not in self.shape:
                raise InputError(
                    "no such axis", operation="mesh", got=repr(name), expected=", ".join(self.shape),
                    remedy=did_you_mean(str(name), self.shape),
                )  # fmt: skip
        if len(set(found)) < len(found):
            raise InputError("an axis is named twice", operation="mesh", got=", ".join(found))
        return found

    def check_coordinate(self, name: str, value: Any) -> int:
        """Return ``value`` as a coordinate along an axis."""
        length = self.shape[self.check_axes([name])[0]]
        found = _integer(f"coordinate {name}", value)
        if not 0 <= found < length:
            raise InputError(f"coordinate {name} is off the mesh", got=found, expected=f"0 to {length - 1}")
        return found


class ProcessMesh:
    """The ranks of a communicator on a grid with named axes.

    Parameters
    ----------
    comm : Communicator
        The ranks: as many as the mesh has places.
    **axes : int
        Length of each axis, outermost first; one may be −1, to take what the others leave.

    Attributes
    ----------
    comm : Communicator
        The ranks.
    shape : dict of str to int
        Length of each axis.
    position : int
        This rank's place, counted along the innermost axis first.
    coordinates : dict of str to int
        This rank's coordinate along each axis.

    Raises
    ------
    InputError
        The axes do not make up the ranks.
    MismatchError
        The ranks asked for different meshes.

    Notes
    -----
    Collective over ``comm``: making it, and the first use of each axis (or tuple of axes), which must be the same on
    all ranks and in the same order; the rest is arithmetic.

    *Placement.*  Places are filled node by node, in the order of each node's lowest rank, and on a node in the order
    of the ranks.  So the innermost axis, along which ranks should talk most, stays on one node wherever its length
    divides the ranks of every node.  Where it does not, or where nodes are of unequal size, some groups reach from the
    end of one node to the beginning of the next; `on_one_node` tells.

    Examples
    --------
    >>> from mpitrain.comm import LocalWorld
    >>> LocalWorld(4).run(lambda comm: ProcessMesh(comm, data=2, tensor=-1).coordinates)[2]
    {'data': 1, 'tensor': 0}
    """

    def __init__(self, comm: Communicator, /, **axes: int) -> None:
        check_kind("ProcessMesh", "comm", comm, Communicator, "a Communicator, e.g. mpitrain.world()")
        self._grid = _grid(axes, comm.size)
        self.comm = comm
        self.shape = dict(self._grid.shape)
        node = int(comm.node.broadcast(comm.rank))  # named by its lowest rank
        told = comm.allgather_object((node, list(self.shape.items())))
        _check_same([shape for _, shape in told])
        self._nodes = [node for node, _ in told]
        self._ranks = sorted(range(comm.size), key=lambda rank: (self._nodes[rank], rank))  # by position
        self.position = self._ranks.index(comm.rank)
        self.coordinates = self._grid.coordinates(self.position)
        self._groups: dict[tuple[str, ...], Communicator] = {}

    def __getitem__(self, axes: str | tuple[str, ...]) -> Communicator:
        """Return the communicator along an axis; ``mesh["data", "tensor"]``: over several, as `flatten`."""
        return self.flatten(*(axes if isinstance(axes, tuple) else (axes,)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shape)

    def __repr__(self) -> str:
        return f"ProcessMesh({', '.join(f'{name}={length}' for name, length in self.shape.items())})"

    def flatten(self, *axes: str) -> Communicator:
        """Return the communicator of the ranks that differ from this one along ``axes`` only.

        Ranks in it are ordered by their coordinates, the first of ``axes`` outermost.  It is made once, counts in
        the ledger under the axes' names joined by ``×``, and is freed with the mesh.  Collective over all ranks of the
        mesh at its first use.
        """
        axes = self._grid.check_axes(axes)
        if axes not in self._groups:
            others = [name for name in self.shape if name not in axes]
            color = self._grid.position(self.coordinates, others)
            group = self.comm.split(color, self._grid.position(self.coordinates, axes), "×".join(axes))
            assert group is not None
            self._groups[axes] = group
        return self._groups[axes]

    def rank_of(self, **coordinates: int) -> int:
        """Return the rank, in the mesh's communicator, at some coordinates; this rank's own along axes not named."""
        given = {name: self._grid.check_coordinate(name, value) for name, value in coordinates.items()}
        return self._ranks[self._grid.position(self.coordinates | given)]

    def on_one_node(self, *axes: str) -> bool:
        """Tell whether every group along ``axes`` lies on one node; the same on all ranks."""
        axes = self._grid.check_axes(axes)
        others = [name for name in self.shape if name not in axes]
        nodes: dict[int, set[int]] = {}
        for position, rank in enumerate(self._ranks):
            group = self._grid.position(self._grid.coordinates(position), others)
            nodes.setdefault(group, set()).add(self._nodes[rank])
        return all(len(found) == 1 for found in nodes.values())

    def free(self) -> None:
        """Release the communicators of the axes; that of the mesh stays.  Collective."""
        for group in self._groups.values():
            group.free()
        self._groups.clear()


def _grid(axes: Mapping[str, Any], ranks: int) -> Grid:
    """Return the grid of some axes, with the one that is −1 filled in."""
    if not axes:
        raise InputError("no axes", operation="ProcessMesh", expected="one or more, e.g. data=2, tensor=2")
    lengths = {name: _integer(f"axis {name}", length) for name, length in axes.items()}
    for name, length in lengths.items():
        if length < 1 and length != -1:
            raise InputError(f"axis {name} has no length", operation="ProcessMesh", got=length, expected="1 or more")
    open_axes = [name for name, length in lengths.items() if length == -1]
    if len(open_axes) > 1:
        raise InputError("two axes are -1", operation="ProcessMesh", got=", ".join(open_axes), expected="at most one")
    fixed = prod(length for length in lengths.values() if length != -1)
    if open_axes and ranks % fixed:
        raise InputError(
            f"{ranks} ranks do not divide by {'×'.join(str(n) for n in lengths.values() if n != -1)}",
            operation="ProcessMesh", got=f"{open_axes[0]}=-1", remedy=f"start a multiple of {fixed} ranks",
        )  # fmt: skip
    grid = Grid({name: ranks // fixed if length == -1 else length for name, length in lengths.items()})
    if grid.size != ranks:
        raise InputError(
            f"mesh {grid} needs {grid.size} ranks, got {ranks}", operation="ProcessMesh",
            remedy=f"start {grid.size} ranks, or give one axis as -1",
        )  # fmt: skip
    return grid


def _check_same(shapes: list[Any]) -> None:
    differing = [rank for rank, shape in enumerate(shapes) if shape != shapes[0]]
    if differing:
        rank = differing[0]
        raise MismatchError(
            "ranks asked for different meshes", operation="ProcessMesh",
            got=f"{_words(shapes[rank])} on rank {rank}", expected=f"{_words(shapes[0])} as on rank 0",
        )  # fmt: skip


def _words(shape: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name}={length}" for name, length in shape)


def _integer(what: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"{what} is not an integer", got=repr(value)) from error
