"""Gradient-parallel training on a node that shares its memory, on several nodes, and in ordinary memory."""

from __future__ import annotations

import copy
import gc
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parallel_cases import METHODS, Make, RowsFeed, by_label, cnn, plan, random_values, same_on_all
from parallel_reference import assert_close

from mpitrain import nn
from mpitrain._errors import CheckpointError
from mpitrain.arrays import plain
from mpitrain.comm import Communicator
from mpitrain.data import Dataset
from mpitrain.nn import Network
from mpitrain.optim import Adam, make_optimizer
from mpitrain.parallel import DataParallel

pytestmark = pytest.mark.mpi

GRADIENT = {name: make for name, make in METHODS.items() if name != "data"}
gradient_methods = pytest.mark.parametrize("make", GRADIENT.values(), ids=GRADIENT.keys())

MODES = {"one node": {}, "nodes of two": {"MPITRAIN_RANKS_PER_NODE": "2"}, "ordinary": {"MPITRAIN_TRANSPORT": "host"}}


@pytest.fixture(params=MODES)
def comm(
    request: pytest.FixtureRequest, world: Communicator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Communicator]:
    for name, value in MODES[request.param].items():
        monkeypatch.setenv(name, value)
    with world.split(0, axis="world") as part:
        yield part


@pytest.mark.parametrize("kernel", ["on", "off"])
@gradient_methods
def test_steps_are_those_of_data_parallel_wherever_memory_lies(
    comm: Communicator, make: Make, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPITRAIN_KERNEL", kernel)
    found = []
    for each in (make, DataParallel):
        method = each(comm, microbatches=2)
        method.setup(cnn(), make_optimizer("lamb"), plan(8, clip_norm=0.2))
        loss = method.advance(RowsFeed(owner=by_label), until=8).loss
        same_on_all(comm, method.whole().sha256())
        found.append((method.whole(), loss))
    assert_close(found[0][0], found[1][0], 1e-10)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)


def writes_for_all(comm: Communicator, method: Any) -> bool:
    """Tell whether the ranks of ``comm`` have their parameters where its first rank has them."""
    place = method.params.flat[:1]
    place.flags.writeable = True
    comm.barrier()
    if comm.rank == 0:
        place[:] = 7
    comm.barrier()
    return bool(comm.size > 1 and comm.allreduce(np.int64(method.params.flat[0] == 7)) == comm.size)


@pytest.mark.parametrize("make", [METHODS["gradient 1"], METHODS["gradient 2"]], ids=["gradient 1", "gradient 2"])
def test_parameters_are_one_array_for_all_ranks_of_a_node(comm: Communicator, make: Make) -> None:
    method = make(comm)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    node = comm.node
    assert writes_for_all(node, method) == (comm.transport == "shared" and node.size > 1)


def test_the_ranks_of_one_node_have_one_replica_each_of_several_nodes_its_own(comm: Communicator) -> None:
    method = DataParallel(comm)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    one_replica = comm.transport == "shared" and comm.node.size == comm.size
    assert writes_for_all(comm, method) == (one_replica and comm.size > 1)
    state = sum(array.nbytes for array in method.optimizer_state.values())
    held = comm.allreduce(np.int64(state))
    assert held == 2 * method.model.layout.nbytes * (1 if one_replica else comm.size)


@pytest.mark.parametrize("make", [METHODS["data"], METHODS["gradient 1"]], ids=["data", "gradient 1"])
def test_what_ranks_share_is_not_written_by_hand_but_loaded(world: Communicator, make: Make) -> None:
    method = make(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    whole = {f"params/{name}": 2 * view for name, view in method.params.views.items()}
    if world.size > 1:
        for array in (method.params.flat, *method.params.views.values()):
            with pytest.raises(ValueError, match="read-only"):
                array *= 2
    method.load_parameters(whole.__getitem__)
    for name, view in method.params.views.items():
        np.testing.assert_array_equal(view, whole[f"params/{name}"])
    method.advance(RowsFeed(owner=by_label), until=1)
    same_on_all(world, method.weights_sha256())


@pytest.mark.parametrize("make", [METHODS["data"], METHODS["gradient 1"]], ids=["data", "gradient 1"])
def test_no_rank_loads_parameters_while_another_reads_the_old_ones(world: Communicator, make: Make) -> None:
    method = make(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    others = {f"params/{name}": view + 1 for name, view in method.params.views.items()}
    world.barrier()
    if world.rank == world.size - 1:
        time.sleep(0.05)
    seen = method.params.sha256()
    method.load_parameters(others.__getitem__)
    same_on_all(world, seen)
    assert seen != method.params.sha256()


def test_what_is_loaded_is_read_before_anything_is_written(world: Communicator) -> None:
    """Also where it follows from what is there: all ranks write when the last has read."""
    method = DataParallel(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    views = method.params.views
    expected = {name: view / np.linalg.norm(view) if view.any() else view.copy() for name, view in views.items()}

    def normalised(name: str) -> np.ndarray:
        if world.rank == 0:
            time.sleep(0.005)
        view = views[name.removeprefix("params/")]
        return view / np.linalg.norm(view) if view.any() else view.copy()

    method.load_parameters(normalised)
    for name, view in method.params.views.items():
        np.testing.assert_array_equal(view, expected[name])


def test_data_parallel_ranks_ask_for_all_tensors_in_one_order(world: Communicator) -> None:
    """So that one of them may read, and tell the others."""
    method = DataParallel(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    method.advance(RowsFeed(owner=by_label), until=1)
    saved = {f"params/{name}": view + 1 for name, view in method.params.views.items()}
    saved |= {name.replace("params", f"optimizer.{slot}"): 2 * array for name, array in saved.items() for slot in "mv"}
    method.load(
        {"step": 1}, lambda name: world.broadcast(saved[name] if world.rank == 0 else np.empty_like(saved[name]))
    )
    held = [piece for rank in world.allgather_object(method.state().pieces) for piece in rank]
    assert {piece.name for piece in held} == saved.keys()
    for piece in held:
        start, stop = piece.span
        np.testing.assert_array_equal(piece.array, saved[piece.name].reshape(-1)[start:stop])


def test_a_tensor_that_does_not_fit_is_refused_by_all_data_parallel_ranks(world: Communicator) -> None:
    method = DataParallel(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    before, *_, last = method.weights_sha256(), *method.params.views
    tensors = {f"params/{name}": np.zeros_like(view) for name, view in method.params.views.items()}
    tensors[f"params/{last}"] = np.zeros(1)
    with pytest.raises(CheckpointError, match=rf"{last}'.*wrong shape"):
        method.load_parameters(tensors.__getitem__)
    assert method.weights_sha256() == before or world.size == 1  # a replica is filled as it is read


def test_copies_of_what_ranks_share_are_their_owners(world: Communicator) -> None:
    method = DataParallel(world)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    for made in (copy.deepcopy(method.params), pickle.loads(pickle.dumps(method.params))):
        assert made.sha256() == method.params.sha256()
        made.flat[...] = 0
        assert not any(view.any() for view in made.views.values())
        assert made.sha256() != method.params.sha256()


def test_with_an_allocator_each_rank_has_a_replica(world: Communicator) -> None:
    method = DataParallel(world, allocator=plain)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    method.params.flat[0] = world.rank
    world.barrier()
    assert method.params.flat[0] == world.rank
    assert {piece.kind for piece in method.state().pieces} == {"replicated"}


def test_in_stage_3_a_node_has_the_passages_once_and_all_ranks_the_shards(comm: Communicator) -> None:
    method = METHODS["gradient 3"](comm)
    method.setup(cnn(), make_optimizer("adam"), plan(1))
    assert sum(comm.allgather_object(method.params.nbytes)) == method.model.layout.nbytes
    node, first = comm.node, method.params.passages[0]
    comm.barrier()
    if node.rank == 0:
        first[0] = 7
    node.barrier()
    assert (first[0] == 7) == (node.rank == 0 or comm.transport == "shared")


WIDTH, LAYERS = 1024, 2  # whole huge pages, to which shared memory may be rounded


def resident_bytes() -> int:
    """This process's proportional share of the memory that is not a file's: libraries' pages come and go."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def grown_bytes(comm: Communicator, make: Make, **options: object) -> tuple[int, int]:
    """How much more memory all ranks together use after some steps, and the size of the parameters."""
    network = Network(
        nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))), nn.MeanSquaredError()
    )
    rows = random_values(8, WIDTH).astype(np.float32)
    feed = RowsFeed(Dataset(rows, rows, "regression", "rows"), 8, dtype=np.float32)
    gc.collect()
    comm.barrier()
    before = resident_bytes()
    method = make(comm)
    method.setup(network, Adam(), plan(3, **options))
    method.advance(feed, until=3)
    gc.collect()
    comm.barrier()
    grown = int(comm.allreduce(resident_bytes() - before))
    comm.barrier()
    return grown, network.layout.nbytes


def check_grown(comm: Communicator, make: Make, multiple: float, **options: object) -> None:
    """Memory grows by a multiple of the parameters' size: parameters, two of Adam's, and gradients."""
    grown_bytes(comm, make, **options)  # libraries, pools and the transport are there now
    grown, nbytes = grown_bytes(comm, make, **options)
    assert grown / nbytes == pytest.approx(multiple, abs=0.1 * comm.size)


@pytest.mark.parametrize("name", METHODS)
def test_a_node_has_parameters_and_optimizer_state_once(world: Communicator, name: str) -> None:
    ranks = world.size
    expected = {
        "data": 1 + 2 + ranks,
        "gradient 1": 1 + 2 + ranks,
        "gradient 2": 1 + 2 + 1 + ranks / LAYERS,  # the shards' gradients, and in turn each layer's
        "gradient 3": 1 + 2 + 1 + ranks / LAYERS + 1 / LAYERS,  # and in turn each layer's parameters
    }[name]
    check_grown(world, METHODS[name], expected)


def test_each_rank_has_a_replica_where_sums_are_clipped(world: Communicator) -> None:
    check_grown(world, METHODS["data"], world.size * (1 + 2 + 1), clip_norm=1e30)
