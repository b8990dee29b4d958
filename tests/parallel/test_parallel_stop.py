"""All ranks stop together: when one is asked to, and when the numbers of one are no longer numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from parallel_cases import BATCH, IMAGES, METHODS, ROWS, KeptKeys, RowsFeed, cnn, last_rank, mlp, plan, same_on_all

from mpitrain import nn
from mpitrain._errors import NonFiniteError
from mpitrain.arrays import Batch, FlatBuffer, Gradients, Key
from mpitrain.comm import Communicator
from mpitrain.method import Share
from mpitrain.nn import Network
from mpitrain.optim import SGD
from mpitrain.parallel import ModelAveraging
from mpitrain.parallel.synchronous import Synchronous

STEPS = 12

MAKES = METHODS | {"averaging": partial(ModelAveraging, average_every=3)}
EVERY = {"averaging": 3}
"""Steps between commit points, if not 1."""

every_name = pytest.mark.parametrize("name", MAKES)


def ready(comm: Communicator, name: str, network: Network) -> Synchronous:
    method = MAKES[name](comm)
    method.setup(network, SGD(), plan(STEPS))
    return method


@dataclass
class Interrupted:
    """A feed during whose step something happens on one rank, as a signal would."""

    rank: int
    step: int
    happens: Callable[[], None]
    feed: RowsFeed = field(default_factory=RowsFeed)

    def share(self, rank: int, size: int, microbatches: int) -> Share:
        share, happens = self.feed.share(rank, size, microbatches), self.happens
        at = self.step if rank == self.rank % size else None

        class Interrupting:
            def batch(self, step: int) -> list[Batch]:
                if step == at:
                    happens()
                return share.batch(step)

        return Interrupting()


def check_stop(comm: Communicator, name: str) -> None:
    method = ready(comm, name, mlp())
    progress = method.advance(Interrupted(-1, 3, method.request_stop), until=STEPS)
    assert progress.stop_requested
    assert progress.step == method.step == {1: 4, 3: 6}[EVERY.get(name, 1)]
    same_on_all(comm, (progress, method.whole().sha256()))


@every_name
def test_all_ranks_stop_at_the_commit_point_after_a_request(on_ranks, name):
    on_ranks(check_stop, name)


def check_stop_before(comm: Communicator, name: str) -> None:
    method = ready(comm, name, mlp())
    if comm.rank == 0:
        method.request_stop()
    progress = method.advance(RowsFeed(), until=STEPS)
    assert (progress.step, progress.stop_requested) == (EVERY.get(name, 1), True)
    same_on_all(comm, progress)


@every_name
def test_a_request_between_two_calls_is_heard_by_the_next(on_ranks, name):
    on_ranks(check_stop_before, name)


def poisoned(value: float) -> RowsFeed:
    """The images with one value spoilt, in a row of the last rank that the first step takes; others have rows too."""
    numbered = replace(IMAGES, targets=np.arange(ROWS))
    first = RowsFeed(numbered).whole(0)[0].targets
    inputs = IMAGES.inputs.copy()
    inputs[first[-1], 1, 2, 0] = value

    def owner(size: int) -> np.ndarray:
        owners = np.zeros(ROWS, int)
        owners[first] = np.arange(BATCH) * size // BATCH
        return owners

    return RowsFeed(replace(IMAGES, inputs=inputs), owner=owner)


def check_not_finite(comm: Communicator, name: str, make: Callable[[], Network], value: float) -> None:
    culprit = comm.size - 1
    method = ready(comm, name, make())
    before = method.whole().sha256()
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError) as caught:
        method.advance(poisoned(value), until=STEPS)
    assert "step 1 is not finite" in str(caught.value)
    assert f"ranks whose own samples gave it: [{culprit}]" in str(caught.value)
    assert method.whole().sha256() == before  # nothing was updated with it
    assert method.step == 0
    same_on_all(comm, str(caught.value))


def shared_cnn() -> KeptKeys:
    """Its BatchNorms carry one rank's trouble to all others before the loss is known."""
    return cnn(dropout=0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("make", [mlp, shared_cnn])
@every_name
def test_a_value_that_is_not_finite_ends_all_ranks_and_names_one(on_ranks, name, make, value):
    on_ranks(check_not_finite, name, make, value)


class Overflowing(Network):
    """Its loss is finite; its gradient is not."""

    def __init__(self) -> None:
        super().__init__(mlp().layer, nn.CrossEntropy(), np.float64)

    def loss_and_gradients(
        self, params: FlatBuffer, batch: Batch, grads: Gradients, rng: Key, reduce: nn.Reduce | None = None
    ) -> tuple[float, float]:
        if len(batch):
            grads.tree["3"]["bias"][0] = np.inf
        return super().loss_and_gradients(params, batch, grads, rng, reduce)


def check_gradient_not_finite(comm: Communicator, name: str) -> None:
    method = ready(comm, name, Overflowing())
    with pytest.raises(NonFiniteError) as caught:
        method.advance(RowsFeed(owner=last_rank), until=STEPS)
    assert f"ranks whose own samples gave it: [{comm.size - 1}]; tensors: 3.bias" in str(caught.value)


@every_name
def test_a_gradient_that_is_not_finite_names_rank_and_tensor(on_ranks, name):
    on_ranks(check_gradient_not_finite, name)
