"""Warm starts: they take another run's best weights, and nothing else."""

import numpy as np
import pytest
from trainer_cases import Crash, crash_at, train

from mpitrain._errors import CheckpointError
from mpitrain.comm import LocalWorld
from mpitrain.train import checkpoint, session
from mpitrain.train.assembly import assemble

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_warm_start_takes_the_best_weights_and_nothing_else(load, tmp_path):
    train(load(), run_dir=tmp_path / "first")
    directory = tmp_path / "first" / "checkpoints"
    best = checkpoint.load(checkpoint.best(directory))

    def first_parameters(comm):
        job = load(train__warm_start=str(tmp_path / "first"), train__steps=1)
        parts = assemble(job, comm)
        session._warm_start(parts, tmp_path / "first", comm)
        state = {slot: float(abs(array).max()) for slot, array in parts.method.optimizer_state.items()}
        return parts.method.step, state, {name: view.copy() for name, view in parts.method.params.views.items()}

    for step, state, views in LocalWorld(2).run(first_parameters):
        assert step == 0
        assert set(state.values()) == {0.0}
        for name, view in views.items():
            np.testing.assert_array_equal(view, best.read(f"params/{name}"))


def test_a_warm_start_is_not_lost_in_a_crash(load, tmp_path):
    train(load(seed=5), run_dir=tmp_path / "first")
    job = load(train__warm_start=str(tmp_path / "first"))
    whole = train(job, run_dir=tmp_path / "whole")
    cold = train(load(), run_dir=tmp_path / "cold")
    assert whole["weights_sha256"] != cold["weights_sha256"]
    with pytest.raises(Crash):
        train(job, ranks=1, run_dir=tmp_path / "run", on_phase=crash_at("created", 1))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") is None
    assert train(job, resume=tmp_path / "run")["weights_sha256"] == whole["weights_sha256"]


def test_a_warm_start_from_another_model(load, tmp_path):
    train(load(model__hidden=[7]), run_dir=tmp_path / "first")
    job = load(train__warm_start=str(tmp_path / "first"))
    with pytest.raises(CheckpointError, match=r"another model: .*\(5, 7\), not \(5, 12\)"):
        train(job, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
