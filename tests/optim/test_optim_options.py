"""What is refused, and in which words."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import mpitrain.optim as optim
from mpitrain._errors import InputError
from mpitrain.optim import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

BAD = [
    ("sgd", {"weight_decay": -0.1}, r"sgd: weight_decay is not allowed; got -0.1; expected a number in \[0, inf\)"),
    ("sgd", {"weight_decay": math.inf}, "got inf"),
    ("momentum", {"momentum": 1.0}, r"momentum: momentum is not allowed; got 1.0; expected a number in \[0, 1\)"),
    ("nesterov", {"momentum": 0.0}, r"expected a number in \(0, 1\)"),
    ("momentum", {"momentum": "0.9"}, "got '0.9'"),
    ("momentum", {"momentum": False}, "got False"),
    ("adam", {"betas": (0.9, 1.5)}, r"got \(0.9, 1.5\); expected two numbers, each a number in \[0, 1\)"),
    ("adam", {"betas": (0.9,)}, "expected two numbers"),
    ("adam", {"betas": 0.9}, "expected two numbers"),
    ("adam", {"eps": 0}, r"adam: eps is not allowed; got 0; expected a number in \[1e-30, inf\)"),
    ("rmsprop", {"alpha": math.nan}, "got nan"),
    ("adagrad", {"eps": None}, "got None"),
    ("lamb", {"adapt": "all"}, "got 'all'; expected 'decay' or 'trained'"),
    ("adam", {"beta3": 0.5}, "optimizer adam: unknown option; got beta3; expected betas, eps, weight_decay"),
    ("adamm", {}, "unknown optimizer; got 'adamm'; expected adagrad or adam or"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD)
def test_bad_hyperparameters(name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        make_optimizer(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_learning_rate_is_sent_to_the_plan(name):
    cls = OPTIMIZERS[name]
    with pytest.raises(
        InputError, match=rf"^{cls.__name__}: .*'lr'; expected by name: .*; .*Plan\(.*Constant\(lr=1e-3\)"
    ):
        cls(lr=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: optim.SGD([], momentum=0.9), "^SGD: too many positional arguments; expected by name: weight_decay$"),
        (lambda: optim.Adam(beta=(0.9, 0.99)), "'beta'; expected by name: weight_decay, betas, eps; did you mean"),
        (lambda: optim.Cosine(lr=0.1), "^Cosine: missing a required.* argument: 'steps'; expected by name: lr, steps"),
        (lambda: optim.Constant(1e-3), "^Constant: too many positional arguments; expected by name: lr$"),
    ],
)
def test_options_that_a_class_does_not_take(wrong, message):
    with pytest.raises(InputError, match=message):
        wrong()


def test_a_class_of_the_users_may_be_made_as_its_own_initialiser_says():
    class Mine(optim.SGD):
        def __init__(self, factor, *others, **options):
            super().__init__(weight_decay=factor * options["by"])

    assert Mine(0.1, 2, by=3.0).weight_decay == pytest.approx(0.3)


def test_numbers_of_numpy_and_lists_of_toml_are_welcome():
    optimizer = make_optimizer("adam", betas=[0, 0.99], eps=np.float32(1e-6))
    assert optimizer.betas == [0, 0.99]


def test_only_gradient_descent_wants_the_whole_set():
    assert [name for name, cls in OPTIMIZERS.items() if cls.full_batch] == ["gd"]


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_hyperparameters_cannot_change(name):
    optimizer = make_optimizer(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.weight_decay = 0.5
    assert optimizer == make_optimizer(name)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_state_is_zero_and_of_the_shard(name, layout):
    optimizer = make_optimizer(name)
    state = optimizer.init(layout.shard(8, 24))
    assert tuple(state) == optimizer.slots
    assert all(array.shape == (16,) and array.dtype == layout.dtype and not array.any() for array in state.values())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_arrays_of_another_size_are_refused(name, layout):
    optimizer, shard = make_optimizer(name), layout.shard(8, 24)
    state, right, wrong = optimizer.init(shard), np.zeros(16), np.zeros(17)
    with pytest.raises(InputError, match=r"params has the wrong shape; got \(17,\); expected \(16,\)"):
        optimizer.update(wrong, right, state, 0.1, 1, shard)
    with pytest.raises(InputError, match="grads has the wrong shape"):
        optimizer.update(right, wrong, state, 0.1, 1, shard)
    with pytest.raises(InputError, match="steps count from 1; got 0"):
        optimizer.update(right, right, state, 0.1, 0, shard)


def test_lamb_needs_the_norms(layout):
    optimizer, shard = make_optimizer("lamb"), layout.whole()
    state, zeros = optimizer.init(shard), np.zeros(shard.size)
    with pytest.raises(
        InputError, match=r"norms of whole tensors are needed; got None; expected \(7, 2\); call partials"
    ):
        optimizer.update(zeros, zeros, state, 0.1, 1, shard)
    with pytest.raises(InputError, match=r"got \(3, 2\)"):
        optimizer.update(zeros, zeros, state, 0.1, 1, shard, np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"lr": 0.1}, r"schedule cosine: an option is missing; got \['lr'\]; expected \['steps'\]"),
        ("constant", {}, r"schedule constant: an option is missing; got none; expected \['lr'\]"),
        ("constant", {"lr": 0.0}, r"constant: lr is not allowed; got 0.0; expected a number in \(0, inf\)"),
        ("step", {"lr": 0.1, "every": 2.5}, r"got 2.5; expected a whole number in \[1, inf\)"),
        ("step", {"lr": 0.1, "every": 2, "factor": 0.0}, r"expected a number in \(0, 1\]"),
        ("cosine", {"lr": 0.1, "steps": 5, "final": 1.0}, "cosine: final is not allowed"),
        ("cosine", {"lr": 0.1, "steps": 0}, "cosine: steps is not allowed; got 0"),
        ("cosine", {"lr": 0.1, "step": 7}, "unknown option; got step; expected final, lr, steps"),
        ("constant", {"lr": 0.1, "warmup_steps": -1}, "schedule constant: warmup_steps is not allowed; got -1"),
        ("constant", {"lr": 0.1, "warmup_start": 1.0}, "warmup_start is not allowed; got 1.0"),
        ("linear", {"lr": 0.1}, "unknown schedule; got 'linear'; expected constant or cosine or step"),
    ],
)
def test_bad_schedules(name, options, message):
    with pytest.raises(InputError, match=message):
        make_schedule(name, **options)


def test_public_names_are_sorted_and_there():
    names = optim.__all__
    assert sorted(names, key=lambda name: (not name.isupper(), name.islower(), name)) == names
    assert all(hasattr(optim, name) for name in names)


def test_registries_use_the_names_of_their_classes():
    for registry in (OPTIMIZERS, SCHEDULES):
        assert all(cls.name == name for name, cls in registry.items())


def test_a_warm_up_warms_a_schedule_up():
    with pytest.raises(InputError, match=r"^WarmUp: schedule is of another kind; got float: 0.1; expected a Schedule"):
        optim.WarmUp(schedule=0.1, steps=2)


def test_a_choice_is_a_word():
    with pytest.raises(InputError, match=r"^lamb: adapt is not allowed; got array\(\[1, 2\]\); expected '"):
        optim.LAMB(adapt=np.array([1, 2]))
