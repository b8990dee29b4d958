"""Losses: closed forms, extreme logits, metrics against scikit-learn, and bad targets."""

import numpy as np
import pytest
from sklearn import metrics as reference

from mpitrain import nn
from mpitrain._errors import DataError
from mpitrain.arrays import Batch


def _batch(targets, weights=None):
    targets = np.asarray(targets)
    return Batch(np.zeros((len(targets), 1)), targets, np.arange(len(targets)), weights)


def _value(loss, outputs, targets, weights=None):
    value, context = loss.forward(np.asarray(outputs), _batch(targets, weights), nn.Pool())
    return value, loss.backward(context)


def test_equal_logits_cost_log_k():
    value, gradient = _value(nn.CrossEntropy(), np.zeros((2, 5)), [1, 4])
    assert value == pytest.approx(2 * np.log(5), rel=1e-15)
    np.testing.assert_allclose(gradient[0], [0.2, -0.8, 0.2, 0.2, 0.2], rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_logits_do_not_overflow(dtype):
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype)
    value, gradient = _value(nn.CrossEntropy(), logits, [0, 1])
    assert value == 2e4
    np.testing.assert_array_equal(gradient, [[0, 0], [1, -1]])
    value, gradient = _value(nn.BinaryCrossEntropy(), np.array([[1e4], [1e4], [-1e4]], dtype), [1, 0, 0])
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[0], [1], [0]])
    assert gradient.dtype == dtype


def test_mean_squared_error_is_the_mean_over_outputs():
    value, gradient = _value(nn.MeanSquaredError(), [[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 0.0]])
    assert value == 2.5 + 4.5
    np.testing.assert_array_equal(gradient, [[1.0, 2.0], [-3.0, 0.0]])


def test_weights_scale_losses_and_not_the_count():
    loss, targets, weights = nn.MeanSquaredError(), np.array([0.0, 0.0]), np.array([2.0, 0.0])
    value, gradient = _value(loss, [[3.0], [5.0]], targets, weights)
    assert value == 18.0
    np.testing.assert_array_equal(gradient, [[12.0], [0.0]])
    assert loss.count(_batch(targets, weights)) == 2.0


def test_tokens_count_one_by_one():
    labels = np.zeros((3, 4), np.int64)
    assert nn.CrossEntropy().count(_batch(labels)) == 12.0
    value, _ = _value(nn.CrossEntropy(), np.zeros((3, 4, 2)), labels)
    assert value == pytest.approx(12 * np.log(2))


def _in_parts(loss, outputs, targets, cuts=(2, 2, 7)):
    """Sums of uneven parts, an empty one among them, added as the methods add them."""
    parts = [loss.sums(o, _batch(t)) for o, t in zip(np.split(outputs, cuts), np.split(targets, cuts), strict=True)]
    for part in parts:
        assert {name: (v.shape, v.dtype) for name, v in part.items()} == {
            name: (v.shape, np.dtype("f8")) for name, v in parts[0].items()
        }
    return loss.metrics({name: sum(part[name] for part in parts) for name in parts[0]})


def test_classification_metrics():
    random = np.random.default_rng(0)
    outputs, labels = random.standard_normal((20, 3)), random.integers(0, 3, 20)
    found = _in_parts(nn.CrossEntropy(), outputs, labels)
    predicted = outputs.argmax(axis=1)
    probabilities = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    assert found["loss"] == pytest.approx(reference.log_loss(labels, probabilities), rel=1e-12)
    assert found["accuracy"] == reference.accuracy_score(labels, predicted)
    np.testing.assert_array_equal(found["confusion"], reference.confusion_matrix(labels, predicted))
    assert found["confusion"].dtype == np.int64


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_bits_are_the_loss_to_the_base_of_two(unit):
    found = _in_parts(nn.CrossEntropy(unit=unit), np.zeros((9, 5, 8)), np.zeros((9, 5), int))
    assert found[f"bits_per_{unit}"] == pytest.approx(3.0, rel=1e-12)
    assert set(found) == {"loss", "accuracy", "confusion", f"bits_per_{unit}"}


def test_large_vocabulary_has_no_confusion_matrix():
    found = _in_parts(nn.CrossEntropy(), np.eye(10, 2000), np.arange(10))
    assert set(found) == {"loss", "accuracy"}
    assert found["accuracy"] == 1.0


def test_binary_metrics():
    random = np.random.default_rng(1)
    outputs, truth = random.standard_normal((20, 1)), random.integers(0, 2, 20)
    found = _in_parts(nn.BinaryCrossEntropy(), outputs, truth)
    predicted = outputs[:, 0] > 0
    assert found["loss"] == pytest.approx(reference.log_loss(truth, 1 / (1 + np.exp(-outputs[:, 0]))), rel=1e-12)
    assert found["accuracy"] == reference.accuracy_score(truth, predicted)
    np.testing.assert_array_equal(found["confusion"], reference.confusion_matrix(truth, predicted))


@pytest.mark.parametrize("offset", [0.0, 150.0])
def test_regression_metrics(offset):
    random = np.random.default_rng(2)
    truth = offset + random.standard_normal((20, 2)) * [1.0, 5.0]
    outputs = truth + random.standard_normal((20, 2))
    found = _in_parts(nn.MeanSquaredError(), outputs, truth)
    assert found["r2"] == pytest.approx(reference.r2_score(truth, outputs), rel=1e-9)
    assert found["rmse"] == pytest.approx(np.sqrt(reference.mean_squared_error(truth, outputs)), rel=1e-12)
    assert found["loss"] == pytest.approx(reference.mean_squared_error(truth, outputs), rel=1e-12)


def test_constant_target_scores_as_in_scikit_learn():
    truth = np.full((12, 1), 2.0)
    for outputs in (truth, truth + 1.0):
        assert _in_parts(nn.MeanSquaredError(), outputs, truth)["r2"] == reference.r2_score(truth, outputs)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropy(), np.zeros(0, np.int64)),
        (nn.BinaryCrossEntropy(), np.zeros((0, 2))),
        (nn.MeanSquaredError(), np.zeros((0, 2))),
    ],
)
def test_no_samples_give_nan(loss, targets):
    found = loss.metrics(loss.sums(np.zeros((0, 2)), _batch(targets)))
    assert all(np.isnan(value) for name, value in found.items() if name != "confusion")


CE, BCE, MSE = nn.CrossEntropy(), nn.BinaryCrossEntropy(), nn.MeanSquaredError()


@pytest.mark.parametrize(
    ("loss", "shape", "targets", "message"),
    [
        (
            CE,
            (3, 4),
            [0, 4, 1],
            "label at position 1 is out of range; got 4; expected 0 to 3 for the model's 4 outputs",
        ),
        (CE, (3, 4), [0, 3, -1], "label at position 2 is out of range; got -1; expected 0 to 3"),
        (CE, (1, 2, 4), [[0, 7]], r"label at position \(0, 1\) is out of range; got 7"),
        (CE, (3, 4), [0.0, 1.0, 2.0], "labels are not integers; got float64"),
        (
            CE,
            (3, 4),
            [[0], [1], [2]],
            r"got labels of shape \(3, 1\) for outputs of shape \(3, 4\); expected .* \(3,\)",
        ),
        (BCE, (3, 1), [0, 1, 2], "target at position 2 is wrong; got 2; expected 0 or 1"),
        (BCE, (2, 1), [0.0, np.nan], "target at position 1 is wrong; got nan"),
        (BCE, (3, 2), [0, 1, 1], r"bce: the targets do not fit .* got targets of shape \(3,\) for outputs of shape"),
        (MSE, (3, 2), [[0.0], [1.0], [1.0]], r"mse: the targets do not fit .* expected targets of shape \(3, 2\)"),
    ],
)
def test_bad_targets_are_named(loss, shape, targets, message):
    with pytest.raises(DataError, match=message):
        loss.check(shape, np.asarray(targets))
    with pytest.raises(DataError, match=message):
        _value(loss, np.zeros(shape), targets)


def test_wrong_number_of_weights_is_named():
    with pytest.raises(DataError, match=r"not one weight a sample; got \(2, 1\); expected \(2,\)"):
        _value(MSE, [[1.0], [2.0]], [0.0, 0.0], np.ones((2, 1)))
