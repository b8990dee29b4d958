"""A data set: gathering rows, selections that stay on disk, and the check of every value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mpitrain import data
from mpitrain._errors import DataError, InputError
from mpitrain.data import Dataset, Selection
from mpitrain.data import dataset as dataset_module


def table(rows: int = 7, **changes) -> Dataset:
    given = {
        "inputs": np.arange(rows * 3, dtype=np.float64).reshape(rows, 3),
        "targets": np.arange(rows) % 3,
        "task": "classification",
        "name": "sales.npy",
        "feature_names": ("age", "height", "weight"),
    }
    return Dataset(**{**given, **changes})


@dataclass(frozen=True)
class Foreign:
    """An array of another library."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(60, dtype=np.float32).reshape(20, 3))
    inputs = np.load(tmp_path / "x.npy", mmap_mode="r")
    return table(20, inputs=inputs)


def test_rows_come_in_the_order_asked_for_from_memory_maps_too(mapped):
    asked = np.array([19, 0, 7, 7, 3])
    inputs, targets = mapped.rows(asked)
    np.testing.assert_array_equal(inputs, [[57, 58, 59], [0, 1, 2], [21, 22, 23], [21, 22, 23], [9, 10, 11]])
    np.testing.assert_array_equal(targets, [1, 0, 1, 1, 0])
    assert type(inputs) is np.ndarray


def test_no_rows(mapped):
    inputs, targets = mapped.rows(np.array([], np.int64))
    assert inputs.shape == (0, 3)
    assert targets.shape == (0,)


@pytest.mark.parametrize("kind", ["memory", "mapped", "taken"])
@pytest.mark.parametrize("method", ["rows", "take"])
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.arange(20) > 17, r"not numbers of rows; got bool of shape \(20,\); .*; numpy.flatnonzero\(mask\) gives"),
        ([1.0, 2.0], r"not numbers of rows; got float64 of shape \(2,\); expected integers of shape \(k,\)$"),
        (3, r"not numbers of rows; got int64 of shape \(\); expected integers of shape \(k,\)$"),
        ([3, -1], "no such row; got -1; expected 0 to 19"),
        (np.array([3, 20], np.uint64), "no such row; got 20; expected 0 to 19"),
    ],
)
def test_what_are_no_numbers_of_rows(mapped, kind, method, indices, message):
    whole = {"memory": table(20), "mapped": mapped, "taken": mapped.take(np.arange(20))}[kind]
    with pytest.raises(InputError, match=f"^sales.npy: {message}"):
        getattr(whole, method)(indices)


@pytest.mark.parametrize("indices", [[], [4, 2], (4, 2), np.array([4, 2], np.uint64), np.array([4, 2], np.int8)])
def test_numbers_of_rows_may_be_a_list_or_of_any_integers(mapped, indices):
    expected = np.arange(60).reshape(20, 3)[np.array(indices, int)]
    for whole in (table(20), mapped):
        some = whole.take(indices)
        np.testing.assert_array_equal(whole.rows(indices)[0], expected)
        np.testing.assert_array_equal(some.rows(range(len(some)))[0], expected)
        np.testing.assert_array_equal(some.rows([])[0], expected[:0])


def test_rows_that_are_taken_twice_are_no_overlapping_windows():
    assert table().take([3, 3]).overlap == 0


def test_taking_rows_of_a_memory_map_leaves_them_on_disk(mapped):
    some = mapped.take(np.array([4, 2, 9])).take(np.array([2, 0]))
    assert isinstance(some.inputs, Selection)
    assert isinstance(some.inputs.base, np.memmap)
    assert (some.inputs.shape, some.inputs.ndim, len(some.inputs)) == ((2, 3), 2, 2)
    np.testing.assert_array_equal(some.rows(np.array([1, 0]))[0], [[12, 13, 14], [27, 28, 29]])
    np.testing.assert_array_equal(some.inputs[:1], [[27, 28, 29]])
    np.testing.assert_array_equal(np.asarray(some.inputs), [[27, 28, 29], [12, 13, 14]])


def test_taking_rows_in_memory_copies_them():
    whole = table()
    part = whole.take(np.array([2, 1]), name="part")
    assert not np.shares_memory(part.inputs, whole.inputs)
    assert (part.name, len(part), part.sample_shape, part.classes) == ("part", 2, (3,), 3)


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({}, 3),
        ({"class_names": ("a", "b", "c", "d")}, 4),
        ({"targets": np.full(7, 8)}, 9),
        ({"targets": np.full(7, 255, np.uint8)}, 256),
    ],
)
def test_number_of_classes(changes, classes):
    assert table(**changes).classes == table(**changes).outputs == classes


def test_outputs_of_a_regression():
    values = table(task="regression", targets=np.zeros((7, 2)))
    assert values.outputs == 2
    with pytest.raises(InputError, match="a regression has no classes"):
        _ = values.classes


def test_columns(mapped):
    np.testing.assert_array_equal(mapped.column("height"), np.arange(20) * 3 + 1)
    np.testing.assert_array_equal(mapped.column(2), np.arange(20) * 3 + 2)
    np.testing.assert_array_equal(mapped.column(np.int64(2)), np.arange(20) * 3 + 2)
    for strange in (True, np.True_, 3, -1, 1.0):
        with pytest.raises(InputError, match=r"sales.npy: no such feature; got .*; expected a number below 3"):
            mapped.column(strange)
    np.testing.assert_array_equal(mapped.column(), np.arange(20) % 3)
    with pytest.raises(InputError, match=r"sales.npy: no such feature; got 'hight'; expected .*age, height, weight"):
        mapped.column("hight")
    with pytest.raises(InputError, match=r"the targets are not labels; got \(7, 1\)"):
        table(task="regression", targets=np.zeros((7, 1))).column()


def test_good_values_pass():
    table().check()
    table(task="regression", targets=np.zeros((7, 1)), target_names=("price",)).check()
    table(task="sequence", inputs=np.arange(7), targets=np.arange(7), feature_names=()).check()
    table(inputs=np.zeros((7, 3), np.uint8)).check()


def broken_input(value: float) -> np.ndarray:
    inputs = np.zeros((7, 3))
    inputs[5, 1] = value
    return inputs


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_located(value, monkeypatch):
    monkeypatch.setattr(dataset_module, "BLOCK_BYTES", 64)  # two rows a block
    message = rf"sales.npy: row 5 \(counted from 0\), column 'height' is not finite; got {value}; expected a finite"
    with pytest.raises(DataError, match=message):
        table(inputs=broken_input(value)).check()
    table(inputs=broken_input(value)).check(0, 5)
    with pytest.raises(DataError, match="row 5"):
        table(inputs=broken_input(value)).check(5, 7)


def test_a_value_of_an_image_is_located():
    inputs = np.zeros((7, 2, 2, 1), np.float32)
    inputs[3, 1, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"row 3 \(counted from 0\), column 1, 0, 0 is not finite"):
        table(inputs=inputs, feature_names=()).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.array([0, 1, 2, -1, 0, 0, 0])}, r"row 3 .*label out of range; got -1; expected 0 or more"),
        ({"targets": np.arange(7), "class_names": ("a", "b")}, r"row 2 .*label out of range; got 2; expected 0 to 1"),
        ({"targets": np.zeros(7)}, r"labels are not integers; got float64; expected integers .*'regression'"),
        ({"inputs": np.full((7, 3), "x")}, r"inputs are not numbers; got <U1"),
        ({"inputs": np.zeros((7, 3), complex)}, r"inputs are not numbers; got complex128"),
        ({"tokens": True}, r"tokens are not integers; got float64"),
        ({"tokens": True, "inputs": np.full((7, 3), -2)}, r"row 0 .*token out of range; got -2"),
        ({"task": "regression", "targets": broken_input(np.nan)[:, 1:2]}, r"row 5 .*target 0 is not finite"),
        ({"task": "regression", "targets": np.full((7, 1), "x")}, r"targets are not numbers; got <U1"),
        (
            {"task": "sequence", "inputs": np.arange(7), "feature_names": (), "class_names": ("a",) * 5,
             "targets": np.zeros(7, int)},
            r"row 5 .*token out of range; got 5; expected 0 to 4",
        ),
    ],
)  # fmt: skip
def test_values_that_cannot_be_trained_on(changes, message):
    with pytest.raises(DataError, match="sales.npy: " + message):
        table(**changes).check()


def test_an_empty_set():
    with pytest.raises(DataError, match=r"sales.npy: the data set is empty; got 0 rows; expected at least one"):
        table(0).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.zeros(6, int)}, r"inputs and targets differ in length; got shapes \(7, 3\) and \(6,\)"),
        ({"targets": np.zeros((7, 1), int)}, r"targets have the wrong shape; got \(7, 1\); expected \(n,\)"),
        ({"task": "regression"}, r"targets have the wrong shape; got \(7,\); expected \(n, outputs\)"),
        ({"task": "sequence"}, r"targets have the wrong shape; got \(7,\); expected \(7, 3\)"),
        ({"feature_names": ("age",)}, r"feature names do not fit; got 1 names; expected \(7, 3\)"),
        ({"inputs": [[1.0]]}, "inputs are no NumPy array; got list; numpy.asarray gives one"),
        ({"inputs": Foreign((7, 3))}, "inputs are no NumPy array; got Foreign; numpy.asarray gives one"),
        ({"targets": None}, "targets are no NumPy array; got NoneType"),
        ({"task": "clustering"}, r"unknown task; got 'clustering'; expected classification or regression or sequence"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(InputError, match="sales.npy: " + message):
        table(**changes)


def test_checking_and_splitting_a_memory_map_never_holds_it_whole(tmp_path, monkeypatch):
    """A sparse file of 1 GiB, of which no more than a block is read at a time."""
    path = tmp_path / "large.npy"
    inputs = np.lib.format.open_memmap(path, "w+", np.float32, (1 << 14, 1 << 14))
    inputs[-1, -1] = np.nan
    inputs.flush()
    seen = []

    class Spy(np.memmap):
        def __getitem__(self, key):
            found = super().__getitem__(key)
            seen.append(np.asarray(found).nbytes)
            return found

    spied = np.load(path, mmap_mode="r").view(Spy)
    whole = table(1 << 14, inputs=spied, targets=np.arange(1 << 14) % 3, feature_names=())
    part = whole.take(np.arange(1, 1 << 14, 2))
    part.check(0, 100)
    part.rows(np.array([3, 1]))
    with pytest.raises(DataError, match=r"row 8191 .*column 16383 "):
        part.check(8100)
    assert 0 < max(seen) <= dataset_module.BLOCK_BYTES


@pytest.mark.parametrize("names", ["abc", None, 3, (1, 2, 3)], ids=str)
def test_names_are_strings(names):
    for what in ("class_names", "feature_names", "target_names"):
        with pytest.raises(
            DataError, match=rf"^sales.npy: {what} are no names; got .*; expected a sequence of strings$"
        ):
            table(**{what: names})


def test_names_may_be_an_array():
    """As scikit-learn has them."""
    assert table(feature_names=np.array(["a", "b", "c"])).feature_names == ("a", "b", "c")


TAKERS = {
    "loader": lambda rows: data.Loader(rows, 2, seed=0),
    "evaluation": lambda rows: list(data.evaluation_batches(rows, 2)),
    "split": lambda rows: data.split(rows, seed=0),
    "split_end": data.split_end,
    "Standardise.fit": data.Standardise.fit,
    "partition": lambda rows: data.partition("block", rows, 2, seed=0),
    "missing_classes": lambda rows: data.missing_classes(rows, np.zeros(7, int), 2),
}


@pytest.mark.parametrize("taker", TAKERS)
def test_who_takes_a_data_set_takes_no_array(taker):
    with pytest.raises(
        InputError, match=f"^{taker}: dataset is of another kind; got ndarray: .*; expected a Dataset, "
    ):
        TAKERS[taker](np.zeros((7, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rows: list(data.evaluation_batches(rows, 2, -1, 2)), "^evaluation: no such rank; got rank -1 of 2"),
        (lambda rows: list(data.evaluation_batches(rows, 2, 0, -1)), "^evaluation: size is too small; got -1"),
        (
            lambda rows: list(data.evaluation_batches(rows, 2, 0.5, 2)),
            "^evaluation: rank is of another kind; got float",
        ),
        (lambda rows: data.Loader(rows, 2, seed=0, size=None), "^loader: size is not an integer; got None"),
        (lambda rows: data.Loader(rows, 2, seed=0, sampling=[]), r"^unknown sampling; got '?\[\]'?; expected"),
        (lambda rows: data.Loader(rows, 2, seed=0, dtype=None), "^loader: not a dtype; got None; expected float32 or"),
        (lambda rows: data.partition("block", rows, 2.0, seed=0), "^partition: parts is not an integer; got 2.0"),
        (lambda rows: data.missing_classes(rows, np.zeros(7, int), 0), "^missing_classes: parts is too small; got 0"),
        (lambda rows: data.load("digits", 3), "^load: options is of another kind; got int: 3; expected a mapping"),
        (lambda rows: data.load(["digits"]), "^unknown data set; got "),
    ],
)
def test_other_kinds_are_refused_in_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make(table())
