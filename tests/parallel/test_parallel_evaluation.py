"""Metrics over all ranks are those of the whole set, however unevenly it lies; predictions are the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, ROWS, cnn, mlp, plan, random_values, same_on_all, set_up
from parallel_reference import mlp_gradients

from mpitrain import nn
from mpitrain._errors import InputError
from mpitrain.arrays import Batch
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh
from mpitrain.data import Dataset, evaluation_batches
from mpitrain.nn import Network
from mpitrain.optim import SGD
from mpitrain.parallel import (
    DataParallel,
    PipelineParallel,
    ReproducibleDataParallel,
    ReproduciblePipelineParallel,
)

TABLE = Dataset(random_values(ROWS, 4), 5.0 + random_values(ROWS, 2, seed=1), "regression", "table")


def evaluated(comm: Communicator, network: Network, dataset: Dataset, batch_size: int) -> tuple[Any, dict[str, Any]]:
    method = set_up(comm, network, 1)
    batches = evaluation_batches(dataset, batch_size, comm.rank, comm.size, np.float64)
    metrics = method.evaluate(batches)
    same_on_all(comm, {name: np.asarray(value).tobytes() for name, value in metrics.items()})
    return method, metrics


def check_classification(comm: Communicator, batch_size: int) -> None:
    method, metrics = evaluated(comm, mlp(), IMAGES, batch_size)
    labels, whole = IMAGES.targets, Batch(IMAGES.inputs, IMAGES.targets, np.arange(ROWS))
    hidden = np.tanh(IMAGES.inputs.reshape(ROWS, -1) @ method.whole().views["1.weight"])  # the biases are zero still
    predicted = (hidden @ method.whole().views["3.weight"]).argmax(1)
    confusion = [[int(((labels == row) & (predicted == column)).sum()) for column in range(3)] for row in range(3)]
    assert metrics["accuracy"] == (predicted == labels).sum() / ROWS
    assert metrics["confusion"].tolist() == confusion
    assert metrics["loss"] == pytest.approx(mlp_gradients(method.whole().views, whole)[0] / ROWS, rel=1e-12)


def check_regression(comm: Communicator, batch_size: int) -> None:
    network = Network(nn.Linear(4, 2), nn.MeanSquaredError(), np.float64)
    method, metrics = evaluated(comm, network, TABLE, batch_size)
    errors = TABLE.inputs @ method.whole().views["weight"] - TABLE.targets
    spread = TABLE.targets - TABLE.targets.mean(0)
    assert metrics["r2"] == pytest.approx((1 - (errors**2).sum(0) / (spread**2).sum(0)).mean(), rel=1e-11)
    assert metrics["rmse"] == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-12)
    assert metrics["loss"] == pytest.approx((errors**2).mean(), rel=1e-12)


@pytest.mark.parametrize("batch_size", [1, 3, ROWS, 64])
@pytest.mark.parametrize("check", [check_classification, check_regression])
def test_metrics_are_those_of_the_whole_set(on_ranks, check, batch_size):
    on_ranks(check, batch_size)


def check_one_rank_has_all(comm: Communicator) -> None:
    """A mean of the ranks' accuracies would be off by the number of ranks."""
    method = set_up(comm, mlp(), 1)
    rows = np.arange(ROWS if comm.rank == comm.size - 1 else 0)
    mine = Batch(IMAGES.inputs[rows], IMAGES.targets[rows], rows)
    whole = Batch(IMAGES.inputs, IMAGES.targets, np.arange(ROWS))
    expected = method.model.metrics(method.model.sums(method.whole(), whole))
    found = method.evaluate([mine])
    assert found["accuracy"] == expected["accuracy"]
    assert found["confusion"].tolist() == expected["confusion"].tolist()


def test_a_rank_may_have_all(on_ranks):
    on_ranks(check_one_rank_has_all)


def check_predictions(comm: Communicator) -> None:
    method = set_up(comm, cnn(), 1)
    outputs = method.predict(IMAGES.inputs)
    assert outputs.shape == (ROWS, 3)
    same_on_all(comm, outputs.tobytes())
    pairs = [method.predict(IMAGES.inputs[start : start + 2]) for start in range(0, ROWS, 2)]
    np.testing.assert_allclose(np.concatenate(pairs), outputs, rtol=1e-12)


def test_predictions_are_the_same_on_all_ranks(on_ranks):
    on_ranks(check_predictions)


def check_batches_of_one_rank(comm: Communicator, build: Callable[[Communicator], Any]) -> None:
    """The last rank alone has batches; then none has any."""
    method, whole = build(comm), Batch(IMAGES.inputs, IMAGES.targets, np.arange(ROWS))
    expected = LocalWorld(1).run(lambda one: set_up(one, mlp(), 1).evaluate([whole]))[0]
    found = method.evaluate([whole] if comm.rank == comm.size - 1 else [])
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    assert found["confusion"].tolist() == expected["confusion"].tolist()
    with pytest.raises(InputError, match="evaluate: there is nothing to evaluate; got no batches on any rank"):
        method.evaluate([])


def two_pipelines(comm: Communicator) -> ProcessMesh:
    return ProcessMesh(comm, data=2, pipe=2)


@pytest.mark.parametrize(
    ("ranks", "make"),
    [
        (3, DataParallel),
        (3, lambda comm: ReproducibleDataParallel(comm, lanes=5)),
        (2, PipelineParallel),
        (4, lambda comm: PipelineParallel(two_pipelines(comm))),
        (2, lambda comm: ReproduciblePipelineParallel(comm, lanes=5)),
        (4, lambda comm: ReproduciblePipelineParallel(two_pipelines(comm), lanes=5)),
    ],
)
def test_ranks_may_have_nothing_to_evaluate_unless_all_have(ranks, make):
    def build(comm: Communicator) -> Any:
        method = make(comm)
        method.setup(mlp(), SGD(), plan(1))
        return method

    LocalWorld(ranks).run(check_batches_of_one_rank, build)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(InputError, match="evaluate: there is nothing to evaluate; got no batches"):
        LocalWorld(2).run(lambda comm: set_up(comm, mlp(), 1).evaluate([]))
