"""The run directory: made once for all ranks, metrics without doubles after a resumption, disk errors in one line."""

import json
import tomllib

import numpy as np
import pytest

from mpitrain._errors import InputError, JobError, MpitrainError, StorageError
from mpitrain.arrays import Layout, Segment
from mpitrain.comm import LocalWorld
from mpitrain.method.state import Piece, State
from mpitrain.train import checkpoint
from mpitrain.train.environment import describe_environment
from mpitrain.train.facts import Facts
from mpitrain.train.rundir import RunDirectory
from mpitrain.train.storage import write_atomic


def create(ranks=1, **options):
    return LocalWorld(ranks).run(lambda comm: RunDirectory.create(comm, "job", **options))


def test_all_ranks_get_one_new_directory(tmp_path):
    made = create(3, root=tmp_path)
    assert len({run.path for run in made}) == 1
    assert made[0].path.parent == tmp_path / "job"
    assert made[0].path.is_dir()


def test_jobs_that_start_at_once_do_not_share_a_directory(tmp_path):
    # Each rank of this world is a job of its own.
    made = LocalWorld(8).run(
        lambda comm: RunDirectory.create(comm.split(comm.rank), "job", root=tmp_path)  # a world of one rank each
    )
    assert len({run.path for run in made}) == 8


def test_a_given_directory_is_used_if_it_is_empty(tmp_path):
    (tmp_path / "empty").mkdir()
    assert create(2, path=tmp_path / "empty")[1].path == tmp_path / "empty"
    assert create(path=tmp_path / "a" / "new")[0].path.is_dir()
    (tmp_path / "empty" / "x").write_text("")
    with pytest.raises(JobError, match=r"empty: run directory is not empty; resume the run that is in it"):
        create(path=tmp_path / "empty")


def test_resume_opens_a_run_and_cleans_up(tmp_path):
    run = create(path=tmp_path / "run")[0]
    with pytest.raises(JobError, match=r"resume: .*run: holds no run; name the directory that has its job\.toml"):
        create(resume=tmp_path / "run")
    run.write_job({"name": "job"})
    for given in (tmp_path, tmp_path / "typo"):
        with pytest.raises(JobError, match=rf": holds no run; .*; the newest in {tmp_path} is {run.path}"):
            create(resume=given)
    (run.checkpoints / ".step-00000001.writing").mkdir(parents=True)
    assert create(2, resume=tmp_path / "run")[1].path == run.path
    assert list(run.checkpoints.iterdir()) == []


def test_files(tmp_path):
    run = create(path=tmp_path / "run")[0]
    run.write_job({"name": "é", "optimizer": {"lr": 0.1}})
    run.write_environment({"ranks": 2})
    assert tomllib.loads(run.job.read_text()) == {"name": "é", "optimizer": {"lr": 0.1}}
    assert json.loads(run.environment.read_text()) == {"ranks": 2}
    run.finish({"loss": np.float32(0.5), "confusion": np.eye(2, dtype=int), "run_dir": tmp_path, "r2": np.nan})
    assert json.loads(run.result.read_text()) == {
        "loss": 0.5, "confusion": [[1, 0], [0, 1]], "run_dir": str(tmp_path), "r2": None,
    }  # fmt: skip
    assert run.completed.exists()


def fill_metrics(run, steps):
    for step in steps:
        run.append_metrics({"step": step, "kind": "train", "loss": np.float32(step)})


@pytest.mark.parametrize(
    "tail",
    [b"", b'{"step": 6, "kind": "tr', b"\0\0\0", b'{"step": 6}', b'{"kind": "train"}\n', b'{"step": 6}\n'],
)
def test_a_resumed_run_has_every_step_once(tmp_path, tail):
    run = create(path=tmp_path / "run")[0]
    fill_metrics(run, range(1, 6))
    run.finish({"loss": 1.0})
    with run.metrics.open("ab") as file:
        file.write(tail)
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5]
    run.rewind(3)
    assert not run.completed.exists()
    assert not run.result.exists()
    fill_metrics(run, range(4, 8))
    found = run.read_metrics()
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6, 7]
    assert found[6] == {"step": 7, "kind": "train", "loss": 7.0}


def test_rewinding_forgets_later_checkpoints(tmp_path):
    run = create(path=tmp_path / "run")[0]
    layout = Layout.build([Segment("w", (1,))])
    state = State((Piece("w", (1,), ((0, 1),), np.zeros(1)),))
    for step in (1, 2, 3):
        LocalWorld(1).run(lambda comm, step=step: checkpoint.save(run.checkpoints, step, state, comm, layout))
    run.rewind(2)
    assert checkpoint.latest(run.checkpoints).name == "step-00000002"


@pytest.mark.parametrize("damaged", ['{"st', '{"step": 2}', '{"step": 2, "kind": 2}', '{"kind": "test"}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    run = create(path=tmp_path / "run")[0]
    fill_metrics(run, [1])
    with run.metrics.open("a") as file:
        file.write(f"{damaged}\n")
    fill_metrics(run, [3])
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: damaged; remove that line"):
        run.read_metrics()


def test_a_full_disk_is_a_storage_error(tmp_path):
    run = create(path=tmp_path / "run")[0]
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(
        StorageError, match=r"append metrics: .*metrics\.jsonl: No space left on device; free some space"
    ):
        fill_metrics(run, [1])


def test_an_atomic_write_that_fails_leaves_the_old_contents(tmp_path):
    write_atomic(tmp_path / "file", b"old")
    (tmp_path / ".file.writing").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_in_the_way_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")

    def run(comm):
        try:
            RunDirectory.create(comm, "job", root=tmp_path / "file")
        except MpitrainError as error:
            return error
        return None

    errors = LocalWorld(3).run(run)
    assert [error.exit_code for error in errors] == [1, 1, 1]
    assert isinstance(errors[0], StorageError)
    assert "Not a directory" in str(errors[2])


def test_the_environment_groups_ranks_by_node_and_is_plain_json():
    found = LocalWorld(3).run(lambda comm: describe_environment(comm, "Open MPI 5"))
    assert found[0] == found[1] == found[2]
    environment = json.loads(json.dumps(found[0]))
    assert environment["ranks"] == 3
    assert environment["nodes"][0]["ranks"] == [0, 1, 2]
    assert environment["mpi_library"] == "Open MPI 5"
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["nodes"][0]["cpu"]


def test_the_environments_of_earlier_starts_are_kept(tmp_path):
    """Beside that of the newest one, which stands where it did in files that kept no other."""
    run = RunDirectory(tmp_path)
    for number in (1, 2, 3):
        run.write_environment({"ranks": number, "from_step": 10 * number})
    first, second, third = ({"ranks": number, "from_step": 10 * number} for number in (1, 2, 3))
    assert json.loads(run.environment.read_text()) == {**third, "earlier_starts": [first, second]}
    run.environment.write_text('{"ranks": 4, "earlier_starts": null}')
    run.write_environment(first)
    assert run.read_environment() == {**first, "earlier_starts": [{"ranks": 4}]}


def test_the_environment_is_told_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = LocalWorld(1).run(describe_environment)[0]
    assert found["git_commit"] is None


KEPT = {
    "task": "classification", "sample_shape": [2], "outputs": 3, "class_names": ["a", "b", "c"],
    "feature_names": [], "mean": [0.5, 1.0], "scale": [1.0, 2.0], "fingerprint": "00", "also_read": {"test": "11"},
}  # fmt: skip
DAMAGED = {
    "nothing": b"",
    "cut short": json.dumps(KEPT).encode()[:-20],
    "no text": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    **{
        f"{name} = {value}": json.dumps(KEPT | {name: value}).encode()
        for name, value in (
            ("also_read", None), ("also_read", ["test"]), ("also_read", {"test": 1}), ("fingerprint", None),
            ("task", "clustering"), ("sample_shape", [2.5]), ("sample_shape", 2), ("sample_shape", [-2]),
            ("sample_shape", [3]), ("outputs", "3"), ("outputs", True), ("class_names", None), ("class_names", "abc"),
            ("feature_names", [1]), ("mean", None), ("mean", 0.5), ("mean", [0.5]), ("mean", [[0.5, 1.0]]),
            ("mean", [0.5, None]), ("mean", [0.5, [1.0]]), ("scale", [1.0, 0.0]), ("scale", ["x", "y"]),
            ("colour", "red"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_what_is_kept_of_the_data_is_refused_in_one_line_when_it_is_damaged(tmp_path, text):
    (tmp_path / "data.json").write_bytes(text)
    with pytest.raises(InputError, match=r"^\S*data\.json: cannot be read; got .*; name a run directory .*$") as caught:
        Facts.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_kept_of_the_data_is_read_back(tmp_path):
    facts = Facts("regression", (2, 1), 1, (), ("a", "b"), [[0.1], [1e-300]], [[1.0], [2.0]], "00", {"test": "11"})
    facts.write(tmp_path)
    assert Facts.read(tmp_path) == facts


@pytest.mark.parametrize("kept", [None, "x86", ["BLAS"], {"BLAS": 1}], ids=str)
def test_a_damaged_fingerprint_is_none(tmp_path, kept):
    run = RunDirectory(tmp_path)
    run.write_environment({"fingerprint": kept})
    assert run.read_fingerprint() == {}
    run.write_environment({"fingerprint": {"BLAS": "x"}})
    assert run.read_fingerprint() == {"BLAS": "x"}
