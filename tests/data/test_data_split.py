"""Splits, folds and standardisation, against their definitions and scikit-learn."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest

from mpitrain._errors import DataError, InputError
from mpitrain.data import Dataset, Standardise, folds, split, split_end
from mpitrain.data import dataset as dataset_module
from mpitrain.data.windows import windows


def labelled(counts: tuple[int, ...], seed: int = 0) -> Dataset:
    """Give rows whose only feature is their number, with so many of each label, in random order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    return Dataset(np.arange(len(labels), dtype=float)[:, None], labels, "classification", "set")


def measured(rows: int, offset: float = 0.0) -> Dataset:
    values = np.random.default_rng(1).normal(offset, 3.0, (rows, 4))
    return Dataset(values, values[:, :1] * 2 + 5, "regression", "set")


def numbers(dataset: Dataset) -> list[int]:
    return dataset.inputs[:, 0].astype(int).tolist()


@pytest.mark.parametrize("counts", [(50, 30, 20), (7, 5, 3), (100, 2)])
@pytest.mark.parametrize("test", [0.2, 0.33, 0.5])
def test_a_stratified_split_keeps_proportions_and_every_row(counts, test):
    whole = labelled(counts)
    train, held_out = split(whole, test, seed=3)
    assert sorted(numbers(train) + numbers(held_out)) == list(range(sum(counts)))
    assert len(held_out) == round(test * sum(counts))
    found = np.bincount(held_out.targets, minlength=len(counts))
    assert (np.abs(found - test * np.array(counts)) <= 1).all()
    np.testing.assert_array_equal(train.targets, whole.targets[numbers(train)])


def test_proportions_as_scikit_learn_splits_digits():
    selection = pytest.importorskip("sklearn.model_selection")
    from mpitrain.data import load

    whole = load("digits")
    _, held_out = split(whole, 0.2, seed=0)
    _, reference = selection.train_test_split(whole.targets, test_size=0.2, stratify=whole.targets, random_state=0)
    difference = np.bincount(held_out.targets) - np.bincount(reference)
    assert np.abs(difference).max() <= 1


def test_a_split_depends_on_the_seed_alone():
    whole = labelled((50, 30, 20))
    first, again, other = (split(whole, seed=seed)[1] for seed in (0, 0, 1))
    assert numbers(first) == numbers(again)
    assert numbers(first) != numbers(other)


def test_a_split_that_is_not_stratified():
    train, held_out = split(measured(10), 0.3, seed=0)
    assert (len(train), len(held_out)) == (7, 3)
    chosen = [numbers(split(labelled((20, 20)), 0.5, seed=seed, stratified=False)[1]) for seed in range(200)]
    frequency = np.bincount(np.concatenate(chosen), minlength=40) / 200
    assert np.abs(frequency - 0.5).max() < 5 * np.sqrt(0.25 / 200)  # five standard deviations of a coin


def test_a_memory_mapped_split_stays_on_disk(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20.0)[:, None])
    inputs = np.load(tmp_path / "x.npy", mmap_mode="r")
    train, held_out = split(Dataset(inputs, np.arange(20) % 2, "classification", "set"), seed=0)
    assert isinstance(train.inputs.base, np.memmap)
    assert isinstance(held_out.inputs.base, np.memmap)
    gathered = np.concatenate([train.rows(np.arange(16))[0], held_out.rows(np.arange(4))[0]])
    assert sorted(gathered[:, 0]) == list(range(20))


@pytest.mark.parametrize("test", [0.0, 1.0, -0.1, 1.5, 0.01, 0.99, float("nan"), "0.2"])
def test_a_split_with_an_empty_side(test):
    with pytest.raises(InputError, match=rf"split: one side would be empty; got test = {test!r} of 10 rows"):
        split(measured(10), test, seed=0)


def test_a_class_of_one_row_cannot_be_stratified():
    message = "set: class 1 has too few rows.*got 1 row; .*split with stratified = false or, .* task = .regression"
    with pytest.raises(DataError, match=message):
        split(labelled((9, 1)), seed=0)
    assert len(split(labelled((9, 1)), seed=0, stratified=False)[0]) == 8
    with pytest.raises(InputError, match="set: only a classification can be stratified; got regression"):
        split(measured(10), seed=0, stratified=True)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("stratified", [None, False])
def test_folds_cover_every_row_once(k, stratified):
    whole = labelled((11, 6, 4))
    pairs = list(folds(whole, k, seed=5, stratified=stratified))
    assert len(pairs) == k
    assert sorted(chain(*(numbers(held_out) for _, held_out in pairs))) == list(range(21))
    for train, held_out in pairs:
        assert sorted(numbers(train) + numbers(held_out)) == list(range(21))
    sizes = [len(held_out) for _, held_out in pairs]
    assert max(sizes) - min(sizes) <= 1
    if stratified is None:
        counts = np.array([np.bincount(held_out.targets, minlength=3) for _, held_out in pairs])
        assert (np.ptp(counts, axis=0) <= 1).all()


@pytest.mark.parametrize("k", [1, 0, 11, 2.5])
def test_a_number_of_folds_that_cannot_be(k):
    with pytest.raises(InputError, match=rf"folds: number of folds out of range; got {k}; expected 2 to .*10"):
        folds(measured(10), k, seed=0)


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_standardisation_equals_scikit_learns(block_bytes, monkeypatch):
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", block_bytes)
    train, test = split(measured(50, offset=1e6), seed=0)
    reference = preprocessing.StandardScaler().fit(train.inputs)
    standardise = Standardise.fit(train, targets=True)
    for part in (train, test):
        np.testing.assert_allclose(standardise(part).inputs, reference.transform(part.inputs), atol=1e-9)
        np.testing.assert_allclose(standardise.targets.undo(standardise(part).targets), part.targets, rtol=1e-14)
    np.testing.assert_allclose(standardise(train).targets.std(), 1, rtol=1e-12)


@pytest.mark.parametrize("value", [7.0, 0.1, np.float32(0.1), 1e-30, 1e308, 2**53 + 1, np.uint8(200)])
@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 20])
def test_constant_columns_become_zero_and_targets_stay(value, block_bytes, monkeypatch):
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", block_bytes)
    whole = Dataset(np.full((1000, 2), value), np.arange(1000.0)[:, None], "regression", "set")
    standardise = Standardise.fit(whole)
    np.testing.assert_array_equal(standardise.inputs.mean, [float(value)] * 2)
    np.testing.assert_array_equal(standardise.inputs.scale, [1, 1])
    np.testing.assert_array_equal(standardise(whole).inputs, np.zeros((1000, 2)))
    other = Dataset(np.full((1, 2), 0.2), np.zeros((1, 1)), "regression", "set")
    np.testing.assert_array_equal(standardise(other).inputs, [[0.2 - float(value)] * 2])
    assert standardise(whole).targets is whole.targets


def test_small_integers_are_measured_as_they_are():
    whole = Dataset(np.array([[200], [0], [100]], np.uint8), np.zeros((3, 1)), "regression", "set")
    scaling = Standardise.fit(whole).inputs
    np.testing.assert_array_equal(scaling.mean, [100])
    np.testing.assert_allclose(scaling.scale, [np.sqrt(20_000 / 3)], rtol=1e-15)


@pytest.mark.parametrize(
    ("fitted", "given", "message"),
    [
        ((5, 1), (5, 2), r"got \(2,\); expected \(1,\)"),
        ((5, 2, 2, 1), (5, 4), r"got \(4,\); expected \(2, 2, 1\)"),
    ],
)
def test_samples_of_another_shape_are_not_standardised(fitted, given, message):
    fit, other = (Dataset(np.ones(shape), np.zeros((5, 1)), "regression", "set") for shape in (fitted, given))
    with pytest.raises(InputError, match="standardise: the samples have another shape .* measured; " + message):
        Standardise.fit(fit)(other)
    scaling = Standardise.fit(fit, targets=True)
    with pytest.raises(InputError, match=r"standardise: .*; got \(3,\); expected \(1,\)"):
        scaling(Dataset(fit.inputs, np.zeros((5, 3)), "regression", "set"))


def test_what_cannot_be_standardised():
    tokens = Dataset(np.arange(5), np.arange(5), "sequence", "text")
    with pytest.raises(InputError, match="text: tokens cannot be standardised"):
        Standardise.fit(tokens)
    with pytest.raises(InputError, match="set: labels cannot be standardised; got classification"):
        Standardise.fit(labelled((3, 3)), targets=True)
    with pytest.raises(InputError, match="set: no rows to standardise by"):
        Standardise.fit(measured(0))


def test_the_end_is_held_out():
    train, test = split_end(labelled((7, 3)), 0.2)
    assert (numbers(train), numbers(test)) == ([*range(8)], [8, 9])


@pytest.mark.parametrize(("context", "stride"), [(4, 1), (4, 2), (4, 3), (4, 4), (4, 9), (1, 1), (1, 2)])
@pytest.mark.parametrize("mapped", [False, True])
def test_windows_held_out_at_the_end_share_no_prediction(tmp_path, context, stride, mapped):
    tokens = np.arange(100)
    if mapped:
        np.save(tmp_path / "tokens.npy", tokens)
        tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    whole = windows(tokens, "text", context, stride, [str(i) for i in range(100)])
    train, test = split_end(whole, 0.3)
    trained, predicted = np.unique(train.rows(np.arange(len(train)))[1]), test.rows(np.arange(len(test)))[1].ravel()
    assert len(np.unique(predicted)) == len(predicted)
    assert trained.max() < predicted.min()
    assert predicted.min() - trained.max() <= context + stride  # nothing is left out but what both sides would share
    assert 70 - context <= predicted.min() <= 70 + context + stride
    again, valid = split_end(train, 0.3)
    assert again.rows(np.arange(len(again)))[1].max() < valid.rows(np.arange(len(valid)))[1].min()


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_few_rows_cover_overlapping_windows(stride):
    whole = windows(np.arange(98), "text", 4, stride, [str(i) for i in range(98)])
    few = whole.cover()
    np.testing.assert_array_equal(np.unique(few.inputs), np.unique(whole.inputs))
    assert len(few) <= 98 / min(3, stride * max(1, whole.overlap)) + 2
    assert few.overlap == 0


@pytest.mark.parametrize(
    ("taken", "overlap"),
    [(range(94), 3), ([0, 1, 5, 6, 7], 2), (range(0, 94, 3), 1), (range(0, 94, 4), 0), ([2, 9, 1], 2), ([9, 1], 0)],
)
def test_rows_that_were_taken_overlap_as_they_did(taken, overlap):
    whole = windows(np.arange(98), "text", 4, 1, [str(i) for i in range(98)])
    some = whole.take(taken)
    assert some.overlap == overlap
    shared = [i for i, j in combinations(range(len(some)), 2) if np.intersect1d(some.inputs[i], some.inputs[j]).size]
    assert max(np.bincount(shared), default=0) <= overlap
    if overlap:
        with pytest.raises(InputError, match="the rows overlap"):
            split(some, seed=0)
    else:
        assert len(split(some, 0.5, seed=0)[0]) == len(some) // 2


@pytest.mark.parametrize("taken", [[0, 1, 5, 6, 7, 30, 31, 60], [2, 9, 1, 50], range(0, 90, 2)])
def test_taken_rows_are_covered_whole(taken):
    some = windows(np.arange(98), "text", 4, 1, []).take(taken)
    np.testing.assert_array_equal(np.unique(some.cover().inputs), np.unique(some.inputs))
    assert some.classes == max(taken) + 5


def test_the_end_of_taken_rows_shares_no_prediction():
    whole = windows(np.arange(98), "text", 4, 1, [str(i) for i in range(98)])
    train, test = split_end(whole.take(np.flatnonzero(np.arange(94) % 5 < 3)), 0.3)
    predicted = test.rows(np.arange(len(test)))[1].ravel()
    assert len(np.unique(predicted)) == len(predicted)
    assert np.max(train.targets) < predicted.min()
    with pytest.raises(InputError, match=r"one side would be empty; .*; 93 rows are left out, as they may share"):
        split_end(whole.take(np.arange(94)[::-1]), 0.3)


def test_random_rows_of_overlapping_windows_are_not_held_out():
    whole = windows(np.arange(98), "text", 4, 2, [str(i) for i in range(98)])
    for cut in (split, folds):
        with pytest.raises(InputError, match=r"text: the rows overlap.* hold out rows at the end"):
            cut(whole, seed=0)


@pytest.mark.parametrize(("test", "context"), [(0.0, 1), (1.0, 1), (0.001, 1), (0.5, 60)])
def test_an_end_that_is_everything_or_nothing(test, context):
    with pytest.raises(InputError, match="one side would be empty; got test = "):
        split_end(windows(np.arange(98), "text", context, 1, [str(i) for i in range(98)]), test)
