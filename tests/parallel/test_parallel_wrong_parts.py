"""Wrong parts handed to a method end in one line that names the argument, what was got, and how to get a right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from parallel_cases import IMAGES, RowsFeed, every_method, mlp, plan, set_up

from mpitrain import nn
from mpitrain._errors import InputError, MpitrainError
from mpitrain.arrays import Key
from mpitrain.comm import Communicator, LocalWorld, ProcessMesh, world
from mpitrain.data import Batches
from mpitrain.method import Plan
from mpitrain.nn import Network
from mpitrain.optim import Adam, Constant
from mpitrain.parallel import (
    DataParallel,
    GradientParallel,
    ModelAveraging,
    PipelineParallel,
    ReproducibleDataParallel,
    ReproduciblePipelineParallel,
)

KEY, RATE = Key(0), Constant(lr=0.1)
LINEAR = nn.Linear(3, 2)

WRONG: dict[str, tuple[Callable[[Communicator], Any], str]] = {
    "comm": (lambda c: DataParallel("world"), "DataParallel: comm is of another kind; got str: 'world'"),
    "a function": (lambda c: GradientParallel(world), "GradientParallel: comm is .* got function: .*mpitrain.world"),
    "across": (lambda c: DataParallel(c, across="tensor"), "DataParallel: across is of another kind"),
    "precision": (lambda c: DataParallel(c, precision="bfloat16"), 'expected a Precision, e.g. Precision."bfloat16"'),
    "codec": (lambda c: DataParallel(c, codec=16), "DataParallel: codec is of another kind; got int: 16"),
    "microbatches": (lambda c: DataParallel(c, microbatches=2.0), "microbatches is not an integer; got 2.0"),
    "stage": (lambda c: GradientParallel(c, stage="1"), "no such stage; got '1'; expected 1, 2 or 3"),
    "average_every": (lambda c: ModelAveraging(c, average_every="2"), "average_every is not an integer; got '2'"),
    "lanes": (lambda c: ReproducibleDataParallel(c, lanes=2.5), "lanes is not an integer; got 2.5"),
    "where": (lambda c: PipelineParallel("x"), "where is of another kind; .* expected a Communicator or a ProcessMesh"),
    "where of lanes": (lambda c: ReproduciblePipelineParallel("x", lanes=2), "where is of another kind"),
    "costs": (
        lambda c: PipelineParallel(c, costs=[1.0, float("nan"), 1.0, 1.0]).setup(mlp(), Adam(), plan(1)),
        "PipelineParallel: one of costs is not allowed; got nan; expected a number in .0, inf",
    ),
    "mesh": (lambda c: ProcessMesh("c", data=2), "ProcessMesh: comm is of another kind"),
    "model": (lambda c: DataParallel(c).setup("m", Adam(), plan(1)), "setup: model is of another kind; got str: 'm'"),
    "a layer": (lambda c: PipelineParallel(c).setup(LINEAR, Adam(), plan(1)), "setup: model .*expected a Model"),
    "optimizer": (lambda c: DataParallel(c).setup(mlp(), Adam, plan(1)), "optimizer is .*; got the class Adam"),
    "plan": (lambda c: DataParallel(c).setup(mlp(), Adam(), 100), "setup: plan is of another kind; got int: 100"),
    "steps": (lambda c: Plan(KEY, RATE, steps=-1), "Plan: steps is too small; got -1; expected at least 0"),
    "no steps": (lambda c: Plan(KEY, RATE, steps=1.5), "Plan: steps is not an integer; got 1.5"),
    "key": (lambda c: Plan(0, RATE, steps=1), "Plan: key is of another kind; got int: 0; expected a Key"),
    "seed": (lambda c: Key("0"), "Key: seed is not an integer; got '0'"),
    "schedule": (lambda c: Plan(KEY, 1e-3, steps=1), "Plan: schedule is no schedule; got 0.001; expected a function"),
    "no rate": (lambda c: Plan(KEY, lambda step: None, steps=1), "Plan: the learning rate of step 1 is .*; got None"),
    "last rate": (lambda c: Plan(KEY, [0, 1.0, np.nan].__getitem__, steps=2), "learning rate of step 2 is .*; got nan"),
    "clip": (lambda c: Plan(KEY, RATE, steps=1, clip_norm=-1), "Plan: clip_norm is not allowed; got -1"),
    "until": (lambda c: set_up(c, mlp(), 4).advance(RowsFeed(1), until=-5), "until is too small; got -5; expected at"),
    "until None": (lambda c: set_up(c, mlp(), 4).advance(RowsFeed(1), until=None), "until is not an integer; got None"),
    "feed": (lambda c: set_up(c, mlp(), 4).advance(IMAGES, until=1), "advance: feed is .*; expected a Feed"),
    "no feed": (lambda c: set_up(c, mlp(), 4).advance(None, until=1), "advance: feed is .*; got NoneType"),
    "evaluate": (lambda c: set_up(c, mlp(), 4).evaluate(3), "evaluate: batches is of another kind; got int: 3"),
    "batch": (lambda c: set_up(c, mlp(), 4).evaluate([np.ones(3)]), "evaluate: one of batches is .* got ndarray"),
    "inputs": (lambda c: set_up(c, mlp(), 4).predict([[1.0]]), "the inputs are no array; got list; .*numpy.asarray"),
    "dataset": (lambda c: Batches("digits", batch_size=4, seed=0), "Batches: dataset is of another kind; got str"),
    "batch_size": (lambda c: Batches(IMAGES, batch_size=0, seed=0), "batch_size is too small; got 0"),
    "layer": (lambda c: Network("x", nn.CrossEntropy()), "Network: layer is of another kind; got str: 'x'"),
    "loss": (lambda c: Network(LINEAR, nn.CrossEntropy), "Network: loss is of .*; got the class CrossEntropy"),
    "a list": (lambda c: nn.Sequential([LINEAR]), "Sequential: layer 0 is of another kind; got list"),
    "a child": (lambda c: nn.Sequential(LINEAR, nn.ReLU), "Sequential: layer 1 is of .*; got the class ReLU"),
}  # fmt: skip
"""By the argument: a call, and a part of what it says."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_part_is_told_in_one_line(name):
    call, told = WRONG[name]
    with pytest.raises(InputError, match=told) as caught:
        LocalWorld(1).run(call)
    assert "\n" not in str(caught.value).partition("raised on rank")[0].rstrip()


@every_method
@pytest.mark.parametrize("use", ["evaluate", "predict"])
def test_what_comes_after_setup_says_so(make, use):
    argument = [next(iter(RowsFeed(IMAGES).share(0, 1, 1).batch(0)))] if use == "evaluate" else np.zeros((2, 3))
    with pytest.raises(MpitrainError, match=r"has no \w+ before setup; call setup\(model, optimizer, plan\)"):
        LocalWorld(1).run(lambda comm: getattr(make(comm), use)(argument))


def test_other_attributes_are_missing_as_always():
    method = LocalWorld(1).run(lambda comm: set_up(comm, mlp(), 1))[0]
    with pytest.raises(AttributeError, match=r"^'DataParallel' object has no attribute 'modle'$"):
        _ = method.modle
    assert not hasattr(LocalWorld(1).run(DataParallel)[0], "plan")
