"""The shipped jobs learn what they should, on two ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import accuracy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("job", "goal"), [("digits_cnn", 0.98), ("digits_mlp", 0.965)])
def test_digits_over_three_seeds(job, goal):
    found = accuracy.over_seeds(job)
    assert np.mean([one["test_accuracy"] for one in found]) >= goal
    assert max(one["seconds"] for one in found) < 60


def test_breast_cancer_in_five_folds():
    assert np.mean([one["test_accuracy"] for one in accuracy.over_folds("breast_cancer")]) >= 0.96


def test_diabetes_is_ridge_regression():
    for seed, found in zip(accuracy.SEEDS, accuracy.over_seeds("diabetes"), strict=True):
        assert found["test_r2"] == pytest.approx(accuracy.ridge(seed), abs=0.02)
