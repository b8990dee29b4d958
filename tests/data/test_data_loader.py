"""The loader: one global batch whatever the layout, and every bad number."""

from __future__ import annotations

import time
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpitrain._errors import DataError, DtypeError, InputError
from mpitrain.arrays import Key
from mpitrain.data import Dataset, Loader, evaluation_batches, partition
from mpitrain.data.partition import by_feature, random

ROWS = 23


def numbered(rows: int = ROWS) -> Dataset:
    """Give rows that hold their own number, so that a batch tells which they are."""
    inputs = np.stack([np.arange(rows), -np.arange(rows)], axis=1).astype(np.float64)
    return Dataset(inputs, np.arange(rows) % 4, "classification", "numbered")


def rows_of(batch) -> list[int]:
    return batch.inputs[:, 0].astype(int).tolist()


def assemble(loaders: list[Loader], step: int) -> list[dict[int, int]]:
    """Return each global microbatch as position → row, put together from the ranks' shares."""
    shares = [loader.batch(step) for loader in loaders]
    found = []
    for parts in zip(*shares, strict=True):
        positions = [int(position) for batch in parts for position in batch.index]
        assert len(set(positions)) == len(positions), "a position is on two ranks"
        found.append(dict(zip(positions, chain(*map(rows_of, parts)), strict=True)))
    return found


@pytest.mark.parametrize("sampling", ["shuffle", "sequential", "importance"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
@pytest.mark.parametrize("owned", [False, True])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(sampling, size, microbatches, owned):
    whole = numbered()
    options = {"seed": 7, "sampling": sampling}
    if sampling == "importance":
        options["sampling_weights"] = np.arange(1, ROWS + 1)
    owner = random(ROWS, size, 1) if owned else None
    serial = Loader(whole, 7, **options)
    layout = {"size": size, "owner": owner, "microbatches": microbatches}
    loaders = [Loader(whole, 7, rank=rank, **layout, **options) for rank in range(size)]
    for step in (0, 3, 5, 8):
        parts = assemble(loaders, step)
        merged = {position: row for part in parts for position, row in part.items()}
        [batch] = serial.batch(step)
        assert [merged[position] for position in range(len(batch))] == rows_of(batch)
        assert batch.index.tolist() == list(range(len(batch)))
        edges = [len(part) for part in parts]
        assert max(edges) - min(edges) <= 1, "global microbatches are near-equal"
        assert [position for part in parts for position in sorted(part)] == list(range(len(batch)))


def test_a_batch_is_what_the_definition_says():
    order = Key(3, "shuffle").at(2).permutation(ROWS)
    loader = Loader(numbered(), 5, seed=3)
    assert loader.steps_per_epoch == 5
    step = 2 * 5 + 1
    assert loader.epoch(step) == 2
    [batch] = loader.batch(step)
    assert rows_of(batch) == order[5:10].tolist()
    np.testing.assert_array_equal(batch.targets, order[5:10] % 4)
    assert batch.weights is None


def test_seven_rows_on_three_ranks():
    shares = [Loader(numbered(7), 7, seed=0, rank=rank, size=3).batch(0)[0] for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2]
    assert [share.index.tolist() for share in shares] == [[0, 1, 2], [3, 4], [5, 6]]


def test_steps_can_be_asked_for_in_any_order():
    loader = Loader(numbered(), 5, seed=0)
    forwards = [rows_of(loader.batch(step)[0]) for step in range(15)]
    backwards = [rows_of(loader.batch(step)[0]) for step in reversed(range(15))]
    assert forwards == backwards[::-1]
    fresh = [rows_of(Loader(numbered(), 5, seed=0).batch(step)[0]) for step in range(15)]
    assert forwards == fresh


def test_batches_do_not_share_memory():
    loader = Loader(numbered(), 5, seed=0)
    first = loader.batch(0)[0]
    before = first.inputs.copy()
    loader.batch(1)
    np.testing.assert_array_equal(first.inputs, before)


@pytest.mark.parametrize(("drop_last", "steps", "sizes"), [(False, 3, [10, 10, 3]), (True, 2, [10, 10])])
def test_every_row_once_an_epoch_in_a_new_order(drop_last, steps, sizes):
    loader = Loader(numbered(), 10, seed=0, drop_last=drop_last)
    assert loader.steps_per_epoch == steps
    epochs = [[rows_of(loader.batch(epoch * steps + k)[0]) for k in range(steps)] for epoch in range(2)]
    assert [len(rows) for rows in epochs[0]] == sizes
    first, second = (list(chain(*epoch)) for epoch in epochs)
    assert len(set(first)) == len(first)
    assert first != second


def test_owners_keep_their_rows_and_may_have_none():
    whole = numbered()
    owner = by_feature(whole.column(), 6)  # four labels: two ranks own nothing
    loaders = [Loader(whole, 4, seed=0, rank=rank, size=6, owner=owner) for rank in range(6)]
    for rank, loader in enumerate(loaders):
        rows = chain(*(rows_of(loader.batch(step)[0]) for step in range(loader.steps_per_epoch)))
        assert sorted(rows) == np.flatnonzero(owner == rank).tolist()
        np.testing.assert_array_equal(loader.shares(), [6, 6, 6, 5, 0, 0])
    empty = loaders[5].batch(0)[0]
    assert empty.inputs.shape == (0, 2)
    assert (empty.inputs.dtype, empty.targets.dtype, empty.index.dtype) == (np.float32, np.int64, np.int64)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_shares_count_what_ranks_get(owned, drop_last):
    whole = numbered()
    owner = partition("weighted", whole, 3, seed=0, options={"capacities": [1, 2, 0]}) if owned else None
    options = {"seed": 0, "size": 3, "owner": owner, "microbatches": 2, "drop_last": drop_last}
    loaders = [Loader(whole, 7, rank=rank, **options) for rank in range(3)]
    for epoch in range(2):
        steps = range(epoch * loaders[0].steps_per_epoch, (epoch + 1) * loaders[0].steps_per_epoch)
        counted = [sum(len(part) for step in steps for part in loader.batch(step)) for loader in loaders]
        assert loaders[0].shares(epoch).tolist() == counted


def test_a_short_last_batch_leaves_ranks_and_microbatches_empty():
    loaders = [Loader(numbered(9), 4, seed=0, rank=rank, size=4, microbatches=2) for rank in range(4)]
    parts = [[len(part) for part in loader.batch(2)] for loader in loaders]
    assert parts == [[1, 0], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes(dtype):
    values = np.arange(10, dtype=np.uint8).reshape(5, 2)
    regression = Dataset(values, values[:, :1], "regression", "set")
    [batch] = Loader(regression, 5, seed=0, dtype=dtype).batch(0)
    assert batch.inputs.dtype == batch.targets.dtype == dtype
    tokens = Dataset(values.astype(np.int32), np.zeros(5, np.uint8), "classification", "set", tokens=True)
    [batch] = Loader(tokens, 5, seed=0, dtype=dtype).batch(0)
    assert batch.inputs.dtype == np.int32
    assert batch.targets.dtype == np.int64


def test_labels_between_integers_are_refused_and_not_cut_off():
    between = Dataset(np.zeros((4, 2)), np.arange(4) + 0.5, "classification", "set")
    for batches in (lambda: Loader(between, 4, seed=0).batch(0), lambda: list(evaluation_batches(between, 4))):
        with pytest.raises(
            DataError, match=r"set: labels are not integers; got float64; .*choose the task 'regression'"
        ):
            batches()


def test_importance_factors_keep_the_mean_unbiased():
    values = np.random.default_rng(0).exponential(size=40)
    whole = Dataset(values[:, None], np.zeros(40, int), "classification", "set")
    weights = values + 0.1
    loader = Loader(whole, 40, seed=0, sampling="importance", sampling_weights=weights, dtype=np.float64)
    means = []
    counts = np.zeros(40)
    for step in range(600):
        [batch] = loader.batch(step)
        means.append(float(np.mean(batch.inputs[:, 0] * batch.weights)))
        counts += np.bincount(loader.order(step), minlength=40)
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - values.mean()) < 4 * error
    assert np.std(means) < 0.5 * values.std() / np.sqrt(40), "weights near the values lower the variance"
    expected = weights / weights.sum() * 600 * 40
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 39 + 5 * np.sqrt(2 * 39)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 3, "size": 4}, r"smaller than the number of ranks; got batch_size 3, 4 ranks; .*to 4 or more"),
        ({"size": 24}, r"loader: more ranks than samples; got 24 ranks, 23 samples; .*start at most 23 ranks"),
        ({"batch_size": 24}, r"does not fit the data set; got batch_size 24 with 23 rows; expected 1 to 23"),
        ({"batch_size": 0}, r"loader: batch_size is too small; got 0; expected at least 1"),
        ({"batch_size": 2.0}, r"loader: batch_size is not an integer; got 2.0"),
        ({"microbatches": 11}, r"cannot be cut; got 11 microbatches of 10 rows; expected 1 to 10"),
        ({"microbatches": 0}, r"loader: microbatches is too small; got 0; expected at least 1"),
        ({"microbatches": 1.0}, r"loader: microbatches is not an integer; got 1.0"),
        ({"rank": 2, "size": 2}, r"no such rank; got rank 2 of 2; expected 0 to 1"),
        ({"rank": -1}, r"no such rank; got rank -1 of 1"),
        ({"owner": np.zeros(5, int)}, r"not one owner for each row; got int64 of shape \(5,\); .*\(23,\)"),
        ({"owner": np.zeros(ROWS)}, r"not one owner for each row; got float64"),
        ({"owner": np.arange(ROWS), "size": 2}, r"a row's owner is no rank; got owners 0 to 22; expected 0 to 1"),
        ({"sampling": "shufle"}, r"unknown sampling; got 'shufle'; .*did you mean \"shuffle\"\?"),
        ({"sampling": "importance"}, r"importance sampling: no weights; expected sampling_weights"),
        ({"sampling_weights": np.ones(ROWS)}, r"sampling_weights are for importance sampling; got sampling 'shuffle'"),
        (
            {"sampling": "importance", "sampling_weights": np.ones(5)},
            r"not one weight for each row; got \(5,\); expected \(23,\)",
        ),
        (
            {"sampling": "importance", "sampling_weights": np.arange(ROWS)},
            r"the weight of row 0 is unusable; got 0.0; expected a positive number",
        ),
    ],
)
def test_bad_numbers(options, message):
    with pytest.raises(InputError, match=message):
        Loader(numbered(), options.pop("batch_size", 10), seed=0, **options)


def test_other_bad_input():
    with pytest.raises(InputError, match="loader: the data set is empty; got 0 rows"):
        Loader(numbered(0), 1, seed=0)
    with pytest.raises(InputError, match="loader: step is too small; got -1; expected at least 0"):
        Loader(numbered(), 10, seed=0).batch(-1)
    with pytest.raises(InputError, match=r"loader: step is not an integer; got 1\.5"):
        Loader(numbered(), 10, seed=0).batch(1.5)
    with pytest.raises(DtypeError, match="loader: models do not compute in this dtype; got int64"):
        Loader(numbered(), 10, seed=0, dtype=np.int64)
    with pytest.raises(InputError, match="evaluation: batch_size is too small; got 0"):
        next(evaluation_batches(numbered(), 0))
    with pytest.raises(InputError, match=r"evaluation: batch_size is not an integer; got 2\.0"):
        next(evaluation_batches(numbered(), 2.0))


@pytest.mark.parametrize("what", ["inputs", "targets"])
def test_values_beyond_the_models_numbers(what):
    given = {"inputs": np.ones((5, 1)), "targets": np.ones((5, 1))}
    given[what][2:4] = [[np.nan], [-1e39]]
    huge = Dataset(**given, task="regression", name="huge")
    with pytest.raises(DataError, match=r"loader: huge: a value is too large for float32; got -1e\+39"):
        Loader(huge, 5, seed=0).batch(0)
    [batch] = Loader(huge, 5, seed=0, dtype=np.float64).batch(0)
    assert np.nanmin(getattr(batch, what)) == -1e39


@given(rows=st.integers(0, 30), batch_size=st.integers(1, 12), size=st.integers(1, 6))
def test_evaluation_takes_every_row_once_in_as_many_batches_on_every_rank(rows, batch_size, size):
    whole = numbered(rows)
    batches = [list(evaluation_batches(whole, batch_size, rank, size)) for rank in range(size)]
    assert {len(found) for found in batches} == {-(-rows // batch_size)}
    seen = [row for found in batches for batch in found for row in rows_of(batch)]
    numbers = [int(row) for found in batches for batch in found for row in batch.index]
    assert seen == numbers
    assert sorted(seen) == list(range(rows))


def test_a_batch_of_digits_takes_less_than_a_tenth_of_a_millisecond():
    images = Dataset(np.zeros((1438, 8, 8, 1), np.float32), np.zeros(1438, int), "classification", "images")
    loader = Loader(images, 64, seed=0)
    times = []
    for step in range(20):
        start = time.perf_counter()
        loader.batch(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 100e-6
