"""The process mesh: its arithmetic, its communicators on threads and over MPI, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest

from mpitrain._errors import InputError, MismatchError
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.comm.mesh import Grid

SHAPES = {
    1: [{"data": 1}, {"data": 1, "tensor": 1}],
    2: [{"data": 2}, {"data": 1, "tensor": 2}],
    3: [{"data": 3, "tensor": 1}],
    4: [{"data": 2, "tensor": 2}, {"pipe": 4}, {"data": 1, "pipe": 2, "tensor": 2}],
    6: [{"data": 2, "tensor": 3}, {"data": 3, "tensor": 2}],
    8: [{"data": 2, "pipe": 2, "tensor": 2}, {"data": 4, "tensor": 2}],
}
CASES = [(size, shape) for size, shapes in SHAPES.items() for shape in shapes]


def expected_coordinates(shape: dict[str, int]) -> list[dict[str, int]]:
    """Every place, in the order in which a nested loop visits them."""
    return [dict(zip(shape, place, strict=True)) for place in product(*map(range, shape.values()))]


@pytest.mark.parametrize("shape", [shape for _, shape in CASES], ids=str)
def test_a_grid_counts_as_a_nested_loop_does(shape: dict[str, int]):
    grid = Grid(shape)
    places = expected_coordinates(shape)
    assert [grid.coordinates(n) for n in range(grid.size)] == places
    assert [grid.position(place) for place in places] == list(range(grid.size))
    assert all(np.ravel_multi_index(tuple(p.values()), tuple(shape.values())) == grid.position(p) for p in places)


def check_mesh(comm: Communicator, shape: dict[str, int], order: list[int]) -> None:
    """``order``: ranks by place."""
    mesh = ProcessMesh(comm, **shape)
    places = expected_coordinates(shape)
    mine = places[order.index(comm.rank)]
    assert mesh.coordinates == mine
    assert mesh.shape == shape
    assert list(mesh) == list(shape)
    assert [mesh.rank_of(**place) for place in places] == order
    for count in range(1, len(shape) + 1):
        for axes in (tuple(shape)[:count], tuple(reversed(tuple(shape)))[:count]):
            check_group(comm, mesh, axes, places, order)
    mesh.free()


def check_group(
    comm: Communicator, mesh: ProcessMesh, axes: tuple[str, ...], places: list[dict[str, int]], order: list[int]
) -> None:
    mine = mesh.coordinates
    together = [
        (tuple(place[name] for name in axes), rank)
        for place, rank in zip(places, order, strict=True)
        if all(place[name] == mine[name] for name in place if name not in axes)
    ]
    ranks = [rank for _, rank in sorted(together)]
    group = mesh[axes]
    assert group is mesh.flatten(*axes)
    assert group.allgather(comm.rank).tolist() == ranks
    assert group.rank == ranks.index(comm.rank)
    before = comm.ledger.snapshot().get(("×".join(axes), "allreduce"))
    assert group.allreduce(comm.rank) == sum(ranks)
    after = comm.ledger.snapshot()["×".join(axes), "allreduce"]
    assert after.calls == (before.calls if before else 0) + 1


@pytest.mark.parametrize(("size", "shape"), CASES, ids=str)
def test_on_one_node_places_follow_the_ranks(size: int, shape: dict[str, int]):
    LocalWorld(size, timeout_s=20).run(check_mesh, shape, list(range(size)))


@pytest.mark.mpi
@pytest.mark.parametrize("axes", [{"data": -1}, {"data": -1, "tensor": 1}, {"data": 1, "tensor": -1}], ids=str)
def test_over_mpi(world: Communicator, axes: dict[str, int]):
    shape = {name: world.size if length == -1 else length for name, length in axes.items()}
    check_mesh(world, shape, list(range(world.size)))


@pytest.mark.mpi
def test_over_mpi_in_three_dimensions(world: Communicator):
    pipe = 2 - world.size % 2
    check_mesh(world, {"data": 1, "pipe": pipe, "tensor": world.size // pipe}, list(range(world.size)))


def shuffled(comm: Communicator) -> Communicator:
    """The same ranks in an order that jumps from node to node."""
    found = comm.split(0, key=comm.rank % 2)
    assert found is not None
    return found


def test_places_are_filled_node_by_node_whatever_the_ranks():
    # World ranks 0 2 4 6 1 3 5 7 are ranks 0 … 7 here; nodes hold world ranks (0 1 2 3) and (4 5 6 7).
    def check(comm: Communicator) -> None:
        part = shuffled(comm)
        check_mesh(part, {"data": 2, "tensor": 4}, [0, 1, 4, 5, 2, 3, 6, 7])
        mesh = ProcessMesh(part, data=2, tensor=4)
        assert mesh.on_one_node("tensor")
        assert not mesh.on_one_node("data")
        assert mesh["tensor"].node.size == 4
        assert mesh["data"].node.size == 1

    LocalWorld(8, ranks_per_node=4, timeout_s=20).run(check)


def test_uneven_nodes_are_filled_in_order_and_say_which_groups_reach_over():
    def check(comm: Communicator) -> None:  # nodes of 4 and 2 ranks
        pairs, triples = ProcessMesh(comm, data=3, tensor=2), ProcessMesh(comm, data=2, tensor=3)
        assert pairs.on_one_node("tensor")
        assert not triples.on_one_node("tensor")
        assert triples.rank_of(data=1, tensor=0) == 3

    LocalWorld(6, ranks_per_node=4, timeout_s=20).run(check)


def test_the_open_axis_takes_what_the_others_leave():
    def shape(comm: Communicator) -> dict[str, int]:
        return ProcessMesh(comm, data=-1, tensor=2, pipe=1).shape

    assert LocalWorld(8).run(shape) == [{"data": 4, "tensor": 2, "pipe": 1}] * 8


def test_coordinates_not_named_are_the_ranks_own():
    def neighbour(comm: Communicator) -> int:
        mesh = ProcessMesh(comm, data=2, pipe=2)
        return mesh.rank_of(pipe=1 - mesh.coordinates["pipe"])

    assert LocalWorld(4).run(neighbour) == [1, 0, 3, 2]


def test_nothing_is_split_before_an_axis_is_used():
    def splits(comm: Communicator) -> tuple[int, int]:
        mesh = ProcessMesh(comm, data=2, tensor=2)
        before = {axis for axis, _ in comm.ledger.snapshot()}
        mesh["tensor"].barrier()
        return "tensor" in before, "tensor" in {axis for axis, _ in comm.ledger.snapshot()}

    assert LocalWorld(4).run(splits) == [(False, True)] * 4


REFUSED: list[tuple[str, Callable[[Communicator], Any], list[str]]] = [
    ("ranks", lambda c: ProcessMesh(c, data=2, tensor=3), ["mesh 2×3 needs 6 ranks, got 4", "start 6 ranks"]),
    ("no axes", lambda c: ProcessMesh(c), ["no axes", "data=2, tensor=2"]),
    ("zero", lambda c: ProcessMesh(c, data=0, tensor=4), ["axis data has no length", "got 0", "1 or more"]),
    ("float", lambda c: ProcessMesh(c, data=2.0), ["axis data is not an integer", "got 2.0"]),
    ("bool", lambda c: ProcessMesh(c, data=True), ["axis data is not an integer", "got True"]),
    ("two open", lambda c: ProcessMesh(c, data=-1, tensor=-1), ["two axes are -1", "got data, tensor"]),
    ("open", lambda c: ProcessMesh(c, data=-1, tensor=3), ["4 ranks do not divide by 3", "a multiple of 3 ranks"]),
    ("axis", lambda c: ProcessMesh(c, data=4)["tensr"], ["no such axis", "got 'tensr'", "expected data"]),
    ("near", lambda c: ProcessMesh(c, data=4)["dat"], ['did you mean "data"?']),
    ("not a name", lambda c: ProcessMesh(c, data=4)[0], ["no such axis", "got 0"]),
    ("twice", lambda c: ProcessMesh(c, data=4)["data", "data"], ["an axis is named twice", "data, data"]),
    ("none", lambda c: ProcessMesh(c, data=4).flatten(), ["no axis was named"]),
    ("off", lambda c: ProcessMesh(c, data=4).rank_of(data=4), ["coordinate data is off the mesh", "0 to 3"]),
    ("negative", lambda c: ProcessMesh(c, data=4).rank_of(data=-1), ["off the mesh", "got -1"]),
    ("coordinate", lambda c: ProcessMesh(c, data=4).rank_of(data="0"), ["coordinate data is not an integer"]),
    ("coordinate axis", lambda c: ProcessMesh(c, data=4).rank_of(pipe=0), ["no such axis", "got 'pipe'"]),
]


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refuses(call: Callable[[Communicator], Any], words: list[str]):
    def check(comm: Communicator) -> None:
        with pytest.raises(InputError) as caught:
            call(comm)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    LocalWorld(4, timeout_s=20).run(check)


def test_ranks_that_ask_for_different_meshes_are_told():
    def check(comm: Communicator) -> None:
        axes = {"data": 2, "tensor": 2} if comm.rank < 2 else {"tensor": 2, "data": 2}
        with pytest.raises(MismatchError, match="tensor=2, data=2 on rank 2; expected data=2, tensor=2 as on rank 0"):
            ProcessMesh(comm, **axes)

    LocalWorld(4, timeout_s=20).run(check)
