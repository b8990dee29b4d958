"""The gradient of n ranks is the serial float64 gradient of the concatenated batch, however it is shared out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import (
    BATCH,
    IMAGES,
    IMPORTANCE,
    METHODS,
    ROWS,
    STEPS_PER_EPOCH,
    TEXT,
    KeptKeys,
    Make,
    Recorder,
    RowsFeed,
    by_label,
    cnn,
    every_method,
    every_method_and,
    gpt,
    last_rank,
    mlp,
    plan,
    same_on_all,
)
from parallel_reference import assert_close, buffer, mlp_mean_gradient, network_mean_gradient

from mpitrain.arrays import FlatBuffer
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.optim import SGD
from mpitrain.parallel import DataParallel

BOUNDS = {"float64": 1e-12, "float32": 1e-5}


@dataclass(frozen=True)
class Case:
    """How the batches are shared out, and whether by microbatches."""

    feed: RowsFeed
    microbatches: int = 1


CASES = {
    "even": Case(RowsFeed()),
    "microbatches": Case(RowsFeed(), 3),
    "by label": Case(RowsFeed(owner=by_label)),
    "by label, microbatches": Case(RowsFeed(owner=by_label), 3),
    "all on the last rank": Case(RowsFeed(owner=last_rank)),
    "importance": Case(RowsFeed(importance=IMPORTANCE)),
    "importance by label, microbatches": Case(RowsFeed(owner=by_label, importance=IMPORTANCE), 3),
}

CASES_IN = {f"{name} in {dtype}": (case, dtype) for name, case in CASES.items() for dtype in BOUNDS}
FEW = {f"{name} in float64" for name in ("even", "by label, microbatches", "all on the last rank")}

every_method_and_case = every_method_and("case", CASES_IN, FEW)

Expected = Callable[[FlatBuffer, int], tuple[float, FlatBuffer]]
"""Gives the mean loss and gradient at some parameters and step."""


def train(comm: Communicator, make: Make, case: Case, network: KeptKeys, **options: int) -> tuple[Any, ...]:
    """Take an epoch's steps, a short batch included, without moving; return what was seen on the way."""
    recorder = Recorder()
    method = make(comm, microbatches=case.microbatches, **options)
    method.setup(network, recorder, plan(STEPS_PER_EPOCH))
    feed = replace(case.feed, dtype=network.layout.dtype)
    losses = [method.advance(feed, until=step + 1).loss for step in range(STEPS_PER_EPOCH)]
    return method, recorder.seen(comm), losses


def compare(comm: Communicator, method: Any, seen: list[np.ndarray], losses: list[float], expected: Expected) -> None:
    layout = method.params.layout
    params, bound = buffer(layout, method.whole().flat), BOUNDS[layout.dtype.name]
    assert len(seen) == STEPS_PER_EPOCH
    for step, flat in enumerate(seen):
        loss, grads = expected(params, step)
        assert_close(buffer(layout, flat), grads, bound)
        assert np.linalg.norm(flat.astype(float)) == pytest.approx(np.linalg.norm(grads.flat), rel=bound)
        assert losses[step] == pytest.approx(loss, rel=bound)
    same_on_all(comm, [losses, *(flat.tobytes() for flat in seen)])


def check_mlp(comm: Communicator, make: Make, case: Case, dtype: str) -> None:
    found = train(comm, make, case, mlp(dtype))
    compare(comm, *found, lambda params, step: mlp_mean_gradient(params, case.feed.whole(step)[0]))


def check_cnn(comm: Communicator, make: Make, case: Case, dtype: str) -> None:
    check_network(comm, make, case, cnn, dtype)


def check_gpt(comm: Communicator, make: Make, case: Case, dtype: str) -> None:
    check_network(comm, make, replace(case, feed=replace(case.feed, dataset=TEXT)), gpt, dtype)


def check_network(comm: Communicator, make: Make, case: Case, build: Callable[..., KeptKeys], dtype: str) -> None:
    network = build(dtype)
    found = train(comm, make, case, network, bucket_bytes=256)
    exact, m = build(), case.microbatches

    def expected(params: FlatBuffer, step: int) -> tuple[float, FlatBuffer]:
        whole = case.feed.whole(step, m)
        return network_mean_gradient(exact, params, whole, network.keys[step * m : (step + 1) * m])

    assert len(set(network.keys)) == STEPS_PER_EPOCH * m  # other elements are dropped in each microbatch
    compare(comm, *found, expected)


@every_method_and_case
def test_mlp_equals_the_closed_form(on_ranks, make, case):
    on_ranks(check_mlp, make, *case)


@every_method_and_case
def test_cnn_with_batchnorm_and_dropout_equals_the_serial_run(on_ranks, make, case):
    on_ranks(check_cnn, make, *case)


@every_method_and(
    "name",
    {name: name for name in ("even", "by label, microbatches", "all on the last rank", "importance")},
    {"by label, microbatches"},
)
def test_gpt_with_dropout_equals_the_serial_run(on_ranks, make, name):
    on_ranks(check_gpt, make, CASES[name], "float64")


def check_recomputed(comm: Communicator, make: Make) -> None:
    """Weights after two steps have the same bits, and what is reduced is the same."""
    found = []
    for recompute in (False, True):
        method = make(comm, microbatches=2)
        method.setup(gpt(recompute=recompute), SGD(), plan(STEPS_PER_EPOCH))
        comm.ledger.reset()
        method.advance(RowsFeed(TEXT, owner=by_label), until=STEPS_PER_EPOCH)
        calls = {name: count.calls for (_, name), count in comm.ledger.snapshot().items() if "gather" not in name}
        calls.pop("barrier", None)  # stage 3 has one before each gathering
        found.append((method.weights_sha256(), calls))
    assert found[0] == found[1]


@every_method
def test_recomputed_blocks_change_nothing(on_ranks, make):
    on_ranks(check_recomputed, make)


@settings(max_examples=25)
@given(
    owner=st.lists(st.integers(0, 2), min_size=ROWS, max_size=ROWS),
    microbatches=st.integers(1, BATCH),
    name=st.sampled_from(list(METHODS)),
)
def test_any_owners_and_microbatches_give_the_closed_form(owner, microbatches, name):
    case = Case(RowsFeed(owner=lambda size: np.array(owner)), microbatches)
    LocalWorld(3, timeout_s=20).run(check_mlp, METHODS[name], case, "float64")


def torch_gradients(params: FlatBuffer, labels: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of `cnn` without dropout, and what its running statistics follow, by PyTorch's autograd."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p = {name: torch.tensor(view.copy(), requires_grad=True) for name, view in params.views.items()}
    statistics = {}

    def block(x: Any, conv: str, norm: str) -> Any:
        y = functional.conv2d(x, p[f"{conv}.weight"].permute(3, 2, 0, 1), padding=1)
        mean, var = torch.zeros(y.shape[1], dtype=y.dtype), torch.ones(y.shape[1], dtype=y.dtype)
        scale, shift = p[f"{norm}.gamma"], p[f"{norm}.beta"]
        y = functional.batch_norm(y, mean, var, scale, shift, training=True, momentum=1.0)
        statistics.update({f"{norm}.running_mean": mean.numpy(), f"{norm}.running_var": var.numpy()})
        return functional.relu(y)

    x = block(block(torch.tensor(images).permute(0, 3, 1, 2), "0", "1"), "3", "4")
    x = functional.max_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)
    hidden = functional.relu(x @ p["8.weight"] + p["8.bias"])
    functional.cross_entropy(hidden @ p["10.weight"] + p["10.bias"], torch.tensor(labels)).backward()
    return statistics | {name: tensor.grad.numpy() for name, tensor in p.items() if tensor.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_cnn_with_batchnorm_equals_pytorch(size):
    pytest.importorskip("torch")
    feed = RowsFeed(batch_size=ROWS, owner=by_label)

    def gradients(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
        recorder, method, network = Recorder(), DataParallel(comm), cnn(dropout=0.0)
        method.setup(network, recorder, plan(1))
        method.advance(feed, until=1)
        return buffer(network.layout, method.params.flat), buffer(network.layout, recorder.seen(comm)[0])

    params, found = LocalWorld(size, timeout_s=20).run(gradients)[0]
    assert_close(found.views, torch_gradients(params, IMAGES.targets, IMAGES.inputs), 1e-12)
