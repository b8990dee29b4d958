"""``mpitrain predict``: a run's model on new inputs, and what cannot be predicted from."""

import json

import numpy as np
import pytest
from commands import mpitrain, settings, write_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, and files of inputs."""
    folder = tmp_path_factory.mktemp("predict")
    done = mpitrain("run", write_job(folder), "--quiet", "--run-dir", folder / "run", *settings(data__standardise=True))
    assert done.code == 0, done.err
    with np.load(folder / "data.npz") as data:
        inputs = data["inputs"][:6]
    np.save(folder / "good.npy", inputs)
    np.save(folder / "single.npy", inputs.astype(np.float32))
    np.save(folder / "none.npy", inputs[:0])
    np.save(folder / "narrow.npy", inputs[:, :3])
    np.save(folder / "flat.npy", inputs[0])
    np.save(folder / "words.npy", np.array([["a"] * 5]))
    np.save(folder / "nan.npy", np.where(np.arange(6)[:, None] == 4, np.nan, inputs))
    np.savez(folder / "good.npz", inputs=inputs)
    rows = ["a,b,c,d,e", *(",".join(map(repr, map(float, row))) for row in inputs)]
    (folder / "good.csv").write_text("\n".join(rows))
    (folder / "broken.csv").write_text("\n".join([*rows[:3], "1,2,x,4,5"]))
    return folder


def predict(folder, *arguments):
    return mpitrain("predict", *arguments, cwd=folder)


@pytest.mark.parametrize("name", ["good.npz", "good.csv", "single.npy"])
def test_every_kind_of_file(folder, name):
    first = predict(folder, "run", "good.npy")
    assert first.code == 0, first.err
    assert set(first.out.split()) <= {"0", "1", "2"}
    assert len(first.out.splitlines()) == 6
    assert predict(folder, "run", name).out == first.out


def test_outputs_and_json(folder):
    done = predict(folder, "run", "good.npy", "--json", "--latest", "--output", "outputs.npy")
    assert done.code == 0, done.err
    assert done.result["checkpoint"] == "step-00000024"
    outputs = np.load(folder / "outputs.npy")
    assert outputs.shape == (6, 3)
    assert done.result["predictions"] == outputs.argmax(axis=1).tolist()


def test_no_samples(folder):
    done = predict(folder, "run", "none.npy", "--json")
    assert (done.code, json.loads(done.out)["predictions"]) == (0, [])


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("nowhere", "good.npy"), 2, ["nowhere: holds no run"]),
        (("run", "missing.npy"), 2, ["missing.npy: no such file"]),
        (("run", "data.txt"), 2, ["unknown kind of file", ".npy, .npz or .csv"]),
        (("run", "narrow.npy"), 2, ["predict: the samples have the wrong shape; got (3,); expected (5,)", "as (n, 5)"]),
        (("run", "flat.npy"), 2, ["the samples have the wrong shape"]),
        (("run", "words.npy"), 2, ["the samples are not numbers"]),
        (("run", "nan.npy"), 2, ["the inputs are not finite; got row 4"]),
        (("run", "broken.csv"), 2, ["broken.csv: line 4, column 'c' is not a number"]),
        (("run", "good.npy", "--output", "outputs.txt"), 2, ["got outputs.txt; expected a name that ends in .npy"]),
        (("run", "good.npy", "--output", "nowhere/outputs.npy"), 1, ["nowhere/outputs.npy: No such file or directory"]),
    ],
)
def test_one_clear_line(folder, arguments, code, parts):
    done = predict(folder, *arguments)
    assert done.code == code
    assert done.err.startswith("mpitrain: error: ")
    assert done.err.count("\n") == 1
    for part in parts:
        assert part in done.err
    assert done.out == ""


def test_a_damaged_checkpoint(folder, tmp_path):
    done = mpitrain("run", folder / "job.toml", "--quiet", "--run-dir", tmp_path / "run", *settings(train__steps=6))
    assert done.code == 0
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "rank-00000.bin"
    file.write_bytes(file.read_bytes()[:-8])
    done = predict(folder, tmp_path / "run", "good.npy")
    assert done.code == 2
    assert "truncated" in done.err
