"""``mpitrain init``: lists and copies what the package ships, and overwrites nothing unasked."""

import resource
from pathlib import Path

import pytest
from click.testing import CliRunner
from commands import mpitrain

from mpitrain._errors import StorageError
from mpitrain.cli.init import command, job_names
from mpitrain.train import Job


def init(*arguments):
    """Run the command in this process, in the current folder."""
    return CliRunner().invoke(command, list(arguments))


def test_lists_each_job_with_what_it_is():
    listed = dict(line.split(maxsplit=1) for line in init().output.splitlines())
    assert listed.keys() == job_names().keys() >= {"digits_cnn", "digits_mlp", "diabetes", "breast_cancer"}
    assert listed["digits_cnn"] == "A convolutional network reads handwritten digits: the main job."
    assert all(text.endswith(".") for text in listed.values())


def test_copies_a_job_and_its_sbatch_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = init("digits_mlp")
    assert done.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"digits_mlp.toml", "cpu.sbatch"}
    assert Job.load("digits_mlp.toml").name == "digits_mlp"
    assert "mpitrain run -n 2 digits_mlp.toml" in done.output
    assert "sbatch cpu.sbatch digits_mlp.toml" in done.output
    assert init("digits_cnn", "--gpu").exit_code == 0
    assert (tmp_path / "gpu.sbatch").is_file()


def test_copies_the_model_of_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert init("digits_torch").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"digits_torch.toml", "digits_torch.py", "cpu.sbatch"}


def test_copies_a_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert init("research_allreduce").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["research_allreduce.py"]


@pytest.mark.parametrize("name", sorted(name for name, path in job_names().items() if path.suffix == ".py"))
def test_says_how_a_script_is_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert init(name).output == f"wrote {name}.py\nrun it:  mpirun -n 2 python {name}.py\n"


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        done = init("digits_mlp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(done.exception, StorageError)
    assert "digits_mlp.toml" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


def test_overwrites_only_if_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("digits_mlp.toml").write_text("mine")
    done = mpitrain("init", "digits_mlp")
    assert done.code == 2
    assert done.err == "mpitrain: error: digits_mlp.toml already in this folder; pass --force to overwrite\n"
    assert Path("digits_mlp.toml").read_text() == "mine"
    assert not Path("cpu.sbatch").exists()
    assert init("digits_mlp", "--force").exit_code == 0
    assert Path("digits_mlp.toml").read_text() != "mine"


def test_an_unknown_name():
    done = mpitrain("init", "digits_cn")
    assert done.code == 2
    assert "no such job is shipped; got digits_cn" in done.err
    assert 'did you mean "digits_cnn"?' in done.err
