"""Learning rates against closed forms and PyTorch's schedulers."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from mpitrain._errors import InputError
from mpitrain.optim import SCHEDULES, linear_scaling, make_schedule

OPTIONS = {"constant": {}, "step": {"every": 3, "factor": 0.5}, "cosine": {"steps": 10, "final": 0.1}}


def rates(schedule, steps):
    return [schedule(step) for step in range(1, steps + 1)]


def test_constant():
    assert rates(make_schedule("constant", lr=0.3), 5) == [0.3] * 5


def test_step_falls_after_every_few_steps():
    assert rates(make_schedule("step", lr=8.0, every=3, factor=0.5), 8) == [8, 8, 8, 4, 4, 4, 2, 2]


def test_cosine_passes_its_known_points_and_stays_at_the_end():
    schedule = make_schedule("cosine", lr=2.0, steps=6, final=0.25)
    assert schedule(1) == 2.0
    assert schedule(3) == pytest.approx(0.5 + 1.5 * 0.75)
    assert schedule(4) == pytest.approx(1.25)
    assert schedule(7) == schedule(8) == schedule(1000) == 0.5


@pytest.mark.parametrize(("name", "torch_name", "torch_options"), [
    ("cosine", "CosineAnnealingLR", {"T_max": 10, "eta_min": 0.02}),
    ("step", "StepLR", {"step_size": 3, "gamma": 0.5}),
])  # fmt: skip
def test_schedules_equal_torch(name, torch_name, torch_options):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = getattr(torch.optim.lr_scheduler, torch_name)(optimizer, **torch_options)
    expected = []
    for _ in range(11):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates(make_schedule(name, lr=0.2, **OPTIONS[name]), 11), expected, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_warm_up_goes_in_front_of_any(name):
    plain = make_schedule(name, lr=0.8, **OPTIONS[name])
    warm = make_schedule(name, lr=0.8, warmup_steps=4, **OPTIONS[name])
    assert rates(warm, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates(warm, 14)[4:] == rates(plain, 10)


def test_warm_up_may_start_higher():
    """Goyal et al.: from the small batch's rate to k times it."""
    warm = make_schedule("constant", lr=linear_scaling(0.1, 1024, 256), warmup_steps=3, warmup_start=0.25)
    assert rates(warm, 4) == pytest.approx([0.2, 0.3, 0.4, 0.4])


def test_warm_up_equals_torch():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, end_factor=1.0, total_iters=3)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(make_schedule("constant", lr=0.8, warmup_steps=4), 6) == pytest.approx(expected, rel=1e-12)


def test_linear_scaling():
    assert linear_scaling(0.1, 8192, 256) == pytest.approx(3.2)
    assert linear_scaling(0.1, 64, 256) == pytest.approx(0.025)
    with pytest.raises(InputError, match="linear scaling: base_batch is not allowed; got 0"):
        linear_scaling(0.1, 64, 0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_schedules_are_pure(name):
    """Any order of calls, and a copy, give the same rates; the type is a plain float."""
    schedule = make_schedule(name, lr=1, warmup_steps=2, **OPTIONS[name])
    forward = rates(schedule, 20)
    assert [schedule(step) for step in range(20, 0, -1)][::-1] == forward
    assert rates(pickle.loads(pickle.dumps(schedule)), 20) == forward
    assert all(rate > 0 and math.isfinite(rate) for rate in forward)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_steps_count_from_one(name):
    with pytest.raises(InputError, match="steps count from 1; got 0"):
        make_schedule(name, lr=1.0, **OPTIONS[name])(0)
