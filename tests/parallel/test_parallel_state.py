"""A state saved on n ranks continues on m ranks where the run would have gone without the break."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from parallel_cases import METHODS, RowsFeed, by_label, cnn, mlp, part, plan, same_on_all
from parallel_reference import assert_close

from mpitrain._errors import CheckpointError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.optim import make_optimizer
from mpitrain.parallel import DataParallel, ModelAveraging
from mpitrain.parallel.synchronous import Synchronous
from mpitrain.train import checkpoint

BREAK, STEPS = 4, 10
FEED = RowsFeed(owner=by_label)

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]


MAKES = METHODS | {"averaging": partial(ModelAveraging, average_every=2)}
FEW = [
    ("data", "data"),
    ("averaging", "averaging"),
    ("gradient 1", "data"),
    ("data", "gradient 2"),
    ("gradient 3", "gradient 3"),
]
MORE = [
    (writer, reader)
    for writer in METHODS
    for reader in ("gradient 1", "gradient 2", "gradient 3")
    if (writer, reader) not in FEW
]
PAIRS = [*FEW, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)]
"""Who writes a state, and who reads it."""


def ready(comm: Communicator, name: str = "data") -> Synchronous:
    """CNN with BatchNorm and Dropout under Adam: everything that a state must hold or imply."""
    method = MAKES[name](comm)
    method.setup(cnn(), make_optimizer("adam", weight_decay=0.01), plan(STEPS))
    return method


def saved(comm: Communicator, method: Synchronous) -> Saved:
    """What a checkpoint would hold: JSON and whole tensors, put together from all ranks' pieces."""
    state = method.state()
    tensors: dict[str, np.ndarray] = {}
    for pieces in comm.allgather_object([(p.name, p.global_shape, p.span, p.array.copy()) for p in state.pieces]):
        for name, shape, span, array in pieces:
            tensors.setdefault(name, np.full(shape, np.nan)).reshape(-1)[slice(*span)] = array.reshape(-1)
    return json.loads(json.dumps(state.scalars)), tensors


def run(comm: Communicator, name: str, until: int, start: Saved | None = None) -> Saved:
    """Train from the beginning or from a state; return the state at ``until``."""
    method = ready(comm, name)
    if start is not None:
        for part in method.parts:
            part.params[...] = np.nan  # whatever is not loaded shows
        comm.barrier()
        scalars, tensors = start
        method.load(scalars, tensors.__getitem__)
        assert bits(saved(comm, method)[1]) == bits(tensors)
    assert method.advance(FEED, until).step == until
    return saved(comm, method)


def bits(tensors: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


def check_resumes(comm: Communicator, writer: str, reader: str) -> None:
    """Between all ranks and each smaller number of them, both ways."""
    for size in range(1, comm.size + 1):
        for writers, readers in {(comm.size, size), (size, comm.size)}:
            with part(comm, writers) as some:
                state = run(some, writer, BREAK) if some else None
            state = comm.broadcast_object(state)
            with part(comm, readers) as some:
                if some:
                    same = writers == readers and writer == reader
                    averaging = "averaging" in (writer, reader)
                    compare(run(some, reader, STEPS, state), run(some, reader, STEPS), averaging, same)


def compare(resumed: Saved, unbroken: Saved, averaging: bool, same: bool) -> None:
    (scalars, found), (expected_scalars, expected) = resumed, unbroken
    assert scalars == expected_scalars
    if same:
        assert bits(found) == bits(expected)
    elif not averaging:
        moving = {name: array for name, array in expected.items() if np.linalg.norm(array) > 0}
        assert_close({name: found[name] for name in moving}, moving, 1e-9)
    else:  # local SGD depends on the number of ranks; that it loads and goes on is what is promised
        assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_a_saved_state_continues_on_any_number_of_ranks(on_ranks, writer, reader):
    on_ranks(check_resumes, writer, reader)


def check_same_bits(comm: Communicator) -> None:
    """Of two ranks' gradients there is one sum, and nothing else differs between the methods."""
    with part(comm, 2) as some:
        if some:
            runs = [run(some, name, STEPS)[1] for name in METHODS]
            assert all(bits(found) == bits(runs[0]) for found in runs)


def test_two_ranks_give_the_same_bits_under_every_method(on_ranks):
    on_ranks(check_same_bits)


EXCHANGES = [
    ("gradient 1", 3, "data", 2),
    ("gradient 2", 4, "gradient 1", 1),
    ("data", 2, "gradient 3", 3),
    ("gradient 3", 4, "gradient 2", 1),
]


@pytest.mark.parametrize(("writer", "writers", "reader", "readers"), EXCHANGES)
def test_checkpoints_pass_between_methods_and_numbers_of_ranks(tmp_path, writer, writers, reader, readers):
    """As files, which `mpitrain run --resume` reads."""
    layout = cnn().layout

    def write(comm: Communicator) -> Saved:
        method = ready(comm, writer)
        method.advance(FEED, until=BREAK)
        checkpoint.save(tmp_path, BREAK, method.state(), comm, layout)
        return saved(comm, method)

    def read(comm: Communicator) -> Saved:
        found = checkpoint.load(tmp_path / f"step-{BREAK:08}", comm, layout)
        method = ready(comm, reader)
        method.load(found.scalars, found.read)
        return saved(comm, method)

    scalars, tensors = LocalWorld(writers).run(write)[0]
    for found_scalars, found in LocalWorld(readers).run(read):
        assert (found_scalars, bits(found)) == (scalars, bits(tensors))


def check_pieces(comm: Communicator, name: str) -> None:
    """Names, shapes and kinds are those of the model, not of its padded memory."""
    method = ready(comm, name)
    method.advance(FEED, until=1)
    state = method.state()
    names = [segment.name for segment in method.params.layout]
    expected = {f"{prefix}/{name}" for prefix in ("params", "optimizer.m", "optimizer.v") for name in names}
    held = comm.allgather_object([(piece.name, piece.kind, piece.array.tobytes()) for piece in state.pieces])
    assert {piece for rank in held for piece, _, _ in rank} == expected
    replicated = name == "data" and (comm.transport != "shared" or comm.size == 1)
    assert {kind for rank in held for _, kind, _ in rank} == {"replicated" if replicated else "sharded"}
    assert state.scalars == {"step": 1}
    values = 3 * sum(segment.size for segment in method.params.layout) * method.params.layout.dtype.itemsize
    assert sum(len(array) for rank in held for _, _, array in rank) == values * (comm.size if replicated else 1)
    if replicated:
        same_on_all(comm, held[comm.rank])


@pytest.mark.parametrize("name", METHODS)
def test_state_speaks_of_tensors(on_ranks, name):
    on_ranks(check_pieces, name)


def check_warm_start(comm: Communicator, name: str) -> None:
    """Another run's parameters, an optimizer that has seen nothing, and step 0."""
    _, tensors = run(comm, name, BREAK)
    method = ready(comm, name)
    method.load_parameters(tensors.__getitem__)
    assert method.step == 0
    assert not any(array.any() for part in method.parts for array in part.state.values())
    for name, view in method.whole().views.items():
        np.testing.assert_array_equal(view, tensors[f"params/{name}"])


@pytest.mark.parametrize("name", METHODS)
def test_parameters_alone_can_be_loaded(on_ranks, name):
    on_ranks(check_warm_start, name)


def test_another_models_state_is_refused():
    def load(comm: Communicator) -> None:
        scalars, tensors = run(comm, "data", 1)
        tensors["params/8.bias"] = np.zeros(7)
        ready(comm).load(scalars, tensors.__getitem__)

    with pytest.raises(CheckpointError, match=r"tensor 'params/8.bias': wrong shape; got \(7,\); expected \(6,\)"):
        LocalWorld(1).run(load)


def test_optimizers_without_state_save_parameters_only():
    def names(comm: Communicator) -> set[str]:
        method = DataParallel(comm)
        method.setup(mlp(), make_optimizer("sgd"), plan(1))
        return {piece.name for piece in method.state().pieces}

    assert LocalWorld(1).run(names) == [{f"params/{n}.{kind}" for n in (1, 3) for kind in ("weight", "bias")}]
