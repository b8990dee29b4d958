"""A state saved on n ranks continues on m ranks where the run would have gone without the break."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from parallel_cases import RowsFeed, by_label, cnn, mlp, part, plan, same_on_all
from parallel_reference import assert_close

from mpitrain._errors import CheckpointError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.optim import make_optimizer
from mpitrain.parallel import DataParallel, ModelAveraging

BREAK, STEPS = 4, 10
FEED = RowsFeed(owner=by_label)

Saved = tuple[dict[str, Any], dict[str, np.ndarray]]


def ready(comm: Communicator, averaging: bool = False) -> DataParallel:
    """CNN with BatchNorm and Dropout under Adam: everything that a state must hold or imply."""
    method = ModelAveraging(comm, average_every=2) if averaging else DataParallel(comm)
    method.setup(cnn(), make_optimizer("adam", weight_decay=0.01), plan(STEPS))
    return method


def saved(method: DataParallel) -> Saved:
    """What a checkpoint would hold: JSON and whole tensors."""
    state = method.state()
    tensors = {piece.name: piece.array.copy().reshape(piece.global_shape) for piece in state.pieces}
    return json.loads(json.dumps(state.scalars)), tensors


def run(comm: Communicator, averaging: bool, until: int, start: Saved | None = None) -> Saved:
    """Train from the beginning or from a state; return the state at ``until``."""
    method = ready(comm, averaging)
    if start is not None:
        method.params.flat[...] = np.nan  # whatever is not loaded shows
        scalars, tensors = start
        method.load(scalars, tensors.__getitem__)
    assert method.advance(FEED, until).step == until
    return saved(method)


def check_resumes(comm: Communicator, averaging: bool) -> None:
    """Between all ranks and each smaller number of them, both ways."""
    for size in range(1, comm.size + 1):
        for writers, readers in {(comm.size, size), (size, comm.size)}:
            with part(comm, writers) as some:
                state = run(some, averaging, BREAK) if some else None
            state = comm.broadcast_object(state)
            with part(comm, readers) as some:
                if some:
                    scalars, found = run(some, averaging, STEPS, state)
                    compare(scalars, found, run(some, averaging, STEPS), averaging, writers == readers)


def compare(
    scalars: dict[str, Any], found: dict[str, np.ndarray], unbroken: Saved, averaging: bool, same: bool
) -> None:
    expected_scalars, expected = unbroken
    assert scalars == expected_scalars
    if same:
        assert {name: array.tobytes() for name, array in found.items()} == {
            name: array.tobytes() for name, array in expected.items()
        }
    elif not averaging:
        moving = {name: array for name, array in expected.items() if np.linalg.norm(array) > 0}
        assert_close({name: found[name] for name in moving}, moving, 1e-9)
    else:  # local SGD depends on the number of ranks; that it loads and goes on is what is promised
        assert all(np.isfinite(array).all() for array in found.values())


@pytest.mark.parametrize("averaging", [False, True], ids=["data parallel", "averaging"])
def test_a_saved_state_continues_on_any_number_of_ranks(on_ranks, averaging):
    on_ranks(check_resumes, averaging)


def check_pieces(comm: Communicator) -> None:
    """Names, shapes and kinds are those of the model, not of its padded memory."""
    method = ready(comm)
    method.advance(FEED, until=1)
    state = method.state()
    names = [segment.name for segment in method.params.layout]
    expected = {f"{prefix}/{name}" for prefix in ("params", "optimizer.m", "optimizer.v") for name in names}
    assert {piece.name for piece in state.pieces} == expected
    assert {piece.kind for piece in state.pieces} == {"replicated"}
    assert state.scalars == {"step": 1}
    same_on_all(comm, {piece.name: piece.array.tobytes() for piece in state.pieces})


def test_state_speaks_of_whole_tensors(on_ranks):
    on_ranks(check_pieces)


def check_warm_start(comm: Communicator) -> None:
    """Another run's parameters, an optimizer that has seen nothing, and step 0."""
    _, tensors = run(comm, False, BREAK)
    method = ready(comm)
    method.load_parameters(tensors.__getitem__)
    assert method.step == 0
    assert not any(array.any() for array in method.optimizer_state.values())
    for name, view in method.params.views.items():
        np.testing.assert_array_equal(view, tensors[f"params/{name}"])


def test_parameters_alone_can_be_loaded(on_ranks):
    on_ranks(check_warm_start)


def test_another_models_state_is_refused():
    def load(comm: Communicator) -> None:
        scalars, tensors = run(comm, False, 1)
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
