"""Stage 3 and layers that break its rules: an error that names the tensor, never another layer's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parallel_cases import RowsFeed, plan, same_on_all

from mpitrain import nn
from mpitrain._errors import InputError, MismatchError
from mpitrain.comm import Communicator, LocalWorld
from mpitrain.nn import Network
from mpitrain.optim import SGD
from mpitrain.parallel import GradientParallel
from mpitrain.parallel.walk import Walk

SIZE = 32


class Keeps(nn.Linear):
    """Keeps what ``keep`` makes of its weight, in its context or in itself."""

    def __init__(self, keep: Callable[[Any], Any], in_context: bool) -> None:
        super().__init__(SIZE, SIZE)
        self.keep, self.in_context = keep, in_context

    def forward(self, params: Any, x: Any, call: Any) -> Any:
        y, context = super().forward(params, x, call)
        kept = self.keep(params["weight"])
        if self.in_context:
            context["kept"] = kept
        else:
            self.kept = kept
        return y, context


def network(*layers: nn.Layer) -> Network:
    return Network(nn.Sequential(nn.Flatten(), *layers, nn.Linear(SIZE, 3)), nn.CrossEntropy(), np.float64)


def advanced(comm: Communicator, made: Network, stage: int, steps: int = 2) -> str:
    method = GradientParallel(comm, stage=stage, bucket_bytes=1)
    method.setup(made, SGD(), plan(steps))
    method.advance(RowsFeed(), until=steps)
    return method.weights_sha256()


def check_kept(comm: Communicator, keep: Callable[[Any], Any], in_context: bool) -> None:
    """All ranks find it, each at its own layer's."""
    with pytest.raises(InputError, match=r"keeps parameters after its call.* a view of '1.weight' that is still held"):
        advanced(comm, network(Keeps(keep, in_context), nn.Linear(SIZE, SIZE)), 3)


@pytest.mark.parametrize("in_context", [True, False], ids=["in the context", "in the layer"])
@pytest.mark.parametrize(
    "keep", [lambda weight: weight, lambda weight: [weight.T[1:]]], ids=["itself", "part of its transpose"]
)
def test_a_view_that_outlives_its_call_is_an_error(on_ranks, keep, in_context):
    on_ranks(check_kept, keep, in_context)


def check_kept_alone(comm: Communicator) -> None:
    """Nothing else needs its memory in a step, but the next step's values come there."""
    with pytest.raises(InputError, match=r"a view of '1\.weight' that is still held"):
        advanced(comm, Network(nn.Sequential(nn.Flatten(), Keeps(lambda w: w, False)), nn.CrossEntropy()), 3, steps=1)


def test_a_view_that_outlives_the_step_is_an_error_too(on_ranks):
    on_ranks(check_kept_alone)


def check_copies(comm: Communicator) -> None:
    found = [advanced(comm, network(Keeps(np.copy, True), nn.Linear(SIZE, SIZE)), stage) for stage in (2, 3)]
    assert found[0] == found[1]
    same_on_all(comm, found)


def test_copies_may_be_kept(on_ranks):
    on_ranks(check_copies)


class InTurns(nn.Sequential):
    """Takes two layers of one size in an order that may change from rank to rank, or from step to step."""

    def __init__(self, swapped: Callable[[int], bool]) -> None:
        super().__init__(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
        self.both, self.swapped, self.passes = self.children, swapped, 0

    def forward(self, params: Any, x: Any, call: Any) -> Any:
        self.children = self.both[::-1] if self.swapped(self.passes) else self.both
        self.passes += 1
        return super().forward(params, x, call)


def check_order_of_ranks(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match=r"in different orders; got another order than rank 0's on ranks \[1\]"):
        advanced(comm, network(InTurns(lambda step: comm.rank == 1)), 3)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_take_layers_in_different_orders_are_named(size):
    """All buckets are of one size, so that no collective operation would notice."""
    LocalWorld(size, timeout_s=20).run(check_order_of_ranks)


def check_order_of_steps(comm: Communicator) -> None:
    with pytest.raises(InputError, match=r"another order than in the first step; got 1\.1; expected 1\.0; let "):
        advanced(comm, network(InTurns(lambda step: step == 1)), 3)


def test_an_order_that_changes_is_an_error(on_ranks):
    on_ranks(check_order_of_steps)


def check_walk(comm: Communicator) -> None:
    walk = Walk(comm)
    for layers in (("a", "b", "a"), ("a", "b", "a"), ("a", "b")):
        for layer in layers:
            walk.visit(layer)
        if len(layers) == 3:
            walk.end()
    with pytest.raises(InputError, match="got the end of the step; expected a; "):
        walk.end()


def test_layers_left_out_at_the_end_are_missed(on_ranks):
    on_ranks(check_walk)


class Skips(InTurns):
    """Leaves out the second layer in some passes."""

    def forward(self, params: Any, x: Any, call: Any) -> Any:
        self.children = self.both[:1] if self.swapped(self.passes) else self.both
        self.passes += 1
        return nn.Sequential.forward(self, params, x, call)


def check_rules_are_of_stage_3(comm: Communicator) -> None:
    """Other stages have the parameters in one place, where views and orders are free."""
    for layer in (Keeps(lambda weight: weight, True), Skips(lambda step: step == 1)):
        same_on_all(comm, advanced(comm, network(layer), 2))


def test_stage_2_has_no_such_rules(on_ranks):
    on_ranks(check_rules_are_of_stage_3)
