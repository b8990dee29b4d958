"""Every source of data, against scikit-learn or values written by hand, and every malformed file."""

from __future__ import annotations

import os
import sys
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpitrain._errors import DataError, InputError, MissingExtraError
from mpitrain.data import DATASETS, Tokenizer, load, read_inputs

INPUTS = np.arange(24, dtype=np.float32).reshape(8, 3)
LABELS = np.arange(8) % 2


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    reference = datasets.load_digits()
    images, flat = load("digits"), load("digits", {"flat": True})
    np.testing.assert_array_equal(images.inputs[..., 0] * 16, reference.images)
    np.testing.assert_array_equal(flat.inputs * 16, reference.data)
    np.testing.assert_array_equal(images.targets, reference.target)
    assert images.inputs.dtype == np.float32
    assert (images.sample_shape, flat.sample_shape, images.classes) == ((8, 8, 1), (64,), 10)


@pytest.mark.parametrize("name", ["breast_cancer", "wine"])
def test_tables_of_scikit_learn(name):
    datasets = pytest.importorskip("sklearn.datasets")
    reference = getattr(datasets, f"load_{name}")()
    found = load(name)
    np.testing.assert_array_equal(found.inputs, reference.data)
    np.testing.assert_array_equal(found.targets, reference.target)
    assert found.feature_names == tuple(reference.feature_names)
    assert found.class_names == tuple(reference.target_names)


def test_diabetes_is_in_its_own_units():
    datasets = pytest.importorskip("sklearn.datasets")
    reference = datasets.load_diabetes(scaled=False)
    found = load("diabetes")
    np.testing.assert_array_equal(found.inputs, reference.data)
    np.testing.assert_array_equal(found.targets[:, 0], reference.target)
    assert (found.task, found.outputs) == ("regression", 1)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"'wine' comes with scikit-learn.*pip install 'mpitrain\[datasets\]'"):
        load("wine")


def test_unknown_names_and_options():
    with pytest.raises(InputError, match=r"unknown data set; got 'digit'; expected .*; did you mean \"digits\"\?"):
        load("digit")
    with pytest.raises(InputError, match=r"data set 'digits': unknown option; got 'flatt'.*did you mean \"flat\"\?"):
        load("digits", {"flatt": True})
    with pytest.raises(InputError, match=r"data set 'wine': unknown option; got 'flat'; expected none"):
        load("wine", {"flat": True})
    with pytest.raises(InputError, match="data set 'npy': the option 'targets' is missing"):
        load("npy", {"inputs": "x.npy"})
    assert sorted(DATASETS) == list(DATASETS)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digits", {"flat": "yes"}, r"data set 'digits': the option 'flat' is unusable; got 'yes'; .*valid boolean"),
        ("text", {"path": 5}, r"the option 'path' is unusable; got 5; expected .*valid string"),
        ("text", {"path": "a", "context": "3"}, r"the option 'context' is unusable; got '3'; .*valid integer"),
        ("text", {"path": "a", "unit": "word"}, r"the option 'unit' is unusable; .*'character' or 'byte'"),
        ("csv", {"path": "a", "target": 1.5}, r"the option 'target' is unusable; got 1.5; expected .*valid string"),
        ("npz", {"path": "a", "task": "clustering"}, r"the option 'task' is unusable; .*'regression' or 'sequence'"),
    ],
)
def test_options_of_the_wrong_type(name, options, message):
    with pytest.raises(InputError, match=message):
        load(name, options)


# --- NumPy's files ---


def npy_pair(folder, inputs=INPUTS, targets=LABELS) -> dict[str, str]:
    np.save(folder / "x.npy", inputs)
    np.save(folder / "y.npy", targets)
    return {"inputs": str(folder / "x.npy"), "targets": str(folder / "y.npy")}


def test_npy_is_memory_mapped(tmp_path):
    found = load("npy", npy_pair(tmp_path))
    assert isinstance(found.inputs, np.memmap)
    np.testing.assert_array_equal(found.inputs, INPUTS)
    np.testing.assert_array_equal(found.targets, LABELS)


def test_npy_regression_takes_one_dimensional_targets(tmp_path):
    found = load("npy", {**npy_pair(tmp_path), "task": "regression"})
    np.testing.assert_array_equal(found.targets, LABELS[:, None])


@pytest.mark.parametrize(("save", "mapped"), [(np.savez, True), (np.savez_compressed, False)])
@pytest.mark.parametrize("inputs", [INPUTS, np.asfortranarray(INPUTS), INPUTS[:, ::2]], ids=["C", "F", "strided"])
def test_npz(tmp_path, save, mapped, inputs):
    path = str(tmp_path / "set.npz")
    save(path, inputs=inputs, labels=LABELS)
    found = load("npz", {"path": path, "targets": "labels"})
    assert isinstance(found.inputs, np.memmap) is mapped
    np.testing.assert_array_equal(found.inputs, inputs)
    np.testing.assert_array_equal(found.targets, LABELS)


def test_npz_without_the_array(tmp_path):
    np.savez(tmp_path / "set.npz", x=INPUTS, y=LABELS)
    with pytest.raises(DataError, match=r"set.npz: no array 'inputs' in the archive; got x, y; expected inputs"):
        load("npz", {"path": str(tmp_path / "set.npz")})


def test_pickled_objects_are_refused(tmp_path):
    objects = np.array([{"a": 1}], object)
    with pytest.raises(DataError, match=r"x.npy: holds Python objects, which are not read"):
        load("npy", npy_pair(tmp_path, objects))
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "set.npz", inputs=objects, targets=LABELS[:1])
        with pytest.raises(DataError, match=r"set.npz: (holds Python objects|cannot be read; got Object arrays)"):
            load("npz", {"path": str(tmp_path / "set.npz")})


def test_labels_out_of_range_in_a_file(tmp_path):
    with pytest.raises(DataError, match=r"x.npy: row 2 .*label out of range; got -3; expected 0 or more"):
        load("npy", npy_pair(tmp_path, targets=np.array([0, 1, -3, 1, 0, 1, 0, 1])))


def test_values_are_checked_unless_told_not_to(tmp_path):
    options = npy_pair(tmp_path, np.full((8, 3), np.nan))
    with pytest.raises(DataError, match=r"x.npy: row 0 \(counted from 0\), column 0 is not finite"):
        load("npy", options)
    assert len(load("npy", options, check=False)) == 8


def test_an_empty_array(tmp_path):
    with pytest.raises(DataError, match=r"x\.npy: .*empty"):
        load("npy", npy_pair(tmp_path, np.zeros((0, 3)), np.zeros(0, int)))


@pytest.mark.parametrize("cut", [0, 3, 20, 100, 150])
def test_truncated_npy(tmp_path, cut):
    options = npy_pair(tmp_path)
    os.truncate(options["inputs"], cut)
    with pytest.raises(DataError, match=r"x.npy: cannot be read; got .+; expected an array of numbers"):
        load("npy", options)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 127), byte=st.integers(0, 255))
def test_a_damaged_header_is_a_clear_error_or_an_array(tmp_path, place, byte):
    options = npy_pair(tmp_path)
    with open(options["inputs"], "r+b") as file:
        file.seek(place)
        file.write(bytes([byte]))
    with suppress(DataError):  # and nothing else
        load("npy", options)


# --- Missing and unreadable files ---


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("csv", {"path": "absent"}, "delimited text in UTF-8"),
        ("npz", {"path": "absent"}, "an archive of arrays as numpy.savez writes it"),
        ("npy", {"inputs": "absent", "targets": "absent"}, "an array of numbers as numpy.save writes it"),
        ("text", {"path": "absent"}, "text in UTF-8"),
    ],
)
def test_a_missing_file(name, options, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"absent: no such file; expected {expected}; the current directory is"):
        load(name, options)
    (tmp_path / "absent").mkdir()
    with pytest.raises(DataError, match=f"absent: not a file; expected {expected}"):
        load(name, options)


def test_a_file_that_may_not_be_read(write, monkeypatch):
    path = write("a.txt", "abc")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # file modes do not stop root
    with pytest.raises(DataError, match=r"a.txt: permission denied; expected a readable file with text in UTF-8"):
        load("text", {"path": path})


# --- CSV ---


def test_csv_with_label_strings(write):
    path = write("iris.csv", "\ufeffwidth,kind,length\n1.5,setosa,2\n\n3,rosea,4e1\n5,setosa,-6\n")
    found = load("csv", {"path": path, "target": "kind"})
    np.testing.assert_array_equal(found.inputs, [[1.5, 2], [3, 40], [5, -6]])
    np.testing.assert_array_equal(found.targets, [1, 0, 1])
    assert (found.class_names, found.feature_names) == (("rosea", "setosa"), ("width", "length"))


def test_csv_labels_that_are_integers_are_sorted_by_value(write):
    found = load("csv", {"path": write("a.csv", "1;10\n2;9\n3;-1\n"), "header": False, "delimiter": ";"})
    np.testing.assert_array_equal(found.targets, [2, 1, 0])
    assert (found.class_names, found.feature_names) == (("-1", "9", "10"), ("0",))


def test_csv_labels_are_numbered_alike_in_every_process(write):
    path = write("a.csv", "".join(f"{i},{label}\n" for i, label in enumerate(["1", "01", "+1", "001", "0", "1"])))
    found = load("csv", {"path": path, "header": False})
    assert found.class_names == ("0", "+1", "001", "01", "1")
    strange = load("csv", {"path": write("b.csv", "x,y\n1,+-2\n2,3\n")})
    assert strange.class_names == ("+-2", "3")


def test_csv_of_two_files_with_the_same_classes(write):
    train = load("csv", {"path": write("train.csv", "x,y\n1,cat\n2,dog\n3,emu\n")})
    path = write("test.csv", "x,y\n1,emu\n2,dog\n")
    test = load("csv", {"path": path, "classes": train.class_names})
    assert (test.targets.tolist(), test.classes, test.class_names) == ([2, 1], 3, ("cat", "dog", "emu"))
    assert load("csv", {"path": path, "classes": ["emu", "dog"]}).targets.tolist() == [0, 1]
    assert load("csv", {"path": path}).targets.tolist() == [1, 0]


def test_csv_columns_named_by_their_numbers(write):
    assert len(load("csv", {"path": write("a.csv", "0,1\n5,a\n6,b\n")})) == 2


def test_csv_regression_with_several_targets(write):
    path = write("a.csv", "x,y,z\n1,2,3\n4,5,6\n")
    found = load("csv", {"path": path, "target": ["z", 0], "task": "regression"})
    np.testing.assert_array_equal(found.inputs, [[2], [5]])
    np.testing.assert_array_equal(found.targets, [[3, 1], [6, 4]])
    assert found.target_names == ("z", "x")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("x,y\n1,a\n?,b\n", {}, r"line 3, column 'x' is not a number; got '\?'; expected a number"),
        ("x,y\n1,a\n,b\n", {}, r"line 3, column 'x' is not a number; got ''"),
        ("x,y\n1,a\nnan,b\n", {}, r"row 1 \(counted from 0\), column 'x' is not finite; got nan"),
        ("x,y\n1,a\n2,\n", {}, r"line 3, column 'y': the label is missing"),
        ("x,y\n1,a\n2,b\n", {"target": "z"}, r"no such column; got 'z'; expected a number below 2 or one of x, y"),
        ("x,y\n1,a\n2,b\n", {"target": 2}, r"no such column; got 2"),
        ("x,y\n1,a\n2,b\n", {"target": ["x", "y"]}, r"a classification has one target column"),
        ("x,y\n1,a\n2\n", {}, r"line 3 has another length; got 1 cells; expected 2"),
        ("x,x\n1,a\n", {}, r"two columns have one name; got 'x'"),
        ("1.5,2\n2,1\n", {}, r"the header has numbers for names; got 1.5, 2; set header = false"),
        ("x,y\n", {}, r"no rows; got 1 lines"),
        ("", {"header": False}, r"no rows; got 0 lines"),
        ('x,y\n1,"a\n', {}, r"cannot be read; got unexpected end of data; expected delimited text in UTF-8"),
        (b"x,y\n1,\xff\n", {}, r"cannot be read; got 'utf-8' codec can't decode .*; expected delimited text in UTF-8"),
        ("x,y\n1,a\n2,b\n", {"task": "regression"}, r"line 2, column 'y' is not a number; got 'a'"),
        ("x,y\n1,a\n1_000,b\n", {}, r"line 3, column 'x' is not a number; got '1_000'"),
        ("x;y\n1;a\n2;b\n", {}, r"no column is left for features; got 'x;y'; .*; the delimiter may be .* than ','"),
        ("y\n1\n2\n", {"task": "regression"}, "no column is left for features; got 'y'"),
        ("1_0,2_0\n2,1\n", {}, r"the header has numbers for names; got 1_0, 2_0"),
        ("x,y\n1,a\n2,b\n", {"classes": ["a", "c"]}, r"line 3, column 'y': no such class; got 'b'; expected a or c"),
        ("x,y\n1,a\n2,b\n", {"classes": ["a", "b", "a"]}, r"a class is named twice; got \['a', 'b', 'a'\]"),
        ("x,y\n1,2\n", {"classes": ["a"], "task": "regression"}, r"a regression has no classes; got \['a'\]"),
    ],
)
def test_malformed_csv(write, content, options, message):
    path = write("bad.csv", content)
    with pytest.raises(DataError, match="bad.csv: " + message):
        load("csv", {"path": path, **options})


# --- Text ---


def test_bigram_pairs(write):
    found = load("text", {"path": write("a.txt", "banána\n")})
    assert found.class_names == ("\n", "a", "b", "n", "á")
    np.testing.assert_array_equal(found.inputs, [2, 1, 3, 4, 3, 1])
    np.testing.assert_array_equal(found.targets, [1, 3, 4, 3, 1, 0])
    assert (found.task, found.tokens, found.outputs) == ("sequence", True, 5)


def test_bytes(write):
    found = load("text", {"path": write("a.bin", b"\xff\x00\xff"), "unit": "byte"})
    assert found.class_names == ("00", "ff")
    np.testing.assert_array_equal(found.inputs, [1, 0])
    np.testing.assert_array_equal(found.targets, [0, 1])


def test_windows(write):
    path = write("a.txt", "abcdefgh")
    side_by_side = load("text", {"path": path, "context": 3})
    np.testing.assert_array_equal(side_by_side.inputs, [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(side_by_side.targets, [[1, 2, 3], [4, 5, 6]])
    overlapping = load("text", {"path": path, "context": 3, "stride": 2})
    np.testing.assert_array_equal(overlapping.inputs, [[0, 1, 2], [2, 3, 4], [4, 5, 6]])
    np.testing.assert_array_equal(overlapping.take(np.array([2, 0])).rows(np.array([0]))[1], [[5, 6, 7]])


def test_a_given_vocabulary(write):
    path = write("a.txt", "cab")
    found = load("text", {"path": path, "vocabulary": ["c", "b", "a", "x"]})
    np.testing.assert_array_equal(found.inputs, [0, 2])
    assert found.class_names == ("c", "b", "a", "x")
    with pytest.raises(DataError, match=r"a.txt: the text has tokens that are not in the vocabulary; got 'b' 'c'"):
        load("text", {"path": path, "vocabulary": ["a"]})


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"\xff\xfe", {}, r"cannot be read; got 'utf-8' codec can't decode .*; expected text in UTF-8"),
        ("a", {}, r"the text is too short; got 1 tokens; expected more than the context of 1"),
        ("", {"unit": "byte"}, r"the text is too short; got 0 tokens"),
        ("abc", {"context": 3}, r"the text is too short; got 3 tokens; expected more than the context of 3"),
        ("abc", {"context": 0}, r"context and stride are too small; got \(0, 0\)"),
    ],
)
def test_malformed_text(write, content, options, message):
    path = write("bad.txt", content)
    with pytest.raises(InputError, match="bad.txt: " + message):
        load("text", {"path": path, **options})


def test_the_texts_behind_help():
    found = load("pydoc", {"context": 128, "stride": 1})
    assert found.inputs.shape[1:] == (128,)
    assert found.overlap == 127
    assert 400_000 < len(found) < 800_000
    names = found.class_names
    assert "".join(names[token] for token in found.inputs[0]).startswith('The "assert" statement\n***')
    assert names == tuple(sorted(names))


def test_no_texts_behind_help(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="pydoc: this Python has no module pydoc_data; take a text of your own"):
        load("pydoc")


def test_batches_of_windows_do_not_copy_them_all(write):
    found = load("text", {"path": write("a.txt", "abcdefgh" * 50_000), "context": 256, "stride": 1})
    tracemalloc.start()
    inputs, _ = found.rows(np.array([399_743, 0, 5]))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    np.testing.assert_array_equal(inputs[:, :3], [[7, 0, 1], [0, 1, 2], [5, 6, 7]])


# --- Tokens ---


@pytest.mark.parametrize(("name", "dtype"), [("t.npy", "int64"), ("t.bin", "uint16"), ("t.u32", "uint32")])
def test_tokens_stay_on_disk(tmp_path, name, dtype):
    numbers = np.array([3, 0, 4, 4, 1, 0, 2], dtype)
    numbers.tofile(tmp_path / name) if name != "t.npy" else np.save(tmp_path / name, numbers)
    options = {"path": str(tmp_path / name), "vocabulary_size": 6, "context": 3, "dtype": dtype}
    found = load("tokens", options)
    np.testing.assert_array_equal(found.inputs, [[3, 0, 4], [4, 1, 0]])
    np.testing.assert_array_equal(found.targets, [[0, 4, 4], [1, 0, 2]])
    assert (found.task, found.outputs, found.inputs.dtype) == ("sequence", 6, dtype)
    base = found.inputs
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize(
    ("numbers", "options", "message"),
    [
        (np.array([0, 5, 6, 1]), {}, "token 2 .* is out of range; got 6; expected 0 to 5, as vocabulary_size = 6"),
        (np.array([0, 5, -1, 1]), {}, "token 2 .* is out of range; got -1"),
        (np.array([0.0, 1.0]), {}, r"does not hold tokens; got float64 of shape \(2,\); expected integers of shape"),
        (np.zeros((2, 2), int), {}, r"does not hold tokens; got int64 of shape \(2, 2\)"),
        (np.array([0]), {}, "the text is too short; got 1 tokens"),
    ],
)
def test_malformed_tokens(tmp_path, numbers, options, message):
    np.save(tmp_path / "t.npy", numbers)
    with pytest.raises(DataError, match="t.npy: " + message):
        load("tokens", {"path": str(tmp_path / "t.npy"), "vocabulary_size": 6, **options})


def test_tokens_of_a_broken_length(write):
    with pytest.raises(DataError, match=r"t.bin: cannot be read; got .*; expected numbers of type uint16"):
        load("tokens", {"path": write("t.bin", b"\x00\x01\x02"), "vocabulary_size": 6})


# --- Tokenizers ---


@pytest.mark.parametrize(("unit", "size"), [("character", 6), ("byte", 7)])
def test_text_comes_back_from_its_tokens(unit, size):
    content = "banáná\n\x00"
    tokenizer = Tokenizer.of(content.encode(), unit)
    tokens = tokenizer.encode(content.encode())
    assert tokenizer.vocabulary == tuple(sorted(tokenizer.vocabulary))
    assert len(tokenizer.vocabulary) == size
    assert tokenizer.decode(tokens.tolist()) == content
    assert Tokenizer.of(content.encode()[:4], "byte").decode([3]) == "\ufffd"  # half of an á


def test_tokens_of_ones_own_are_written_as_numbers():
    tokenizer = Tokenizer("token", ("0", "1", "2"))
    assert tokenizer.encode(b" 2 0\n2").tolist() == [2, 0, 2]
    assert tokenizer.decode([2, 0, 2]) == "2 0 2"
    with pytest.raises(InputError, match="unknown unit of text; got 'token'; expected byte or character"):
        Tokenizer.of(b"2 0 2", "token")
    with pytest.raises(InputError, match="unknown unit of text; got 'word'; expected byte or character or token"):
        Tokenizer("word", ("a",))
    with pytest.raises(DataError, match="prompt: the text has tokens that are not in the vocabulary; got '3'"):
        tokenizer.encode(b"1 3", "prompt")


@pytest.mark.parametrize("token", [-1, 3, 1.0, True])
def test_tokens_that_the_vocabulary_has_not(token):
    message = rf"Tokenizer.decode: token is not allowed; got {token!r}; expected a whole number in \[0, 3\)"
    with pytest.raises(InputError, match=message):
        Tokenizer("character", ("a", "b", "c")).decode([0, token])


def test_a_vocabulary_that_repeats_a_name():
    with pytest.raises(InputError, match="Tokenizer: two tokens of the vocabulary have one name; got 'b'"):
        Tokenizer("character", ("a", "b", "b"))


# --- Inputs to predict from ---


def test_inputs_to_predict_from(tmp_path, write):
    np.save(tmp_path / "x.npy", INPUTS)
    np.savez(tmp_path / "x.npz", inputs=INPUTS)
    np.testing.assert_array_equal(read_inputs(tmp_path / "x.npy"), INPUTS)
    np.testing.assert_array_equal(read_inputs(tmp_path / "x.npz"), INPUTS)
    table = write("x.csv", "id,b,a\n7,1,2\n8,3,4\n")
    np.testing.assert_array_equal(read_inputs(table, feature_names=("a", "b")), [[2, 1], [4, 3]])
    np.testing.assert_array_equal(read_inputs(table), [[7, 1, 2], [8, 3, 4]])
    with pytest.raises(DataError, match=r"x.csv: no such column; got 'c'"):
        read_inputs(table, feature_names=("c",))
    with pytest.raises(DataError, match=r"x.pkl: unknown kind of file; got '.pkl'; expected .npy, .npz or .csv"):
        read_inputs("x.pkl")


def test_a_source_called_directly_checks_its_unit():
    with pytest.raises(InputError, match=r"a.txt: unknown unit of text; got 'word'; expected byte or character"):
        DATASETS["text"](path="a.txt", unit="word")
