"""Ranks must read the same data, and a run goes on with those that it was started with."""

import json

import numpy as np
import pytest
from commands import write_data
from trainer_cases import train

from mpitrain._errors import DataError, JobError, MismatchError
from mpitrain.comm import LocalWorld
from mpitrain.train import Job, train_job

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_other_data_under_the_same_name_are_refused(tmp_path, load):
    LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, run_dir=tmp_path / "run"))
    write_data(tmp_path, rows=121)
    with pytest.raises(JobError, match="the data are not those that the run was started with"):
        LocalWorld(1).run(lambda comm: train_job(load(train__steps=6), comm, resume=tmp_path / "run"))


def test_npy_files_may_lie_elsewhere_as_long_as_they_are_the_same(tmp_path, job_file):
    def job(folder, steps=6):
        files = f'inputs = "{folder}/x.npy"\ntargets = "{folder}/y.npy"'
        text = job_file.read_text().replace('source = "npz"\npath = "data.npz"', 'source = "npy"')
        return Job.from_toml(f"{text}\n[data.options]\n{files}", job_file, [f"train.steps={steps}"])

    with np.load(tmp_path / "data.npz") as data:
        for folder, inputs in (("a", data["inputs"]), ("moved", data["inputs"]), ("other", data["inputs"] + 1)):
            (tmp_path / folder).mkdir()
            np.save(tmp_path / folder / "x.npy", inputs)
            np.save(tmp_path / folder / "y.npy", data["targets"])
    train(job("a"), ranks=1, run_dir=tmp_path / "run")
    assert train(job("moved", 8), ranks=1, resume=tmp_path / "run")["steps"] == 8
    with pytest.raises(JobError, match="the data are not those that the run was started with"):
        train(job("other", 8), ranks=1, resume=tmp_path / "run")


@pytest.mark.parametrize("drawn", ["::2", "-3:"], ids=["train", "held out"])
def test_ranks_that_read_different_data_are_told(tmp_path, job_file, drawn):
    """As two nodes with a file each of their own do; here each rank draws its rows anew."""
    (tmp_path / "drawn.py").write_text(
        "import numpy as np\nfrom mpitrain import Dataset\n\n"
        "def build():\n"
        "    inputs = np.random.default_rng(3).normal(size=(96, 5)).astype(np.float32)\n"
        f"    inputs[{drawn}] = np.random.default_rng().normal(size=inputs[{drawn}].shape)\n"
        '    return Dataset(inputs, np.arange(96) % 2, "classification", "drawn")\n'
    )
    text = job_file.read_text().replace('source = "npz"\npath = "data.npz"', 'build = "drawn.py:build"')
    job = Job.from_toml(text, job_file, ['data.hold_out="end"'])
    said = r"train \w{12}, test \w{12}"
    with pytest.raises(MismatchError, match=rf"^data: ranks have read different data; got {said} on rank 1; expected"):
        train(job, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def drawing(load, weights, first=1.0, steps=6):
    """Return the job that draws its rows by weights, which it writes: ones, but for the first row's."""
    np.save(weights, np.r_[first, np.ones(95)])
    return load(train__steps=steps, data__sampling="importance", data__weights=str(weights))


def test_ranks_that_read_different_weights_are_told(tmp_path, load):
    jobs = [drawing(load, tmp_path / f"{rank}.npy", first=rank + 1.0) for rank in range(2)]
    said = r"train \w{12}, test \w{12}, weights \w{12}"
    with pytest.raises(MismatchError, match=rf"^data: ranks have read different data; got {said} on rank 1; expected"):
        LocalWorld(2).run(lambda comm: train_job(jobs[comm.rank], comm, run_dir=tmp_path / "run"))


def test_a_run_goes_on_with_its_own_weights_only(tmp_path, load):
    weights, run = tmp_path / "w.npy", tmp_path / "run"
    train(drawing(load, weights), ranks=1, run_dir=run)
    other = drawing(load, weights, first=5.0, steps=7)
    with pytest.raises(JobError, match=r"data are not those that .*; got others for weights; restore them"):
        train(other, ranks=1, resume=run)
    assert train(drawing(load, tmp_path / "moved.npy", steps=7), resume=run)["steps"] == 7
    facts = json.loads((run / "data.json").read_text())
    del facts["also_read"]["weights"]
    (run / "data.json").write_text(json.dumps(facts))  # as if it had drawn without any
    with pytest.raises(JobError, match="got others for weights"):
        train(drawing(load, weights, steps=8), ranks=1, resume=run)


def test_a_run_goes_on_with_its_own_held_out_rows_only(tmp_path, load):
    def job(steps):
        return load(train__steps=steps, data__hold_out="end", data__valid=0.1)

    run = tmp_path / "run"
    train(job(6), ranks=1, run_dir=run)
    with np.load(tmp_path / "data.npz") as data:
        targets = data["targets"]
        targets[-1] = (targets[-1] + 1) % 3
        np.savez(tmp_path / "data.npz", inputs=data["inputs"], targets=targets)
    with pytest.raises(JobError, match=r"data are not those that .*; got others for test; restore them"):
        train(job(7), ranks=1, resume=run)
    facts = json.loads((run / "data.json").read_text())
    assert facts.pop("also_read").keys() == {"valid", "test"}
    (run / "data.json").write_text(json.dumps(facts))  # as runs were before these were kept
    assert train(job(7), ranks=1, resume=run)["steps"] == 7


def test_weights_are_one_array(tmp_path, load):
    np.savez(tmp_path / "w.npz", np.ones(96))
    job = load(data__sampling="importance", data__weights=str(tmp_path / "w.npz"))
    with pytest.raises(DataError, match=r"w.npz: cannot be read; got .*; expected a .npy file"):
        train(job, ranks=1, run_dir=tmp_path / "run")
