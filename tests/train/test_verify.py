"""Two runs of a job, recorded and compared: equal where the method is right, and a tensor named where it is broken.

Every method with every model: test_verify_methods.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import write_job

from mpitrain._errors import InputError, MismatchError
from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.method.steps import reduce_gradients
from mpitrain.parallel import data
from mpitrain.train import Job
from mpitrain.train.comparison import compare, default_tolerance, worst
from mpitrain.train.record import Record, record

STEPS = 6
TOLERANCE = 1e-10

Load = Callable[..., Job]

METHODS: dict[str, dict[str, Any]] = {
    "data": {},
    "gradient 1": {"method__kind": "gradient"},
    "gradient 2": {"method__kind": "gradient", "method__stage": 2, "method__bucket_bytes": 256},
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    path = write_job(tmp_path_factory.mktemp("job"))

    def load(**changes: Any) -> Job:
        changes = {"dtype": "float64", **changes}
        return Job.load(path, [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()])

    return load


def recorded(job: Job, ranks: int, steps: int = STEPS) -> Record:
    found, *others = LocalWorld(ranks).run(lambda comm: record(job, comm, steps))
    assert others == [None] * (ranks - 1)
    assert isinstance(found, Record)
    return found


REPRODUCIBLE = METHODS | {"pipeline": {"method__kind": "pipeline", "method__schedule": "gpipe"}}


@pytest.mark.parametrize("changes", REPRODUCIBLE.values(), ids=REPRODUCIBLE)
def test_a_reproducible_job_is_equal_to_the_bit(load, changes):
    settings = {"reproducible": True, "lanes": 5, "dtype": "float32"}
    found, expected = recorded(load(**changes, **settings), 3), recorded(load(**settings), 1)
    assert default_tolerance(expected, True) == 0
    assert compare(found, expected, 0.0).first is None
    for name, array in expected.weights.items():
        assert array.tobytes() == found.weights[name].tobytes()


ALL = METHODS | {"gradient 3": {"method__kind": "gradient", "method__stage": 3, "method__bucket_bytes": 256}}

JOBS: dict[str, list[str]] = {
    "digits_mlp": [],
    "digits_cnn": [],
    "gpt_pydoc": [
        "data.test=0.002",
        "data.options.context=16",
        "model.layers=2",
        "model.width=16",
        "model.dropout=0.1",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("changes", ALL.values(), ids=ALL)
@pytest.mark.parametrize("name", JOBS)
def test_every_job_that_comes_along_is_the_serial_run_under_every_method(name, changes, ranks):
    if name.startswith("digits"):
        pytest.importorskip("sklearn")
    fixed = ["dtype=float64", *JOBS[name]]
    settings = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
    path = Path(__file__).resolve().parents[2] / "jobs" / f"{name}.toml"
    found = recorded(Job.load(path, [*fixed, *settings]), ranks)
    compared = compare(found, recorded(Job.load(path, fixed), 1), TOLERANCE)
    assert compared.first is None
    assert worst(compared.totals).relative < 1e-12


def test_what_is_recorded_is_what_the_method_has(load):
    """The weights after no step are the initial ones, tensor by tensor in the shapes of the model."""
    seen = recorded(load(method__kind="gradient"), 3)
    shapes = {name: array.shape for name, array in seen.weights.items()}
    assert shapes["1.weight"] == (5, 12)
    assert seen.gradient.keys() == seen.weights.keys() == seen.norms.keys()
    for name, gradient in seen.gradient.items():
        assert seen.norms[name][0] == pytest.approx(np.linalg.norm(gradient), rel=1e-12)
        assert seen.norms[name].shape == (STEPS,)


def test_fewer_steps_where_the_job_has_fewer(load):
    assert len(recorded(load(train__steps=3), 2).losses) == 3


def test_a_record_is_read_as_it_was_written(load, tmp_path):
    seen = recorded(load(), 1)
    seen.write(tmp_path / "record")
    read = Record.read(tmp_path / "record")
    for group in ("norms", "gradient", "weights"):
        written, found = getattr(seen, group), getattr(read, group)
        assert list(written) == list(found)
        assert all(written[name].tobytes() == found[name].tobytes() for name in written)
    assert seen.losses.tolist() == read.losses.tolist()


def test_local_sgd_is_another_method(load):
    """Each rank takes a step of its own, on a gradient of its own."""
    first = compare(recorded(load(method__average_every=1), 2), recorded(load(), 1), TOLERANCE).first
    assert first is not None
    assert (first.what, first.step) == ("gradient", 1)
    assert np.isnan(first.size)


def test_a_bucket_that_is_not_reduced_is_named(load, monkeypatch):
    def forgetful(comm: Communicator, grads: FlatBuffer, buckets: Any) -> None:
        before = grads.views["5.weight"].copy()
        reduce_gradients(comm, grads, buckets)
        grads.views["5.weight"][...] = comm.broadcast(before)

    expected = recorded(load(), 1)
    monkeypatch.setattr(data, "reduce_gradients", forgetful)
    first = compare(recorded(load(), 2), expected, TOLERANCE).first
    assert first is not None
    assert (first.what, first.tensor, first.step) == ("gradient", "5.weight", 1)
    assert first.relative > 0.1


def test_a_mean_of_the_ranks_means_is_found(load, monkeypatch):
    """The mistake that most home-made data-parallel loops make: 16 samples on 3 ranks are 6, 5 and 5."""

    def means(comm: Communicator, grads: FlatBuffer, buckets: Any) -> None:
        own = np.array([6, 5, 5][comm.rank])
        grads.flat *= 16 / (own * comm.size)
        reduce_gradients(comm, grads, buckets)

    expected = recorded(load(), 1)
    monkeypatch.setattr(data, "reduce_gradients", means)
    compared = compare(recorded(load(), 3), expected, TOLERANCE)
    assert compared.first is not None
    within = {each.tensor for each in compared.gradients if each.within}
    assert within == {"2.running_mean", "2.running_var"}  # means over all ranks already
    assert compared.losses[0].within  # which a check of losses alone does not see


def made(losses: list[float], first: float = 1.0, last: float = 1.0, norms: tuple[float, float] = (1.0, 1.0)) -> Record:
    """A record of two steps of a large tensor ``a`` and a small one ``b``, of which these numbers are."""
    return Record(
        np.array(losses),
        {"a": np.array([100.0, 100.0]), "b": np.array(norms)},
        {"a": np.full(1, 100.0), "b": np.full((1, 1), first)},
        {"a": np.full(1, 100.0), "b": np.full((1, 1), last)},
    )


GOOD = made([1.0, 2.0])


@pytest.mark.parametrize(
    ("found", "what"),
    [
        (made([1.0, 2.0], first=1.001), None),
        (made([1.0, 2.0], first=1.1), ("gradient", "b", 1, 0.1)),
        (made([1.0, 2.0], norms=(1.1, 1.2)), ("gradient norm", "b", 2, 0.2)),
        (made([1.0, 2.0], last=0.9), ("weights", "b", 2, 0.1)),
        (made([1.0, 2.2]), ("loss", "", 2, 0.2)),
        (made([1.1, 2.0], first=1.1, last=0.5), ("gradient", "b", 1, 0.1)),
        (made([1.0, 2.0], last=np.nan), ("weights", "b", 2, np.nan)),
    ],
)
def test_what_differs_first_is_told(found, what):
    first = compare(found, GOOD, 0.01).first
    if what is None:
        assert first is None
        return
    assert first is not None
    assert (first.what, first.tensor, first.step) == what[:3]
    assert first.size == pytest.approx(what[3], nan_ok=True)


def test_small_tensors_are_measured_by_a_hundredth_of_the_whole():
    tiny = made([1.0, 2.0], first=0.0)
    off = made([1.0, 2.0], first=0.005)
    (_, difference) = compare(off, tiny, 0.01).gradients
    assert difference.relative == pytest.approx(0.005)
    assert difference.within


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match="the tolerance is negative; got -1"):
        compare(GOOD, GOOD, -1)
    with pytest.raises(MismatchError, match="as many steps; got 1; expected 2"):
        compare(Record(np.ones(1), GOOD.norms, GOOD.gradient, GOOD.weights), GOOD, 0)
    other = {"a": np.ones(2), "b": GOOD.weights["b"]}
    with pytest.raises(MismatchError, match="other tensors; got a"):
        compare(Record(GOOD.losses, GOOD.norms, GOOD.gradient, other), GOOD, 0)


def test_the_tolerance_is_that_of_the_dtype(load):
    assert default_tolerance(recorded(load(), 1, 1), False) == 1e-10
    assert default_tolerance(recorded(load(dtype="float32"), 1, 1), False) == 1e-3
